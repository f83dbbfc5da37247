"""A simulated machine with GPUs, kept in a folder and shared by the processes that use it.

The agent's telemetry reads it as it would read NVML; simulated engines take memory from it as they
would from a driver. Its state is one JSON file that a person can read and edit, replaced whole under
a lock on a second file, so that any number of processes may use it at once. What a dead process held
is free again, as with a real driver: a process is known by its pid and its start time.

Make one by hand with `python -m nodeagent.simulators.gpu create DIR --profile workstation`.
"""

from __future__ import annotations

import argparse
import fcntl
import math
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from enum import StrEnum
from pathlib import Path

import msgspec
from msgspec import Struct

_MIB = 1024**2
_GIB = 1024**3

_STATE_FILE = "machine.json"
_LOCK_FILE = "machine.lock"

#: How fast a GPU warms up under work and cools down without, as time constants.
_WARMING_S = 20.0
_COOLING_S = 40.0


class SimulatedOutOfMemory(Exception):  # noqa: N818 - says what happened, as drivers do
    """There is not that much memory; nothing was taken. A real engine dies of it."""


class SimulatedGpuSpec(Struct, frozen=True, kw_only=True):
    """One simulated device.

    `unattributed_bytes` is what a desktop holds. With `unified_memory` the device has no memory of
    its own: everything is taken from the host's, and `memory_total_bytes` must be the host's.
    """

    name: str
    memory_total_bytes: int
    unified_memory: bool = False
    unattributed_bytes: int = 0
    idle_watts: float = 20.0
    power_limit_watts: float = 300.0
    idle_celsius: float = 35.0
    busy_celsius: float = 70.0


class SimulatedProcess(Struct, frozen=True, kw_only=True):
    """What one process holds. `start_ticks` tells it from a later process with the same pid."""

    pid: int
    start_ticks: int
    gpu_bytes: dict[int, int] = {}
    host_bytes: int = 0


class SimulatedActivity(Struct, frozen=True, kw_only=True):
    """How busy a GPU was: `warmth` from 0 to 1 at `at_s`, and working until `busy_until_s`."""

    warmth: float = 0.0
    at_s: float = 0.0
    busy_until_s: float = 0.0

    def warmth_at(self, now_s: float) -> float:
        """Warmth at a later time, if no more work comes."""
        busy_end = min(max(self.busy_until_s, self.at_s), max(now_s, self.at_s))
        warm = 1.0 - (1.0 - self.warmth) * math.exp(-(busy_end - self.at_s) / _WARMING_S)
        return warm * math.exp(-max(now_s - busy_end, 0.0) / _COOLING_S)


class SimulatedMachine(Struct, frozen=True, kw_only=True):
    """The machine at one moment; processes are in order of pid."""

    gpus: tuple[SimulatedGpuSpec, ...]
    host_memory_total_bytes: int
    host_memory_unattributed_bytes: int = 0
    processes: tuple[SimulatedProcess, ...] = ()
    activity: tuple[SimulatedActivity, ...] = ()

    @property
    def host_memory_available_bytes(self) -> int:
        """What the host, and with it every unified-memory GPU, has left."""
        unified = [index for index, gpu in enumerate(self.gpus) if gpu.unified_memory]
        taken = self.host_memory_unattributed_bytes + sum(
            self.gpus[index].unattributed_bytes for index in unified
        )
        for process in self.processes:
            taken += process.host_bytes + sum(process.gpu_bytes.get(index, 0) for index in unified)
        return max(self.host_memory_total_bytes - taken, 0)

    def gpu_total_bytes(self, gpu_index: int) -> int:
        """Memory of the device, or of the pool that it shares with the host."""
        gpu = self.gpus[gpu_index]
        return self.host_memory_total_bytes if gpu.unified_memory else gpu.memory_total_bytes

    def gpu_free_bytes(self, gpu_index: int) -> int:
        """What can still be allocated on the device."""
        gpu = self.gpus[gpu_index]
        if gpu.unified_memory:
            return self.host_memory_available_bytes
        taken = gpu.unattributed_bytes + sum(
            process.gpu_bytes.get(gpu_index, 0) for process in self.processes
        )
        return max(gpu.memory_total_bytes - taken, 0)

    def gpu_uuid(self, gpu_index: int) -> str:
        """A name for the device that is the same as long as the machine has the same GPUs."""
        return f"GPU-51300000-0000-0000-0000-{gpu_index:012d}"


