"""A control plane that draws, all of it real, on a scripted agent whose ComfyUI takes and gives memory."""

from __future__ import annotations

import asyncio
import hashlib
import random
from collections.abc import AsyncIterator, Iterable, Mapping
from contextlib import asynccontextmanager
from typing import Any

import msgspec
from msgspec.structs import replace
from prometheus_client import CollectorRegistry

from controlplane.estimates import Estimates
from controlplane.fleet import Fleet, NodeSchedulers, log_alert
from controlplane.jobs import Jobs, LiveJob
from controlplane.ladder import Ladder
from controlplane.pipelines import Cloud, Pipelines, Slots, Wish
from controlplane.pipelines.image import Artist, CloudImages, ImagePipeline, Rooms
from controlplane.stages import Enhanced, StageRequest, Verdict
from controlplane.vram import Lease
from controlplane.workflows import DEFAULT_TIERS, Tier, Workflows
from rung import codec, v1
from rung.codec import GenerationEvent
from rung.errors import RungError
from rung.service import EngineClient
from rung.types import (
    ArtifactChunk,
    ComfyUiEngine,
    DeploymentSpec,
    GpuProcess,
    ImageInput,
    JobEvent,
    JobKind,
    LifecycleDone,
    LifecyclePayload,
    NodeState,
    Phase,
    PhaseProgress,
    Policy,
    Residency,
    ResidencyClass,
    ServiceEngine,
    VllmEngine,
    WorkflowInput,
)
from tests.fakes.agent_server import Call, ScriptedAgent, a_spec
from tests.fakes.api_server import ANode
from tests.fakes.artifacts import MemoryRows, some_artifacts
from tests.fakes.gpu_agent import GIB, GpuAgent
from tests.fakes.store import MemoryStore

_POLICY = Policy()
CONTEXT_BYTES = GIB // 2
CHECKPOINTS = {
    "sdxl_lightning_4step.safetensors": 5 * GIB,
    "waiIllustriousSDXL_v140.safetensors": 11 * GIB,
    "flux1-dev-fp8.safetensors": 19 * GIB,
}


def draws(spec: DeploymentSpec) -> DeploymentSpec:
    """The deployment, as one that can draw."""
    return replace(spec, capabilities=("image", "video"), slots=1)


COMFYUI = draws(a_spec("comfyui", engine=ComfyUiEngine(), residency_class=ResidencyClass.CACHE))
#: The default ones, in sizes that the cards of these tests are told in.
TIERS = {
    name: replace(DEFAULT_TIERS[name], vram_bytes=size_gib * GIB)
    for name, size_gib in {"lightning": 6, "quality": 12, "ultra": 20}.items()
}
SANA = draws(replace(a_spec("sana", engine=ServiceEngine(dialect="sana")), vram_bytes=4 * GIB))
REASONER = replace(
    a_spec(
        "reasoner",
        residency_class=ResidencyClass.SLEEPABLE,
        engine=VllmEngine(model="m", sleep_mode=True),
    ),
    vram_bytes=16 * GIB,
)


