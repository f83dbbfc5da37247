"""Memory of a simulated GPU, held by a simulated engine for as long as it lives."""

from __future__ import annotations

import os
from collections.abc import Mapping

from nodeagent.simulators.gpu import SimulatedGpus, SimulatedMachine, SimulatedOutOfMemory

__all__ = ["GpuMemory", "SimulatedOutOfMemory", "gpu_memory_from"]


class GpuMemory:
    """This process's part of one simulated GPU."""

    def __init__(self, gpus: SimulatedGpus, gpu_index: int) -> None:
        self._gpus = gpus
        self._pid = os.getpid()
        self.gpu_index = gpu_index

    def total_bytes(self) -> int:
        """Memory of the device."""
        return self._gpus.read().gpu_total_bytes(self.gpu_index)

    def free_bytes(self) -> int:
        """What is free on it now."""
        return self._gpus.read().gpu_free_bytes(self.gpu_index)

    def hold(self, memory_bytes: int) -> None:
        """Hold exactly so much. Raises SimulatedOutOfMemory, and then holds what it held."""
        self._gpus.resize(self._pid, self.gpu_index, memory_bytes)

    def hold_host(self, memory_bytes: int) -> None:
        """Hold exactly so much host memory. Raises SimulatedOutOfMemory, and then holds what it held."""
        self._gpus.resize_host(self._pid, memory_bytes)

    def touch_busy(self) -> None:
        """Say that the GPU works, for the next second or so."""
        self._gpus.touch_busy(self._pid, 1.5)

    def free(self) -> None:
        """Give everything back."""
        self._gpus.free(self._pid)


def gpu_memory_from(gpus: SimulatedGpus | None, environment: Mapping[str, str]) -> GpuMemory | None:
    """The first GPU that `CUDA_VISIBLE_DEVICES` shows, by index or UUID; None if it shows none."""
    if gpus is None:
        return None
    machine = gpus.read()
    visible = environment.get("CUDA_VISIBLE_DEVICES")
    index = 0 if visible is None else _index_of(visible.split(",")[0].strip(), machine)
    return None if index is None or not machine.gpus else GpuMemory(gpus, index)


def _index_of(name: str, machine: SimulatedMachine) -> int | None:
    for index in range(len(machine.gpus)):
        if name in (str(index), machine.gpu_uuid(index)):
            return index
    return None
