"""Figures from NVML, through pynvml.

NVML differs by driver, part and platform: any figure may be missing, any call may not exist, and a
device may stop answering and come back. Every such case is a value in the sample. All calls are made
by the one thread that owns the source, because a wedged driver can hold a call for ever.
"""

from __future__ import annotations

import ctypes
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import msgspec
import pynvml

from nodeagent.telemetry._host import read_host_memory
from nodeagent.telemetry._readings import (
    GpuReading,
    HostMemory,
    MemoryReading,
    NvmlCode,
    ProcessReading,
    gpu_from_reading,
    init_problem,
    merged_processes,
    warnings_of,
)
from nodeagent.telemetry._source import GpuSample

#: With these a device has stopped answering, whatever was asked.
_GONE = (NvmlCode.GPU_IS_LOST, NvmlCode.RESET_REQUIRED)

#: Xids that an application causes and the device survives; all others mark it as degraded.
_APPLICATION_XIDS = (13, 31, 43, 45, 68, 109)

#: A device that had a fatal event and works on is trusted again after so long.
_FAULT_MEMORY_S = 600.0

#: NVML is initialised anew after so many times `retry_s` at the latest.
_MAX_RETRY_FACTOR = 12

#: Events taken in one sample at most, so that a storm of them cannot hold up the figures.
_MAX_EVENTS = 16


class _GoneError(Exception):
    """A device stopped answering."""

    def __init__(self, code: int) -> None:
        super().__init__(code)
        self.code = code


@dataclass(kw_only=True)
class _Device:
    """A device as it is known between samples. `handle` is None while NVML does not give one."""

    index: int
    uuid: str
    name: str
    handle: Any
    fault: int = 0
    mig_enabled: bool = False
    last_total_bytes: int = 0
    recent_fault: str = ""
    recent_fault_s: float = 0.0