class Card(GpuAgent):
    """A card of 32 GiB on which ComfyUI keeps the models that it loads.

    Attributes:
        fails: raised by the next generations, by the phase at which they fail.
        pauses: waited for by generations before a phase, by that.
        reached: a generation has come to a pause.
        graphs: those that were sent.
        pictures: how many each generation makes.
        ignores_free: a flush gives nothing back.
        has_gpu: there is a card at all.
    """

    def __init__(self, specs: Iterable[DeploymentSpec]) -> None:
        self.models: dict[str, int] = {}
        self.fails: dict[Phase, RungError] = {}
        self.pauses: dict[Phase, asyncio.Event] = {}
        self.reached = asyncio.Event()
        self.graphs: list[dict[str, Any]] = []
        self.pictures = 1
        self.ignores_free = False
        self.has_gpu = True
        specs = list(specs)
        super().__init__(specs)
        self._awake_bytes["comfyui"] = CONTEXT_BYTES
        self.agent.generation_script = self._generate

    async def _obey(self, agent: ScriptedAgent, call: Call) -> AsyncIterator[LifecyclePayload]:
        if call.action != "free":
            async for payload in super()._obey(agent, call):
                yield payload
            return
        freed_bytes = 0 if self.ignores_free else sum(self.models.values())
        if not self.ignores_free:
            self.models.clear()
        self._hold()
        yield LifecycleDone(agent.deployments["comfyui"], freed_bytes)

    def load(self, checkpoint: str) -> None:
        """ComfyUI has a model in memory."""
        self.models[checkpoint] = CHECKPOINTS[checkpoint]
        self._hold()

    def _hold(self) -> None:
        held_bytes = CONTEXT_BYTES + sum(self.models.values())
        self.agent.report(replace(self.agent.deployments["comfyui"], vram_bytes=held_bytes))
        self._measure()
        self.agent.tick()

    def _measure(self) -> None:
        super()._measure()
        status = self.agent.status
        held = [
            GpuProcess(100 + place, each.vram_bytes, deployment_id=each.spec.id)
            for place, each in enumerate(self.agent.deployments.values())
        ]
        if not self.has_gpu:
            self.agent.status = replace(status, gpus=())
            return
        gpus = tuple(replace(gpu, processes=(*gpu.processes, *held)) for gpu in status.gpus)
        self.agent.status = replace(status, gpus=gpus)

    async def _at(self, phase: Phase) -> None:
        if phase in self.pauses:
            self.reached.set()
            await self.pauses[phase].wait()
        error = self.fails.pop(phase, None)
        if error is not None:
            raise error

    async def _generate(self, request: v1.RunGenerationRequest) -> AsyncIterator[GenerationEvent]:
        wanted = codec.read_engine_input(request)
        await self._at(Phase.QUEUED)
        if isinstance(wanted, WorkflowInput):
            graph = msgspec.json.decode(wanted.graph_json, type=dict[str, dict[str, Any]])
            self.graphs.append(graph)
            for node in graph.values():
                checkpoint = node["inputs"].get("ckpt_name")
                if checkpoint in CHECKPOINTS and checkpoint not in self.models:
                    yield PhaseProgress(Phase.MODEL_SWAP, f"loading {checkpoint}")
                    # Longer than a step, or there is nothing to learn of it.
                    await asyncio.sleep(0.05)
                    self.load(checkpoint)
        for step in (0, 1, 2, 4):
            yield PhaseProgress(Phase.SAMPLING, step=step, total=4, percent=25.0 * step)
            # Long enough for a clock to tell the steps apart.
            await asyncio.sleep(0.002)
        await self._at(Phase.SAMPLING)
        yield PhaseProgress(Phase.ENCODING, "saving (SaveImage)")
        for place in range(self.pictures):
            data = b"\x89PNG" + bytes([place]) * 10
            whole = ArtifactChunk(
                str(place),
                "image/png",
                data=data,
                sha256=hashlib.sha256(data).hexdigest(),
                size_bytes=len(data),
            )
            yield whole
            await self._at(Phase.ENCODING)


class ScriptedStages:
    """Stages that say what a test wants; they wait for `may_enhance`."""

    def __init__(self) -> None:
        self.refuses = ""
        self.adds = ""
        self.requests: list[StageRequest] = []
        self.may_enhance = asyncio.Event()
        self.may_enhance.set()

    async def check(self, request: StageRequest) -> Verdict:
        self.requests.append(request)
        if self.refuses:
            return Verdict(allowed=False, detail=self.refuses, category="test")
        return Verdict(allowed=True, detail="Safety: unrestricted")

    async def enhance(self, request: StageRequest) -> Enhanced:
        await self.may_enhance.wait()
        if not self.adds:
            return Enhanced(prompt=request.prompt, detail="Skipped (fast tier)")
        return Enhanced(prompt=request.prompt + self.adds, detail="Enhanced by orchestrator")


