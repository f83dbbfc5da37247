"""The simulated Ollama as a real process, through its adapter and over its own HTTP."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import AbstractAsyncContextManager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import aiohttp
import msgspec
import pytest
from msgspec.structs import replace

from nodeagent.engines import EngineHealth, OllamaAdapter, RunKind
from nodeagent.simulators.gpu import SimulatedGpus, SimulatedGpuSpec
from rung.errors import EngineFailedError, EngineTimeoutError
from rung.service import EngineClient
from rung.types import DeploymentSpec, EngineSpec, OllamaEngine, ProcessRuntime
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
MODELS = "qwen3:8b,deepseek-r1:14b,gemma3:4b,nomic-embed-text:latest"


def spec_of(model: str, *capabilities: str) -> DeploymentSpec:
    return DeploymentSpec(
        id=f"sim-{model}",
        node_id="n1",
        model=model,
        capabilities=capabilities or ("chat",),
        engine=EngineSpec(
            engine=OllamaEngine(model=model),
            runtime=ProcessRuntime(executable="ollama"),
            start_timeout_s=20.0,
        ),
    )


QWEN = spec_of("qwen3:8b")
R1 = spec_of("deepseek-r1:14b")
GEMMA = spec_of("gemma3:4b")


@pytest.fixture
async def adapter() -> AsyncIterator[OllamaAdapter]:
    client = EngineClient()
    yield OllamaAdapter(client, unload_timeout_s=5.0)
    await client.aclose()


@pytest.fixture
def gpus(tmp_path: Path) -> SimulatedGpus:
    gpu = SimulatedGpuSpec(name="RTX 5090", memory_total_bytes=32 * GIB)
    return SimulatedGpus.create(tmp_path / "gpus", gpus=[gpu])


class Started:
    """Starts simulated Ollamas on the simulated machine, each model as large as the test wants."""

    def __init__(self, adapter: OllamaAdapter, folder: Path) -> None:
        self._adapter = adapter
        self._folder = folder

    def __call__(self, **environment: str) -> AbstractAsyncContextManager[EngineProcess]:
        port = free_port()
        line = self._adapter.command_line(QWEN, listen_host="127.0.0.1", listen_port=port)
        given = {
            "RUNG_SIM_SPEED": "100",
            "RUNG_SIM_LOAD_S": "0.05",
            "RUNG_SIM_MODELS": MODELS,
            "RUNG_SIM_GPUS": str(self._folder / "gpus"),
            "RUNG_SIM_VRAM_BYTES": str(6 * GIB),
            **line.environment,
            **environment,
        }
        return engine_process(
            [*python_module("nodeagent.simulators.ollama"), *line.arguments],
            port=port,
            log_path=self._folder / f"ollama-{port}.log",
            environment=given,
        )


@pytest.fixture
def start(adapter: OllamaAdapter, gpus: SimulatedGpus, tmp_path: Path) -> Started:
    return Started(adapter, tmp_path)


async def ready(engine: EngineProcess, adapter: OllamaAdapter) -> None:
    """Its server is up, and nothing is loaded."""
    await engine.become(EngineHealth.ASLEEP, adapter, QWEN)


def held(gpus: SimulatedGpus) -> int:
    return sum(process.gpu_bytes.get(0, 0) for process in gpus.read().processes)


async def get(url: str) -> tuple[int, Any]:
    async with aiohttp.ClientSession() as session, session.get(url) as response:
        return response.status, await response.json(content_type=None)


async def post(url: str, body: object) -> tuple[int, Any]:
    """The status, and what was answered: an object, or the objects of a stream's lines."""
    async with (
        aiohttp.ClientSession() as session,
        session.post(url, data=msgspec.json.encode(body)) as response,
    ):
        text = await response.read()
        if response.content_type == "application/x-ndjson":
            return response.status, [msgspec.json.decode(found) for found in text.splitlines()]
        return response.status, msgspec.json.decode(text)


async def names_loaded(engine: EngineProcess) -> list[str]:
    return [model["name"] for model in (await get(engine.base_url + "/api/ps"))[1]["models"]]


