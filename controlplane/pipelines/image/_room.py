"""Room for the model of a picture: what ComfyUI holds is flushed where that is best, the rest is leased."""

from __future__ import annotations

import asyncio
from contextlib import AbstractAsyncContextManager, AsyncExitStack

import structlog
from msgspec import Struct

from controlplane.fleet import DeploymentView, Fleet, NodeSchedulers, find_gpu, held_bytes, pool_of
from controlplane.pipelines._leasing import flush, leased, measured_since, usual_step_s
from controlplane.pipelines.image._memory import Flush, Loaded, Need, need_of, wanted_bytes
from controlplane.pipelines.image._pace import EstimatesPort
from controlplane.pipelines.image._picture import Picture
from controlplane.pipelines.image._telling import Telling
from controlplane.vram import Demand, Infeasible, Lease, ReclaimGrade
from rung.errors import EngineStartFailedError, RungError
from rung.types import Phase

_log = structlog.get_logger("rung.pipelines")

_MIB = 1 << 20
_GIB = 1 << 30
#: How often a lease is asked for again that came when what it reckoned with was gone.
_ROUNDS = 4
#: So much less may be held of a model than when its lease was asked for.
_SLACK_BYTES = _GIB // 2


class Room(Struct, frozen=True, kw_only=True):
    """What a picture has to work in.

    Attributes:
        is_loaded: its model is there already.
        held_bytes: what ComfyUI held when the room was there; None where nobody can tell.
        swapped: what was flushed, for a person; empty for nothing.
    """

    is_loaded: bool = False
    held_bytes: int | None = None
    swapped: str = ""


