"""What the agent does over and over goes on, whatever one round of it runs into."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path

from structlog.testing import capture_logs

from nodeagent.app import _keep_discovering, _keep_measuring
from nodeagent.engines import adapter_for
from nodeagent.runtimes import EngineRuntime, ExternalEngineRuntime, RunningEngine
from nodeagent.supervisor import EngineRecord, Records, Supervisor
from nodeagent.telemetry import GpuSample, Telemetry
from rung.errors import UnavailableError
from rung.service import EngineClient
from rung.types import (
    DeploymentSpec,
    DockerRuntime,
    EngineSpec,
    ExternalRuntime,
    Gpu,
    GpuHealth,
    GpuProcess,
    LlamaCppEngine,
    MemorySource,
    Residency,
    ResidencyClass,
    Runtime,
)
from tests.integration.engine_process import free_port


class _Containers(ExternalEngineRuntime):
    """A runtime whose engine runs for ever, as this process; it fails until it is told not to."""

    def __init__(self) -> None:
        self.failing = True

    async def find(self, record: RunningEngine) -> bool:
        return True

    async def pids(self, record: RunningEngine) -> frozenset[int]:
        if self.failing:
            raise ValueError("a defect")
        return frozenset({os.getpid()})


class _Source:
    """A GPU on which this process holds memory."""

    def read(self) -> GpuSample:
        gpu = Gpu(
            index=0,
            uuid="GPU-1",
            name="Test",
            health=GpuHealth.OK,
            memory_source=MemorySource.NVML,
            memory_total_bytes=100,
            memory_used_bytes=40,
            memory_free_bytes=60,
            processes=(GpuProcess(pid=os.getpid(), memory_bytes=40),),
        )
        return GpuSample(gpus=(gpu,))

    def close(self) -> None:
        return


def _spec(runtime: Runtime) -> DeploymentSpec:
    engine = EngineSpec(engine=LlamaCppEngine(model_path="/m.gguf"), runtime=runtime)
    return DeploymentSpec(id="engine", node_id="box", model="m", engine=engine)


@asynccontextmanager
async def _supervisor(
    folder: Path, containers: EngineRuntime, record: EngineRecord | None = None
) -> AsyncIterator[Supervisor]:
    """That of an agent that comes back, with an engine on record."""
    records = Records(folder)
    if record is not None:
        records.save(record)
    client = EngineClient()
    supervisor = Supervisor(
        node_id="box",
        records=records,
        runtimes={DockerRuntime: containers, ExternalRuntime: ExternalEngineRuntime()},
        adapter_for=partial(adapter_for, client=client),
    )
    await supervisor.resume()
    try:
        yield supervisor
    finally:
        await supervisor.aclose()
        await client.aclose()
        records.close()


async def test_a_failure_does_not_end_the_attribution_of_memory(tmp_path: Path) -> None:
    containers = _Containers()
    running = RunningEngine(
        deployment_id="engine",
        generation=1,
        spec_hash="",
        base_url=f"http://127.0.0.1:{free_port()}",
        container_id="c1",
    )
    record = EngineRecord(
        spec=_spec(DockerRuntime(image="engine:1")),
        residency=Residency.AWAKE,
        residency_class=ResidencyClass.ON_DEMAND,
        generation=1,
        running=running,
    )
    telemetry = Telemetry(state_dir=tmp_path, agent_version="1", gpu_source=_Source(), interval_s=0.02)
    await telemetry.start()
    with capture_logs() as logged:
        async with _supervisor(tmp_path, containers, record) as supervisor:
            measuring = asyncio.create_task(_keep_measuring(supervisor, telemetry))
            async with asyncio.timeout(20):
                await _samples_until(telemetry, lambda: _count(logged, "owners_not_known") > 0)
                # It is not the last round, nor said with each.
                await _samples_until(telemetry, _after(5))
                assert supervisor.deployments[0].vram_bytes is None
                containers.failing = False
                await _samples_until(telemetry, lambda: supervisor.deployments[0].vram_bytes == 40)
            assert not measuring.done()
            measuring.cancel()
            await asyncio.gather(measuring, return_exceptions=True)
    await telemetry.aclose()
    assert _count(logged, "owners_not_known") == 1


async def _samples_until(telemetry: Telemetry, holds: Callable[[], bool]) -> None:
    async for _ in telemetry.changes():
        if holds():
            return


def _after(samples: int) -> Callable[[], bool]:
    left = iter(range(samples))
    return lambda: next(left, None) is None


def _count(logged: object, event: str) -> int:
    assert isinstance(logged, list)
    return sum(1 for line in logged if line["event"] == event)


async def test_discovery_goes_on_after_any_failure(tmp_path: Path) -> None:
    spec = _spec(ExternalRuntime(base_url=f"http://127.0.0.1:{free_port()}"))
    answers: list[Exception | tuple[DeploymentSpec, ...]] = [
        UnavailableError("away"),
        ValueError("a defect"),
        UnavailableError("still away"),
        (),
        UnavailableError("away again"),
        (spec,),
    ]
    asked = iter(answers)
    found = asyncio.Event()

    async def find() -> tuple[DeploymentSpec, ...]:
        answer = next(asked, None)
        if answer is None:
            found.set()
            return ()
        if isinstance(answer, Exception):
            raise answer
        return answer

    with capture_logs() as logged:
        async with _supervisor(tmp_path, _Containers()) as supervisor:
            discovering = asyncio.create_task(_keep_discovering(supervisor, find, 1, interval_s=0.0))
            await asyncio.wait_for(found.wait(), 10)
            discovering.cancel()
            await asyncio.gather(discovering, return_exceptions=True)
            assert [each.spec.id for each in supervisor.deployments] == ["engine"]

    lines = [line for line in logged if line["event"] == "engines_not_discovered"]
    assert [line["error"] for line in lines] == ["away", "a defect", "away again"]
    assert [line["exc_info"] is not None for line in lines] == [False, True, False]