# Loading and unloading.


async def test_it_listens_at_once_and_sleeps_while_nothing_is_loaded(
    start: Started, adapter: OllamaAdapter, gpus: SimulatedGpus
) -> None:
    async with start() as engine:
        probe, _ = await engine.become(EngineHealth.ASLEEP, adapter, QWEN)
        assert probe.detail == "its model is not loaded"
        assert "qwen3:8b" in probe.models
        await until(lambda: "Listening on" in engine.log(), "it says where it listens")
        steps = [found for text in engine.log().splitlines() if (found := adapter.load_progress(text))]
        assert [step.detail for step in steps] == ["listening"]
        assert held(gpus) == 0
        missing = await adapter.probe(engine.base_url, spec_of("llama3:70b"))

    assert (missing.health, "ollama pull llama3:70b" in missing.detail) == (EngineHealth.NO_MODEL, True)


async def test_memory_moves_with_waking_and_freeing(
    start: Started, adapter: OllamaAdapter, gpus: SimulatedGpus
) -> None:
    async with start() as engine:
        await ready(engine, adapter)
        await adapter.wake(engine.base_url, QWEN, 1)
        assert held(gpus) == 6 * GIB
        model = await adapter.loaded(engine.base_url, QWEN)
        assert model is not None
        assert (model.size_bytes, model.vram_bytes) == (6 * GIB, 6 * GIB)
        probe = await adapter.probe(engine.base_url, QWEN)
        assert (probe.detail, probe.context_tokens) == ("", 4096)

        await adapter.free(engine.base_url, QWEN)
        assert held(gpus) == 0
        assert await adapter.loaded(engine.base_url, QWEN) is None
        await adapter.free(engine.base_url, QWEN)

        await adapter.wake(engine.base_url, QWEN, 1)
        assert held(gpus) == 6 * GIB
    assert held(gpus) == 0


async def test_a_request_loads_the_model_by_itself(
    start: Started, adapter: OllamaAdapter, gpus: SimulatedGpus
) -> None:
    async with start() as engine:
        await ready(engine, adapter)
        body = chat_body("hello there", model="qwen3:8b", stream_options={"include_usage": True})
        async with adapter.run(engine.base_url, QWEN, CHAT, body, idle_timeout_s=10) as stream:
            assert (stream.status, stream.content_type[:17]) == (200, "text/event-stream")
            frames = await read_frames(stream)
        assert held(gpus) == 6 * GIB

    assert frames[-1] == "[DONE]"
    chunks = [msgspec.json.decode(data) for data in frames[:-1]]
    assert {chunk["system_fingerprint"] for chunk in chunks} == {"fp_ollama"}
    deltas = [choice["delta"] for chunk in chunks for choice in chunk["choices"]]
    assert {delta["role"] for delta in deltas} == {"assistant"}
    assert "simulated Ollama in the role of qwen3:8b" in "".join(delta["content"] for delta in deltas)
    assert chunks[-2]["choices"][0]["finish_reason"] == "stop"
    assert chunks[-1]["choices"] == []
    assert chunks[-1]["usage"]["completion_tokens"] == len(chunks) - 2


async def test_unloading_waits_for_who_is_being_answered(
    start: Started, adapter: OllamaAdapter, gpus: SimulatedGpus
) -> None:
    async with start(RUNG_SIM_SPEED="0.5") as engine:
        await ready(engine, adapter)
        await adapter.wake(engine.base_url, QWEN, 1)
        body = chat_body("go on", model="qwen3:8b", ignore_eos=True, max_tokens=10)
        async with adapter.run(engine.base_url, QWEN, CHAT, body, idle_timeout_s=10) as stream:
            pieces = stream.chunks()
            await anext(pieces)
            unload = {"model": "qwen3:8b", "keep_alive": 0, "stream": False}
            assert (await post(engine.base_url + "/api/generate", unload))[1]["done_reason"] == "unload"
            assert held(gpus) == 6 * GIB
            rest = b"".join([piece async for piece in pieces])
            assert rest.endswith(b"data: [DONE]\n\n")
        # It is listed until its runner has ended.
        assert await names_loaded(engine) == ["qwen3:8b"]
        await until(lambda: held(gpus) == 0, "the memory is given back")


