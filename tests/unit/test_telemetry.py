"""The sampler: threads, drivers that hang, readers that are slow, and simulated machines."""

from __future__ import annotations

import asyncio
import os
import threading
from collections.abc import AsyncIterator, Callable
from contextlib import aclosing, asynccontextmanager
from pathlib import Path

import psutil
import pytest

from nodeagent.simulators.gpu import SimulatedGpus, SimulatedProfile
from nodeagent.telemetry import GpuSample, Telemetry
from rung.service import host_id
from rung.types import Gpu, GpuHealth, GpuProcess, MemorySource, NodeStatus

GIB = 1024**3


def gpu(*processes: GpuProcess) -> Gpu:
    return Gpu(
        index=0,
        uuid="GPU-1",
        name="Test",
        health=GpuHealth.OK,
        memory_source=MemorySource.NVML,
        memory_total_bytes=10,
        memory_used_bytes=4,
        memory_free_bytes=6,
        processes=processes,
    )


class FakeSource:
    """A source that answers, fails or hangs as told."""

    def __init__(self, *processes: GpuProcess) -> None:
        self.sample = GpuSample(gpus=(gpu(*processes),), driver_version="1.2")
        self.failing = False
        self.answering = threading.Event()
        self.answering.set()
        self.closed = threading.Event()
        self.threads: set[str] = set()

    def read(self) -> GpuSample:
        self.threads.add(threading.current_thread().name)
        assert self.answering.wait(30.0)
        if self.failing:
            raise RuntimeError("boom")
        return self.sample

    def close(self) -> None:
        self.threads.add(threading.current_thread().name)
        self.closed.set()


@asynccontextmanager
async def running(
    tmp_path: Path,
    source: FakeSource | None = None,
    *,
    simulated: Path | None = None,
    stale_after_s: float = 5.0,
    interval_s: float = 0.02,
) -> AsyncIterator[Telemetry]:
    telemetry = Telemetry(
        state_dir=tmp_path / "not" / "made" / "yet",
        simulated_gpus=simulated,
        agent_version="9.9",
        gpu_source=source,
        interval_s=interval_s,
        stale_after_s=stale_after_s,
    )
    await telemetry.start()
    try:
        yield telemetry
    finally:
        await telemetry.aclose()


async def first(telemetry: Telemetry, wanted: Callable[[NodeStatus], bool]) -> NodeStatus:
    async with asyncio.timeout(20), aclosing(telemetry.changes()) as changes:
        async for status in changes:
            if wanted(status):
                return status
    raise AssertionError("telemetry ended")


async def test_a_started_node_has_a_whole_sample(tmp_path: Path) -> None:
    source = FakeSource()
    async with running(tmp_path, source) as telemetry:
        status = telemetry.status
        assert status.gpus == (gpu(),)
        assert status.driver_version == "1.2"
        assert status.agent_version == "9.9"
        assert status.host_id == host_id()
        assert not status.simulated
        assert status.warnings == ()
        assert status.host.memory_total_bytes == psutil.virtual_memory().total
        assert 0 < status.host.memory_available_bytes <= status.host.memory_total_bytes
        assert 0 < status.host.disk_free_bytes <= status.host.disk_total_bytes
        assert status.host.cpu_count == os.cpu_count()
    assert source.closed.is_set()
    # One thread for all of NVML, and not one of the pool's.
    assert source.threads == {"gpu-telemetry"}


async def test_status_before_the_start_is_a_mistake(tmp_path: Path) -> None:
    telemetry = Telemetry(state_dir=tmp_path, agent_version="1", gpu_source=FakeSource())
    with pytest.raises(RuntimeError, match="not been started"):
        _ = telemetry.status


async def test_samples_keep_coming_and_end_with_the_telemetry(tmp_path: Path) -> None:
    source = FakeSource()
    times: list[float] = []
    async with running(tmp_path, source) as telemetry:

        async def read_on() -> None:
            async for status in telemetry.changes():
                times.append(status.sample_time_s)

        reader = asyncio.create_task(read_on())
        source.sample = GpuSample(driver_version="1.3")
        await first(telemetry, lambda status: status.driver_version == "1.3")
        await first(telemetry, lambda status: len(times) >= 3)
    await asyncio.wait_for(reader, 5)
    assert times == sorted(set(times))


async def test_a_look_is_a_sample_of_this_moment_however_far_the_next_one_is(tmp_path: Path) -> None:
    source = FakeSource()
    async with running(tmp_path, source, interval_s=3600.0) as telemetry:
        for pid in range(1, 4):
            source.sample = GpuSample(gpus=(gpu(GpuProcess(pid)),))
            async with asyncio.timeout(10):
                looked = await telemetry.look()
            assert looked.gpus[0].processes == (GpuProcess(pid),)
            assert telemetry.status is looked


async def test_a_sample_can_be_had_soon_without_waiting_for_it(tmp_path: Path) -> None:
    source = FakeSource()
    async with running(tmp_path, source, interval_s=3600.0) as telemetry:
        source.sample = GpuSample(gpus=(gpu(GpuProcess(7)),))
        telemetry.look_soon()
        await first(telemetry, lambda status: status.gpus[0].processes == (GpuProcess(7),))
        assert telemetry.sample_age_s < 600.0


