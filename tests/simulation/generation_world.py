"""What the random schedules of pictures happen to: engines that draw and fail as drawn from a seed."""

from __future__ import annotations

import asyncio
import hashlib
import random
from collections.abc import AsyncGenerator
from typing import Any

from msgspec.structs import replace

from controlplane.ladder import Candidate, TargetKind
from controlplane.pipelines.image import OnEvent
from controlplane.stages import Enhanced, StageRequest, Verdict
from rung.codec import GenerationEvent
from rung.errors import (
    BudgetExhaustedError,
    EngineFailedError,
    EngineProtocolError,
    EngineRejectedError,
    EngineStartFailedError,
    EngineTimeoutError,
    EngineUnreachableError,
    RungError,
    UnavailableError,
)
from rung.types import (
    ArtifactChunk,
    ComfyUiEngine,
    DeploymentSpec,
    EngineInput,
    ImageInput,
    Phase,
    PhaseProgress,
    Residency,
    ResidencyClass,
    ServiceEngine,
    VllmEngine,
    WorkflowInput,
)
from tests.fakes.agent_server import a_spec
from tests.fakes.direct_agent import GIB, DirectAgent

CLOUD = "openai/gpt-image-1"
MODEL_BYTES = {"lightning": 5 * GIB, "quality": 11 * GIB, "ultra": 19 * GIB}
#: What the artist gives an engine that says nothing.
IDLE_TIMEOUT_S = 8.0

COMFYUI = replace(
    a_spec("comfyui", node_id="workstation", engine=ComfyUiEngine(), residency_class=ResidencyClass.CACHE),
    capabilities=("image", "video"),
    slots=1,
    vram_bytes=GIB // 2,
)
REASONER = replace(
    a_spec(
        "reasoner",
        node_id="workstation",
        engine=VllmEngine(model="m", sleep_mode=True),
        residency_class=ResidencyClass.SLEEPABLE,
    ),
    vram_bytes=16 * GIB,
)
SANA = replace(
    a_spec("sana", node_id="spark", engine=ServiceEngine(dialect="sana")),
    capabilities=("image",),
    slots=1,
    vram_bytes=4 * GIB,
)

#: What may go wrong, each at any of the places.
_FAULTS = ("error", "error", "out of memory", "silence", "dies", "lost", "rejected")
_BROKEN_PIECES = ("hash", "gap", "size", "again", "none", "more")
_PLACES = ("accepted", "loading", "sampling", "encoding", "piece", "end")