async def test_a_model_goes_when_its_time_is_over(
    start: Started, adapter: OllamaAdapter, gpus: SimulatedGpus
) -> None:
    async with start() as engine:
        await ready(engine, adapter)
        body = {"model": "qwen3:8b", "keep_alive": "1500ms", "stream": False}
        assert (await post(engine.base_url + "/api/generate", body))[1]["done_reason"] == "load"
        assert held(gpus) == 6 * GIB
        (row,) = (await get(engine.base_url + "/api/ps"))[1]["models"]
        left_s = (datetime.fromisoformat(row["expires_at"]) - datetime.now(UTC)).total_seconds()
        assert 0 < left_s <= 1.5
        await until(lambda: held(gpus) == 0, "the model expires")


async def test_the_servers_default_is_for_ever(start: Started, adapter: OllamaAdapter) -> None:
    async with start() as engine:
        await ready(engine, adapter)
        await post(engine.base_url + "/api/generate", {"model": "qwen3:8b", "stream": False})
        (row,) = (await get(engine.base_url + "/api/ps"))[1]["models"]

    assert datetime.fromisoformat(row["expires_at"]).year > 2300


async def test_the_least_recently_used_makes_room(
    start: Started, adapter: OllamaAdapter, gpus: SimulatedGpus
) -> None:
    async with start(OLLAMA_MAX_LOADED_MODELS="2") as engine:
        await ready(engine, adapter)
        for spec in (QWEN, R1, QWEN, GEMMA):
            await adapter.wake(engine.base_url, spec, 1)
        assert await names_loaded(engine) == ["gemma3:4b", "qwen3:8b"]
        assert held(gpus) == 12 * GIB


async def test_others_go_before_a_model_is_split(
    start: Started, adapter: OllamaAdapter, gpus: SimulatedGpus
) -> None:
    gpus.set_unattributed(0, 22 * GIB)
    async with start(OLLAMA_MAX_LOADED_MODELS="3") as engine:
        await ready(engine, adapter)
        await adapter.wake(engine.base_url, QWEN, 1)
        await adapter.wake(engine.base_url, R1, 1)
        assert await names_loaded(engine) == ["deepseek-r1:14b"]
        assert held(gpus) == 6 * GIB