async def test_a_sample_is_as_old_as_its_reading_not_as_its_telling(tmp_path: Path) -> None:
    source = FakeSource()
    async with running(tmp_path, source, stale_after_s=0.1) as telemetry:
        source.answering.clear()
        hung = await first(telemetry, lambda status: bool(status.warnings))
        await first(telemetry, lambda status: status.sample_time_s > hung.sample_time_s)
        assert telemetry.sample_age_s > 0.1
        source.answering.set()


async def test_a_look_at_a_driver_that_hangs_is_the_last_sample(tmp_path: Path) -> None:
    source = FakeSource()
    async with running(tmp_path, source, interval_s=3600.0) as telemetry:
        source.answering.clear()
        async with asyncio.timeout(10):
            assert (await telemetry.look()).gpus[0].processes == ()
        source.answering.set()


async def test_a_driver_that_hangs_is_told_and_the_host_stays_fresh(tmp_path: Path) -> None:
    source = FakeSource()
    async with running(tmp_path, source, stale_after_s=0.1) as telemetry:
        source.answering.clear()
        hung = await first(telemetry, lambda status: bool(status.warnings))
        assert "the GPU driver hangs" in hung.warnings[0]
        assert hung.gpus[0].health is GpuHealth.UNKNOWN
        assert hung.gpus[0].memory_total_bytes == 10
        later = await first(telemetry, lambda status: status.sample_time_s > hung.sample_time_s)
        assert later.warnings
        source.answering.set()
        well = await first(telemetry, lambda status: not status.warnings)
        assert well.gpus[0].health is GpuHealth.OK


async def test_a_driver_that_hangs_from_the_start_holds_up_neither_start_nor_end(tmp_path: Path) -> None:
    source = FakeSource()
    source.answering.clear()
    async with asyncio.timeout(20), running(tmp_path, source) as telemetry:
        assert telemetry.status.gpus == ()
        assert "has not answered since the agent started" in telemetry.status.warnings[0]
        assert telemetry.status.host.memory_total_bytes > 0
    assert not source.closed.is_set()
    source.answering.set()
    assert await asyncio.to_thread(source.closed.wait, 10)


async def test_a_source_that_fails_is_a_warning(tmp_path: Path) -> None:
    source = FakeSource()
    source.failing = True
    async with running(tmp_path, source) as telemetry:
        assert telemetry.status.warnings == ("GPU telemetry failed: boom",)
        source.failing = False
        await first(telemetry, lambda status: not status.warnings and len(status.gpus) == 1)


async def test_owners_hold_at_once(tmp_path: Path) -> None:
    source = FakeSource(GpuProcess(os.getpid(), 4), GpuProcess(2**22 + 1, 5))
    async with running(tmp_path, source) as telemetry:
        assert [process.deployment_id for process in telemetry.status.gpus[0].processes] == ["", ""]
        telemetry.set_owners({os.getppid(): "llm"})
        assert [process.deployment_id for process in telemetry.status.gpus[0].processes] == ["llm", ""]
        telemetry.set_owners({})
        assert [process.deployment_id for process in telemetry.status.gpus[0].processes] == ["", ""]


async def test_a_simulated_workstation(tmp_path: Path) -> None:
    machine = SimulatedGpus.create_profile(tmp_path / "box", SimulatedProfile.WORKSTATION)
    machine.allocate(os.getpid(), 0, 8 * GIB)
    async with running(tmp_path, simulated=tmp_path / "box") as telemetry:
        telemetry.set_owners({os.getpid(): "llm"})
        status = telemetry.status
        assert status.simulated
        assert status.host.memory_total_bytes == 64 * GIB
        (card,) = status.gpus
        assert card.name == "NVIDIA GeForce RTX 5090"
        assert card.memory_source is MemorySource.SIMULATED
        assert card.memory_total_bytes == 32_607 * 1024**2
        assert card.memory_used_bytes == 8 * GIB + 1_229 * 1024**2
        assert card.processes == (GpuProcess(os.getpid(), 8 * GIB, "llm"),)
        machine.free(os.getpid())
        await first(telemetry, lambda status: status.gpus[0].memory_used_bytes == 1_229 * 1024**2)


async def test_a_simulated_spark_is_one_pool(tmp_path: Path) -> None:
    machine = SimulatedGpus.create_profile(tmp_path / "box", SimulatedProfile.SPARK)
    machine.allocate(os.getpid(), 0, 60 * GIB)
    async with running(tmp_path, simulated=tmp_path / "box") as telemetry:
        status = telemetry.status
        (card,) = status.gpus
        assert card.unified_memory
        assert card.memory_total_bytes == status.host.memory_total_bytes == 127_600_748 * 1024
        assert card.memory_free_bytes == status.host.memory_available_bytes


async def test_a_simulated_machine_that_is_missing_is_a_warning(tmp_path: Path) -> None:
    async with running(tmp_path, simulated=tmp_path / "nowhere") as telemetry:
        assert telemetry.status.gpus == ()
        assert "simulated machine in" in telemetry.status.warnings[0]
