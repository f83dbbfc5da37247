"""A scripted agent with one GPU, whose memory follows what its deployments are told."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager

from msgspec.structs import replace

from rung.errors import EngineStartFailedError
from rung.types import (
    DeploymentSpec,
    Gpu,
    GpuHealth,
    GpuProcess,
    LifecycleDone,
    LifecyclePayload,
    MemorySource,
    Residency,
)
from tests.fakes.agent_server import Call, ScriptedAgent, a_deployment, a_status

GIB = 1 << 30
TOTAL_BYTES = 32 * GIB
HELD_ASLEEP_BYTES = GIB
_RESTING = {"stop": Residency.STOPPED, "sleep": Residency.ASLEEP}


class GpuAgent:
    """Deployments on a card of 32 GiB, of which a desktop has one.

    Args:
        specs: its deployments; awake they hold what they declare.
    """

    def __init__(self, specs: Iterable[DeploymentSpec]) -> None:
        self.agent = ScriptedAgent(script=self._obey)
        #: Deployments that do not come up.
        self.broken: set[str] = set()
        #: Processes of nobody that the agent knows, by pid.
        self.programs: dict[int, int] = {}
        self._awake_bytes = {spec.id: spec.vram_bytes for spec in specs}
        self._measure()

    @property
    def told(self) -> list[tuple[str, str]]:
        """What was done, and to which deployment."""
        return [(call.action, call.deployment_id) for call in self.agent.calls]

    def put(self, spec: DeploymentSpec, residency: Residency) -> None:
        """A deployment is so."""
        held_bytes = {Residency.AWAKE: self._awake_bytes[spec.id], Residency.ASLEEP: HELD_ASLEEP_BYTES}
        known = self.agent.deployments.get(spec.id)
        found = a_deployment(spec, residency, generation=known.generation + 1 if known else 1)
        self.agent.report(
            replace(
                found,
                vram_bytes=held_bytes.get(residency, 0),
                asleep_level=1 if residency is Residency.ASLEEP else 0,
            )
        )
        self._measure()

    @asynccontextmanager
    async def running(self) -> AsyncIterator[GpuAgent]:
        """Listen, and say what is measured often."""
        await self.agent.start()
        ticking = asyncio.create_task(self._tick())
        try:
            yield self
        finally:
            ticking.cancel()
            await asyncio.gather(ticking, return_exceptions=True)
            await self.agent.stop()

    async def _tick(self) -> None:
        while True:
            self._measure()
            self.agent.tick()
            await asyncio.sleep(0.1)

    async def _obey(self, agent: ScriptedAgent, call: Call) -> AsyncIterator[LifecyclePayload]:
        spec = call.spec or agent.deployments[call.deployment_id].spec
        if call.action in _RESTING:
            self.put(spec, _RESTING[call.action])
        elif call.deployment_id in self.broken:
            self.put(spec, Residency.FAILED)
            raise EngineStartFailedError(f"{call.deployment_id} ended with exit code 1")
        else:
            self.put(spec, Residency.AWAKE)
        yield LifecycleDone(agent.deployments[call.deployment_id])

    def _measure(self) -> None:
        deployments = self.agent.deployments.values()
        held_bytes = sum(each.vram_bytes or 0 for each in deployments) + sum(self.programs.values())
        free_bytes = TOTAL_BYTES - GIB - held_bytes
        gpu = Gpu(
            index=0,
            uuid="GPU-0",
            name="NVIDIA GeForce RTX 5090",
            health=GpuHealth.OK,
            memory_source=MemorySource.NVML,
            memory_total_bytes=TOTAL_BYTES,
            memory_used_bytes=TOTAL_BYTES - free_bytes,
            memory_free_bytes=free_bytes,
            processes=tuple(GpuProcess(pid, size_bytes) for pid, size_bytes in self.programs.items()),
        )
        status = a_status()
        host = replace(status.host, memory_total_bytes=64 * GIB, memory_available_bytes=48 * GIB)
        self.agent.status = replace(status, gpus=(gpu,), host=host)
