"""From what NVML said to the fleet's types: every odd case of a figure, a part and a failure."""

from __future__ import annotations

import pytest

from nodeagent.telemetry._host import ProcessorTimes, processor_use
from nodeagent.telemetry._owners import Kin, deployment_of, kin_of, with_owners
from nodeagent.telemetry._readings import (
    GpuReading,
    HostMemory,
    MemoryReading,
    NvmlCode,
    ProcessReading,
    gpu_from_reading,
    init_problem,
    merged_processes,
    throttle_reasons,
    warnings_of,
)
from rung.types import Gpu, GpuHealth, GpuProcess, MemorySource

GIB = 1024**3
HOST = HostMemory(total_bytes=127_600_748 * 1024, available_bytes=100 * GIB)
CARD_MEMORY = MemoryReading(total_bytes=32 * GIB, free_bytes=20 * GIB, reserved_bytes=GIB // 2)


def rtx(
    *,
    memory: MemoryReading | None = CARD_MEMORY,
    name: str = "NVIDIA GeForce RTX 5090",
    fault: int = 0,
    memory_error: int = 0,
    mig_enabled: bool = False,
    recent_fault: str = "",
    processes: tuple[ProcessReading, ...] = (),
) -> GpuReading:
    return GpuReading(
        index=0,
        uuid="GPU-1",
        name=name,
        memory=memory,
        fault=fault,
        memory_error=memory_error,
        mig_enabled=mig_enabled,
        recent_fault=recent_fault,
        processes=processes,
        last_total_bytes=32 * GIB,
    )


def test_used_is_total_minus_free_and_reserved_is_told_apart() -> None:
    gpu = gpu_from_reading(rtx(), HOST)
    assert (gpu.memory_total_bytes, gpu.memory_free_bytes, gpu.memory_used_bytes) == (
        32 * GIB,
        20 * GIB,
        12 * GIB,
    )
    assert gpu.memory_reserved_bytes == GIB // 2
    assert gpu.memory_source is MemorySource.NVML
    assert gpu.health is GpuHealth.OK
    assert not gpu.unified_memory


def test_figures_that_are_missing_stay_missing() -> None:
    gpu = gpu_from_reading(rtx(), HOST)
    assert gpu.utilization_percent is None
    assert gpu.memory_utilization_percent is None
    assert gpu.power_watts is None
    assert gpu.power_limit_watts is None
    assert gpu.temperature_celsius is None
    assert gpu.throttle_reasons == ()


def test_power_is_in_watts() -> None:
    reading = GpuReading(index=0, uuid="u", name="n", power_milliwatts=11_170, power_limit_milliwatts=575_000)
    gpu = gpu_from_reading(reading, HOST)
    assert (gpu.power_watts, gpu.power_limit_watts) == (11.17, 575.0)


UNIFIED = {
    "not supported": rtx(memory=None, memory_error=NvmlCode.NOT_SUPPORTED, name="NVIDIA GB10"),
    "total of zero": rtx(memory=MemoryReading(total_bytes=0, free_bytes=0), name="NVIDIA GB10"),
    "the host's total": rtx(
        memory=MemoryReading(total_bytes=120 * GIB, free_bytes=7 * GIB), name="NVIDIA GB10"
    ),
}


@pytest.mark.parametrize("reading", UNIFIED.values(), ids=UNIFIED.keys())
def test_one_pool_is_counted_from_available_host_memory(reading: GpuReading) -> None:
    gpu = gpu_from_reading(reading, HOST)
    assert gpu.unified_memory
    assert gpu.memory_source is MemorySource.HOST
    assert gpu.memory_total_bytes == HOST.total_bytes
    assert gpu.memory_free_bytes == 100 * GIB
    assert gpu.memory_used_bytes == HOST.total_bytes - 100 * GIB
    assert gpu.memory_reserved_bytes is None
    assert gpu.health is GpuHealth.OK
    assert warnings_of(reading) == ()


NOT_UNIFIED = {
    "lost": rtx(memory=None, fault=NvmlCode.GPU_IS_LOST, name="NVIDIA GB10"),
    "unknown error": rtx(memory=None, fault=NvmlCode.UNKNOWN, name="NVIDIA GB10"),
    "timeout": rtx(memory=None, memory_error=NvmlCode.TIMEOUT, name="NVIDIA GB10"),
    "MIG": rtx(memory=None, memory_error=NvmlCode.NOT_SUPPORTED, mig_enabled=True),
    "a card as large as the host": rtx(
        memory=MemoryReading(total_bytes=HOST.total_bytes, free_bytes=GIB), name="NVIDIA H200"
    ),
    "an integrated part with memory of its own": rtx(
        memory=MemoryReading(total_bytes=32 * GIB, free_bytes=GIB), name="NVIDIA GB10"
    ),
}


@pytest.mark.parametrize("reading", NOT_UNIFIED.values(), ids=NOT_UNIFIED.keys())
def test_a_failure_is_not_unified_memory(reading: GpuReading) -> None:
    gpu = gpu_from_reading(reading, HOST)
    assert not gpu.unified_memory
    assert gpu.memory_source is MemorySource.NVML


@pytest.mark.parametrize(
    ("code", "text"),
    [
        (NvmlCode.GPU_IS_LOST, "fell off the bus"),
        (NvmlCode.UNKNOWN, "recreate the container"),
        (NvmlCode.RESET_REQUIRED, "reset required"),
        (77, "NVML error 77"),
    ],
)
def test_a_lost_device_has_nothing_free_and_says_what_to_do(code: int, text: str) -> None:
    reading = rtx(fault=code)
    gpu = gpu_from_reading(reading, HOST)
    assert gpu.health is GpuHealth.LOST
    assert gpu.memory_total_bytes == 32 * GIB
    assert gpu.memory_free_bytes == 0
    (warning,) = warnings_of(reading)
    assert text in warning
    assert "GPU 0 (NVIDIA GeForce RTX 5090)" in warning


def test_memory_that_cannot_be_read_leaves_health_unknown() -> None:
    reading = rtx(memory=None, memory_error=NvmlCode.TIMEOUT)
    assert gpu_from_reading(reading, HOST).health is GpuHealth.UNKNOWN
    assert warnings_of(reading) == (
        "GPU 0 (NVIDIA GeForce RTX 5090): memory cannot be read (NVML: timeout).",
    )


def test_a_fatal_event_degrades() -> None:
    reading = rtx(recent_fault="Xid 79")
    assert gpu_from_reading(reading, HOST).health is GpuHealth.DEGRADED
    assert "Xid 79" in warnings_of(reading)[0]


def test_memory_of_processes_is_unknown_rather_than_wrong() -> None:
    reading = rtx(
        processes=(
            ProcessReading(pid=1, memory_bytes=5 * GIB),
            ProcessReading(pid=2, memory_bytes=None),
            ProcessReading(pid=3, memory_bytes=0),
            ProcessReading(pid=4, memory_bytes=2**64 - 1),
        )
    )
    assert gpu_from_reading(reading, HOST).processes == (
        GpuProcess(1, 5 * GIB),
        GpuProcess(2, None),
        GpuProcess(3, None),
        GpuProcess(4, None),
    )


def test_a_process_in_both_lists_is_there_once_with_what_is_known_of_its_memory() -> None:
    computing = (ProcessReading(pid=1, memory_bytes=5), ProcessReading(pid=2, memory_bytes=0))
    drawing = (
        ProcessReading(pid=3),
        ProcessReading(pid=2, memory_bytes=7),
        ProcessReading(pid=1, memory_bytes=2**64 - 1),
    )
    assert merged_processes(computing, drawing) == (
        ProcessReading(pid=1, memory_bytes=5),
        ProcessReading(pid=2, memory_bytes=7),
        ProcessReading(pid=3),
    )


@pytest.mark.parametrize(
    ("mask", "names"),
    [
        (None, ()),
        (0, ()),
        (0x1, ()),
        (0x5, ("sw_power_cap",)),
        (0x68, ("hw_slowdown", "sw_thermal", "hw_thermal")),
        (0x1000, ("0x1000",)),
    ],
)
def test_throttle_reasons_have_names_and_idle_is_none(mask: int | None, names: tuple[str, ...]) -> None:
    assert throttle_reasons(mask) == names


def test_trouble_with_the_driver_says_what_to_do() -> None:
    assert "reboot" in init_problem(18, "Driver/library version mismatch")
    assert "recreate the container" in init_problem(999, "Unknown Error")
    assert init_problem(9, "Driver Not Loaded") == "Driver Not Loaded"


FAMILY = {
    500: Kin(parent=100, session=500),  # an engine that we started: leads a session
    501: Kin(parent=500, session=500),
    502: Kin(parent=501, session=502),
    600: Kin(parent=1, session=500),  # its parent died; it is still of the session
    700: Kin(parent=1, session=700),
    100: Kin(parent=1, session=90),
    1: Kin(parent=0, session=1),
}


@pytest.mark.parametrize(
    ("pid", "deployment"), [(500, "llm"), (501, "llm"), (502, "llm"), (600, "llm"), (700, ""), (9, "")]
)
def test_a_process_belongs_to_the_engine_above_it(pid: int, deployment: str) -> None:
    assert deployment_of(pid, {500: "llm"}, FAMILY.get) == deployment


def test_the_nearest_engine_wins_and_a_circle_ends() -> None:
    assert deployment_of(502, {500: "outer", 501: "inner"}, FAMILY.get) == "inner"
    assert deployment_of(5, {1: "x"}, {5: Kin(6, 5), 6: Kin(5, 5)}.get) == ""


def test_a_gpu_of_ours_is_told_whose_its_processes_are() -> None:
    gpu = Gpu(
        index=0,
        uuid="u",
        name="n",
        health=GpuHealth.OK,
        memory_source=MemorySource.NVML,
        memory_total_bytes=1,
        memory_used_bytes=1,
        memory_free_bytes=0,
        processes=(GpuProcess(501, 7), GpuProcess(700, 8)),
    )
    (owned,) = with_owners((gpu,), {500: "llm"}, FAMILY.get)
    assert owned.processes == (GpuProcess(501, 7, "llm"), GpuProcess(700, 8, ""))
    assert with_owners((gpu,), {}, FAMILY.get) == (gpu,)


def test_a_process_that_is_gone_has_no_kin() -> None:
    assert kin_of(2**22 + 1) is None


def test_processor_use_is_of_the_time_between_two_looks() -> None:
    before = ProcessorTimes(all_s=1000.0, idle_s=900.0)
    assert processor_use(before, ProcessorTimes(all_s=1010.0, idle_s=907.5)) == 25.0
    assert processor_use(before, before) == 0.0
    assert processor_use(before, ProcessorTimes(all_s=1010.0, idle_s=899.0)) == 100.0
