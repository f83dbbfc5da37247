"""What NVML said, as plain values, and the pure step from there to the fleet's types.

No NVML and no clock here: every rule about missing figures, unified memory and lost devices can be
tested with values alone.
"""

from __future__ import annotations

from enum import IntEnum

from msgspec import Struct

from rung.types import Gpu, GpuHealth, GpuProcess, MemorySource


class NvmlCode(IntEnum):
    """The return codes of NVML that mean something to us."""

    UNINITIALIZED = 1
    NOT_SUPPORTED = 3
    DRIVER_NOT_LOADED = 9
    TIMEOUT = 10
    LIBRARY_NOT_FOUND = 12
    FUNCTION_NOT_FOUND = 13
    GPU_IS_LOST = 15
    RESET_REQUIRED = 16
    LIB_RM_VERSION_MISMATCH = 18
    ARGUMENT_VERSION_MISMATCH = 25
    UNKNOWN = 999


class MemoryReading(Struct, frozen=True, kw_only=True):
    """Device memory. NVML's own `used` is not kept: driver versions disagree on what it counts."""

    total_bytes: int
    free_bytes: int
    reserved_bytes: int | None = None


class ProcessReading(Struct, frozen=True, kw_only=True):
    """A process on a device. `memory_bytes` as read: None, 0 and the all-ones sentinel mean "unknown"."""

    pid: int
    memory_bytes: int | None = None


class GpuReading(Struct, frozen=True, kw_only=True):
    """One device as read; None is a figure that the platform does not give.

    `fault` is the code with which the device stopped answering, 0 while it answers. `memory_error`
    is the code of the memory query alone. `last_total_bytes` is the total when it last answered.
    `recent_fault` is a fatal event of the last minutes, in words.
    """

    index: int
    uuid: str
    name: str
    fault: int = 0
    memory: MemoryReading | None = None
    memory_error: int = 0
    last_total_bytes: int = 0
    mig_enabled: bool = False
    utilization_percent: int | None = None
    memory_utilization_percent: int | None = None
    power_milliwatts: int | None = None
    power_limit_milliwatts: int | None = None
    temperature_celsius: int | None = None
    clocks_event_reasons: int | None = None
    processes: tuple[ProcessReading, ...] = ()
    recent_fault: str = ""


class HostMemory(Struct, frozen=True, kw_only=True):
    """Host memory; `available_bytes` is MemAvailable, which counts reclaimable page cache as free."""

    total_bytes: int
    available_bytes: int


#: NVML's "no value" for a process' memory (WDDM and WSL2 have no such figure).
_NO_VALUE = 2**64 - 1

_IDLE_BIT = 0x1

_THROTTLE_NAMES: dict[int, str] = {
    0x2: "application_clocks",
    0x4: "sw_power_cap",
    0x8: "hw_slowdown",
    0x10: "sync_boost",
    0x20: "sw_thermal",
    0x40: "hw_thermal",
    0x80: "hw_power_brake",
    0x100: "display_clocks",
}

#: Parts whose GPU has no memory of its own, by a word of their product name.
_INTEGRATED_PARTS = ("GB10", "Thor", "Orin", "Xavier", "Tegra")

#: A total this near to the host's is the host's.
_SAME_POOL = 0.1


def merged_processes(*lists: tuple[ProcessReading, ...]) -> tuple[ProcessReading, ...]:
    """Each process once, in the order in which they are first met.

    One that both computes and draws is in both of NVML's lists, each time with all of its memory: its
    figures are not added, and a figure that is known outdoes one that is not.
    """
    found: dict[int, ProcessReading] = {}
    for reading in (each for listed in lists for each in listed):
        if reading.pid not in found or not _has_memory(found[reading.pid]):
            found[reading.pid] = reading
    return tuple(found.values())


def throttle_reasons(mask: int | None) -> tuple[str, ...]:
    """Names of why clocks are held down, lowest bit first. Idle is no throttling; unknown bits in hex."""
    names = []
    bit = _IDLE_BIT << 1
    while mask and bit <= mask:
        if mask & bit:
            names.append(_THROTTLE_NAMES.get(bit, hex(bit)))
        bit <<= 1
    return tuple(names)