class World:
    """Two nodes and a provider.

    Attributes:
        hashes: of pictures that were sent as they are.
    """

    def __init__(self, rng: random.Random) -> None:
        self.rng = rng
        self.fault_share = rng.choice([0.0, 0.3, 0.5, 0.8])
        self.hashes: set[str] = set()
        self.workstation = self._agent("workstation", (COMFYUI, REASONER))
        self.spark = self._agent("spark", (SANA,))
        self.agents = (self.workstation, self.spark)
        asleep, stopped = Residency.ASLEEP, Residency.STOPPED
        for agent, spec, residencies in (
            (self.workstation, COMFYUI, [Residency.AWAKE] * 4 + [stopped]),
            (self.workstation, REASONER, [Residency.AWAKE] * 3 + [asleep, stopped]),
            (self.spark, SANA, [Residency.AWAKE] * 2 + [stopped]),
        ):
            agent.put(spec.id, rng.choice(residencies))

    def _agent(self, node_id: str, specs: tuple[DeploymentSpec, ...]) -> DirectAgent:
        return DirectAgent(node_id, specs, gpu_bytes=32 * GIB, generate=self._generate, takes_s=self._takes_s)

    async def tick(self) -> None:
        """Measure each second, as agents do."""
        while True:
            await asyncio.sleep(1.0)
            for agent in self.agents:
                agent.tick()

    def lose(self, agent: DirectAgent) -> None:
        """A node is away for a while."""
        if not agent.is_lost:
            agent.lose()
            asyncio.get_running_loop().call_later(self.rng.uniform(0.2, 15.0), agent.come_back)

    def _takes_s(self, action: str, deployment_id: str) -> float | RungError:
        if self.rng.random() < self.fault_share / 4:
            if action in ("start", "wake"):
                return EngineStartFailedError(f"{deployment_id} ended with exit code 1")
            return EngineFailedError(f"{deployment_id} did not {action}")
        return self.rng.choice([0.0, 0.2, self.rng.uniform(0.5, 6.0)])

    # Engines.

    def _generate(self, deployment_id: str, wanted: EngineInput) -> AsyncGenerator[GenerationEvent, None]:
        agent = self.workstation if deployment_id == COMFYUI.id else self.spark
        return self.draw(deployment_id, wanted, agent)

    async def draw(
        self, target_id: str, wanted: EngineInput, agent: DirectAgent | None
    ) -> AsyncGenerator[GenerationEvent, None]:
        """What an engine does; without an agent it is the provider's."""
        rng = self.rng
        fault = rng.choice(_FAULTS) if rng.random() < self.fault_share else ""
        where = rng.choice(_PLACES)

        async def at(place: str) -> None:
            if fault and place == where:
                await self._fail(fault, target_id, agent)

        await asyncio.sleep(rng.choice([0.0, 0.0, rng.uniform(0.0, 5.0)]))
        await at("accepted")
        if isinstance(wanted, WorkflowInput) and agent is not None:
            model = rng.choice(list(MODEL_BYTES))
            yield PhaseProgress(Phase.MODEL_SWAP, f"loading {model}")
            await asyncio.sleep(rng.choice([0.0, rng.uniform(0.5, 7.0)]))
            agent.hold(target_id, min(MODEL_BYTES[model], max(0, agent.free_bytes())))
        await at("loading")
        async for event in self._sampled():
            yield event
        await at("sampling")
        if rng.random() < 0.8:
            yield PhaseProgress(Phase.ENCODING, "saving (SaveImage)")
        await asyncio.sleep(rng.choice([0.0, rng.uniform(0.0, 3.0)]))
        await at("encoding")
        breaks = rng.choice(_BROKEN_PIECES) if rng.random() < self.fault_share / 2 else ""
        for place in range(rng.choice([1, 1, 2])):
            for chunk in self._pieces(place, breaks):
                yield chunk
                await asyncio.sleep(rng.choice([0.0, 0.0, rng.uniform(0.0, 2.0)]))
                await at("piece")
        await at("end")

    async def _sampled(self) -> AsyncGenerator[GenerationEvent, None]:
        """Steps, told one by one, now and then twice or late, with a preview here and there."""
        rng = self.rng
        steps = rng.choice([1, 4, 4, 20, 30])
        step_s = rng.choice([0.01, 0.1, rng.uniform(0.05, 2.0 if steps < 20 else 0.4)])
        samplers = rng.choice([1, 1, 1, 2])
        for sampler in range(samplers):
            detail = f"sampler {sampler + 1} of 2" if samplers == 2 else ""
            for step in range(steps + 1):
                told = step if rng.random() < 0.9 else rng.randrange(steps + 1)
                percent = 100.0 * told / steps
                yield PhaseProgress(Phase.SAMPLING, detail, step=told, total=steps, percent=percent)
                if rng.random() < 0.1:
                    yield PhaseProgress(rng.choice([Phase.QUEUED, Phase.MODEL_SWAP]), "what came late")
                if rng.random() < 0.15:
                    yield ArtifactChunk("preview", "image/jpeg", data=rng.randbytes(20), preview=True)
                await asyncio.sleep(step_s)

    def _pieces(self, place: int, breaks: str) -> list[ArtifactChunk]:
        """One picture in pieces; `breaks` says what is wrong with them."""
        rng = self.rng
        size = rng.choice([1, rng.randrange(2, 3000), rng.randrange(2, 3000), 300_000])
        data = rng.randbytes(8) + bytes(size)
        sha256 = hashlib.sha256(data).hexdigest()
        if not breaks:
            self.hashes.add(sha256)
        ends = sorted({rng.randrange(1, len(data)) for _ in range(rng.choice([0, 0, 1, 3]))} | {len(data)})
        claims_size, claims_hash = rng.random() < 0.7, rng.random() < 0.7
        pieces, begin = [], 0
        for end in ends:
            pieces.append(
                ArtifactChunk(
                    str(place),
                    "image/png",
                    offset_bytes=begin,
                    data=data[begin:end],
                    size_bytes=len(data) if claims_size else 0,
                    sha256=sha256 if claims_hash and end == len(data) else "",
                )
            )
            begin = end
        last = pieces[-1]
        match breaks:
            case "hash":
                pieces[-1] = replace(last, sha256="0" * 64)
            case "gap":
                pieces[-1] = replace(last, offset_bytes=last.offset_bytes + 1)
            case "size":
                pieces[-1] = replace(last, size_bytes=len(data) + 1, sha256=sha256)
            case "again":
                pieces[-1] = replace(last, sha256=sha256)
                pieces.append(pieces[-1])
            case "none":
                pieces.clear()
            case "more":
                pieces[-1] = replace(last, size_bytes=len(data), data=last.data + b"more")
        return pieces

    async def _fail(self, fault: str, target_id: str, agent: DirectAgent | None) -> None:
        match fault:
            case "silence" if agent is None:
                await asyncio.sleep(IDLE_TIMEOUT_S)
                raise EngineTimeoutError(f"{target_id} said nothing", engine=target_id)
            case "silence":
                await asyncio.sleep(1000.0)
            case "out of memory":
                raise EngineFailedError(f"{target_id} ran out of GPU memory")
            case "rejected":
                raise EngineRejectedError(f"{target_id} refuses this")
            case "dies" if agent is not None:
                agent.put(target_id, Residency.FAILED)
                raise EngineUnreachableError(f"{target_id} is gone", engine=target_id)
            case "lost" if agent is not None:
                self.lose(agent)
                await asyncio.sleep(1000.0)
            case _:
                raise self.rng.choice(
                    [
                        EngineProtocolError(f"{target_id} was not understood", engine=target_id),
                        EngineFailedError(f"{target_id} failed"),
                        UnavailableError(f"{target_id} is away"),
                        RungError("something else"),
                    ]
                )