async def test_what_does_not_fit_is_left_to_the_cpu(
    start: Started, adapter: OllamaAdapter, gpus: SimulatedGpus
) -> None:
    gpus.set_unattributed(0, 29 * GIB)
    async with start() as engine:
        await ready(engine, adapter)
        await adapter.wake(engine.base_url, QWEN, 1)
        model = await adapter.loaded(engine.base_url, QWEN)
        probe = await adapter.probe(engine.base_url, QWEN)
        assert model is not None
        # 16 of 33 layers.
        assert (model.size_bytes, model.vram_bytes) == (6 * GIB, 6 * GIB * 16 // 33)
        assert held(gpus) == model.vram_bytes
        assert probe.detail == "52 % of it is on the CPU"


async def test_memory_that_goes_while_it_loads_ends_the_load(
    start: Started, adapter: OllamaAdapter, gpus: SimulatedGpus
) -> None:
    async with start(OLLAMA_MAX_LOADED_MODELS="2", RUNG_SIM_LOAD_S="1") as engine:
        await ready(engine, adapter)
        await adapter.wake(engine.base_url, QWEN, 1)
        loading = asyncio.create_task(adapter.wake(engine.base_url, R1, 1))
        await until(lambda: held(gpus) > 6 * GIB, "the second model is being loaded")
        # It may take another step meanwhile.
        gpus.set_unattributed(0, gpus.read().gpu_free_bytes(0) - GIB)
        with pytest.raises(EngineFailedError, match=r"answers 500: .*cudaMalloc failed: out of memory"):
            await loading
        # And it lets go of everything.
        await until(lambda: held(gpus) == 0, "all models are gone")
        assert (await get(engine.base_url + "/api/version"))[0] == 200


async def test_who_leaves_while_a_model_loads_ends_the_load(
    start: Started, adapter: OllamaAdapter, gpus: SimulatedGpus
) -> None:
    async with start(RUNG_SIM_LOAD_S="30") as engine:
        await ready(engine, adapter)
        loading = asyncio.create_task(adapter.wake(engine.base_url, QWEN, 1))
        await until(lambda: held(gpus) > 0, "the model is being loaded")
        loading.cancel()
        await until(lambda: held(gpus) == 0, "the load is given up")
        assert await names_loaded(engine) == []


# Faults.


async def test_a_runner_may_die_and_the_server_stays(
    start: Started, adapter: OllamaAdapter, gpus: SimulatedGpus
) -> None:
    async with start(RUNG_SIM_FAULTS="die_while_loading") as engine:
        await ready(engine, adapter)
        with pytest.raises(EngineFailedError, match="llama runner process has terminated: exit status 2"):
            await adapter.wake(engine.base_url, QWEN, 1)
        assert held(gpus) == 0
        await post(engine.base_url + "/sim/faults", {"faults": []})
        await adapter.wake(engine.base_url, QWEN, 1)
        assert held(gpus) == 6 * GIB


async def test_a_load_may_never_end(start: Started, adapter: OllamaAdapter) -> None:
    spec = replace(QWEN, engine=replace(QWEN.engine, start_timeout_s=0.5))
    async with start(RUNG_SIM_FAULTS="never_ready") as engine:
        await ready(engine, adapter)
        with pytest.raises(EngineTimeoutError):
            await adapter.wake(engine.base_url, spec, 1)


async def test_an_unload_that_is_a_lie_is_found_out(
    start: Started, gpus: SimulatedGpus, adapter: OllamaAdapter
) -> None:
    client = EngineClient()
    impatient = OllamaAdapter(client, unload_timeout_s=0.3)
    async with start(RUNG_SIM_FAULTS="free_ignored") as engine:
        await ready(engine, adapter)
        await impatient.wake(engine.base_url, QWEN, 1)
        with pytest.raises(EngineFailedError, match="said that it unloads qwen3:8b, and lists it"):
            await impatient.free(engine.base_url, QWEN)
        assert held(gpus) == 6 * GIB
    await client.aclose()


async def test_health_may_hang(start: Started, adapter: OllamaAdapter) -> None:
    async with start() as engine:
        await ready(engine, adapter)
        await post(engine.base_url + "/sim/faults", {"faults": ["hang_health"]})
        probe = await adapter.probe(engine.base_url, QWEN)

    assert (probe.health, probe.detail) == (EngineHealth.UNWELL, "did not answer within 2 s")


async def test_too_many_requests_are_refused(start: Started, adapter: OllamaAdapter) -> None:
    body = chat_body("go on", model="qwen3:8b", ignore_eos=True, max_tokens=900)
    async with start(OLLAMA_MAX_QUEUE="1", RUNG_SIM_SPEED="1") as engine:
        await ready(engine, adapter)
        await adapter.wake(engine.base_url, QWEN, 1)

        async def listen() -> None:
            async with adapter.run(engine.base_url, QWEN, CHAT, body, idle_timeout_s=30) as stream:
                async for _ in stream.chunks():
                    pass

        listeners = [asyncio.create_task(listen()) for _ in range(2)]
        state: dict[str, Any] = {}
        async with asyncio.timeout(10):
            while (state.get("active"), state.get("waiting")) != (1, 1):
                state = (await get(engine.base_url + "/sim/state"))[1]
        refused = await post(engine.base_url + "/api/chat", msgspec.json.decode(body))
        for task in listeners:
            task.cancel()
        await asyncio.gather(*listeners, return_exceptions=True)

    assert refused == (
        503,
        {"error": "server busy, please try again.  maximum pending requests exceeded"},
    )


@pytest.mark.parametrize(
    ("fault", "last"),
    [
        ("error_frame_then_done", {"error"}),
        ("cut_mid_stream", None),
        ("broken_sse", None),
    ],
)
async def test_its_lines_may_break_off(
    start: Started, adapter: OllamaAdapter, fault: str, last: set[str] | None
) -> None:
    async with start(RUNG_SIM_FAULTS=fault) as engine:
        await ready(engine, adapter)
        body = {"model": "qwen3:8b", "messages": [{"role": "user", "content": "hello"}]}
        url = engine.base_url + "/api/chat"
        if last is None:
            with pytest.raises((aiohttp.ClientError, msgspec.DecodeError)):
                await post(url, body)
        else:
            status, lines = await post(url, body)
            assert (status, set(lines[-1])) == (200, last)
            assert not any(line.get("done") for line in lines)


# Its own routes.


async def test_an_answer_comes_as_lines_and_as_a_whole(start: Started, adapter: OllamaAdapter) -> None:
    async with start() as engine:
        await ready(engine, adapter)
        messages = [{"role": "user", "content": "count to 12"}]
        chat = await post(engine.base_url + "/api/chat", {"model": "qwen3:8b", "messages": messages})
        whole = await post(
            engine.base_url + "/api/generate",
            {"model": "qwen3:8b", "prompt": "count to 12", "stream": False, "options": {"num_predict": 3}},
        )
        thought = await post(
            engine.base_url + "/api/chat", {"model": "deepseek-r1:14b", "messages": messages, "stream": False}
        )

    lines = chat[1]
    assert "".join(line["message"]["content"] for line in lines) == "1 2 3 4 5 6 7 8 9 10 11 12"
    assert [line["done"] for line in lines] == [False] * (len(lines) - 1) + [True]
    assert (lines[-1]["done_reason"], lines[-1]["eval_count"]) == ("stop", len(lines) - 1)
    assert (whole[1]["response"], whole[1]["done_reason"]) == ("1 2 3", "length")
    assert "Thinking is simulated" in thought[1]["message"]["thinking"]


async def test_a_tool_is_called_in_one_piece(start: Started, adapter: OllamaAdapter) -> None:
    parameters = {"type": "object", "properties": {"city": {"enum": ["Berlin"]}}}
    tools = [{"type": "function", "function": {"name": "weather", "parameters": parameters}}]
    messages = [{"role": "user", "content": "please call the tool"}]
    async with start() as engine:
        await ready(engine, adapter)
        body = {"model": "qwen3:8b", "messages": messages, "tools": tools}
        _, lines = await post(engine.base_url + "/api/chat", body)

    calls = [line["message"]["tool_calls"] for line in lines if "tool_calls" in line["message"]]
    assert calls == [[{"function": {"name": "weather", "arguments": {"city": "Berlin"}}}]]


async def test_a_model_that_only_embeds(start: Started, adapter: OllamaAdapter, gpus: SimulatedGpus) -> None:
    spec = spec_of("nomic-embed-text:latest", "embedding")
    async with start() as engine:
        await ready(engine, adapter)
        await adapter.wake(engine.base_url, spec, 1)
        assert held(gpus) == 6 * GIB
        body = msgspec.json.encode({"model": "nomic-embed-text", "input": ["a", "b"]})
        async with adapter.run(engine.base_url, spec, RunKind.EMBEDDINGS, body, idle_timeout_s=10) as stream:
            answer = msgspec.json.decode(b"".join([chunk async for chunk in stream.chunks()]))
        native = await post(engine.base_url + "/api/embed", {"model": "nomic-embed-text", "input": "a"})
        refused = await post(engine.base_url + "/api/generate", {"model": "nomic-embed-text", "prompt": "a"})

    vectors = [row["embedding"] for row in answer["data"]]
    assert vectors[0] != vectors[1]
    assert native[1]["embeddings"] == [vectors[0]]
    assert refused == (400, {"error": '"nomic-embed-text" does not support generate'})


async def test_it_refuses_in_its_own_shapes(start: Started, adapter: OllamaAdapter) -> None:
    hello = [{"role": "user", "content": "hello"}]
    async with start() as engine:
        await ready(engine, adapter)
        url = engine.base_url
        unknown = await post(url + "/api/chat", {"model": "nope", "messages": hello})
        unknown_openai = await post(url + "/v1/chat/completions", {"model": "nope", "messages": hello})
        cloud = await post(url + "/api/chat", {"model": "kimi:cloud", "messages": hello})
        duration = await post(url + "/api/generate", {"model": "qwen3:8b", "keep_alive": "soon"})
        await post(url + "/sim/faults", {"faults": ["http_500"]})
        broken = await post(url + "/api/chat", {"model": "qwen3:8b", "messages": hello})

    assert unknown == (404, {"error": "model 'nope' not found"})
    assert unknown_openai == (
        404,
        {
            "error": {
                "message": "model 'nope' not found",
                "type": "not_found_error",
                "param": None,
                "code": None,
            }
        },
    )
    assert cloud == (401, {"error": "unauthorized"})
    assert duration == (400, {"error": 'time: invalid duration "soon"'})
    assert broken[0] == 500
    assert isinstance(broken[1]["error"], str)


async def test_it_tells_what_its_models_are(start: Started, adapter: OllamaAdapter) -> None:
    async with start(RUNG_SIM_MODELS=f"{MODELS},kimi:cloud") as engine:
        await ready(engine, adapter)
        tags = {tag["name"]: tag for tag in (await get(engine.base_url + "/api/tags"))[1]["models"]}
        shown = (await post(engine.base_url + "/api/show", {"model": "deepseek-r1:14b"}))[1]
        listed = (await get(engine.base_url + "/v1/models"))[1]["data"]

    assert tags["nomic-embed-text:latest"]["capabilities"] == ["embedding"]
    assert "remote_host" in tags["kimi:cloud"]
    assert "remote_host" not in tags["qwen3:8b"]
    assert tags["qwen3:8b"]["details"]["parameter_size"] == "8.0B"
    assert shown["capabilities"] == ["completion", "tools", "thinking"]
    assert {row["owned_by"] for row in listed} == {"library"}


async def test_a_pull_tells_how_far_it_is_and_goes_on_where_it_was_cut(
    start: Started, adapter: OllamaAdapter
) -> None:
    async with start(RUNG_SIM_FAULTS="cut_mid_stream", RUNG_SIM_SPEED="10000") as engine:
        await ready(engine, adapter)
        url = engine.base_url
        _, cut = await post(url + "/api/pull", {"model": "llama3:8b"})
        assert cut[-1]["status"].startswith("pulling ")
        assert cut[-1]["completed"] == cut[-1]["total"] // 2
        await post(url + "/sim/faults", {"faults": []})
        _, rest = await post(url + "/api/pull", {"model": "llama3:8b"})
        assert (await adapter.probe(url, spec_of("llama3:8b"))).health is EngineHealth.ASLEEP
        whole = await post(url + "/api/pull", {"model": "phi4:14b", "stream": False})
        await post(url + "/sim/faults", {"faults": ["error_frame_then_done"]})
        _, failed = await post(url + "/api/pull", {"model": "nowhere:1b"})
        invalid = await post(url + "/api/pull", {"model": "not a name"})

    assert cut[0] == rest[0] == {"status": "pulling manifest"}
    assert "completed" not in cut[1]
    digest = cut[1]["digest"]
    sizes = [found["completed"] for found in rest if found.get("digest") == digest and "completed" in found]
    assert sizes == sorted(sizes)
    assert sizes[0] > cut[-1]["completed"]
    assert sizes[-1] == cut[1]["total"]
    assert [found["status"] for found in rest[-3:]] == [
        "verifying sha256 digest",
        "writing manifest",
        "success",
    ]
    assert whole == (200, {"status": "success"})
    assert failed[-1] == {"error": "pull model manifest: file does not exist"}
    assert invalid == (400, {"error": "invalid model name"})
