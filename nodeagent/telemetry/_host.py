"""The machine around the GPUs: memory, processors, disk."""

from __future__ import annotations

import os
import socket
from pathlib import Path

import psutil
from msgspec import Struct

from nodeagent.telemetry._readings import HostMemory
from rung.types import HostStatus


def read_host_memory() -> HostMemory:
    """Host memory now. In a container these are the whole host's figures."""
    memory = psutil.virtual_memory()
    return HostMemory(total_bytes=memory.total, available_bytes=memory.available)


class ProcessorTimes(Struct, frozen=True, kw_only=True):
    """Seconds of all processors together since boot."""

    all_s: float
    idle_s: float


class HostReader:
    """The host's figures. Processor use is since the look before, and 0 at the first."""

    def __init__(self, state_dir: Path) -> None:
        self._state_dir = state_dir
        self._processors = _processor_times()

    def read(self, memory: HostMemory | None = None) -> HostStatus:
        """The host now. `memory` replaces the host's own, for a machine that is simulated.

        May block on a file system that does not answer, so it is not for the event loop's thread.
        """
        known = memory or read_host_memory()
        disk_total, disk_free = _disk(self._state_dir)
        before, self._processors = self._processors, _processor_times()
        return HostStatus(
            memory_total_bytes=known.total_bytes,
            memory_available_bytes=known.available_bytes,
            disk_total_bytes=disk_total,
            disk_free_bytes=disk_free,
            cpu_count=os.cpu_count() or 1,
            cpu_utilization_percent=processor_use(before, self._processors),
            hostname=socket.gethostname(),
        )


def processor_use(before: ProcessorTimes, after: ProcessorTimes) -> float:
    """Use of all processors between two looks, 0 to 100."""
    elapsed = after.all_s - before.all_s
    if elapsed <= 0:
        return 0.0
    busy = elapsed - (after.idle_s - before.idle_s)
    return round(min(max(100.0 * busy / elapsed, 0.0), 100.0), 1)


def _processor_times() -> ProcessorTimes:
    # Not psutil.cpu_percent: it remembers per thread, and we come from any thread of a pool.
    times = psutil.cpu_times()
    # Guests' time is in `user` and `nice` already.
    guests = getattr(times, "guest", 0.0) + getattr(times, "guest_nice", 0.0)
    return ProcessorTimes(all_s=sum(times) - guests, idle_s=times.idle + getattr(times, "iowait", 0.0))


def _disk(state_dir: Path) -> tuple[int, int]:
    """Size and free bytes of the file system that holds, or will hold, a folder."""
    for folder in (state_dir, *state_dir.absolute().parents):
        try:
            usage = psutil.disk_usage(str(folder))
        except FileNotFoundError:
            continue
        return usage.total, usage.free
    return 0, 0
