"""The simulated engines as real processes, through the real adapters."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import AbstractAsyncContextManager
from pathlib import Path
from typing import Any

import aiohttp
import msgspec
import pytest

from nodeagent.engines import EngineAdapter, EngineHealth, RunKind, adapter_for
from nodeagent.simulators.gpu import SimulatedGpus, SimulatedGpuSpec
from rung.errors import EngineProtocolError, EngineTimeoutError
from rung.service import EngineClient
from rung.types import (
    DeploymentSpec,
    EngineSpec,
    LlamaCppEngine,
    OpenAiCompatibleEngine,
    ProcessRuntime,
)
from tests.integration.engine_process import (
    CHAT,
    EngineProcess,
    chat_body,
    engine_process,
    free_port,
    python_module,
    read_frames,
    until,
)

GIB = 1024**3
LLAMA = DeploymentSpec(
    id="sim-llama",
    node_id="n1",
    model="qwen-8b",
    engine=EngineSpec(
        engine=LlamaCppEngine(model_path="/models/qwen-8b-Q4_K_M.gguf", context_tokens=2048, parallel=2),
        runtime=ProcessRuntime(executable="llama-server"),
    ),
)
VLLM = DeploymentSpec(
    id="sim-vllm",
    node_id="n1",
    model="nemotron-8b-fp8",
    engine=EngineSpec(
        engine=OpenAiCompatibleEngine(health_path="/health", api_key_env=""),
        runtime=ProcessRuntime(executable="vllm"),
    ),
)
BOTH = pytest.mark.parametrize("spec", [LLAMA, VLLM], ids=["llama-server", "vllm"])


@pytest.fixture
async def client() -> AsyncIterator[EngineClient]:
    made = EngineClient()
    yield made
    await made.aclose()


class Started:
    """Starts simulated engines; each is as fast as the test wants."""

    def __init__(self, client: EngineClient, folder: Path) -> None:
        self._client = client
        self._folder = folder

    def __call__(
        self, spec: DeploymentSpec, *more: str, **environment: str
    ) -> AbstractAsyncContextManager[EngineProcess]:
        port = free_port()
        line = self.adapter(spec).command_line(spec, listen_host="127.0.0.1", listen_port=port)
        if isinstance(spec.engine.engine, LlamaCppEngine):
            command = [*python_module("nodeagent.simulators.llama_server"), *line.arguments, *more]
        else:
            command = [*python_module("nodeagent.simulators.vllm"), spec.model, *line.arguments, *more]
        fast = {"RUNG_SIM_SPEED": "100", "RUNG_SIM_LOAD_S": "0.05"}
        return engine_process(
            command,
            port=port,
            log_path=self._folder / f"{spec.id}-{port}.log",
            environment={**fast, **line.environment, **environment},
        )

    def adapter(self, spec: DeploymentSpec) -> EngineAdapter:
        """The adapter that the agent would use."""
        return adapter_for(spec.engine.engine, self._client)

    async def ready(self, engine: EngineProcess, spec: DeploymentSpec) -> EngineAdapter:
        """Wait until the engine is ready."""
        adapter = self.adapter(spec)
        await engine.become(EngineHealth.READY, adapter, spec)
        return adapter


@pytest.fixture
def start(client: EngineClient, tmp_path: Path) -> Started:
    return Started(client, tmp_path)


async def get(url: str) -> tuple[int, Any]:
    async with aiohttp.ClientSession() as session, session.get(url) as response:
        return response.status, await response.json(content_type=None)


async def post(url: str, body: object, headers: dict[str, str] | None = None) -> tuple[int, Any]:
    async with (
        aiohttp.ClientSession() as session,
        session.post(url, data=msgspec.json.encode(body), headers=headers) as response,
    ):
        return response.status, await response.json(content_type=None)


def chunks_of(frames: list[str]) -> list[dict[str, Any]]:
    assert frames[-1] == "[DONE]"
    return [msgspec.json.decode(data) for data in frames[:-1]]


def text_of(chunks: list[dict[str, Any]], key: str = "content") -> str:
    deltas = [choice["delta"] for chunk in chunks for choice in chunk["choices"]]
    return "".join(delta.get(key) or "" for delta in deltas)


# Loading.


async def test_llama_server_answers_503_everywhere_while_it_loads(start: Started) -> None:
    async with start(LLAMA, RUNG_SIM_FAULTS="never_ready") as engine:
        probe, _ = await engine.become(EngineHealth.LOADING, start.adapter(LLAMA), LLAMA)
        assert probe.detail == "Loading model"
        for path in ("/health", "/props", "/v1/models", "/nowhere"):
            status, body = await get(engine.base_url + path)
            assert status == 503
            assert body["error"] == {"code": 503, "message": "Loading model", "type": "unavailable_error"}
        assert (await get(engine.base_url + "/sim/state"))[1]["ready"] is False

        await post(engine.base_url + "/sim/faults", {"faults": []})
        probe, _ = await engine.become(EngineHealth.READY, start.adapter(LLAMA), LLAMA)
        assert (probe.models, probe.context_tokens) == (("qwen-8b",), 1024)


async def test_vllm_opens_its_port_when_it_is_ready_and_not_before(start: Started) -> None:
    async with start(VLLM, "--max-model-len", "4096", RUNG_SIM_LOAD_S="0.4") as engine:
        probe, seen = await engine.become(EngineHealth.READY, start.adapter(VLLM), VLLM)

        assert seen == [EngineHealth.ABSENT, EngineHealth.READY]
        assert (probe.models, probe.context_tokens) == (("nemotron-8b-fp8",), 4096)
        await until(lambda: "startup complete" in engine.log(), "the last milestone")
        found = [start.adapter(VLLM).load_progress(line) for line in engine.log().split("\n")]
    steps = [step for step in found if step is not None]
    assert [step.percent for step in steps if "shards" in step.detail] == [0, 25, 50, 75, 100]
    assert "capturing CUDA graphs, 35 of 35" in [step.detail for step in steps]
    assert steps[-1].detail == "ready"


async def test_llama_servers_output_tells_the_same_steps_as_the_real_ones(start: Started) -> None:
    async with start(LLAMA) as engine:
        adapter = await start.ready(engine, LLAMA)
        await until(lambda: "main loop" in engine.log(), "the last milestone")
        steps = [found.detail for line in engine.log().splitlines() if (found := adapter.load_progress(line))]

    assert "loading weights" in steps
    assert "weights loaded" in steps
    assert steps[-1] == "ready"


@BOTH
async def test_an_engine_may_die_while_loading(start: Started, spec: DeploymentSpec) -> None:
    async with start(spec, RUNG_SIM_FAULTS="die_while_loading") as engine:
        assert await engine.exit_code() == 1
        assert "failed" in engine.log()


@pytest.mark.parametrize(
    ("module", "code", "complaint"),
    [
        ("nodeagent.simulators.llama_server", 1, "error: invalid argument: --wrong"),
        ("nodeagent.simulators.vllm", 2, "unrecognized arguments: --wrong"),
    ],
)
async def test_unknown_options_are_refused(tmp_path: Path, module: str, code: int, complaint: str) -> None:
    command = [*python_module(module), "--wrong", "-m", "x"]
    if module.endswith("vllm"):
        command = [*python_module(module), "model", "--wrong"]

    async with engine_process(command, port=0, log_path=tmp_path / "log") as engine:
        assert await engine.exit_code() == code
        assert complaint in engine.log()


# Memory.


@pytest.fixture
def gpus(tmp_path: Path) -> SimulatedGpus:
    gpu = SimulatedGpuSpec(name="RTX 5090", memory_total_bytes=32 * GIB)
    return SimulatedGpus.create(tmp_path / "gpus", gpus=[gpu])


async def test_memory_is_taken_while_loading_and_given_back_at_the_end(
    start: Started, gpus: SimulatedGpus, tmp_path: Path
) -> None:
    machine = str(tmp_path / "gpus")
    async with (
        start(LLAMA, RUNG_SIM_GPUS=machine, RUNG_SIM_VRAM_BYTES=str(6 * GIB)) as llama,
        start(VLLM, "--gpu-memory-utilization", "0.5", RUNG_SIM_GPUS=machine) as vllm,
    ):
        await start.ready(llama, LLAMA)
        await start.ready(vllm, VLLM)
        held = {process.pid: process.gpu_bytes[0] for process in gpus.read().processes}
        assert held == {llama.pid: 6 * GIB, vllm.pid: 16 * GIB}
    assert gpus.read().gpu_free_bytes(0) == 32 * GIB


async def test_vllm_refuses_to_start_with_less_free_than_its_share(
    start: Started, gpus: SimulatedGpus, tmp_path: Path
) -> None:
    gpus.set_unattributed(0, 8 * GIB)

    async with start(VLLM, RUNG_SIM_GPUS=str(tmp_path / "gpus")) as engine:
        assert await engine.exit_code() == 1
        assert (
            "ValueError: Free memory on device cuda:0 (24.00/32.00 GiB) on startup is less than"
            in engine.log()
        )


async def test_llama_server_dies_of_too_little_memory(
    start: Started, gpus: SimulatedGpus, tmp_path: Path
) -> None:
    gpus.set_unattributed(0, 30 * GIB)

    async with start(LLAMA, RUNG_SIM_GPUS=str(tmp_path / "gpus")) as engine:
        assert await engine.exit_code() == 1
        assert "cudaMalloc failed: out of memory" in engine.log()
        assert "exiting due to model loading error" in engine.log()


# Answers.


@BOTH
async def test_a_stream_has_its_frames_in_order(start: Started, spec: DeploymentSpec) -> None:
    async with start(spec) as engine:
        adapter = await start.ready(engine, spec)
        body = chat_body("hello there", stream_options={"include_usage": True})
        async with adapter.run(engine.base_url, spec, CHAT, body, idle_timeout_s=10) as stream:
            assert (stream.status, stream.content_type[:17]) == (200, "text/event-stream")
            chunks = chunks_of(await read_frames(stream))

    assert chunks[0]["choices"][0]["delta"]["role"] == "assistant"
    assert [chunk["choices"][0]["finish_reason"] for chunk in chunks[:-1]][-1] == "stop"
    assert chunks[-1]["choices"] == []
    usage = chunks[-1]["usage"]
    assert usage["completion_tokens"] == len(chunks) - 3
    assert usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"]
    assert ("timings" in chunks[-1]) is (spec is LLAMA)
    assert "simulated" in text_of(chunks)
    assert "\u201chello there\u201d" in text_of(chunks)


@BOTH
async def test_the_same_answer_comes_whole(start: Started, spec: DeploymentSpec) -> None:
    messages = [{"role": "user", "content": "count to 12"}]
    async with start(spec) as engine:
        await start.ready(engine, spec)
        status, body = await post(engine.base_url + "/v1/chat/completions", {"messages": messages})
        cut = await post(engine.base_url + "/v1/completions", {"prompt": "count to 12", "max_tokens": 3})

    assert status == 200
    assert body["choices"][0]["message"]["content"] == "1 2 3 4 5 6 7 8 9 10 11 12"
    assert body["choices"][0]["finish_reason"] == "stop"
    assert (cut[1]["choices"][0]["text"], cut[1]["choices"][0]["finish_reason"]) == ("1 2 3", "length")


@BOTH
async def test_a_tool_is_called_when_asked(start: Started, spec: DeploymentSpec) -> None:
    parameters = {"type": "object", "properties": {"city": {"enum": ["Berlin"]}, "days": {"type": "integer"}}}
    tools = [{"type": "function", "function": {"name": "weather", "parameters": parameters}}]
    understands = ("--enable-auto-tool-choice", "--tool-call-parser", "hermes") if spec is VLLM else ()
    async with start(spec, *understands) as engine:
        adapter = await start.ready(engine, spec)
        body = chat_body("please call the tool", tools=tools)
        async with adapter.run(engine.base_url, spec, CHAT, body, idle_timeout_s=10) as stream:
            chunks = chunks_of(await read_frames(stream))

    calls = [call for c in chunks for call in c["choices"][0]["delta"].get("tool_calls", [])]
    assert calls[0]["function"]["name"] == "weather"
    arguments = "".join(call["function"]["arguments"] for call in calls)
    assert msgspec.json.decode(arguments) == {"city": "Berlin", "days": 1}
    assert len(calls) > 2
    assert chunks[-1]["choices"][0]["finish_reason"] == "tool_calls"


async def test_a_reasoner_thinks_before_it_answers(start: Started) -> None:
    async with start(VLLM, "--served-model-name", "deepseek-r1-14b") as engine:
        adapter = await start.ready(engine, VLLM)
        async with adapter.run(engine.base_url, VLLM, CHAT, chat_body("why?"), idle_timeout_s=10) as stream:
            chunks = chunks_of(await read_frames(stream))

    assert "Thinking is simulated" in text_of(chunks, "reasoning_content")
    kinds = ["reasoning_content" in chunk["choices"][0]["delta"] for chunk in chunks[1:-1]]
    assert kinds == sorted(kinds, reverse=True)


async def test_embeddings_need_an_engine_that_embeds(start: Started) -> None:
    body = msgspec.json.encode({"input": ["a", "b"]})
    async with start(LLAMA) as chat, start(LLAMA, "--embedding") as embedder:
        adapter = await start.ready(chat, LLAMA)
        await start.ready(embedder, LLAMA)
        async with adapter.run(
            embedder.base_url, LLAMA, RunKind.EMBEDDINGS, body, idle_timeout_s=10
        ) as stream:
            answer = msgspec.json.decode(b"".join([chunk async for chunk in stream.chunks()]))
        refused = await post(chat.base_url + "/v1/embeddings", {"input": "a"})
        no_chat = await post(embedder.base_url + "/v1/chat/completions", {"messages": [{"content": "a"}]})

    vectors = [row["embedding"] for row in answer["data"]]
    assert vectors[0] != vectors[1]
    assert sum(value * value for value in vectors[0]) == pytest.approx(1.0, abs=1e-3)
    assert (refused[0], refused[1]["error"]["type"]) == (501, "not_supported_error")
    assert no_chat[0] == 501


# Refusals.


async def test_llama_server_refuses_in_its_own_shapes(start: Started) -> None:
    long = [{"role": "user", "content": "word " * 3000}]
    async with start(LLAMA, "--api-key", "secret") as engine:
        await start.ready(engine, LLAMA)
        chat = engine.base_url + "/v1/chat/completions"
        key = {"Authorization": "Bearer secret"}
        too_long = await post(chat, {"messages": long}, key)
        keyless = await post(chat, {"messages": long})
        malformed = await post(chat, ["no object"], key)

    assert too_long[0] == 400
    error = too_long[1]["error"]
    assert (error["type"], error["n_ctx"]) == ("exceed_context_size_error", 1024)
    assert error["n_prompt_tokens"] > 1024
    assert (keyless[0], keyless[1]["error"]["type"]) == (401, "authentication_error")
    assert (malformed[0], malformed[1]["error"]["code"]) == (400, 400)


async def test_vllm_refuses_in_its_own_shapes(start: Started) -> None:
    hello = [{"role": "user", "content": "hello"}]
    async with start(VLLM, "--api-key", "secret", "--max-model-len", "64") as engine:
        await until(lambda: "startup complete" in engine.log(), "vLLM is up")
        chat = engine.base_url + "/v1/chat/completions"
        key = {"Authorization": "Bearer secret"}
        unknown = await post(chat, {"model": "nope", "messages": hello}, key)
        too_long = await post(chat, {"messages": hello, "max_tokens": 100}, key)
        keyless = await post(chat, {"messages": hello})
        no_sleep = await post(engine.base_url + "/sleep", {})

    assert unknown[0] == 404
    assert unknown[1]["error"] == {
        "message": "The model `nope` does not exist. Valid aliases: nemotron-8b-fp8.",
        "type": "NotFoundError",
        "param": "model",
        "code": 404,
    }
    assert (too_long[0], too_long[1]["error"]["type"]) == (400, "BadRequestError")
    assert keyless == (401, {"error": "Unauthorized"})
    assert no_sleep[0] == 404


# Cancelling and faults.


@BOTH
async def test_leaving_a_stream_aborts_the_generation(start: Started, spec: DeploymentSpec) -> None:
    async with start(spec, RUNG_SIM_SPEED="1") as engine:
        adapter = await start.ready(engine, spec)
        body = chat_body("go on", ignore_eos=True, max_tokens=900)
        async with adapter.run(engine.base_url, spec, CHAT, body, idle_timeout_s=10) as stream:
            await anext(aiter(stream.chunks()))
            assert (await get(engine.base_url + "/sim/state"))[1]["active"] == 1
        state = await _settled(engine)

    assert (state["aborted"], state["completed"], state["active"]) == (1, 0, 0)
    assert state["tokens_generated"] < 900


async def test_more_requests_than_slots_wait_and_may_leave_while_they_do(start: Started) -> None:
    body = chat_body("go on", ignore_eos=True, max_tokens=900)
    async with start(LLAMA, RUNG_SIM_SPEED="1") as engine:
        adapter = await start.ready(engine, LLAMA)

        async def listen() -> None:
            async with adapter.run(engine.base_url, LLAMA, CHAT, body, idle_timeout_s=30) as stream:
                async for _ in stream.chunks():
                    pass

        listeners = [asyncio.create_task(listen()) for _ in range(3)]
        state: dict[str, Any] = {}
        async with asyncio.timeout(10):
            while (state.get("active"), state.get("waiting")) != (2, 1):
                state = (await get(engine.base_url + "/sim/state"))[1]
        full = await get(engine.base_url + "/slots?fail_on_no_slot=1")
        for task in listeners:
            task.cancel()
        await asyncio.gather(*listeners, return_exceptions=True)
        state = await _settled(engine)

    assert full[0] == 503
    assert (state["aborted"], state["waiting"]) == (3, 0)


async def _settled(engine: EngineProcess) -> dict[str, Any]:
    async with asyncio.timeout(10):
        while True:
            state: dict[str, Any] = (await get(engine.base_url + "/sim/state"))[1]
            if state["active"] == 0 and state["waiting"] == 0 and state["aborted"] > 0:
                return state


@BOTH
async def test_a_stream_can_be_cut(start: Started, spec: DeploymentSpec) -> None:
    async with start(spec, RUNG_SIM_FAULTS="cut_mid_stream") as engine:
        adapter = await start.ready(engine, spec)
        got = bytearray()

        async def listen() -> None:
            body = chat_body("hello")
            async with adapter.run(engine.base_url, spec, CHAT, body, idle_timeout_s=10) as stream:
                async for chunk in stream.chunks():
                    got.extend(chunk)

        with pytest.raises(EngineProtocolError):
            await listen()

    assert got.count(b"\n\n") == 4
    assert not got.endswith(b"\n\n")


@BOTH
async def test_a_stream_can_hold_nonsense(start: Started, spec: DeploymentSpec) -> None:
    async with start(spec, RUNG_SIM_FAULTS="broken_sse") as engine:
        adapter = await start.ready(engine, spec)
        async with adapter.run(engine.base_url, spec, CHAT, chat_body("hello"), idle_timeout_s=10) as stream:
            frames = await read_frames(stream)

    with pytest.raises(msgspec.DecodeError):
        msgspec.json.decode(frames[-1])


@BOTH
async def test_an_error_may_come_under_status_200(start: Started, spec: DeploymentSpec) -> None:
    async with start(spec, RUNG_SIM_FAULTS="error_frame_then_done") as engine:
        adapter = await start.ready(engine, spec)
        async with adapter.run(engine.base_url, spec, CHAT, chat_body("hello"), idle_timeout_s=10) as stream:
            assert stream.status == 200
            chunks = chunks_of(await read_frames(stream))

    assert chunks[-1]["error"]["code"] == 500


@BOTH
async def test_faults_are_switched_while_it_runs(start: Started, spec: DeploymentSpec) -> None:
    async with start(spec, RUNG_SIM_SLOW_FIRST_BYTE_S="0.3") as engine:
        adapter = await start.ready(engine, spec)
        faults = engine.base_url + "/sim/faults"
        body = chat_body("hello")

        async def status(idle_timeout_s: float) -> int:
            async with adapter.run(
                engine.base_url, spec, CHAT, body, idle_timeout_s=idle_timeout_s
            ) as stream:
                await read_frames(stream)
                return stream.status

        assert await status(10) == 200
        assert (await post(faults, {"faults": ["http_500"]}))[1] == {"faults": ["http_500"]}
        assert await status(10) == 500
        await post(faults, {"faults": ["hang"]})
        with pytest.raises(EngineTimeoutError):
            await status(0.2)
        await post(faults, {"faults": ["slow_first_byte"]})
        with pytest.raises(EngineTimeoutError):
            await status(0.1)
        assert await status(10) == 200
        await post(faults, {"faults": ["hang_health"]})
        probe = await adapter.probe(engine.base_url, spec)
        assert (probe.health, probe.detail) == (EngineHealth.UNWELL, "did not answer within 2 s")
        assert (await post(faults, {"faults": ["nonsense"]}))[0] == 400
        assert (await get(engine.base_url + "/sim/state"))[1]["faults"] == ["hang_health"]


async def test_life_speed_is_that_of_a_real_model(start: Started) -> None:
    async with start(VLLM, RUNG_SIM_SPEED="1") as engine:
        await start.ready(engine, VLLM)
        loop = asyncio.get_running_loop()
        started = loop.time()
        body = {"messages": [{"role": "user", "content": "go on"}], "ignore_eos": True, "max_tokens": 42}
        await post(engine.base_url + "/v1/chat/completions", body)
        took_s = loop.time() - started

    # 42 tokens a second after 0.15 s; a busy machine may be late, never early.
    assert 1.1 <= took_s < 3.0