class Painter:
    """A cloud model that draws as engines do."""

    def __init__(self, world: World) -> None:
        self._world = world
        model = Candidate(
            id=CLOUD, kind=TargetKind.CLOUD, owned=False, capabilities=frozenset({"image", "video"})
        )
        self.candidates = {model.id: model}

    def refusal(self, target_id: str) -> str:
        return ""

    def model_name(self, target_id: str) -> str:
        return "gpt-image-1"

    async def open(self, target_id: str, body: bytes, *, stream: bool, idle_timeout_s: float) -> Any:
        raise AssertionError("nobody chats here")

    async def generate(self, target_id: str, wanted: ImageInput, on_event: OnEvent) -> float:
        if self._world.rng.random() < self._world.fault_share / 4:
            raise BudgetExhaustedError("the day's money is spent")
        async for event in self._world.draw(target_id, wanted, None):
            await on_event(event)
        return 0.04


class Moody:
    """Stages that take their time, refuse, fail or hang."""

    def __init__(self, rng: random.Random, fault_share: float) -> None:
        self._rng = rng
        self._fault_share = fault_share / 8

    async def check(self, request: StageRequest) -> Verdict:
        await self._mood()
        if self._rng.random() < self._fault_share / 4:
            return Verdict(allowed=False, detail="Safety: refused", category="test")
        return Verdict(allowed=True, detail="Safety: unrestricted")

    async def enhance(self, request: StageRequest) -> Enhanced:
        await self._mood()
        if self._rng.random() < 0.5:
            return Enhanced(prompt=request.prompt, detail="Skipped (fast tier)")
        return Enhanced(prompt=f"{request.prompt}, in oil", detail="Enhanced by orchestrator")

    async def _mood(self) -> None:
        if self._rng.random() < self._fault_share:
            if self._rng.random() < 0.5:
                raise ValueError("a plugin that is broken")
            await asyncio.sleep(1000.0)
        await asyncio.sleep(self._rng.choice([0.0, 0.0, 0.02, self._rng.uniform(0.0, 4.0)]))
