"""From a wish to an engine that answers: route, make it awake, take a slot, send the request."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import aclosing
from itertools import pairwise
from types import TracebackType
from typing import Protocol

import structlog

from controlplane.fleet import DeploymentView, Fleet, NodeSchedulers
from controlplane.jobs import LiveJob
from controlplane.ladder import order_targets, refusal
from controlplane.pipelines._openai import check_status
from controlplane.pipelines._slots import Slots
from controlplane.pipelines._wish import Wish
from rung.errors import EngineStartFailedError, NoTargetError, UnavailableError, UnknownModelError
from rung.service import EngineClient
from rung.types import DeploymentSpec, JobKind, Phase, Residency, Served

_log = structlog.get_logger("rung.pipelines")

#: Names that leave the choice of the model to us.
AUTO_MODELS = frozenset({"", "rung/auto"})

_PATHS = {JobKind.CHAT: "/v1/chat/completions", JobKind.EMBEDDING: "/v1/embeddings"}
_CAPABILITIES = {JobKind.CHAT: "chat", JobKind.EMBEDDING: "embedding"}
_STARTING = frozenset({Residency.STOPPED, Residency.STARTING, Residency.FAILED, Residency.STOPPING})

#: How often a request makes its deployment awake that others make give way again.
_AWAKE_ROUNDS = 4

#: Called with each line of progress while an engine is made awake or a slot is waited for.
OnWait = Callable[[str], Awaitable[None]]


class Reply(Protocol):
    """An engine's answer, straight from the engine or through its agent."""

    status: int
    content_type: str
    retry_after: str

    def chunks(self, interval_s: Callable[[], float] | None = None) -> AsyncIterator[bytes]:
        """The body as it comes, with no less than `interval_s()` between two pieces."""
        ...

    async def read(self) -> bytes:
        """The whole body."""
        ...

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Let go; before the end of the body this cancels the generation in the engine."""
        ...


class Engaged:
    """An engine that answers, on a slot of ours; leaving the context lets go of both.

    A class and not a generator: this is on the path of every request.
    """

    __slots__ = ("_slots", "deployment_id", "reply")

    def __init__(self, deployment_id: str, reply: Reply, slots: Slots) -> None:
        self.deployment_id = deployment_id
        self.reply = reply
        self._slots = slots

    async def __aenter__(self) -> Engaged:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            await self.reply.__aexit__(None, None, None)
        finally:
            self._slots.release(self.deployment_id)


class Engager:
    """Finds the engine for a wish and opens its answer."""

    def __init__(
        self,
        *,
        fleet: Fleet,
        schedulers: NodeSchedulers,
        slots: Slots,
        client: EngineClient,
        engine_idle_timeout_s: float,
    ) -> None:
        self._fleet = fleet
        self._schedulers = schedulers
        self._slots = slots
        self._client = client
        self._idle_timeout_s = engine_idle_timeout_s

    def named(self, wish: Wish) -> Sequence[DeploymentView]:
        """The deployments that a wish may mean, whether they can answer or not.

        Raises:
            UnknownModelError: there is none of that name, or none for this kind of job.
        """
        view = self._fleet.view
        if wish.model in AUTO_MODELS:
            wanted = _CAPABILITIES[wish.kind]
            found = [
                each for each in view.deployments.values() if wanted in each.deployment.spec.capabilities
            ]
            if not found:
                raise UnknownModelError(
                    f"no deployment can do {wanted}; `rung models` lists what there is", model=wish.model
                )
            return found
        named = view.by_model.get(wish.model)
        if named is None:
            names = sorted({each.deployment.spec.model for each in view.deployments.values()})
            there = f"there are {', '.join(names[:8])}" if names else "no model is deployed"
            raise UnknownModelError(f"there is no model {wish.model!r}; {there}", model=wish.model)
        return named

    def targets(self, wish: Wish) -> list[DeploymentView]:
        """The deployments that can answer, best first.

        Raises:
            UnknownModelError: as `named`.
            NoTargetError: none of them can answer now; the message says why, for each.
        """
        named = self.named(wish)
        targets = order_targets(named, self._slots.load)
        if not targets:
            why = "; ".join(f"{each.deployment.spec.id}: {refusal(each)}" for each in named)
            raise NoTargetError(
                f"nothing can answer for {wish.model or 'any model'} now: {why}", model=wish.model
            )
        return targets

    async def engage(
        self,
        job: LiveJob,
        wish: Wish,
        targets: Sequence[DeploymentView],
        make_body: Callable[[str], bytes],
        on_wait: OnWait | None = None,
    ) -> Engaged:
        """Open the answer of the first target that gives one.

        A target that is away, does not start or answers with a server error is followed by the next.
        Nothing was delivered by then, so nothing is sent twice to the caller.

        Raises:
            EngineRejectedError: the engine refused the request.
            UnavailableError, DeadlineExceededError: as the last target failed.
            QueueFullError: too many wait for it.
        """
        for target, following in pairwise(targets):
            try:
                return await self._try(job, wish, target, make_body, on_wait)
            except UnavailableError as error:
                _log.warning(
                    "target_failed", job=job.id, target=target.deployment.spec.id, error=error.message
                )
                job.progress(Phase.ROUTE, f"{error.message}; trying {following.deployment.spec.id}")
        return await self._try(job, wish, targets[-1], make_body, on_wait)

    async def _try(
        self,
        job: LiveJob,
        wish: Wish,
        target: DeploymentView,
        make_body: Callable[[str], bytes],
        on_wait: OnWait | None,
    ) -> Engaged:
        spec = target.deployment.spec
        for _ in range(_AWAKE_ROUNDS):
            if target.deployment.residency is not Residency.AWAKE:
                target = await self._awake(job, wish, target, on_wait)
            if self._slots.try_acquire(spec.id, spec.slots):
                break
            await self._slot(job, spec, on_wait)
            target = self._now(target)
            if target.deployment.residency is Residency.AWAKE:
                break
            # It was told to give way while this request waited.
            self._slots.release(spec.id)
        else:
            raise EngineStartFailedError(
                f"{spec.id} was made awake {_AWAKE_ROUNDS} times, and had to give way each time",
                deployment=spec.id,
            )
        try:
            reply = await self._open(job, wish, target, make_body)
            if reply.status >= 400:
                try:
                    check_status(reply.status, await reply.read(), reply.retry_after, spec.id)
                finally:
                    await reply.__aexit__(None, None, None)
        except BaseException:
            self._slots.release(spec.id)
            raise
        return Engaged(spec.id, reply, self._slots)

    async def _awake(
        self, job: LiveJob, wish: Wish, target: DeploymentView, on_wait: OnWait | None
    ) -> DeploymentView:
        deployment_id = target.deployment.spec.id
        residency = target.deployment.residency
        phase = Phase.ENGINE_START if residency in _STARTING else Phase.ENGINE_WAKE
        job.progress(phase, f"{deployment_id} is {residency}; making it ready")
        raising = self._schedulers.make_awake(deployment_id, priority=wish.policy.priority)
        async with aclosing(raising) as steps:
            async for step in steps:
                job.progress(step.phase, step.detail, percent=step.percent, remaining_s=step.remaining_s)
                if on_wait is not None:
                    await on_wait(step.detail)
        return self._now(target)

    def _now(self, target: DeploymentView) -> DeploymentView:
        deployment_id = target.deployment.spec.id
        found = self._fleet.view.deployments.get(deployment_id)
        if found is None:
            raise EngineStartFailedError(f"{deployment_id} is no longer deployed", deployment=deployment_id)
        return found

    async def _slot(self, job: LiveJob, spec: DeploymentSpec, on_wait: OnWait | None) -> None:
        async for place in self._slots.acquire(spec.id):
            detail = f"waiting for one of {spec.slots} slots of {spec.id}; place {place} in the queue"
            job.progress(Phase.QUEUED, detail)
            if on_wait is not None:
                await on_wait(detail)

    async def _open(
        self, job: LiveJob, wish: Wish, target: DeploymentView, make_body: Callable[[str], bytes]
    ) -> Reply:
        spec = target.deployment.spec
        model = spec.engine_model_name
        body = make_body(model)
        job.begin_generating(Served(requested=job.model, target=spec.id, node=target.node.id, model=model))
        if target.direct_url is not None:
            return await self._client.post(
                target.direct_url + _PATHS[wish.kind], body, what=spec.id, idle_timeout_s=self._idle_timeout_s
            )
        run = self._fleet.run_through_agent(spec.id, job.id, wish.kind, body, self._idle_timeout_s)
        return await run.__aenter__()
