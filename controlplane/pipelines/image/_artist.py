"""Who draws: one attempt at one target, from its health to the stored picture."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack, suppress

from msgspec.structs import replace

from controlplane.artifacts import Artifacts
from controlplane.fleet import DeploymentView, Fleet
from controlplane.jobs import LiveJob
from controlplane.ladder import Candidate, TargetKind
from controlplane.pipelines._engage import Engager
from controlplane.pipelines._generation import DeliveredError
from controlplane.pipelines._slots import Slots
from controlplane.pipelines.image._pace import Drawing, EstimatesPort, Pace
from controlplane.pipelines.image._picture import Picture
from controlplane.pipelines.image._ports import CloudImages
from controlplane.pipelines.image._relay import Relay
from controlplane.pipelines.image._room import Room, Rooms
from controlplane.pipelines.image._staging import Staging
from controlplane.pipelines.image._telling import Telling
from controlplane.workflows import build
from rung.errors import (
    EngineProtocolError,
    EngineStartFailedError,
    RungError,
    UnknownDeploymentError,
    UnsuitableTargetError,
    VramInfeasibleError,
)
from rung.types import ComfyUiEngine, Phase, Residency, Served, ServiceEngine

#: How often a deployment is made awake again that others stop while memory for it is waited for.
_AWAKE_ROUNDS = 4
#: A flush after a failure holds up the next attempt no longer.
_EMPTYING_S = 15.0
_ENHANCING = "prompt_enhance"


class Drawn:
    """What one target drew: how many, and what tells of it."""

    __slots__ = ("count", "telling")

    def __init__(self, count: int, telling: Telling) -> None:
        self.count = count
        self.telling = telling


class Artist:
    """Has a target draw.

    Args:
        fleet: deployments, and the way to their agents.
        slots: of deployments.
        engager: makes them awake.
        rooms: make room for models.
        artifacts: keep what is drawn.
        estimates: how long things take here.
        cloud: cloud models that draw; None for none.
        idle_timeout_s: longest silence of an engine.
    """

    def __init__(
        self,
        *,
        fleet: Fleet,
        slots: Slots,
        engager: Engager,
        rooms: Rooms,
        artifacts: Artifacts,
        estimates: EstimatesPort,
        cloud: CloudImages | None = None,
        idle_timeout_s: float = 600.0,
    ) -> None:
        self._fleet = fleet
        self._slots = slots
        self._engager = engager
        self._rooms = rooms
        self._artifacts = artifacts
        self._estimates = estimates
        self._cloud = cloud
        self._idle_timeout_s = idle_timeout_s

    async def draw(self, job: LiveJob, picture: Picture, staging: Staging, target: Candidate) -> Drawn:
        """Have a target draw a picture; tells the job each phase but the last.

        Raises:
            InvalidRequestError: the wish is refused.
            DeliveredError: it failed, and nobody else is to be tried.
            RungError: it failed.
        """
        attempt = _Attempt(job, picture, staging, target.id)
        enhancing_s = 0.0 if staging.is_enhanced else self._estimates.expected_s(target.id, _ENHANCING)
        attempt.telling.expect(Phase.PROMPT_ENHANCE, enhancing_s)
        attempt.telling.tell(Phase.HEALTH_CHECK, f"Checking {target.id}")
        verdict = await staging.verdict()
        if not verdict.allowed:
            # Before anybody gives way for it.
            attempt.telling.tell(Phase.SAFETY_FILTER, verdict.detail)
            verdict.require_allowed()
        if target.kind is TargetKind.CLOUD:
            return Drawn(await self._by_cloud(attempt), attempt.telling)
        match self._now(target.id).deployment.spec.engine.engine:
            case ComfyUiEngine():
                count = await self._by_comfyui(attempt)
            case ServiceEngine(dialect="sana"):
                count = await self._by_sana(attempt)
            case _:
                raise UnsuitableTargetError(f"{target.id} has an engine that does not draw")
        return Drawn(count, attempt.telling)

    # ComfyUI.

    async def _by_comfyui(self, attempt: _Attempt) -> int:
        """Take a slot, lease memory with the slot parked, draw.

        While it is parked, whoever needs this ComfyUI drained to give memory gets that, and so do we, when we
        flush it ourselves. The lease keeps its model from being taken away again.
        """
        target_id, telling = attempt.target_id, attempt.telling
        for _ in range(_AWAKE_ROUNDS):
            slot = self._engager.slot(telling, attempt.picture.wish, target_id)
            async with slot as view, AsyncExitStack() as held:
                self._expect(attempt, is_loaded=self._rooms.is_loaded(view, attempt.picture))
                async with self._slots.parked(target_id):
                    room = await self._rooms.make(held, view, attempt.picture, telling)
                view = self._now(target_id)
                if view.deployment.residency is Residency.AWAKE:
                    return await self._workflow(attempt, view, room)
        raise EngineStartFailedError(
            f"{target_id} was made awake {_AWAKE_ROUNDS} times, and had to give way each time",
            deployment=target_id,
        )

    async def _workflow(self, attempt: _Attempt, view: DeploymentView, room: Room) -> int:
        picture, telling, target_id = attempt.picture, attempt.telling, attempt.target_id
        pace = self._expect(attempt, is_loaded=room.is_loaded)
        prompt = await self._stages(attempt)
        telling.tell(Phase.MODEL_SWAP, _swap_in_words(picture, room))
        telling.tell(Phase.WORKFLOW_BUILD, f"Building {picture.in_words()}")
        workflow = build(picture.template, replace(picture.wanted, prompt=prompt), picture.tier, picture.seed)
        attempt.served(view, picture.tier.checkpoint)
        telling.tell(Phase.QUEUED, f"Submitted to {target_id}")
        pace.submitted(asyncio.get_running_loop().time())

        async def generate(relay: Relay) -> None:
            await relay.all_of(
                self._fleet.generate_through_agent(target_id, attempt.job.id, workflow, self._idle_timeout_s)
            )

        try:
            count = await self._collected(attempt, generate, pace, seed=picture.used_seed)
        except BaseException as error:
            self._rooms.forget(target_id)
            if isinstance(_cause_of(error), VramInfeasibleError):
                # It ran out of memory, and may hold on to what it has.
                with suppress(TimeoutError):
                    async with asyncio.timeout(_EMPTYING_S), self._slots.parked(target_id):
                        await self._rooms.empty(target_id)
            raise
        self._rooms.used(view, picture, room)
        return count

    def _expect(self, attempt: _Attempt, *, is_loaded: bool) -> Pace:
        """Reckon with the times that were learnt of such pictures."""
        picture, telling = attempt.picture, attempt.telling
        pace = Pace(
            Drawing(
                deployment_id=attempt.target_id,
                model=picture.learnt_as,
                megapixels=picture.megapixels,
                steps=picture.steps,
                is_loaded=is_loaded,
            ),
            self._estimates,
        )
        telling.expect(Phase.QUEUED, pace.start_s())
        telling.expect(Phase.SAMPLING, pace.sampling_s())
        telling.expect(Phase.ENCODING, pace.encoding_s())
        return pace

    # Others.

    async def _by_sana(self, attempt: _Attempt) -> int:
        picture, telling, target_id = attempt.picture, attempt.telling, attempt.target_id
        if picture.template.name != "generate" or picture.wanted.images:
            raise UnsuitableTargetError(
                f"{target_id} draws from words only; {picture.template.name} is for ComfyUI"
            )
        async with self._engager.slot(telling, picture.wish, target_id) as view:
            telling.tell(Phase.VRAM_ACQUIRE, f"No VRAM to acquire: {target_id} keeps its model loaded")
            wanted = replace(picture.wanted, prompt=await self._stages(attempt))
            telling.tell(Phase.MODEL_SWAP, f"{view.deployment.spec.model} is loaded")
            telling.tell(Phase.WORKFLOW_BUILD, f"Skipped (no workflow; seed {picture.seed})")
            attempt.served(view, view.deployment.spec.engine_model_name)
            telling.tell(Phase.QUEUED, f"Submitted to {target_id}")

            async def generate(relay: Relay) -> None:
                await relay.all_of(
                    self._fleet.generate_through_agent(
                        target_id, attempt.job.id, wanted, self._idle_timeout_s
                    )
                )

            return await self._collected(attempt, generate, seed=picture.seed)

    async def _by_cloud(self, attempt: _Attempt) -> int:
        cloud, telling, target_id = self._cloud, attempt.telling, attempt.target_id
        if cloud is None:
            raise UnsuitableTargetError(f"{target_id}: this control plane has nothing drawn in the cloud")
        telling.tell(Phase.VRAM_ACQUIRE, "Skipped (cloud model)")
        wanted = replace(attempt.picture.wanted, prompt=await self._stages(attempt))
        telling.tell(Phase.MODEL_SWAP, "Skipped (cloud model)")
        telling.tell(Phase.WORKFLOW_BUILD, "Skipped (cloud model)")
        model = cloud.model_name(target_id)
        telling.routed(Served(requested=attempt.job.model, target=target_id, model=model))
        telling.tell(Phase.QUEUED, f"Submitted to {target_id}")

        async def generate(relay: Relay) -> None:
            attempt.job.spent(await cloud.generate(target_id, wanted, relay.take))
            relay.ended()

        return await self._collected(attempt, generate)

    # For all.

    async def _stages(self, attempt: _Attempt) -> str:
        """Tell of the stages, which began long ago; returns the prompt to go on with."""
        staging, telling, target_id = attempt.staging, attempt.telling, attempt.target_id
        telling.tell(Phase.SAFETY_FILTER, (await staging.verdict()).detail)
        if not await staging.is_enhanced_soon():
            telling.tell(Phase.PROMPT_ENHANCE, "Enhancing the prompt")
        enhanced = await staging.enhanced()
        telling.expect(Phase.PROMPT_ENHANCE, 0.0)
        telling.tell(Phase.PROMPT_ENHANCE, enhanced.detail)
        if staging.enhancing_s is not None:
            self._estimates.observe(target_id, _ENHANCING, staging.enhancing_s)
        return enhanced.prompt

    async def _collected(
        self,
        attempt: _Attempt,
        generate: Callable[[Relay], Awaitable[None]],
        pace: Pace | None = None,
        *,
        seed: int | None = None,
    ) -> int:
        """Have it generated, and keep what comes; returns how many pictures that are."""
        collector = self._artifacts.collector(attempt.job, seed)
        relay = Relay(attempt.telling, collector, pace)
        try:
            async with collector:
                await generate(relay)
        except RungError as error:
            if collector.has_told:
                raise DeliveredError(error) from error
            raise
        if not collector.artifacts:
            raise EngineProtocolError(
                f"{attempt.target_id} ended without a picture", engine=attempt.target_id
            )
        return len(collector.artifacts)

    def _now(self, deployment_id: str) -> DeploymentView:
        found = self._fleet.view.deployments.get(deployment_id)
        if found is None:
            raise UnknownDeploymentError(f"{deployment_id} is no longer deployed", deployment=deployment_id)
        return found


class _Attempt:
    """One target, and what it is to draw."""

    __slots__ = ("job", "picture", "staging", "target_id", "telling")

    def __init__(self, job: LiveJob, picture: Picture, staging: Staging, target_id: str) -> None:
        self.job = job
        self.picture = picture
        self.staging = staging
        self.target_id = target_id
        self.telling = Telling(job)

    def served(self, view: DeploymentView, model: str) -> None:
        """Say that it is this one that draws."""
        self.telling.routed(
            Served(requested=self.job.model, target=self.target_id, node=view.node.id, model=model)
        )


def _swap_in_words(picture: Picture, room: Room) -> str:
    if not picture.model_name:
        return "Skipped (no model is sampled with)"
    if room.is_loaded:
        return f"{picture.model_name} is loaded"
    return f"Loading {picture.model_name}{f': {room.swapped}' if room.swapped else ''}"


def _cause_of(error: BaseException) -> BaseException:
    return error.error if isinstance(error, DeliveredError) else error
