"""The simulated machine: one pool or two, dead processes, over-commitment, many processes at once."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import msgspec
import pytest

from nodeagent.simulators.gpu import (
    SimulatedActivity,
    SimulatedGpus,
    SimulatedGpuSpec,
    SimulatedOutOfMemory,
    SimulatedProfile,
    main,
)

GIB = 1024**3


class Clock:
    def __init__(self) -> None:
        self.now_s = 1_000_000.0

    def __call__(self) -> float:
        return self.now_s


def two_gpus(directory: Path) -> SimulatedGpus:
    return SimulatedGpus.create(
        directory,
        gpus=[
            SimulatedGpuSpec(name="A", memory_total_bytes=10 * GIB, unattributed_bytes=1 * GIB),
            SimulatedGpuSpec(name="B", memory_total_bytes=20 * GIB),
        ],
        host_memory_total_bytes=32 * GIB,
        host_memory_unattributed_bytes=2 * GIB,
    )


@contextmanager
def other_process() -> Iterator[subprocess.Popen[bytes]]:
    """A process that lives until its input closes."""
    process = subprocess.Popen([sys.executable, "-c", "import sys; sys.stdin.read()"], stdin=subprocess.PIPE)
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def test_memory_is_taken_from_the_gpu_that_was_named(tmp_path: Path) -> None:
    gpus = two_gpus(tmp_path)
    gpus.allocate(os.getpid(), 0, 3 * GIB)
    gpus.allocate(os.getpid(), 0, 1 * GIB)
    machine = gpus.read()
    assert machine.gpu_free_bytes(0) == 5 * GIB
    assert machine.gpu_free_bytes(1) == 20 * GIB
    assert machine.host_memory_available_bytes == 30 * GIB


def test_who_asks_for_too_much_gets_nothing(tmp_path: Path) -> None:
    gpus = two_gpus(tmp_path)
    gpus.allocate(os.getpid(), 0, 8 * GIB)
    with pytest.raises(SimulatedOutOfMemory, match=r"GPU 0: 2\.00 GiB wanted, 1\.00 GiB free"):
        gpus.allocate(os.getpid(), 0, 2 * GIB)
    assert gpus.read().gpu_free_bytes(0) == 1 * GIB


def test_sleeping_moves_memory_to_the_host_and_waking_back(tmp_path: Path) -> None:
    gpus = two_gpus(tmp_path)
    gpus.allocate(os.getpid(), 1, 15 * GIB)
    gpus.resize_host(os.getpid(), 14 * GIB)
    gpus.resize(os.getpid(), 1, 1 * GIB)
    asleep = gpus.read()
    assert asleep.gpu_free_bytes(1) == 19 * GIB
    assert asleep.host_memory_available_bytes == 16 * GIB
    gpus.free(os.getpid())
    freed = gpus.read()
    assert freed.gpu_free_bytes(1) == 20 * GIB
    assert freed.host_memory_available_bytes == 30 * GIB
    assert freed.processes == ()


def test_host_memory_is_a_budget_too(tmp_path: Path) -> None:
    gpus = two_gpus(tmp_path)
    with pytest.raises(SimulatedOutOfMemory, match="host memory"):
        gpus.resize_host(os.getpid(), 31 * GIB)


def test_unified_memory_is_one_pool(tmp_path: Path) -> None:
    gpus = SimulatedGpus.create_profile(tmp_path, SimulatedProfile.SPARK)
    before = gpus.read()
    assert before.gpu_total_bytes(0) == before.host_memory_total_bytes == 127_600_748 * 1024
    gpus.allocate(os.getpid(), 0, 60 * GIB)
    gpus.resize_host(os.getpid(), 40 * GIB)
    machine = gpus.read()
    assert machine.gpu_free_bytes(0) == machine.host_memory_available_bytes
    assert before.host_memory_available_bytes - machine.host_memory_available_bytes == 100 * GIB
    with pytest.raises(SimulatedOutOfMemory):
        gpus.allocate(os.getpid(), 0, 30 * GIB)


def test_unified_memory_must_be_as_large_as_the_hosts(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="shares the host's memory"):
        SimulatedGpus.create(
            tmp_path,
            gpus=[SimulatedGpuSpec(name="X", memory_total_bytes=1, unified_memory=True)],
            host_memory_total_bytes=2,
        )


def test_what_a_dead_process_held_is_free(tmp_path: Path) -> None:
    gpus = two_gpus(tmp_path)
    with other_process() as process:
        gpus.allocate(process.pid, 1, 5 * GIB)
        assert gpus.read().gpu_free_bytes(1) == 15 * GIB
        process.kill()
        # Not reaped yet: a zombie holds no memory either.
        os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
        assert gpus.read().gpu_free_bytes(1) == 20 * GIB
    with pytest.raises(ProcessLookupError):
        gpus.allocate(process.pid, 1, GIB)


def test_a_reused_pid_is_another_process(tmp_path: Path) -> None:
    gpus = two_gpus(tmp_path)
    gpus.allocate(os.getpid(), 1, 5 * GIB)
    path = tmp_path / "machine.json"
    state = json.loads(path.read_text())
    state["processes"][0]["start_ticks"] -= 1
    path.write_text(json.dumps(state))
    assert gpus.read().gpu_free_bytes(1) == 20 * GIB


def test_unknown_gpu_and_negative_size_are_refused(tmp_path: Path) -> None:
    gpus = two_gpus(tmp_path)
    with pytest.raises(ValueError, match="no GPU 2"):
        gpus.allocate(os.getpid(), 2, 1)
    with pytest.raises(ValueError, match="less than nothing"):
        gpus.resize(os.getpid(), 0, -1)


def test_a_desktop_that_grows_is_counted(tmp_path: Path) -> None:
    gpus = two_gpus(tmp_path)
    gpus.set_unattributed(0, 6 * GIB)
    assert gpus.read().gpu_free_bytes(0) == 4 * GIB
    with pytest.raises(SimulatedOutOfMemory):
        gpus.set_unattributed(0, 11 * GIB)


def test_sensors_move_with_work(tmp_path: Path) -> None:
    clock = Clock()
    two_gpus(tmp_path)
    gpus = SimulatedGpus(tmp_path, clock=clock)
    gpus.allocate(os.getpid(), 0, GIB)
    idle = gpus.sensors(0)
    assert idle.utilization_percent == 0
    assert idle.temperature_celsius == 35
    for _ in range(60):
        gpus.touch_busy(os.getpid(), 1.5)
        clock.now_s += 1.0
    busy = gpus.sensors(0)
    assert busy.utilization_percent > 70
    assert 200 < busy.power_watts < 300
    assert busy.temperature_celsius > 65
    assert gpus.sensors(1).utilization_percent == 0
    clock.now_s += 600.0
    after = gpus.sensors(0)
    assert after.utilization_percent == 0
    assert after.temperature_celsius == 35


def test_warmth_never_leaves_its_range() -> None:
    activity = SimulatedActivity(warmth=0.5, at_s=100.0, busy_until_s=110.0)
    assert activity.warmth_at(90.0) == pytest.approx(0.5)
    assert 0.5 < activity.warmth_at(110.0) < 1.0
    assert activity.warmth_at(1e6) == pytest.approx(0.0)


TAKER = """
import os, sys
from pathlib import Path
from nodeagent.simulators.gpu import SimulatedGpus, SimulatedOutOfMemory
gpus = SimulatedGpus(Path(sys.argv[1]))
taken = 0
for _ in range(40):
    try:
        gpus.allocate(os.getpid(), 1, 1024**3 // 4)
        taken += 1
    except SimulatedOutOfMemory:
        pass
print(taken, flush=True)
sys.stdin.read()
"""


def test_processes_at_once_never_take_more_than_there_is(tmp_path: Path) -> None:
    gpus = two_gpus(tmp_path)
    takers = [
        subprocess.Popen(
            [sys.executable, "-c", TAKER, str(tmp_path)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for _ in range(3)
    ]
    try:
        taken = 0
        for taker in takers:
            assert taker.stdout is not None
            taken += int(taker.stdout.readline())
        # 3 x 40 quarters were wanted, 80 fit: none is lost and none is given twice.
        assert taken == 80
        assert gpus.read().gpu_free_bytes(1) == 0
    finally:
        for taker in takers:
            taker.communicate("")
    assert gpus.read().gpu_free_bytes(1) == 20 * GIB
    assert [path.name for path in sorted(tmp_path.iterdir())] == ["machine.json", "machine.lock"]


def test_command_makes_and_shows_a_machine(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["create", str(tmp_path / "box"), "--profile", "workstation"]) == 0
    assert main(["show", str(tmp_path / "box")]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert shown["gpus"][0]["name"] == "NVIDIA GeForce RTX 5090"
    assert shown["gpus"][0]["memory_total_bytes"] == 32_607 * 1024**2
    assert main(["show", str(tmp_path / "nowhere")]) == 2


def test_a_broken_file_is_said_to_be_broken(tmp_path: Path) -> None:
    gpus = two_gpus(tmp_path)
    (tmp_path / "machine.json").write_text("{")
    with pytest.raises(msgspec.DecodeError):
        gpus.read()