class SimulatedReading(Struct, frozen=True, kw_only=True):
    """What sensors of a simulated GPU show."""

    utilization_percent: float
    memory_utilization_percent: float
    power_watts: float
    temperature_celsius: float


class SimulatedProfile(StrEnum):
    """Machines that can be made by name."""

    WORKSTATION = "workstation"
    SPARK = "spark"


_SPARK_MEMORY_BYTES = 127_600_748 * 1024

_PROFILES: dict[SimulatedProfile, SimulatedMachine] = {
    SimulatedProfile.WORKSTATION: SimulatedMachine(
        gpus=(
            SimulatedGpuSpec(
                name="NVIDIA GeForce RTX 5090",
                memory_total_bytes=32_607 * _MIB,
                unattributed_bytes=1_229 * _MIB,
                idle_watts=28.0,
                power_limit_watts=575.0,
                idle_celsius=36.0,
                busy_celsius=72.0,
            ),
        ),
        host_memory_total_bytes=64 * _GIB,
        host_memory_unattributed_bytes=9 * _GIB,
    ),
    SimulatedProfile.SPARK: SimulatedMachine(
        gpus=(
            SimulatedGpuSpec(
                name="NVIDIA GB10",
                memory_total_bytes=_SPARK_MEMORY_BYTES,
                unified_memory=True,
                idle_watts=11.0,
                power_limit_watts=140.0,
                idle_celsius=35.0,
                busy_celsius=68.0,
            ),
        ),
        host_memory_total_bytes=_SPARK_MEMORY_BYTES,
        host_memory_unattributed_bytes=5 * _GIB,
    ),
}


