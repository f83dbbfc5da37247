"""The simulated worker of predictions as a real process, over its own HTTP and through its adapter."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import AbstractAsyncContextManager
from pathlib import Path
from typing import Any

import aiohttp
import msgspec
import pytest

from nodeagent.engines import EngineHealth, PredictionAdapter, RunKind, adapter_for
from nodeagent.simulators.gpu import SimulatedGpus, SimulatedGpuSpec
from rung.errors import EngineFailedError, EngineTimeoutError, InvalidRequestError
from rung.service import EngineClient
from rung.types import DeploymentSpec, EngineSpec, ProcessRuntime, ServiceEngine, default_slots
from tests.integration.engine_process import EngineProcess, engine_process, free_port, python_module

GIB = 1024**3
WEIGHTS_BYTES = 400_000_000
SPEC = DeploymentSpec(
    id="timesfm-1",
    node_id="n1",
    model="timesfm-2.5-0.2b",
    capabilities=("prediction", "forecast"),
    engine=EngineSpec(
        engine=ServiceEngine(dialect="prediction"),
        runtime=ProcessRuntime(executable="python"),
        start_timeout_s=10.0,
    ),
)
TABLE = DeploymentSpec(id="any-1", node_id="n1", model="small-0.1b", engine=SPEC.engine)
WEEKS = [float(day % 7) for day in range(28)]
FORECAST = {"task": "forecast", "series": [WEEKS], "horizon": 7}


@pytest.fixture
async def adapter() -> AsyncIterator[PredictionAdapter]:
    client = EngineClient()
    found = adapter_for(SPEC.engine.engine, client)
    assert isinstance(found, PredictionAdapter)
    yield found
    await client.aclose()


@pytest.fixture
def gpus(tmp_path: Path) -> SimulatedGpus:
    return SimulatedGpus.create(
        tmp_path / "gpus", gpus=[SimulatedGpuSpec(name="one", memory_total_bytes=8 * GIB)]
    )


def running(
    tmp_path: Path, adapter: PredictionAdapter, spec: DeploymentSpec = SPEC, **environment: str
) -> AbstractAsyncContextManager[EngineProcess]:
    port = free_port()
    line = adapter.command_line(spec, listen_host="127.0.0.1", listen_port=port)
    own = {
        "RUNG_SIM_SPEED": "100",
        "RUNG_SIM_LOAD_S": "0.05",
        "RUNG_SIM_GPUS": str(tmp_path / "gpus"),
        **environment,
    }
    return engine_process(
        [*python_module("nodeagent.simulators.prediction"), *line.arguments],
        port=port,
        log_path=tmp_path / f"engine-{port}.log",
        environment=own,
    )


async def awake(engine: EngineProcess, adapter: PredictionAdapter, spec: DeploymentSpec = SPEC) -> None:
    await engine.become(EngineHealth.ASLEEP, adapter, spec)
    await adapter.wake(engine.base_url, spec, 2)


def held(gpus: SimulatedGpus) -> int:
    return sum(process.gpu_bytes.get(0, 0) for process in gpus.read().processes)


async def predicted(
    adapter: PredictionAdapter,
    engine: EngineProcess,
    task: object = FORECAST,
    spec: DeploymentSpec = SPEC,
    *,
    idle_timeout_s: float = 30.0,
) -> Any:
    body = msgspec.json.encode(task)
    run = adapter.run(engine.base_url, spec, RunKind.PREDICTIONS, body, idle_timeout_s=idle_timeout_s)
    async with run as stream:
        assert (stream.status, stream.content_type) == (200, "application/json")
        answer = stream.ready() + b"".join([piece async for piece in stream.chunks()])
    return msgspec.json.decode(answer)


async def posted(engine: EngineProcess, path: str, body: object) -> tuple[int, Any, str]:
    async with (
        aiohttp.ClientSession() as session,
        session.post(engine.base_url + path, json=body) as answer,
    ):
        return answer.status, await answer.json(), answer.headers.get("Retry-After", "")


async def becomes(engine: EngineProcess, name: str, value: int) -> None:
    """Wait until the engine counts so."""
    async with asyncio.timeout(10), aiohttp.ClientSession() as session:
        while True:
            async with session.get(engine.base_url + "/sim/state") as answer:
                if (await answer.json())[name] == value:
                    return
            await asyncio.sleep(0.01)


async def test_a_worker_predicts_once_it_is_loaded_and_gives_its_memory_back(
    tmp_path: Path, adapter: PredictionAdapter, gpus: SimulatedGpus
) -> None:
    async with running(tmp_path, adapter) as engine:
        await engine.become(EngineHealth.ASLEEP, adapter, SPEC)
        assert held(gpus) == 0
        with pytest.raises(EngineFailedError, match=r"answers 409: timesfm-2\.5-0\.2b is not loaded"):
            await predicted(adapter, engine)

        await adapter.wake(engine.base_url, SPEC, 2)
        assert held(gpus) == WEIGHTS_BYTES
        answer = await predicted(adapter, engine)
        assert answer["forecasts"][0] == pytest.approx(WEEKS[:7])
        assert [each["level"] for each in answer["quantiles"]] == [0.1, 0.5, 0.9]
        assert held(gpus) == WEIGHTS_BYTES

        await adapter.free(engine.base_url, SPEC)
        assert held(gpus) == 0
        assert (await adapter.probe(engine.base_url, SPEC)).health is EngineHealth.ASLEEP


async def test_a_model_without_a_speciality_does_all_three(
    tmp_path: Path, adapter: PredictionAdapter, gpus: SimulatedGpus
) -> None:
    known: dict[str, Any] = {"context": [[0, 0], [0, 1], [9, 9], [9, 8]], "rows": [[1, 1], [8, 9]]}
    async with running(tmp_path, adapter, TABLE) as engine:
        await awake(engine, adapter, TABLE)
        classes = {"task": "classify", "labels": ["low", "low", "high", "high"], **known}
        assert await predicted(adapter, engine, classes, TABLE) == {"labels": ["low", "high"]}
        numbers = {"task": "regress", "targets": [0, 1, 18, 17], **known}
        low, high = (await predicted(adapter, engine, numbers, TABLE))["values"]
        assert low < 9 < high
        assert await predicted(adapter, engine, FORECAST, TABLE)


async def test_what_is_wrong_with_a_task_is_said(
    tmp_path: Path, adapter: PredictionAdapter, gpus: SimulatedGpus
) -> None:
    async with running(tmp_path, adapter) as engine:
        await awake(engine, adapter)
        classify: dict[str, Any] = {"task": "classify", "context": [[1]], "labels": ["a"], "rows": [[1]]}
        for task, why in (
            (classify, r"timesfm-2\.5-0\.2b does not classify"),
            ({"task": "guess"}, "Invalid value 'guess'"),
            ({**FORECAST, "horizon": 0}, "nothing to forecast"),
        ):
            with pytest.raises(InvalidRequestError, match=f"/predict answers 400: .*{why}"):
                await predicted(adapter, engine, task)


async def test_a_worker_that_is_busy_with_what_a_caller_left_is_waited_for(
    tmp_path: Path, adapter: PredictionAdapter, gpus: SimulatedGpus
) -> None:
    async with running(tmp_path, adapter, RUNG_SIM_FAULTS="hang") as engine:
        await awake(engine, adapter)
        left = asyncio.create_task(predicted(adapter, engine))
        await becomes(engine, "active", 1)
        left.cancel()
        await asyncio.gather(left, return_exceptions=True)
        assert await posted(engine, "/unload", {}) == (503, {"error": "busy with something else"}, "0.2")

        with pytest.raises(EngineFailedError, match="answers 503: busy with something else"):
            await predicted(adapter, engine, idle_timeout_s=0.3)
        waiting = asyncio.create_task(predicted(adapter, engine))
        await becomes(engine, "requests", 4)
        await posted(engine, "/sim/faults", {"faults": []})
        assert (await waiting)["forecasts"]
        # What was left was finished, too.
        await becomes(engine, "completed", 2)


async def test_a_worker_that_never_answers_is_given_up(
    tmp_path: Path, adapter: PredictionAdapter, gpus: SimulatedGpus
) -> None:
    async with running(tmp_path, adapter, RUNG_SIM_FAULTS="hang") as engine:
        await awake(engine, adapter)
        with pytest.raises(EngineTimeoutError):
            await predicted(adapter, engine, idle_timeout_s=0.2)


def test_it_predicts_and_nothing_else(adapter: PredictionAdapter) -> None:
    with pytest.raises(InvalidRequestError, match="prediction has no route for chat_completions"):
        adapter.run("http://127.0.0.1:1", SPEC, RunKind.CHAT_COMPLETIONS, b"{}", idle_timeout_s=1)
    assert default_slots(SPEC.engine.engine) == 1


def test_jax_is_kept_from_taking_the_whole_gpu(adapter: PredictionAdapter) -> None:
    line = adapter.command_line(SPEC, listen_host="127.0.0.1", listen_port=8192)
    assert line.arguments == ("--host", "127.0.0.1", "--port", "8192", "--model", "timesfm-2.5-0.2b")
    assert line.environment["XLA_PYTHON_CLIENT_PREALLOCATE"] == "false"
    assert line.environment["XLA_PYTHON_CLIENT_ALLOCATOR"] == "platform"