class Rooms:
    """Makes room for models, and remembers by deployment which one was used last.

    Args:
        fleet: what is held, and the way to flush.
        schedulers: grant leases.
        estimates: how long it took to make room before.
    """

    def __init__(self, fleet: Fleet, schedulers: NodeSchedulers, estimates: EstimatesPort) -> None:
        self._fleet = fleet
        self._schedulers = schedulers
        self._estimates = estimates
        self._loaded: dict[str, Loaded] = {}
        #: When something changed of what is loaded: what was measured before says nothing of it.
        self._changed_s: dict[str, float] = {}

    async def make(
        self, held: AsyncExitStack, view: DeploymentView, picture: Picture, telling: Telling
    ) -> Room:
        """Make room and keep it for as long as `held` is open. The slot is parked meanwhile.

        Raises:
            VramInfeasibleError: it does not fit, and waiting does not help.
            UnavailableError: the GPU is not measured, or what is granted is taken again and again.
        """
        deployment_id, grade = view.deployment.spec.id, picture.tier.grade
        if pool_of(view) is None:
            telling.tell(Phase.VRAM_ACQUIRE, f"No VRAM to acquire: {view.node.id} has no GPU")
            return Room()
        telling.expect(Phase.VRAM_ACQUIRE, None)
        telling.tell(Phase.VRAM_ACQUIRE, f"Requesting VRAM slot (mode={grade})")
        began_s = _now_s()
        await measured_since(self._fleet, deployment_id, self._changed_s.get(deployment_id, 0.0))
        view = self._now(deployment_id)
        swapped = ""
        for _ in range(_ROUNDS):
            need = self._need(view, picture)
            if need.flush is Flush.YES or (
                need.flush is Flush.BEFORE_OTHERS and await self._disturbs(view, picture, need)
            ):
                swapped = await self._flush(view, telling)
                view = self._now(deployment_id)
                need = self._need(view, picture)
            asked = AsyncExitStack()
            lease = await asked.enter_async_context(self._leased(view, picture, need, telling))
            held.push_async_exit(asked)
            view = self._now(deployment_id)
            if self._is_enough(view, need):
                took_s = _now_s() - began_s
                self._granted(view, lease, telling, took_s)
                return Room(is_loaded=need.is_loaded, held_bytes=held_bytes(view), swapped=swapped)
            await asked.aclose()
            telling.tell(Phase.VRAM_ACQUIRE, f"{picture.model_name} was unloaded meanwhile; asking for more")
        raise EngineStartFailedError(
            f"{deployment_id} was flushed {_ROUNDS} times by others before its model could be used",
            deployment=deployment_id,
        )

    def is_loaded(self, view: DeploymentView, picture: Picture) -> bool:
        """Whether the model of a picture is there already."""
        return pool_of(view) is not None and self._need(view, picture).is_loaded

    def used(self, view: DeploymentView, picture: Picture, room: Room) -> None:
        """A picture was drawn: its model is what was used last."""
        tier, deployment = picture.tier, view.deployment
        if not tier.checkpoint or room.is_loaded:
            return
        self._loaded[deployment.spec.id] = Loaded(
            generation=deployment.generation,
            checkpoint=tier.checkpoint,
            family=tier.family,
            others_bytes=room.held_bytes,
        )
        self._changed_s[deployment.spec.id] = _now_s()

    def forget(self, deployment_id: str) -> None:
        """It is not known any more what is loaded."""
        self._changed_s[deployment_id] = _now_s()
        self._loaded.pop(deployment_id, None)

    async def empty(self, deployment_id: str) -> None:
        """Have ComfyUI give back what a failed picture may have left; that it does not is only logged."""
        self.forget(deployment_id)
        try:
            await flush(self._fleet, deployment_id)
        except RungError as error:
            _log.warning("not_flushed", deployment=deployment_id, error=error.message)

    def _need(self, view: DeploymentView, picture: Picture) -> Need:
        deployment, wanted = view.deployment, picture.wanted
        whole_bytes = wanted_bytes(picture.tier, picture.width_pixels, picture.height_pixels, wanted.count)
        return need_of(
            picture.tier,
            whole_bytes,
            generation=deployment.generation,
            measured_bytes=held_bytes(view),
            loaded=self._loaded.get(deployment.spec.id),
        )

    async def _disturbs(self, view: DeploymentView, picture: Picture, need: Need) -> bool:
        """Whether others would have to give way, or it would not fit."""
        pool_id = pool_of(view)
        assert pool_id is not None  # else there is nothing to lease
        scheduler = self._schedulers.of_node(view.node.id)
        plan = await scheduler.preview(pool_id, _demand(view, picture, need))
        return isinstance(plan, Infeasible) or bool(plan.steps)

    async def _flush(self, view: DeploymentView, telling: Telling) -> str:
        """Flush; returns what that did, in words."""
        deployment_id = view.deployment.spec.id
        before = self._loaded.get(deployment_id)
        what = before.family or before.checkpoint if before is not None else "what is loaded"
        telling.tell(Phase.VRAM_ACQUIRE, f"flushing {what} from {deployment_id}")
        self.forget(deployment_id)
        try:
            freed_bytes = await flush(self._fleet, deployment_id)
        except RungError as error:
            # It may fit all the same; whether it does is measured.
            _log.warning("not_flushed", deployment=deployment_id, error=error.message)
            return f"{what} was not given back: {error.message}"
        if freed_bytes is None:
            return f"{what} was flushed"
        return f"{what} was flushed, {freed_bytes / _GIB:.1f} GiB freed"

    def _leased(
        self, view: DeploymentView, picture: Picture, need: Need, telling: Telling
    ) -> AbstractAsyncContextManager[Lease | None]:
        deployment_id = view.deployment.spec.id

        def expected_s(grade: ReclaimGrade) -> float | None:
            return self._estimates.expected_s(deployment_id, f"vram:{grade}")

        return leased(
            self._schedulers,
            view,
            _demand(view, picture, need),
            telling,
            usual_s=lambda step: usual_step_s(self._fleet, step),
            expected_s=expected_s,
        )

    def _is_enough(self, view: DeploymentView, need: Need) -> bool:
        """Whether what the lease reckoned with is still held, now that nobody may flush it any more."""
        loaded = self._loaded.get(view.deployment.spec.id)
        if not need.is_loaded or loaded is None:
            return not need.is_loaded
        return loaded.held_bytes(held_bytes(view)) >= need.held_bytes - _SLACK_BYTES

    def _granted(self, view: DeploymentView, lease: Lease | None, telling: Telling, took_s: float) -> None:
        if lease is None:
            return
        self._estimates.observe(view.deployment.spec.id, f"vram:{lease.grade}", took_s)
        _, gpu = find_gpu(self._fleet.view, lease.pool_id)
        free = f"{gpu.memory_free_bytes // _MIB:,} MB free"
        telling.expect(Phase.VRAM_ACQUIRE, 0.0)
        telling.tell(Phase.VRAM_ACQUIRE, f"VRAM acquired: {free} (mode={lease.grade})")

    def _now(self, deployment_id: str) -> DeploymentView:
        found = self._fleet.view.deployments.get(deployment_id)
        if found is None:
            raise EngineStartFailedError(f"{deployment_id} is no longer deployed", deployment=deployment_id)
        return found


def _now_s() -> float:
    return asyncio.get_running_loop().time()


def _demand(view: DeploymentView, picture: Picture, need: Need) -> Demand:
    wish = picture.wish
    return Demand(
        vram_bytes=need.vram_bytes,
        max_grade=picture.tier.grade,
        priority=wish.policy.priority,
        # What it holds itself is for us to flush: it is part of what was reckoned with.
        exclude=(view.deployment.spec.id,),
        holder=f"{picture.tier.name} {wish.kind}",
    )
