"""An agent without a process or a wire: the real fleet follows it in virtual time."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncGenerator, Callable, Iterable, Sequence
from typing import Any, TypeAlias

from msgspec import Struct
from msgspec.structs import replace

from controlplane.fleet import Fleet
from controlplane.fleet._agent_client import AgentSnapshot, AgentUpdate
from controlplane.fleet._node_session import NodeSession
from rung import reason_of_error
from rung.codec import GenerationEvent
from rung.errors import EngineTimeoutError, NodeUnreachableError, NotAwakeError, RungError
from rung.types import (
    Deployment,
    DeploymentSpec,
    EngineInput,
    Gpu,
    GpuHealth,
    GpuProcess,
    LifecycleDone,
    LifecycleEvent,
    LifecycleFailed,
    MemorySource,
    NodeOwnership,
    Residency,
)
from tests.fakes.agent_server import a_deployment, a_status

GIB = 1 << 30
HELD_ASLEEP_BYTES = GIB

#: What a deployment does with an input; silence is for `idle_s` to notice.
Generate: TypeAlias = Callable[[str, EngineInput], AsyncGenerator[GenerationEvent, None]]

#: What becomes of a deployment on the way, and at the end.
_COURSES = {
    "start": (Residency.STARTING, Residency.AWAKE),
    "wake": (Residency.WAKING, Residency.AWAKE),
    "sleep": (Residency.FALLING_ASLEEP, Residency.ASLEEP),
    "stop": (Residency.STOPPING, Residency.STOPPED),
}


class DirectNode(Struct, frozen=True):
    """A node of a configuration."""

    id: str
    address: str = ""
    ownership: NodeOwnership = NodeOwnership.OWNED


class DirectAgent:
    """Stands for an `AgentClient` and the agent at its other end, with one GPU.

    Args:
        node_id: the node.
        specs: its deployments.
        gpu_bytes: of its GPU.
        generate: what its deployments draw.
        takes_s: how long an action takes; an error is what it ends with.

    Attributes:
        held: by deployment, what it holds beside what it holds awake.
        outside_bytes: held by nobody that the agent knows.
        is_lost: it answers nothing, and what is under way breaks.
    """

    is_closed = True

    def __init__(
        self,
        node_id: str,
        specs: Iterable[DeploymentSpec],
        *,
        gpu_bytes: int,
        generate: Generate,
        takes_s: Callable[[str, str], float | RungError],
    ) -> None:
        self.node_id = node_id
        self.deployments: dict[str, Deployment] = {}
        self.held: dict[str, int] = {}
        self.outside_bytes = 0
        self.generations = 0
        self._specs = {spec.id: spec for spec in specs}
        self._gpu_bytes = gpu_bytes
        self._generate = generate
        self._takes_s = takes_s
        self._queues: list[asyncio.Queue[AgentUpdate | None]] = []
        self._lost = asyncio.Event()
        self._samples = 0

    @property
    def is_lost(self) -> bool:
        return self._lost.is_set()

    def lose(self) -> None:
        """It is away from now on."""
        self._lost.set()
        for queue in self._queues:
            queue.put_nowait(None)

    def come_back(self) -> None:
        """It is there again, its engines as they were."""
        self._lost = asyncio.Event()

    def put(self, deployment_id: str, residency: Residency, **fields: Any) -> None:
        """A deployment is so; says it."""
        known = self.deployments.get(deployment_id)
        generation = known.generation if known is not None else 1
        if residency is Residency.STARTING:
            generation += 1
        if residency in (Residency.STARTING, Residency.STOPPED):
            self.held.pop(deployment_id, None)
        found = a_deployment(self._specs[deployment_id], residency, generation=generation)
        self.deployments[deployment_id] = replace(
            found,
            vram_bytes=self._holds_bytes(deployment_id, residency),
            asleep_level=1 if residency is Residency.ASLEEP else 0,
            **fields,
        )
        self._say(self.deployments[deployment_id])
        self.tick()

    def hold(self, deployment_id: str, more_bytes: int) -> None:
        """An engine holds so much beside what it holds awake."""
        self.held[deployment_id] = more_bytes
        self.put(deployment_id, self.deployments[deployment_id].residency)

    def free_bytes(self) -> int:
        """What of the GPU nobody holds."""
        held = sum(each.vram_bytes or 0 for each in self.deployments.values())
        return self._gpu_bytes - GIB - held - self.outside_bytes

    def tick(self) -> None:
        """Measure, and say it."""
        self._say(self._status())

    # As `NodeSession` and `Operations` see it.

    async def watch(self, epoch: int) -> AsyncGenerator[AgentUpdate, None]:
        if self.is_lost:
            raise NodeUnreachableError(f"{self.node_id} does not answer", node=self.node_id)
        queue: asyncio.Queue[AgentUpdate | None] = asyncio.Queue()
        self._queues.append(queue)
        try:
            yield AgentSnapshot(
                node_id=self.node_id,
                agent_instance_id=f"{self.node_id}-1",
                epoch=epoch,
                status=self._status(),
                deployments=tuple(self.deployments.values()),
            )
            while (update := await queue.get()) is not None:
                yield update
        finally:
            self._queues.remove(queue)
        raise NodeUnreachableError(f"{self.node_id} was lost", node=self.node_id)

    async def generate(
        self, deployment_id: str, *, job_id: str, wanted: EngineInput, idle_timeout_s: float
    ) -> AsyncGenerator[GenerationEvent, None]:
        found = self.deployments.get(deployment_id)
        if self.is_lost:
            raise NodeUnreachableError(f"{self.node_id} does not answer", node=self.node_id)
        if found is None or found.residency is not Residency.AWAKE:
            raise NotAwakeError(f"{deployment_id} is not awake", deployment=deployment_id)
        self.generations += 1
        events = self._generate(deployment_id, wanted)
        try:
            while True:
                event = await self._heard(anext(events, None), idle_timeout_s, deployment_id)
                if event is None:
                    return
                yield event
        finally:
            self.generations -= 1
            await events.aclose()

    async def _heard(self, coming: Any, idle_timeout_s: float, deployment_id: str) -> GenerationEvent | None:
        """The next event, unless the node is lost, or nothing comes, before there is one."""
        next_event = asyncio.ensure_future(coming)
        lost = asyncio.ensure_future(self._lost.wait())
        try:
            await asyncio.wait(
                (next_event, lost), timeout=idle_timeout_s, return_when=asyncio.FIRST_COMPLETED
            )
            if next_event.done():
                event: GenerationEvent | None = next_event.result()
                return event
            if self.is_lost:
                raise NodeUnreachableError(f"{self.node_id} was lost", node=self.node_id)
            raise EngineTimeoutError(f"{deployment_id} said nothing", engine=deployment_id)
        finally:
            for task in (next_event, lost):
                task.cancel()
            await asyncio.gather(next_event, lost, return_exceptions=True)

    def start_engine(
        self, spec: DeploymentSpec, *, operation_id: str, epoch: int
    ) -> AsyncGenerator[LifecycleEvent, None]:
        return self._operate("start", spec.id, operation_id)

    def stop_engine(
        self, deployment_id: str, *, operation_id: str, epoch: int, force: bool = False
    ) -> AsyncGenerator[LifecycleEvent, None]:
        return self._operate("stop", deployment_id, operation_id)

    def sleep_engine(
        self, deployment_id: str, *, operation_id: str, epoch: int, level: int = 0, force: bool = False
    ) -> AsyncGenerator[LifecycleEvent, None]:
        return self._operate("sleep", deployment_id, operation_id)

    def wake_engine(
        self, deployment_id: str, *, operation_id: str, epoch: int
    ) -> AsyncGenerator[LifecycleEvent, None]:
        return self._operate("wake", deployment_id, operation_id)

    def free_engine(
        self, deployment_id: str, *, operation_id: str, epoch: int
    ) -> AsyncGenerator[LifecycleEvent, None]:
        return self._operate("free", deployment_id, operation_id)

    def retire(self) -> None:
        """There is no channel."""

    async def aclose(self) -> None:
        """There is no channel."""

    async def _operate(
        self, action: str, deployment_id: str, operation_id: str
    ) -> AsyncGenerator[LifecycleEvent, None]:
        if self.is_lost:
            raise NodeUnreachableError(f"{self.node_id} does not answer", node=self.node_id)
        before = self.deployments[deployment_id].residency
        outcome = self._takes_s(action, deployment_id)
        on_the_way, at_the_end = _COURSES.get(action, (before, before))
        self.put(deployment_id, on_the_way)
        await asyncio.sleep(1.0 if isinstance(outcome, RungError) else outcome)
        if isinstance(outcome, RungError):
            self.put(deployment_id, Residency.FAILED if action in ("start", "wake") else before)
            reason = reason_of_error(outcome)
            yield LifecycleEvent(operation_id, 1, 1.0, LifecycleFailed(reason, outcome.message))
            return
        held_bytes = self.deployments[deployment_id].vram_bytes or 0
        if action == "free":
            self.held.pop(deployment_id, None)
        self.put(deployment_id, at_the_end)
        if self.is_lost:
            raise NodeUnreachableError(f"{self.node_id} was lost", node=self.node_id)
        now = self.deployments[deployment_id]
        freed_bytes = held_bytes - (now.vram_bytes or 0) if at_the_end is not Residency.AWAKE else None
        yield LifecycleEvent(operation_id, 1, 1.0, LifecycleDone(now, freed_bytes))

    def _holds_bytes(self, deployment_id: str, residency: Residency) -> int:
        awake_bytes = self._specs[deployment_id].vram_bytes + self.held.get(deployment_id, 0)
        match residency:
            case Residency.STOPPED | Residency.FAILED | Residency.STARTING:
                return 0
            case Residency.ASLEEP | Residency.WAKING:
                return HELD_ASLEEP_BYTES
            case _:
                return awake_bytes

    def _status(self) -> Any:
        self._samples += 1
        free_bytes = max(0, self.free_bytes())
        processes = [
            GpuProcess(100 + place, each.vram_bytes, deployment_id=each.spec.id)
            for place, each in enumerate(self.deployments.values())
        ]
        gpu = Gpu(
            index=0,
            uuid=f"GPU-{self.node_id}",
            name="NVIDIA GeForce RTX 5090",
            health=GpuHealth.OK,
            memory_source=MemorySource.NVML,
            memory_total_bytes=self._gpu_bytes,
            memory_used_bytes=self._gpu_bytes - free_bytes,
            memory_free_bytes=free_bytes,
            processes=tuple(processes),
        )
        status = a_status(host_id=f"host-{self.node_id}", sample_time_s=float(self._samples))
        host = replace(status.host, memory_total_bytes=64 * GIB, memory_available_bytes=48 * GIB)
        return replace(status, gpus=(gpu,), host=host, sample_age_s=0.0)

    def _say(self, update: AgentUpdate) -> None:
        for queue in self._queues:
            queue.put_nowait(update)


class _DirectSession(NodeSession):
    """A session with an agent that is there."""

    def __init__(
        self, agent: DirectAgent, *, on_change: Callable[[NodeSession, bool], None], seed: int
    ) -> None:
        super().__init__(
            node_id=agent.node_id, address="", epoch=1, on_change=on_change, rng=random.Random(seed)
        )
        self._agent = agent

    @property
    def client(self) -> Any:
        """The agent itself."""
        return self._agent


class DirectFleet(Fleet):
    """The real fleet, with agents that are objects."""

    def __init__(
        self, agents: Sequence[DirectAgent], deployments: Sequence[DeploymentSpec], seed: int, **fields: Any
    ) -> None:
        nodes = [DirectNode(agent.node_id) for agent in agents]
        super().__init__(nodes=nodes, deployments=deployments, epoch=1, own_host_id="", **fields)
        self._sessions = {
            agent.node_id: _DirectSession(agent, on_change=self._on_change, seed=seed) for agent in agents
        }
