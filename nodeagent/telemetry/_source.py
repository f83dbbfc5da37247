"""Where figures about GPUs come from: NVML, or a simulated machine."""

from __future__ import annotations

from pathlib import Path
from typing import Protocol

from msgspec import Struct

from nodeagent.simulators.gpu import SimulatedGpus, SimulatedMachine
from nodeagent.telemetry._readings import HostMemory
from rung.types import Gpu, GpuHealth, GpuProcess, MemorySource


class GpuSample(Struct, frozen=True, kw_only=True):
    """One look at the GPUs. `host_memory` is set if the machine around them is simulated too."""

    gpus: tuple[Gpu, ...] = ()
    driver_version: str = ""
    warnings: tuple[str, ...] = ()
    simulated: bool = False
    host_memory: HostMemory | None = None


class GpuSource(Protocol):
    """Something that can be looked at once a second. Used by one thread alone; calls may block."""

    def read(self) -> GpuSample:
        """Look once. Trouble of the platform is told in the sample, not raised."""
        ...

    def close(self) -> None:
        """Let go of the platform. Does not raise."""
        ...


class SimulatedSource:
    """A simulated machine seen as telemetry sees a real one."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._machine = SimulatedGpus(directory)

    def read(self) -> GpuSample:
        """Look once; a machine that is missing or broken is a node without GPUs, and a warning."""
        try:
            machine = self._machine.read()
        except (OSError, ValueError) as error:
            return GpuSample(warnings=(f"simulated machine in {self._directory}: {error}",), simulated=True)
        return GpuSample(
            gpus=tuple(self._gpu(machine, index) for index in range(len(machine.gpus))),
            simulated=True,
            host_memory=HostMemory(
                total_bytes=machine.host_memory_total_bytes,
                available_bytes=machine.host_memory_available_bytes,
            ),
        )

    def close(self) -> None:
        """Nothing is held."""

    def _gpu(self, machine: SimulatedMachine, index: int) -> Gpu:
        spec = machine.gpus[index]
        sensors = self._machine.sensors(index, machine)
        total, free = machine.gpu_total_bytes(index), machine.gpu_free_bytes(index)
        return Gpu(
            index=index,
            uuid=machine.gpu_uuid(index),
            name=spec.name,
            health=GpuHealth.OK,
            memory_source=MemorySource.SIMULATED,
            memory_total_bytes=total,
            memory_used_bytes=total - free,
            memory_free_bytes=free,
            utilization_percent=sensors.utilization_percent,
            memory_utilization_percent=sensors.memory_utilization_percent,
            power_watts=sensors.power_watts,
            power_limit_watts=spec.power_limit_watts,
            temperature_celsius=sensors.temperature_celsius,
            processes=tuple(
                GpuProcess(process.pid, process.gpu_bytes[index])
                for process in machine.processes
                if process.gpu_bytes.get(index)
            ),
            unified_memory=spec.unified_memory,
        )
