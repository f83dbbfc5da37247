"""The real pynvml, through our telemetry, against a stand-in library that these tests compile.

pynvml finds its library once for each process, so every case runs a process of its own.
"""

from __future__ import annotations

import ctypes.util
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import msgspec
import psutil
import pytest

from rung.types import GpuHealth, GpuProcess, MemorySource, NodeStatus

MIB = 1024**2
STUB = Path(__file__).parents[1] / "fakes" / "nvml_stub.c"

#: Prints each sample as a line of JSON until it is stopped.
PROGRAM = """
import asyncio, sys
from pathlib import Path
import msgspec
from nodeagent.telemetry import Telemetry
from nodeagent.telemetry._nvml import NvmlSource

async def main() -> None:
    telemetry = Telemetry(
        state_dir=Path("."), agent_version="test", interval_s=0.03, stale_after_s=float(sys.argv[1]),
        gpu_source=NvmlSource(retry_s=0.02),
    )
    await telemetry.start()
    async for status in telemetry.changes():
        print(msgspec.json.encode(status).decode(), flush=True)

asyncio.run(main())
"""

CARD = """
gpu GPU-5090 NVIDIA GeForce RTX 5090
memory 34190917632 20000000000 600000000
utilization 37 22
temperature 61
power 312500 575000
reasons 0x5
process 4242 19327352832
process 4343 -
"""

SPARK = """
gpu GPU-GB10 NVIDIA GB10
utilization 12 0
temperature 35
power 11170 0
process 4444 43000000
"""


class Machine:
    """The figures that the library shows, and the telemetry that sees them."""

    def __init__(self, process: subprocess.Popen[str], file: Path) -> None:
        self._process = process
        self._file = file

    def show(self, text: str) -> None:
        show(self._file, text)

    def first(self, wanted: Callable[[NodeStatus], bool]) -> NodeStatus:
        assert self._process.stdout is not None
        for _ in range(600):
            line = self._process.stdout.readline()
            assert line, "the telemetry ended"
            status = msgspec.json.decode(line, type=NodeStatus)
            if wanted(status):
                return status
        raise AssertionError(f"never seen; at last: {status}")


def show(file: Path, text: str) -> None:
    new = file.with_suffix(".new")
    new.write_text("driver 580.95.05\n" + text)
    new.replace(file)


def build(folder: Path, *options: str) -> Path:
    flags = ["-O1", "-Wall", "-Wextra", "-Werror", "-shared", "-fPIC", "-fvisibility=hidden"]
    name = "libnvidia-ml.so.1"
    subprocess.run(
        ["gcc", *flags, *options, f"-Wl,-soname,{name}", "-o", str(folder / name), str(STUB)], check=True
    )
    return folder


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(tmp_path_factory.mktemp("nvml"))


@pytest.fixture(scope="module")
def old_library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(tmp_path_factory.mktemp("nvml-old"), "-DOLD_DRIVER")