class SimulatedGpus:
    """A simulated machine in a folder. Every call is complete in itself; keep no state between.

    Calls take a file lock and rewrite a small file (well under a millisecond): fine once a second,
    not once a token.
    """

    def __init__(self, directory: Path, *, clock: Callable[[], float] = time.time) -> None:
        self._directory = directory
        self._clock = clock

    @classmethod
    def create(
        cls,
        directory: Path,
        *,
        gpus: Sequence[SimulatedGpuSpec],
        host_memory_total_bytes: int = 64 * _GIB,
        host_memory_unattributed_bytes: int = 8 * _GIB,
    ) -> SimulatedGpus:
        """Make a machine in a folder, which is made too; a machine that was there is replaced.

        Raises:
            ValueError: a unified-memory GPU's total is not the host's.
        """
        for gpu in gpus:
            if gpu.unified_memory and gpu.memory_total_bytes != host_memory_total_bytes:
                raise ValueError(f"{gpu.name} shares the host's memory, so its total must be the host's")
        machine = SimulatedMachine(
            gpus=tuple(gpus),
            host_memory_total_bytes=host_memory_total_bytes,
            host_memory_unattributed_bytes=host_memory_unattributed_bytes,
        )
        return cls._create(directory, machine)

    @classmethod
    def create_profile(cls, directory: Path, profile: SimulatedProfile) -> SimulatedGpus:
        """Make one of the machines that have a name; a machine that was there is replaced."""
        return cls._create(directory, _PROFILES[profile])

    @classmethod
    def _create(cls, directory: Path, machine: SimulatedMachine) -> SimulatedGpus:
        directory.mkdir(parents=True, exist_ok=True)
        made = cls(directory)
        with made._locked():
            made._write(machine)
        return made

    def read(self) -> SimulatedMachine:
        """The machine now, without what dead processes held. Changes nothing.

        Raises:
            FileNotFoundError: there is no machine in the folder.
            ValueError: the file is not a machine's (msgspec's errors are such).
        """
        return _without_dead(_read(self._directory / _STATE_FILE))

    def sensors(self, gpu_index: int, machine: SimulatedMachine | None = None) -> SimulatedReading:
        """What the sensors of a GPU show now: idle figures that rise with `touch_busy` and fall after."""
        found = machine or self.read()
        activity = found.activity[gpu_index] if gpu_index < len(found.activity) else SimulatedActivity()
        return _sensors(found.gpus[gpu_index], activity, self._clock())

    def allocate(self, pid: int, gpu_index: int, memory_bytes: int) -> None:
        """Take more memory of a GPU for a process.

        Raises:
            SimulatedOutOfMemory: there is not that much free; nothing is taken.
            ProcessLookupError: no such process.
            ValueError: no such GPU, or less than nothing is asked for.
        """
        with self._changing(pid) as (machine, change):
            held = _held(machine, pid).gpu_bytes.get(gpu_index, 0)
            change(_with_gpu_bytes(machine, pid, gpu_index, held + memory_bytes))

    def resize(self, pid: int, gpu_index: int, memory_bytes: int) -> None:
        """Let a process hold exactly so much of a GPU, as when an engine falls asleep or wakes.

        Raises:
            SimulatedOutOfMemory: there is not that much; the process holds what it held.
            ProcessLookupError: no such process.
            ValueError: no such GPU, or less than nothing is asked for.
        """
        with self._changing(pid) as (machine, change):
            change(_with_gpu_bytes(machine, pid, gpu_index, memory_bytes))

    def resize_host(self, pid: int, memory_bytes: int) -> None:
        """Let a process hold exactly so much host memory, as a sleeping engine does.

        Raises:
            SimulatedOutOfMemory: there is not that much; the process holds what it held.
            ProcessLookupError: no such process.
        """
        with self._changing(pid) as (machine, change):
            change(_with_host_bytes(machine, pid, memory_bytes))

    def free(self, pid: int) -> None:
        """Give back all that a process holds, GPU and host memory. Nothing held is no error."""
        with self._locked():
            machine = self.read()
            kept = tuple(process for process in machine.processes if process.pid != pid)
            self._write(msgspec.structs.replace(machine, processes=kept))

    def touch_busy(self, pid: int, seconds: float = 1.0) -> None:
        """Say that a process works its GPUs for so long from now. Call it once a second at most."""
        now_s = self._clock()
        with self._locked():
            machine = self.read()
            used = _held(machine, pid).gpu_bytes
            activity = list(machine.activity)
            activity += [SimulatedActivity()] * (len(machine.gpus) - len(activity))
            for index in used:
                before = activity[index]
                activity[index] = SimulatedActivity(
                    warmth=before.warmth_at(now_s),
                    at_s=now_s,
                    busy_until_s=max(before.busy_until_s, now_s + seconds),
                )
            self._write(msgspec.structs.replace(machine, activity=tuple(activity)))

    def set_unattributed(self, gpu_index: int, memory_bytes: int) -> None:
        """Let something that is nobody's (a desktop, a game) hold exactly so much of a GPU.

        Raises:
            SimulatedOutOfMemory: there is not that much.
            ValueError: no such GPU.
        """
        with self._locked():
            machine = self.read()
            _check_gpu(machine, gpu_index)
            gpus = list(machine.gpus)
            free = machine.gpu_free_bytes(gpu_index) + gpus[gpu_index].unattributed_bytes
            if memory_bytes > free:
                raise SimulatedOutOfMemory(_shortage(f"GPU {gpu_index}", memory_bytes, free))
            gpus[gpu_index] = msgspec.structs.replace(gpus[gpu_index], unattributed_bytes=memory_bytes)
            self._write(msgspec.structs.replace(machine, gpus=tuple(gpus)))

    @contextmanager
    def _changing(self, pid: int) -> Iterator[tuple[SimulatedMachine, Callable[[SimulatedMachine], None]]]:
        with self._locked():
            machine = self.read()
            if not any(process.pid == pid for process in machine.processes):
                start_ticks = _start_ticks(pid)
                if start_ticks is None:
                    raise ProcessLookupError(f"there is no process {pid}")
                newcomer = SimulatedProcess(pid=pid, start_ticks=start_ticks)
                machine = msgspec.structs.replace(machine, processes=(*machine.processes, newcomer))
            yield machine, self._write

    @contextmanager
    def _locked(self) -> Iterator[None]:
        descriptor = os.open(self._directory / _LOCK_FILE, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            yield
        finally:
            os.close(descriptor)  # releases the lock

    def _write(self, machine: SimulatedMachine) -> None:
        ordered = tuple(sorted(machine.processes, key=lambda process: process.pid))
        text = msgspec.json.format(msgspec.json.encode(msgspec.structs.replace(machine, processes=ordered)))
        descriptor, name = tempfile.mkstemp(dir=self._directory, prefix=".machine-", suffix=".json")
        try:
            with os.fdopen(descriptor, "wb") as file:
                file.write(text + b"\n")
            Path(name).replace(self._directory / _STATE_FILE)
        except BaseException:
            Path(name).unlink(missing_ok=True)
            raise


def _read(path: Path) -> SimulatedMachine:
    return msgspec.json.decode(path.read_bytes(), type=SimulatedMachine)


def _without_dead(machine: SimulatedMachine) -> SimulatedMachine:
    alive = tuple(found for found in machine.processes if _start_ticks(found.pid) == found.start_ticks)
    return msgspec.structs.replace(machine, processes=alive)


def _start_ticks(pid: int) -> int | None:
    """When a process started, in clock ticks since boot; None if it is gone or a zombie."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return None
    # The command, in brackets, may itself hold spaces and brackets.
    fields = stat[stat.rindex(")") + 2 :].split()
    return None if fields[0] in ("Z", "X") else int(fields[19])


def _held(machine: SimulatedMachine, pid: int) -> SimulatedProcess:
    for process in machine.processes:
        if process.pid == pid:
            return process
    return SimulatedProcess(pid=pid, start_ticks=0)


def _check_gpu(machine: SimulatedMachine, gpu_index: int) -> None:
    if not 0 <= gpu_index < len(machine.gpus):
        raise ValueError(f"the simulated machine has {len(machine.gpus)} GPUs; there is no GPU {gpu_index}")


def _check_size(memory_bytes: int) -> None:
    if memory_bytes < 0:
        raise ValueError("a process cannot hold less than nothing")


def _shortage(where: str, wanted: int, free: int) -> str:
    return f"simulated {where}: {wanted / _GIB:.2f} GiB wanted, {max(free, 0) / _GIB:.2f} GiB free"


def _with_gpu_bytes(
    machine: SimulatedMachine, pid: int, gpu_index: int, memory_bytes: int
) -> SimulatedMachine:
    _check_gpu(machine, gpu_index)
    _check_size(memory_bytes)
    process = _held(machine, pid)
    held = process.gpu_bytes.get(gpu_index, 0)
    growth = memory_bytes - held
    free = machine.gpu_free_bytes(gpu_index)
    if growth > free:
        raise SimulatedOutOfMemory(_shortage(f"GPU {gpu_index}", growth, free))
    gpu_bytes = {**process.gpu_bytes, gpu_index: memory_bytes}
    return _with_process(machine, msgspec.structs.replace(process, gpu_bytes=gpu_bytes))


def _with_host_bytes(machine: SimulatedMachine, pid: int, memory_bytes: int) -> SimulatedMachine:
    _check_size(memory_bytes)
    process = _held(machine, pid)
    growth = memory_bytes - process.host_bytes
    free = machine.host_memory_available_bytes
    if growth > free:
        raise SimulatedOutOfMemory(_shortage("host memory", growth, free))
    return _with_process(machine, msgspec.structs.replace(process, host_bytes=memory_bytes))


def _with_process(machine: SimulatedMachine, process: SimulatedProcess) -> SimulatedMachine:
    others = tuple(other for other in machine.processes if other.pid != process.pid)
    return msgspec.structs.replace(machine, processes=(*others, process))


def _sensors(gpu: SimulatedGpuSpec, activity: SimulatedActivity, now_s: float) -> SimulatedReading:
    warmth = activity.warmth_at(now_s)
    busy = now_s < activity.busy_until_s
    # A slow wave, so that a person who watches sees that figures are alive.
    wave = math.sin(now_s / 3.0)
    load = 0.88 + 0.08 * wave if busy else 0.0
    watts = gpu.idle_watts + (gpu.power_limit_watts - gpu.idle_watts) * 0.85 * load + wave
    return SimulatedReading(
        utilization_percent=round(100.0 * load),
        memory_utilization_percent=round(62.0 * load),
        power_watts=round(watts, 1),
        temperature_celsius=round(gpu.idle_celsius + (gpu.busy_celsius - gpu.idle_celsius) * warmth),
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Make or show a simulated machine; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m nodeagent.simulators.gpu", description=__doc__)
    verbs = parser.add_subparsers(dest="verb", required=True)
    create = verbs.add_parser("create", help="make a simulated machine in a folder")
    create.add_argument("directory", type=Path)
    profiles = [profile.value for profile in SimulatedProfile]
    create.add_argument("--profile", choices=profiles, default=SimulatedProfile.WORKSTATION.value)
    show = verbs.add_parser("show", help="print the machine as JSON")
    show.add_argument("directory", type=Path)
    chosen = parser.parse_args(arguments)
    if chosen.verb == "create":
        SimulatedGpus.create_profile(chosen.directory, SimulatedProfile(chosen.profile))
        return 0
    try:
        machine = SimulatedGpus(chosen.directory).read()
    except FileNotFoundError:
        sys.stderr.write(f"there is no simulated machine in {chosen.directory}\n")
        return 2
    sys.stdout.write(msgspec.json.format(msgspec.json.encode(machine)).decode() + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
