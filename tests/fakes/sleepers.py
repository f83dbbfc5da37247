"""Engines that sleep and wake on a GPU that is watched, as a test tells them."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field

from msgspec.structs import replace

from nodeagent.engines import EngineHealth, Probe
from rung.errors import RungError
from rung.types import (
    DeploymentSpec,
    EngineSpec,
    Gpu,
    GpuHealth,
    GpuProcess,
    MemorySource,
    NodeStatus,
    ResidencyClass,
)
from tests.fakes.agent_server import a_spec, a_status
from tests.fakes.engines import ScriptedAdapter, open_gate

GIB = 1 << 30
AWAKE_BYTES = 14 * GIB
ASLEEP_BYTES = 1 * GIB
SHRUNK_BYTES = 6 * GIB


async def _nothing() -> None:
    return


@dataclass
class WatchedGpu:
    """GPUs of 32 GiB, and what deployments hold of the first."""

    held: dict[str, int] = field(default_factory=dict)
    count: int = 1
    #: As on platforms that do not tell what each process holds.
    per_process: bool = True
    health: GpuHealth = GpuHealth.OK

    async def look(self) -> NodeStatus:
        # Some time passes, as with a real driver.
        await asyncio.sleep(0.01)
        return replace(a_status(), gpus=tuple(self._gpu(index) for index in range(self.count)))

    def _gpu(self, index: int) -> Gpu:
        held = self.held if index == 0 else {}
        used = sum(held.values())
        processes = tuple(
            GpuProcess(place, memory if self.per_process else None, name)
            for place, (name, memory) in enumerate(held.items())
        )
        return Gpu(
            index=index,
            uuid=f"GPU-{index}",
            name="RTX 5090",
            health=self.health,
            memory_source=MemorySource.SIMULATED,
            memory_total_bytes=32 * GIB,
            memory_used_bytes=used,
            memory_free_bytes=32 * GIB - used,
            processes=processes,
        )


@dataclass
class SleepyAdapter(ScriptedAdapter):
    """Its engines sleep, wake and flush; `calls` is what they were asked, with the deployment."""

    gpu: WatchedGpu = field(default_factory=WatchedGpu)
    levels: tuple[int, ...] = (1, 2)
    #: Deployments that sleep.
    asleep: set[str] = field(default_factory=set)
    calls: list[str] = field(default_factory=list)
    #: Closed, a call goes on until it is opened, and has its effect then.
    may_move: asyncio.Event = field(default_factory=open_gate)
    #: Raised by calls, after their effect if they have one.
    error: RungError | None = None
    has_effect: bool = True
    asleep_bytes: int = ASLEEP_BYTES
    #: The figures show so much later that a sleeper's memory is free.
    lag_s: float = 0.0
    others_requests: int | None = 0
    frees_model: bool = False
    #: Called when a call comes.
    on_call: Callable[[], Awaitable[None]] = _nothing

    async def probe(self, base_url: str, spec: DeploymentSpec) -> Probe:
        probe = await super().probe(base_url, spec)
        if probe.health is EngineHealth.READY and spec.id in self.asleep:
            return Probe(health=EngineHealth.ASLEEP)
        return probe

    def sleep_levels(self, spec: DeploymentSpec) -> tuple[int, ...]:
        return self.levels

    async def requests(self, base_url: str, spec: DeploymentSpec) -> int | None:
        return self.others_requests

    async def sleep(self, base_url: str, spec: DeploymentSpec, level: int) -> None:
        await self._called(f"sleep {spec.id} {level}")
        if self.has_effect:
            self.asleep.add(spec.id)
            asyncio.get_running_loop().call_later(self.lag_s, self._hold, spec.id, self.asleep_bytes)
            if not self.lag_s:
                self._hold(spec.id, self.asleep_bytes)
        self._fail()

    async def wake(self, base_url: str, spec: DeploymentSpec, level: int) -> None:
        await self._called(f"wake {spec.id} {level}")
        if self.has_effect:
            self.asleep.discard(spec.id)
            self._hold(spec.id, AWAKE_BYTES)
        self._fail()

    def kv_cache_bytes(self, line: str) -> int | None:
        return int(line.removeprefix("KV ")) if line.startswith("KV ") else None

    async def shrink(self, base_url: str, spec: DeploymentSpec) -> None:
        await self._called(f"shrink {spec.id}")
        if self.has_effect:
            self.asleep.add(spec.id)
            self._hold(spec.id, SHRUNK_BYTES)
        self._fail()

    async def grow(self, base_url: str, spec: DeploymentSpec) -> None:
        await self._called(f"grow {spec.id}")
        if self.has_effect:
            self.asleep.discard(spec.id)
            self._hold(spec.id, AWAKE_BYTES)
        self._fail()

    async def free(self, base_url: str, spec: DeploymentSpec) -> None:
        await self._called(f"free {spec.id}")
        if self.has_effect:
            asyncio.get_running_loop().call_later(self.lag_s, self._hold, spec.id, self.asleep_bytes)
        self._fail()

    async def _called(self, what: str) -> None:
        self.calls.append(what)
        await self.on_call()
        await self.may_move.wait()

    def _hold(self, deployment_id: str, memory_bytes: int) -> None:
        self.gpu.held[deployment_id] = memory_bytes

    def _fail(self) -> None:
        if self.error is not None:
            raise self.error


def a_sleeper(
    deployment_id: str = "chat-1",
    *,
    gpus: tuple[str, ...] = (),
    pinned: bool = False,
    shrinkable: bool = False,
) -> DeploymentSpec:
    """A deployment that may sleep."""
    spec = a_spec(
        deployment_id, residency_class=ResidencyClass.PINNED if pinned else ResidencyClass.SLEEPABLE
    )
    engine: EngineSpec = replace(spec.engine, gpus=gpus)
    return replace(spec, engine=engine, shrinkable=shrinkable)
