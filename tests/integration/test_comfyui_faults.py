"""What becomes of a workflow where ComfyUI says nothing, hangs, or has too little memory."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, aclosing, asynccontextmanager
from pathlib import Path

import httpx
import msgspec
import pytest

from nodeagent.engines import ComfyUiAdapter, EngineHealth, Generation
from nodeagent.engines._comfyui_generate import ComfyUiPace
from nodeagent.simulators.gpu import SimulatedGpus, SimulatedGpuSpec
from rung.codec import GenerationEvent
from rung.errors import (
    EngineFailedError,
    EngineTimeoutError,
    EngineUnreachableError,
    InvalidRequestError,
    VramInfeasibleError,
)
from rung.service import EngineClient
from rung.types import (
    ArtifactChunk,
    ComfyUiEngine,
    DeploymentSpec,
    EngineInput,
    EngineSpec,
    ImageInput,
    Phase,
    PhaseProgress,
    ProcessRuntime,
    WorkflowInput,
)
from tests.engines.comfyui_graphs import Graph, painted, sampled
from tests.integration.engine_process import EngineProcess, engine_process, free_port, python_module

GIB = 1024**3
SPEC = DeploymentSpec(
    id="pictures",
    node_id="n1",
    model="comfyui",
    engine=EngineSpec(engine=ComfyUiEngine(), runtime=ProcessRuntime(executable="comfyui")),
)
PACE = ComfyUiPace(
    waiting_poll_s=0.05,
    running_poll_s=0.05,
    rejoin_pause_s=0.05,
    retell_s=0.1,
    silent_s=0.2,
    stop_patience_s=0.3,
    stop_pause_s=0.05,
)
Start = Callable[..., AbstractAsyncContextManager[EngineProcess]]


@pytest.fixture
async def adapter() -> AsyncIterator[ComfyUiAdapter]:
    client = EngineClient()
    yield ComfyUiAdapter(client, pace=PACE)
    await client.aclose()


@pytest.fixture
def start(adapter: ComfyUiAdapter, tmp_path: Path) -> Start:
    @asynccontextmanager
    async def started(*faults: str, speed: float = 20.0, **environment: str) -> AsyncIterator[EngineProcess]:
        port = free_port()
        line = adapter.command_line(SPEC, listen_host="127.0.0.1", listen_port=port)
        given = {
            "RUNG_SIM_SPEED": str(speed),
            "RUNG_SIM_LOAD_S": "0.02",
            "RUNG_SIM_CHECKPOINTS": f"a={20 * GIB}",
            "RUNG_SIM_FAULTS": ",".join(faults),
            **line.environment,
            **environment,
        }
        command = [*python_module("nodeagent.simulators.comfyui"), *line.arguments]
        log_path = tmp_path / f"comfyui-{port}.log"
        async with engine_process(command, port=port, log_path=log_path, environment=given) as engine:
            await engine.become(EngineHealth.READY, adapter, SPEC)
            yield engine

    return started


async def run(
    adapter: ComfyUiAdapter, engine: EngineProcess, graph: Graph, *, idle_timeout_s: float = 20.0
) -> list[GenerationEvent]:
    wanted = WorkflowInput(graph_json=msgspec.json.encode(graph))
    return await generated(adapter, engine, wanted, idle_timeout_s=idle_timeout_s)


async def generated(
    adapter: ComfyUiAdapter, engine: EngineProcess, wanted: EngineInput, *, idle_timeout_s: float = 20.0
) -> list[GenerationEvent]:
    generation = Generation(job_id="j", input=wanted, idle_timeout_s=idle_timeout_s)
    async with (
        asyncio.timeout(30),
        aclosing(adapter.generate(engine.base_url, SPEC, generation)) as events,
    ):
        return [event async for event in events]


async def test_what_is_no_workflow_is_refused(adapter: ComfyUiAdapter, start: Start) -> None:
    async with start() as engine:
        with pytest.raises(InvalidRequestError, match="carries out workflows"):
            await generated(adapter, engine, ImageInput(prompt="a cat"))


async def test_without_a_word_on_the_socket_the_history_is_enough(
    adapter: ComfyUiAdapter, start: Start
) -> None:
    async with start("tells_nothing") as engine:
        events = await run(adapter, engine, sampled("a", seed=1, steps=5, side=512))

    assert [event.artifact_id for event in events if isinstance(event, ArtifactChunk)] == ["0"]


async def test_a_socket_that_is_cut_again_and_again_loses_no_workflow(
    adapter: ComfyUiAdapter, start: Start
) -> None:
    async with start("cut_mid_stream") as engine:
        events = await run(adapter, engine, sampled("a", seed=1, steps=5, side=512))

    assert [event.artifact_id for event in events if isinstance(event, ArtifactChunk)] == ["0"]


async def test_one_that_hangs_ends_with_the_idle_timeout(adapter: ComfyUiAdapter, start: Start) -> None:
    async with start("hang") as engine:
        with pytest.raises(EngineTimeoutError, match=r"nothing was heard of the workflow for 0\.5 s"):
            await run(adapter, engine, sampled("a", seed=1, steps=5, side=512), idle_timeout_s=0.5)


async def test_one_that_waits_behind_a_hung_one_waits_and_gives_signs_of_life(
    adapter: ComfyUiAdapter, start: Start
) -> None:
    async with start("hang") as engine, httpx.AsyncClient(base_url=engine.base_url) as routes:
        await routes.post("/prompt", json={"prompt": sampled("a", seed=1, steps=1, side=64)})
        generation = Generation(
            job_id="j", input=WorkflowInput(graph_json=msgspec.json.encode(painted())), idle_timeout_s=0.3
        )
        waits: list[PhaseProgress] = []
        async with (
            asyncio.timeout(30),
            aclosing(adapter.generate(engine.base_url, SPEC, generation)) as events,
        ):
            async for event in events:
                if isinstance(event, PhaseProgress) and event.phase is Phase.QUEUED:
                    waits.append(event)
                    # Far longer than the idle timeout.
                    if len(waits) == 8:
                        await routes.post("/sim/faults", json={"faults": []})

    assert set(waits) == {waits[0]}
    assert waits[0].detail == "1 ahead in ComfyUI's queue"
    assert isinstance(event, ArtifactChunk)


async def test_too_little_memory_is_told_as_such(
    adapter: ComfyUiAdapter, start: Start, tmp_path: Path
) -> None:
    gpu = SimulatedGpuSpec(name="RTX 3060", memory_total_bytes=12 * GIB)
    SimulatedGpus.create(tmp_path / "gpus", gpus=[gpu])
    async with start(RUNG_SIM_GPUS=str(tmp_path / "gpus")) as engine:
        with pytest.raises(VramInfeasibleError, match="ran out of GPU memory at node 3"):
            await run(adapter, engine, sampled("a", seed=1, steps=5, side=512))


async def test_one_that_dies_of_too_little_memory_is_unreachable(
    adapter: ComfyUiAdapter, start: Start, tmp_path: Path
) -> None:
    gpu = SimulatedGpuSpec(name="RTX 3060", memory_total_bytes=12 * GIB)
    SimulatedGpus.create(tmp_path / "gpus", gpus=[gpu])
    async with start("out_of_memory_kills", RUNG_SIM_GPUS=str(tmp_path / "gpus")) as engine:
        with pytest.raises(EngineUnreachableError):
            await run(adapter, engine, sampled("a", seed=1, steps=5, side=512), idle_timeout_s=1.0)


async def test_a_server_error_is_no_fault_of_the_workflow(adapter: ComfyUiAdapter, start: Start) -> None:
    async with start("http_500") as engine:
        with pytest.raises(EngineFailedError, match="answers 500"):
            await run(adapter, engine, painted())


async def test_nobody_listens(adapter: ComfyUiAdapter, start: Start) -> None:
    async with start() as engine:
        engine.process.kill()
        await engine.exit_code()
        with pytest.raises(EngineUnreachableError):
            await run(adapter, engine, painted())