class NvmlSource:
    """The GPUs of this machine, as NVML shows them; a `GpuSource`.

    Without NVML's library there are no GPUs and nothing to warn of. With a library that fails, or
    devices that are lost, NVML is initialised anew until all is well: after `retry_s` seconds, and
    ever more seldom, since that is not free while other devices work.
    """

    def __init__(
        self,
        *,
        retry_s: float = 5.0,
        clock: Callable[[], float] = time.monotonic,
        host_memory: Callable[[], HostMemory] = read_host_memory,
    ) -> None:
        self._retry_s = retry_s
        self._next_retry_s = retry_s
        self._clock = clock
        self._host_memory = host_memory
        self._devices: list[_Device] = []
        self._open = False
        self._opened_s: float | None = None
        self._problem = ""
        self._driver_version = ""
        self._events: Any = None

    def read(self) -> GpuSample:
        """Look once; see `GpuSource`."""
        now_s = self._clock()
        if self._open and not any(device.fault for device in self._devices):
            self._next_retry_s = self._retry_s
        elif self._opened_s is None:
            self._opened_s = now_s
            self._reopen()
        elif now_s - self._opened_s >= self._next_retry_s:
            self._opened_s = now_s
            self._next_retry_s = min(self._next_retry_s * 2, self._retry_s * _MAX_RETRY_FACTOR)
            self._reopen()
        if self._open:
            self._take_events(now_s)
        readings = [self._read_device(device, now_s) for device in self._devices]
        host = self._host_memory()
        warnings = [f"NVML: {self._problem}"] if self._problem else []
        warnings += [warning for reading in readings for warning in warnings_of(reading)]
        return GpuSample(
            gpus=tuple(gpu_from_reading(reading, host) for reading in readings),
            driver_version=self._driver_version,
            warnings=tuple(warnings),
        )

    def close(self) -> None:
        """Shut NVML down."""
        if self._events is not None:
            _quietly(pynvml.nvmlEventSetFree, self._events)
            self._events = None
        if self._open:
            self._open = False
            _quietly(pynvml.nvmlShutdown)

    def _reopen(self) -> None:
        """Initialise NVML, again if need be. Devices that it no longer shows stay known, as lost."""
        self.close()
        self._problem = ""
        try:
            pynvml.nvmlInit()
            self._open = True
            found = [self._open_device(index) for index in range(pynvml.nvmlDeviceGetCount())]
        except pynvml.NVMLError as error:
            if error.value != NvmlCode.LIBRARY_NOT_FOUND:
                self._problem = init_problem(error.value, str(error))
            found = []
        self._driver_version = _text(_quietly(pynvml.nvmlSystemGetDriverVersion)) if self._open else ""
        self._devices = _merged(self._devices, found)
        self._watch_events()

    def _open_device(self, index: int) -> _Device:
        try:
            handle = pynvml.nvmlDeviceGetHandleByIndex(index)
            uuid = _text(pynvml.nvmlDeviceGetUUID(handle))
            name = _text(_optional(pynvml.nvmlDeviceGetName, handle))
            mig = _optional(pynvml.nvmlDeviceGetMigMode, handle)
        except pynvml.NVMLError as error:
            return _Device(index=index, uuid=f"index-{index}", name="", handle=None, fault=error.value)
        except _GoneError as gone:
            return _Device(index=index, uuid=f"index-{index}", name="", handle=None, fault=gone.code)
        return _Device(index=index, uuid=uuid, name=name, handle=handle, mig_enabled=bool(mig and mig[0]))

    def _read_device(self, device: _Device, now_s: float) -> GpuReading:
        if device.recent_fault and now_s - device.recent_fault_s > _FAULT_MEMORY_S:
            device.recent_fault = ""
        known = GpuReading(
            index=device.index,
            uuid=device.uuid,
            name=device.name,
            last_total_bytes=device.last_total_bytes,
            mig_enabled=device.mig_enabled,
            recent_fault=device.recent_fault,
        )
        if device.handle is None:
            return msgspec.structs.replace(known, fault=device.fault or NvmlCode.GPU_IS_LOST)
        try:
            reading = _figures(device.handle, known)
        except _GoneError as gone:
            device.fault = gone.code
            return msgspec.structs.replace(known, fault=gone.code)
        device.fault = 0
        if reading.memory is not None:
            device.last_total_bytes = reading.memory.total_bytes
        return reading

    def _watch_events(self) -> None:
        """Ask to be told of fatal events, where the platform can. The figures do not depend on it."""
        if not self._open:
            return
        wanted = pynvml.nvmlEventTypeXidCriticalError | pynvml.nvmlEventTypeDoubleBitEccError
        try:
            events = pynvml.nvmlEventSetCreate()
        except pynvml.NVMLError:
            return
        watched = 0
        for device in self._devices:
            if device.handle is None:
                continue
            try:
                # GeForce parts refuse ECC events, so ask only for what is offered.
                offered = pynvml.nvmlDeviceGetSupportedEventTypes(device.handle) & wanted
                if offered:
                    pynvml.nvmlDeviceRegisterEvents(device.handle, offered, events)
                    watched += 1
            except pynvml.NVMLError:
                continue
        if watched:
            self._events = events
        else:
            _quietly(pynvml.nvmlEventSetFree, events)

    def _take_events(self, now_s: float) -> None:
        """Note the events since the last sample. NVML queues them, so no thread has to wait there."""
        for _ in range(_MAX_EVENTS if self._events is not None else 0):
            try:
                event = pynvml.nvmlEventSetWait_v2(self._events, 1)
            except pynvml.NVMLError as error:
                if error.value != NvmlCode.TIMEOUT:
                    _quietly(pynvml.nvmlEventSetFree, self._events)
                    self._events = None
                return
            fault = _fault_of(event.eventType, event.eventData)
            for device in self._devices:
                if fault and device.handle is not None and _address(device.handle) == _address(event.device):
                    device.recent_fault = fault
                    device.recent_fault_s = now_s


def _figures(handle: Any, known: GpuReading) -> GpuReading:
    """All figures of a device. Raises _GoneError when it stops answering."""
    memory, memory_error = _memory(handle)
    utilization = _optional(pynvml.nvmlDeviceGetUtilizationRates, handle)
    limit = _first(handle, pynvml.nvmlDeviceGetEnforcedPowerLimit, pynvml.nvmlDeviceGetPowerManagementLimit)
    core = pynvml.NVML_TEMPERATURE_GPU
    temperature = _optional(pynvml.nvmlDeviceGetTemperatureV, handle, core)
    if temperature is None:
        temperature = _optional(pynvml.nvmlDeviceGetTemperature, handle, core)
    reasons = _first(
        handle,
        pynvml.nvmlDeviceGetCurrentClocksEventReasons,
        pynvml.nvmlDeviceGetCurrentClocksThrottleReasons,
    )
    computing = _first(
        handle, pynvml.nvmlDeviceGetComputeRunningProcesses_v3, pynvml.nvmlDeviceGetComputeRunningProcesses_v2
    )
    # A desktop or a game holds memory too, and is in a list of its own.
    drawing = _first(
        handle,
        pynvml.nvmlDeviceGetGraphicsRunningProcesses_v3,
        pynvml.nvmlDeviceGetGraphicsRunningProcesses_v2,
    )
    return msgspec.structs.replace(
        known,
        memory=memory,
        memory_error=memory_error,
        utilization_percent=None if utilization is None else utilization.gpu,
        memory_utilization_percent=None if utilization is None else utilization.memory,
        power_milliwatts=_optional(pynvml.nvmlDeviceGetPowerUsage, handle),
        power_limit_milliwatts=limit,
        temperature_celsius=temperature,
        clocks_event_reasons=reasons,
        processes=merged_processes(_processes(computing), _processes(drawing)),
    )