class Studio:
    """The pieces, and what is asked of them."""

    def __init__(
        self,
        card: Card,
        fleet: Fleet,
        schedulers: NodeSchedulers,
        slots: Slots,
        jobs: Jobs,
        pipelines: Pipelines,
        stages: ScriptedStages,
        estimates: Estimates,
        rows: MemoryRows,
    ) -> None:
        self.card = card
        self.fleet = fleet
        self.schedulers = schedulers
        self.slots = slots
        self.jobs = jobs
        self.pipelines = pipelines
        self.stages = stages
        self.estimates = estimates
        self.rows = rows

    @property
    def leases(self) -> list[Lease]:
        """Those that are held now."""
        return [lease for scheduler in self.schedulers.all for lease in scheduler.leases]

    def start(
        self, prompt: str = "a cat", *, model: str = "", policy: Policy | None = None, **more: Any
    ) -> LiveJob:
        """Begin a picture of the fast tier, unless another one is named."""
        wanted = ImageInput(prompt=prompt, **{"tier": "lightning", **more})
        wish = Wish(kind=JobKind.IMAGE, model=model, input=wanted, policy=policy or Policy())
        return self.pipelines.start(wish)

    async def log_of(self, job: LiveJob) -> list[JobEvent]:
        """All events of a job, without heartbeats, once it has ended."""
        async with asyncio.timeout(20):
            return [event async for event in self.jobs.watch(job.id) if event.sequence]

    async def draw(self, prompt: str = "a cat", **more: Any) -> list[JobEvent]:
        """Have it drawn."""
        return await self.log_of(self.start(prompt, **more))

    async def until_told(self, job: LiveJob, words: str) -> None:
        """Return once a job was told something."""
        async with asyncio.timeout(10):
            async for event in self.jobs.watch(job.id):
                if isinstance(event.payload, PhaseProgress) and words in event.payload.detail:
                    return
        raise AssertionError(f"the job ended without a word of {words!r}")


@asynccontextmanager
async def a_studio(
    *specs: DeploymentSpec,
    awake: Iterable[DeploymentSpec] = (COMFYUI,),
    tiers: Mapping[str, Tier] = TIERS,
    ladder: Ladder | None = None,
    cloud: Cloud | None = None,
    cloud_images: CloudImages | None = None,
    card: Card | None = None,
) -> AsyncIterator[Studio]:
    """Deployments on a card, those of them up that are `awake`."""
    specs = specs or (COMFYUI, REASONER)
    card = card or Card(specs)
    for spec in awake:
        card.put(spec, Residency.AWAKE)
    slots, jobs, rows = Slots(), Jobs(MemoryStore()), MemoryRows()
    async with card.running(), some_artifacts(rows=rows) as artifacts:
        fleet = Fleet(
            nodes=[ANode(card.agent.node_id, card.agent.address)],
            deployments=specs,
            epoch=1,
            load=slots.load,
            drained=slots.drained,
            own_host_id="",
        )
        schedulers = NodeSchedulers(fleet, idle_s=slots.idle_s, alert=log_alert)
        fleet.make_awake = schedulers.make_awake
        await jobs.start()
        client = EngineClient()
        pipelines = Pipelines(
            jobs=jobs,
            fleet=fleet,
            schedulers=schedulers,
            slots=slots,
            client=client,
            registry=CollectorRegistry(),
            ladder=ladder,
            cloud=cloud,
        )
        stages, estimates = ScriptedStages(), Estimates()
        artist = Artist(
            fleet=fleet,
            slots=slots,
            engager=pipelines.engager,
            rooms=Rooms(fleet, schedulers, estimates),
            artifacts=artifacts,
            estimates=estimates,
            cloud=cloud_images,
            idle_timeout_s=5.0,
        )
        images = ImagePipeline(
            router=pipelines.router,
            engager=pipelines.engager,
            artist=artist,
            workflows=Workflows(),
            tiers=tiers,
            stages=stages,
            choose=random.Random(7),
        )
        pipelines.add(images, JobKind.IMAGE, JobKind.VIDEO)
        await fleet.start()
        schedulers.start()
        async with asyncio.timeout(10):
            async for view in fleet.changes():
                if view.nodes[card.agent.node_id].state is NodeState.READY:
                    break
        try:
            yield Studio(card, fleet, schedulers, slots, jobs, pipelines, stages, estimates, rows)
        finally:
            await jobs.drain(0.0)
            await pipelines.aclose()
            await schedulers.aclose()
            await fleet.aclose()
            await client.aclose()