def shares_host_memory(reading: GpuReading, host: HostMemory) -> bool:
    """Whether device and host are one pool.

    1. A device that stopped answering says nothing about its memory.
    2. A query that failed with anything but NOT_SUPPORTED is a failure, not a kind of device.
    3. NOT_SUPPORTED, unless the device is cut into MIG slices, whose parent hides its memory too.
    4. Success with a total of zero.
    5. Success with about the host's total, on a part that is known to be integrated.
    """
    if reading.fault:
        return False
    if reading.memory is None:
        return reading.memory_error == NvmlCode.NOT_SUPPORTED and not reading.mig_enabled
    if reading.memory.total_bytes == 0:
        return True
    integrated = any(part in reading.name for part in _INTEGRATED_PARTS)
    return integrated and abs(reading.memory.total_bytes - host.total_bytes) <= _SAME_POOL * host.total_bytes


def gpu_from_reading(reading: GpuReading, host: HostMemory) -> Gpu:
    """The device for the fleet. A device whose memory is not known has no free memory."""
    unified = shares_host_memory(reading, host)
    reserved: int | None = None
    if unified:
        total, free = host.total_bytes, host.available_bytes
    elif reading.memory is not None and not reading.fault:
        total, free = reading.memory.total_bytes, reading.memory.free_bytes
        reserved = reading.memory.reserved_bytes
    else:
        total, free = reading.last_total_bytes, 0
    return Gpu(
        index=reading.index,
        uuid=reading.uuid,
        name=reading.name,
        health=_health(reading, unified=unified),
        memory_source=MemorySource.HOST if unified else MemorySource.NVML,
        memory_total_bytes=total,
        memory_used_bytes=total - free,
        memory_free_bytes=free,
        memory_reserved_bytes=reserved,
        utilization_percent=reading.utilization_percent,
        memory_utilization_percent=reading.memory_utilization_percent,
        power_watts=_watts(reading.power_milliwatts),
        power_limit_watts=_watts(reading.power_limit_milliwatts),
        temperature_celsius=reading.temperature_celsius,
        throttle_reasons=throttle_reasons(reading.clocks_event_reasons),
        processes=tuple(_process(found) for found in reading.processes),
        unified_memory=unified,
    )


def warnings_of(reading: GpuReading) -> tuple[str, ...]:
    """What a person should know of a device, and what to do about it."""
    where = f"GPU {reading.index} ({reading.name or reading.uuid})"
    found = []
    if reading.fault == NvmlCode.UNKNOWN:
        found.append(
            f"{where}: NVML reports an unknown error. In a container this means that it lost access to "
            "the device: recreate the container."
        )
    elif reading.fault == NvmlCode.GPU_IS_LOST:
        found.append(f"{where} is lost: it fell off the bus, and needs a reset of the device or a reboot.")
    elif reading.fault:
        found.append(f"{where} does not answer ({_code_name(reading.fault)}).")
    elif reading.memory is None and reading.mig_enabled:
        found.append(f"{where} is cut into MIG slices, which are not supported; its memory is not counted.")
    elif reading.memory is None and reading.memory_error not in (0, NvmlCode.NOT_SUPPORTED):
        found.append(f"{where}: memory cannot be read ({_code_name(reading.memory_error)}).")
    if reading.recent_fault:
        found.append(f"{where} had a fault: {reading.recent_fault}.")
    return tuple(found)


def init_problem(code: int, text: str) -> str:
    """Why NVML cannot be initialised, and what to do about it. `text` is what NVML calls it."""
    if code == NvmlCode.LIB_RM_VERSION_MISMATCH:
        return f"{text}: the driver was updated under the running kernel module; reboot, or reload it"
    if code == NvmlCode.UNKNOWN:
        return f"{text}: in a container this means that it lost its devices; recreate the container"
    return text


def _health(reading: GpuReading, *, unified: bool) -> GpuHealth:
    if reading.fault:
        return GpuHealth.LOST
    if reading.memory is None and not unified:
        return GpuHealth.UNKNOWN
    return GpuHealth.DEGRADED if reading.recent_fault else GpuHealth.OK


def _process(reading: ProcessReading) -> GpuProcess:
    return GpuProcess(reading.pid, reading.memory_bytes if _has_memory(reading) else None)


def _has_memory(reading: ProcessReading) -> bool:
    # Some drivers say 0 for processes of another PID namespace.
    return reading.memory_bytes not in (None, 0, _NO_VALUE)


def _watts(milliwatts: int | None) -> float | None:
    return None if milliwatts is None else milliwatts / 1000.0


def _code_name(code: int) -> str:
    try:
        return f"NVML: {NvmlCode(code).name.lower().replace('_', ' ')}"
    except ValueError:
        return f"NVML error {code}"