def _processes(found: Any) -> tuple[ProcessReading, ...]:
    return tuple(ProcessReading(pid=each.pid, memory_bytes=each.usedGpuMemory) for each in found or ())


def _memory(handle: Any) -> tuple[MemoryReading | None, int]:
    """Memory, or the code of why not. Raises _GoneError when the device stops answering.

    An unknown error counts as gone here and only here: this is the one query that every device that
    answers at all supports or refuses properly, while others are known to fail oddly under WSL2.
    """
    code = 0
    for version in (pynvml.nvmlMemory_v2, None):
        try:
            found = pynvml.nvmlDeviceGetMemoryInfo(handle, version=version)
        except pynvml.NVMLError as error:
            code = error.value
            if code in (*_GONE, NvmlCode.UNKNOWN, NvmlCode.UNINITIALIZED):
                raise _GoneError(code) from error
            continue
        reserved = found.reserved if version else None
        return MemoryReading(total_bytes=found.total, free_bytes=found.free, reserved_bytes=reserved), 0
    return None, code


def _first(handle: Any, *queries: Callable[[Any], Any]) -> Any:
    """What the first query that works gives, None if none does; older drivers have older names."""
    for query in queries:
        found = _optional(query, handle)
        if found is not None:
            return found
    return None


def _optional(query: Callable[..., Any], *arguments: Any) -> Any:
    """What NVML answers, None if it cannot. Raises _GoneError when the device stops answering."""
    try:
        return query(*arguments)
    except pynvml.NVMLError as error:
        if error.value in _GONE:
            raise _GoneError(error.value) from error
        return None


def _quietly(query: Callable[..., Any], *arguments: Any) -> Any:
    """What NVML answers to something that concerns no device, None if it cannot."""
    try:
        return query(*arguments)
    except pynvml.NVMLError:
        return None


def _merged(before: list[_Device], found: list[_Device]) -> list[_Device]:
    """Devices found now, with what was known of them, and those known before that are missing now."""
    known = {device.uuid: device for device in before if not device.uuid.startswith("index-")}
    for device in found:
        earlier = known.pop(device.uuid, None)
        if earlier is None and device.handle is None:
            # A lost device tells no UUID: the one that had its place is most likely it.
            earlier = next((other for other in known.values() if other.index == device.index), None)
            if earlier is not None:
                del known[earlier.uuid]
                device.uuid, device.name = earlier.uuid, earlier.name
        if earlier is not None:
            device.last_total_bytes = earlier.last_total_bytes
            device.recent_fault, device.recent_fault_s = earlier.recent_fault, earlier.recent_fault_s
    for missing in known.values():
        missing.handle = None
        missing.fault = missing.fault or NvmlCode.GPU_IS_LOST
    return sorted([*found, *known.values()], key=lambda device: (device.index, device.uuid))


def _fault_of(event_type: int, event_data: int) -> str:
    """A fatal event in words, "" if it was not fatal to the device."""
    if event_type == pynvml.nvmlEventTypeDoubleBitEccError:
        return "uncorrectable memory error"
    if event_type == pynvml.nvmlEventTypeXidCriticalError and event_data not in _APPLICATION_XIDS:
        return f"Xid {event_data}"
    return ""


def _address(handle: Any) -> int | None:
    return ctypes.cast(handle, ctypes.c_void_p).value


def _text(value: Any) -> str:
    if value is None:
        return ""
    return value.decode(errors="replace") if isinstance(value, bytes) else str(value)
