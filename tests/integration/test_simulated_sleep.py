"""Sleep mode of the simulated vLLM, asked as the reference says, and through the real adapter."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import AbstractAsyncContextManager
from pathlib import Path
from typing import Any

import aiohttp
import msgspec
import pytest

from nodeagent.engines import EngineHealth, VllmAdapter
from nodeagent.simulators.gpu import SimulatedGpus, SimulatedGpuSpec
from rung.errors import EngineFailedError, RungError
from rung.service import EngineClient
from rung.types import DeploymentSpec, EngineSpec, ProcessRuntime, VllmEngine
from tests.integration.engine_process import (
    CHAT,
    EngineProcess,
    chat_body,
    engine_process,
    free_port,
    python_module,
    until,
)

GIB = 1024**3
#: 8.48 GB of weights and 1 GiB of overhead in a half of the GPU, which leaves 7.1 GiB of KV cache.
VLLM = DeploymentSpec(
    id="sim-vllm",
    node_id="n1",
    model="nemotron-8b-fp8",
    engine=EngineSpec(
        engine=VllmEngine(model="nemotron-8b-fp8", gpu_memory_utilization=0.5, sleep_mode=True),
        runtime=ProcessRuntime(executable="vllm"),
    ),
)
WEIGHTS = int(8e9 * 1.06)


class Machine:
    """A simulated machine with one GPU of 32 GiB, and engines on it."""

    def __init__(self, folder: Path, adapter: VllmAdapter) -> None:
        self.adapter = adapter
        self.gpus = SimulatedGpus.create(
            folder / "gpus", gpus=[SimulatedGpuSpec(name="RTX 5090", memory_total_bytes=32 * GIB)]
        )
        self._folder = folder

    def start(
        self, *, dev_mode: bool = True, **environment: str
    ) -> AbstractAsyncContextManager[EngineProcess]:
        port = free_port()
        line = self.adapter.command_line(VLLM, listen_host="127.0.0.1", listen_port=port)
        told = dict(line.environment)
        if not dev_mode:
            del told["VLLM_SERVER_DEV_MODE"]
        fast = {
            "RUNG_SIM_SPEED": "100",
            "RUNG_SIM_LOAD_S": "0.05",
            "RUNG_SIM_GPUS": str(self._folder / "gpus"),
        }
        return engine_process(
            [*python_module("nodeagent.simulators.vllm"), *line.arguments],
            port=port,
            log_path=self._folder / f"{port}.log",
            environment={**fast, **told, **environment},
        )

    async def ready(self, engine: EngineProcess) -> None:
        await engine.become(EngineHealth.READY, self.adapter, VLLM)

    def held(self, engine: EngineProcess) -> tuple[int, int]:
        """Bytes of the GPU and of the host."""
        for process in self.gpus.read().processes:
            if process.pid == engine.pid:
                return process.gpu_bytes.get(0, 0), process.host_bytes
        return 0, 0


@pytest.fixture
async def machine(tmp_path: Path) -> AsyncIterator[Machine]:
    client = EngineClient()
    yield Machine(tmp_path, VllmAdapter(client))
    await client.aclose()


async def call(engine: EngineProcess, method: str, path: str, body: object = None) -> tuple[int, Any]:
    data = None if body is None else msgspec.json.encode(body)
    async with (
        aiohttp.ClientSession() as session,
        session.request(method, engine.base_url + path, data=data) as response,
    ):
        return response.status, await response.json(content_type=None)


async def sleeping(engine: EngineProcess) -> bool:
    status, body = await call(engine, "GET", "/is_sleeping")
    assert status == 200
    return bool(body["is_sleeping"])


async def answer(engine: EngineProcess) -> tuple[str, str]:
    """What it says, and how it ended."""
    messages = [{"role": "user", "content": "count to 3"}]
    _, body = await call(engine, "POST", "/v1/chat/completions", {"messages": messages})
    return body["choices"][0]["message"]["content"], body["choices"][0]["finish_reason"]


# The routes, as the reference has them.


async def test_without_dev_mode_there_are_no_such_routes(machine: Machine) -> None:
    async with machine.start(dev_mode=False) as engine:
        await machine.ready(engine)
        statuses = {
            (await call(engine, method, path))[0]
            for method, path in (
                ("POST", "/sleep"),
                ("POST", "/wake_up"),
                ("GET", "/is_sleeping"),
                ("POST", "/collective_rpc"),
            )
        }
        with pytest.raises(EngineFailedError, match="404"):
            await machine.adapter.sleep(engine.base_url, VLLM, 1)

    assert statuses == {404}


async def test_from_level_2_it_answers_garbage_unless_its_weights_are_reloaded(machine: Machine) -> None:
    async with machine.start() as engine:
        await machine.ready(engine)
        await call(engine, "POST", "/sleep?level=2")
        await call(engine, "POST", "/wake_up")
        assert set((await answer(engine))[0]) == {"!"}

        await call(engine, "POST", "/sleep?level=2")
        await machine.adapter.wake(engine.base_url, VLLM, 2)
        assert await answer(engine) == ("1 2 3", "stop")


async def test_sleep_breaks_off_what_runs(machine: Machine) -> None:
    async with machine.start(RUNG_SIM_SPEED="1") as engine:
        await machine.ready(engine)
        body = chat_body("go on", ignore_eos=True, max_tokens=900)
        async with machine.adapter.run(engine.base_url, VLLM, CHAT, body, idle_timeout_s=10) as stream:
            pieces = aiter(stream.chunks())
            await anext(pieces)
            assert await machine.adapter.requests(engine.base_url, VLLM) == 1
            await call(engine, "POST", "/sleep?level=1")
            rest = b"".join([piece async for piece in pieces])

    assert b'"finish_reason":"abort"' in rest


# Memory.


async def test_level_1_moves_the_weights_to_the_host_and_back(machine: Machine) -> None:
    async with machine.start() as engine:
        await machine.ready(engine)
        assert machine.held(engine) == (16 * GIB, 0)

        await machine.adapter.sleep(engine.base_url, VLLM, 1)
        assert machine.held(engine) == (GIB, WEIGHTS)
        assert (await machine.adapter.probe(engine.base_url, VLLM)).health is EngineHealth.ASLEEP

        await machine.adapter.wake(engine.base_url, VLLM, 1)
        assert machine.held(engine) == (16 * GIB, 0)
        assert (await machine.adapter.probe(engine.base_url, VLLM)).health is EngineHealth.READY


async def test_level_2_drops_them_and_wakes_step_by_step(machine: Machine) -> None:
    async with machine.start() as engine:
        await machine.ready(engine)
        await machine.adapter.sleep(engine.base_url, VLLM, 2)
        assert machine.held(engine) == (GIB, 0)

        await call(engine, "POST", "/wake_up?tags=weights")
        assert machine.held(engine) == (GIB + WEIGHTS, 0)
        # Whoever finds it like this finishes it with the same calls.
        await machine.adapter.wake(engine.base_url, VLLM, 2)
        assert machine.held(engine) == (16 * GIB, 0)


async def test_a_shrunk_one_keeps_its_weights_and_gives_up_its_kv_cache(machine: Machine) -> None:
    async with machine.start() as engine:
        await machine.ready(engine)
        await machine.adapter.shrink(engine.base_url, VLLM)
        assert machine.held(engine) == (GIB + WEIGHTS, 0)
        assert (await machine.adapter.probe(engine.base_url, VLLM)).health is EngineHealth.ASLEEP
        parked = asyncio.create_task(answer(engine))
        # Not in its metrics, which say nothing of those that wait for a sleeper.
        while (await call(engine, "GET", "/sim/state"))[1]["waiting"] != 1:
            assert not parked.done()
        assert await machine.adapter.requests(engine.base_url, VLLM) == 0

        await machine.adapter.grow(engine.base_url, VLLM)

        assert machine.held(engine) == (16 * GIB, 0)
        async with asyncio.timeout(10):
            assert await parked == ("1 2 3", "stop")


async def test_one_whose_shrinking_broke_off_grows_with_the_same_calls(machine: Machine) -> None:
    async with machine.start() as engine:
        await machine.ready(engine)
        await call(engine, "POST", "/sleep?level=1")

        await machine.adapter.grow(engine.base_url, VLLM)

        assert machine.held(engine) == (16 * GIB, 0)
        assert await answer(engine) == ("1 2 3", "stop")


async def test_growing_where_there_is_no_room_kills_the_engine(machine: Machine) -> None:
    async with machine.start() as engine:
        await machine.ready(engine)
        await machine.adapter.shrink(engine.base_url, VLLM)
        machine.gpus.set_unattributed(0, 20 * GIB)

        with pytest.raises(RungError):
            await machine.adapter.grow(engine.base_url, VLLM)

        assert await engine.exit_code() == 1


async def test_waking_where_there_is_no_room_kills_the_engine(machine: Machine) -> None:
    async with machine.start() as engine:
        await machine.ready(engine)
        await machine.adapter.sleep(engine.base_url, VLLM, 1)
        machine.gpus.set_unattributed(0, 20 * GIB)

        with pytest.raises(RungError):
            await machine.adapter.wake(engine.base_url, VLLM, 1)

        assert await engine.exit_code() == 1
        assert "torch.OutOfMemoryError: CUDA out of memory" in engine.log()
    assert machine.gpus.read().gpu_free_bytes(0) == 12 * GIB


# Faults.


async def test_a_sleep_may_free_too_little(machine: Machine) -> None:
    async with machine.start(RUNG_SIM_FAULTS="sleep_frees_little") as engine:
        await machine.ready(engine)
        await machine.adapter.sleep(engine.base_url, VLLM, 1)

        assert machine.held(engine)[0] > 12 * GIB
        await machine.adapter.wake(engine.base_url, VLLM, 1)
        assert machine.held(engine)[0] == 16 * GIB


async def test_sleep_under_a_running_request_may_kill_the_engine(machine: Machine) -> None:
    async with machine.start(RUNG_SIM_SPEED="1", RUNG_SIM_FAULTS="crash_when_slept_busy") as engine:
        await machine.ready(engine)
        body = chat_body("go on", ignore_eos=True, max_tokens=900)
        async with machine.adapter.run(engine.base_url, VLLM, CHAT, body, idle_timeout_s=10) as stream:
            await anext(aiter(stream.chunks()))
            assert (await call(engine, "POST", "/sleep?level=1"))[0] == 500
            assert await engine.exit_code() == 1

    assert "illegal memory access" in engine.log()


async def test_it_may_listen_before_it_is_loaded(machine: Machine) -> None:
    async with machine.start(RUNG_SIM_FAULTS="listen_while_loading,never_ready") as engine:
        await engine.become(EngineHealth.LOADING, machine.adapter, VLLM)

        await call(engine, "POST", "/sim/faults", {"faults": []})
        await machine.ready(engine)


async def test_waking_may_take_long(machine: Machine) -> None:
    async with machine.start(RUNG_SIM_SLOW_WAKE_S="600") as engine:
        await machine.ready(engine)
        await machine.adapter.sleep(engine.base_url, VLLM, 1)
        await call(engine, "POST", "/sim/faults", {"faults": ["slow_wake"]})

        waking = asyncio.create_task(machine.adapter.wake(engine.base_url, VLLM, 1))
        # It goes on answering such questions meanwhile.
        assert await sleeping(engine)
        assert not waking.done()
        waking.cancel()
        await asyncio.gather(waking, return_exceptions=True)
    await until(lambda: machine.gpus.read().gpu_free_bytes(0) == 32 * GIB, "its memory is free")