@contextmanager
def watching(library: Path, folder: Path, text: str, *, stale_after_s: float = 60.0) -> Iterator[Machine]:
    file = folder / "machine.txt"
    show(file, text)
    process = subprocess.Popen(
        [sys.executable, "-c", PROGRAM, str(stale_after_s)],
        env={**os.environ, "LD_LIBRARY_PATH": str(library), "NVML_STUB_FILE": str(file)},
        cwd=folder,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        yield Machine(process, file)
    finally:
        process.kill()
        process.communicate()


def anything(status: NodeStatus) -> bool:
    """Any sample of the library, which may come late on a machine under load."""
    return not any("has not answered" in warning for warning in status.warnings)


def test_a_card_with_every_figure(library: Path, tmp_path: Path) -> None:
    with watching(library, tmp_path, CARD) as machine:
        status = machine.first(anything)
    assert status.driver_version == "580.95.05"
    assert status.warnings == ()
    assert not status.simulated
    (gpu,) = status.gpus
    assert (gpu.index, gpu.uuid, gpu.name) == (0, "GPU-5090", "NVIDIA GeForce RTX 5090")
    assert gpu.health is GpuHealth.OK
    assert gpu.memory_source is MemorySource.NVML
    assert gpu.memory_total_bytes == 34_190_917_632
    assert gpu.memory_free_bytes == 20_000_000_000
    assert gpu.memory_used_bytes == 14_190_917_632
    assert gpu.memory_reserved_bytes == 600_000_000
    assert (gpu.utilization_percent, gpu.memory_utilization_percent) == (37, 22)
    assert (gpu.power_watts, gpu.power_limit_watts) == (312.5, 575.0)
    assert gpu.temperature_celsius == 61
    assert gpu.throttle_reasons == ("sw_power_cap",)
    assert gpu.processes == (GpuProcess(4242, 19_327_352_832), GpuProcess(4343, None))


@pytest.mark.parametrize("driver", ["library", "old_library"])
def test_a_desktop_and_a_game_are_listed_and_each_process_once(
    driver: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    drawing = "graphics 900 450000000\ngraphics 4242 19327352832\ngraphics 4343 77\ngraphics 901 -\n"
    with watching(request.getfixturevalue(driver), tmp_path, CARD + drawing) as machine:
        (gpu,) = machine.first(anything).gpus
    assert gpu.processes == (
        GpuProcess(4242, 19_327_352_832),
        GpuProcess(4343, 77),
        GpuProcess(900, 450_000_000),
        GpuProcess(901, None),
    )


def test_figures_are_followed(library: Path, tmp_path: Path) -> None:
    with watching(library, tmp_path, CARD) as machine:
        machine.first(anything)
        machine.show(CARD.replace("20000000000", "10000000000").replace("temperature 61", "temperature 83"))
        changed = machine.first(lambda status: status.gpus[0].temperature_celsius == 83)
    assert changed.gpus[0].memory_free_bytes == 10_000_000_000


def test_memory_that_is_not_supported_is_one_pool_with_the_host(library: Path, tmp_path: Path) -> None:
    with watching(library, tmp_path, SPARK) as machine:
        status = machine.first(anything)
    (gpu,) = status.gpus
    assert gpu.unified_memory
    assert gpu.memory_source is MemorySource.HOST
    assert gpu.memory_total_bytes == psutil.virtual_memory().total == status.host.memory_total_bytes
    # Sampled a moment apart, on a machine where other things run.
    assert abs(gpu.memory_free_bytes - status.host.memory_available_bytes) < 512 * MIB
    assert (gpu.utilization_percent, gpu.temperature_celsius, gpu.power_watts) == (12, 35, 11.17)
    assert gpu.power_limit_watts is None
    assert gpu.processes == (GpuProcess(4444, 43_000_000),)
    assert gpu.health is GpuHealth.OK
    assert status.warnings == ()


def test_a_lost_card_is_lost_alone_and_comes_back(library: Path, tmp_path: Path) -> None:
    with watching(library, tmp_path, CARD + SPARK) as machine:
        machine.first(anything)
        machine.show(CARD + "error 15\n" + SPARK)
        lost = machine.first(lambda status: status.gpus[0].health is GpuHealth.LOST)
        assert len(lost.gpus) == 2
        assert lost.gpus[0].uuid == "GPU-5090"
        assert not lost.gpus[0].unified_memory
        assert lost.gpus[0].memory_total_bytes == 34_190_917_632
        assert lost.gpus[0].memory_free_bytes == 0
        assert lost.gpus[0].temperature_celsius is None
        assert lost.gpus[1].health is GpuHealth.OK
        assert any("is lost" in warning for warning in lost.warnings)
        # Also through several initialisations that do not help.
        for _ in range(10):
            still = machine.first(anything)
            assert [gpu.uuid for gpu in still.gpus] == ["GPU-5090", "GPU-GB10"]
            assert still.gpus[0].health is GpuHealth.LOST
        machine.show(CARD + SPARK)
        well = machine.first(lambda status: status.gpus[0].health is GpuHealth.OK)
        assert well.gpus[0].temperature_celsius == 61
        assert well.warnings == ()


def test_a_card_that_is_not_listed_any_more_is_lost(library: Path, tmp_path: Path) -> None:
    with watching(library, tmp_path, SPARK + CARD) as machine:
        machine.first(anything)
        machine.show(SPARK + CARD + "error 15\n")
        machine.first(lambda status: status.gpus[1].health is GpuHealth.LOST)
        machine.show(SPARK)
        for _ in range(10):
            status = machine.first(anything)
            assert [(gpu.uuid, gpu.health) for gpu in status.gpus] == [
                ("GPU-GB10", GpuHealth.OK),
                ("GPU-5090", GpuHealth.LOST),
            ]


def test_an_unknown_error_asks_to_recreate_the_container(library: Path, tmp_path: Path) -> None:
    with watching(library, tmp_path, CARD) as machine:
        machine.first(anything)
        machine.show(CARD + "error 999\n")
        status = machine.first(lambda status: status.gpus[0].health is GpuHealth.LOST)
    assert "recreate the container" in status.warnings[0]


def test_a_memory_query_that_fails_is_not_unified_memory(library: Path, tmp_path: Path) -> None:
    with watching(library, tmp_path, CARD + "memory_error 10\n") as machine:
        (gpu,) = machine.first(anything).gpus
    assert not gpu.unified_memory
    assert gpu.health is GpuHealth.UNKNOWN
    assert gpu.temperature_celsius == 61


def test_a_card_cut_in_slices_is_not_unified_memory(library: Path, tmp_path: Path) -> None:
    with watching(library, tmp_path, "gpu GPU-H100 NVIDIA H100\nmig\n") as machine:
        status = machine.first(anything)
    assert not status.gpus[0].unified_memory
    assert "MIG" in status.warnings[0]


def test_an_old_driver_gives_what_it_has(old_library: Path, tmp_path: Path) -> None:
    with watching(old_library, tmp_path, CARD) as machine:
        status = machine.first(anything)
    assert status.warnings == ()
    (gpu,) = status.gpus
    assert gpu.memory_used_bytes == 14_190_917_632
    assert gpu.memory_reserved_bytes is None
    assert gpu.temperature_celsius == 61
    assert gpu.throttle_reasons == ("sw_power_cap",)
    assert [process.pid for process in gpu.processes] == [4242, 4343]


def test_a_driver_that_is_not_loaded_is_a_warning_until_it_is(library: Path, tmp_path: Path) -> None:
    with watching(library, tmp_path, "init_error 9\n" + CARD) as machine:
        status = machine.first(anything)
        assert status.gpus == ()
        assert status.warnings == ("NVML: Driver Not Loaded",)
        assert status.host.memory_total_bytes > 0
        machine.show(CARD)
        well = machine.first(lambda status: len(status.gpus) == 1)
        assert well.warnings == ()


def test_a_driver_that_hangs_is_told_and_recovers(library: Path, tmp_path: Path) -> None:
    with watching(library, tmp_path, CARD, stale_after_s=0.5) as machine:
        machine.first(anything)
        machine.show("hang\n" + CARD)
        hung = machine.first(lambda status: bool(status.warnings))
        assert "hangs" in hung.warnings[0]
        assert hung.gpus[0].health is GpuHealth.UNKNOWN
        machine.show(CARD)
        assert machine.first(lambda status: not status.warnings).gpus[0].health is GpuHealth.OK


def test_a_fatal_event_degrades_and_an_applications_does_not(library: Path, tmp_path: Path) -> None:
    with watching(library, tmp_path, CARD + SPARK) as machine:
        machine.first(anything)
        machine.show(CARD + "xid 31\n" + SPARK + "xid 79\n")
        status = machine.first(lambda status: status.gpus[1].health is GpuHealth.DEGRADED)
    assert status.gpus[0].health is GpuHealth.OK
    assert status.warnings == ("GPU 1 (NVIDIA GB10) had a fault: Xid 79.",)


def test_a_library_without_devices_is_a_node_without_gpus(library: Path, tmp_path: Path) -> None:
    with watching(library, tmp_path, "") as machine:
        status = machine.first(anything)
    assert status.gpus == ()
    assert status.driver_version == "580.95.05"
    assert status.warnings == ()


@pytest.mark.skipif(
    ctypes.util.find_library("nvidia-ml") is not None, reason="this machine has NVIDIA's own library"
)
def test_no_library_is_a_node_without_gpus(tmp_path: Path) -> None:
    with watching(tmp_path, tmp_path, "") as machine:
        status = machine.first(anything)
    assert status.gpus == ()
    assert status.driver_version == ""
    assert status.warnings == ()
    assert status.host.memory_total_bytes > 0
