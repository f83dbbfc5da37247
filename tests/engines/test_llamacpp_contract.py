"""What llama.cpp's servers have in common: one suite, for the simulator and for a real llama.cpp.

The real one is the server of llama-cpp-python, which the tests build. The simulator is one of llama-server,
which is run here only where it is on PATH: what only llama-server has (health, slots, metrics, 503 while it
loads) the simulator has by its documentation, and that is not held to the real thing.
"""

from __future__ import annotations

import asyncio
import importlib.util
import shutil
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import httpx
import msgspec
import pytest

from nodeagent.engines import LlamaCppAdapter
from rung.service import EngineClient
from rung.types import DeploymentSpec, EngineSpec, LlamaCppEngine, LlamaCppServer, ProcessRuntime
from tests.integration.engine_process import engine_process, free_port, python_module
from tests.integration.tiny_gguf import CONTEXT_TOKENS, write_tiny_gguf

_CHAT = "/v1/chat/completions"
_COMMANDS = {
    "simulator": python_module("nodeagent.simulators.llama_server"),
    "llama-cpp-python": [sys.executable, "-m", "llama_cpp.server"],
    "llama-server": ["llama-server"],
}


def _is_there(name: str) -> bool:
    if name == "llama-cpp-python":
        return importlib.util.find_spec("llama_cpp") is not None
    return name == "simulator" or shutil.which(name) is not None


@pytest.fixture(
    params=[
        pytest.param(
            name,
            marks=()
            if name == "simulator"
            else (
                pytest.mark.llamacpp,
                pytest.mark.skipif(not _is_there(name), reason=f"{name} is not installed"),
            ),
        )
        for name in _COMMANDS
    ]
)
async def engine(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[httpx.AsyncClient]:
    """One that is ready, started with our adapter's command line."""
    name: str = request.param
    embedding = "embed" in request.node.name
    model = write_tiny_gguf(tmp_path / "tiny.gguf")
    server = LlamaCppServer.LLAMA_CPP_PYTHON if name == "llama-cpp-python" else LlamaCppServer.LLAMA_SERVER
    spec = DeploymentSpec(
        id="tiny-1",
        node_id="n1",
        model="tiny",
        engine=EngineSpec(
            engine=LlamaCppEngine(
                model_path=str(model), server=server, context_tokens=CONTEXT_TOKENS, embedding=embedding
            ),
            runtime=ProcessRuntime(executable=name),
        ),
    )
    control = EngineClient()
    adapter, port = LlamaCppAdapter(control), free_port()
    line = adapter.command_line(spec, listen_host="127.0.0.1", listen_port=port)
    environment = {**line.environment, "RUNG_SIM_LOAD_S": "0.1", "RUNG_SIM_SPEED": "4"}
    started = engine_process(
        [*_COMMANDS[name], *line.arguments],
        port=port,
        log_path=tmp_path / "engine.log",
        environment=environment,
    )
    try:
        async with started as process, httpx.AsyncClient(base_url=process.base_url, timeout=20) as client:
            async with asyncio.timeout(60):
                while (await adapter.probe(process.base_url, spec)).health != "ready":
                    assert process.process.returncode is None, process.log()[-3000:]
            yield client
    finally:
        await control.aclose()


def wish(tokens: int, **more: object) -> dict[str, object]:
    """A chat request for so many tokens at most."""
    messages = [{"role": "user", "content": "count to 1000"}]
    return {"model": "tiny", "messages": messages, "max_tokens": tokens, **more}


async def test_it_lists_its_model_under_the_name_that_it_serves(engine: httpx.AsyncClient) -> None:
    body = (await engine.get("/v1/models")).json()

    assert body["object"] == "list"
    assert [(row["id"], row["object"]) for row in body["data"]] == [("tiny", "model")]


async def test_an_answer_comes_whole_with_its_usage(engine: httpx.AsyncClient) -> None:
    answer = await engine.post(_CHAT, json=wish(6))

    assert answer.status_code == 200
    body = answer.json()
    (choice,) = body["choices"]
    assert (body["object"], choice["finish_reason"]) == ("chat.completion", "length")
    assert choice["message"]["role"] == "assistant"
    assert choice["message"]["content"]
    assert body["usage"]["completion_tokens"] == 6
    assert body["usage"]["total_tokens"] == body["usage"]["prompt_tokens"] + 6


async def test_a_stream_ends_with_its_reason_and_done(engine: httpx.AsyncClient) -> None:
    async with engine.stream("POST", _CHAT, json=wish(6, stream=True)) as answer:
        assert answer.status_code == 200
        assert answer.headers["content-type"].startswith("text/event-stream")
        lines = [line async for line in answer.aiter_lines() if line and not line.startswith(":")]

    assert all(line.startswith("data: ") for line in lines)
    *told_of, done = [line.removeprefix("data: ") for line in lines]
    assert done == "[DONE]"
    chunks = [msgspec.json.decode(data) for data in told_of]
    assert {chunk["object"] for chunk in chunks} == {"chat.completion.chunk"}
    choices = [chunk["choices"][0] for chunk in chunks if chunk["choices"]]
    assert choices[0]["delta"]["role"] == "assistant"
    assert "".join(choice["delta"].get("content") or "" for choice in choices)
    assert [choice["finish_reason"] for choice in choices[:-1]] == [None] * (len(choices) - 1)
    assert choices[-1]["finish_reason"] == "length"


async def test_the_name_of_the_model_is_not_looked_at(engine: httpx.AsyncClient) -> None:
    answer = await engine.post(_CHAT, json=wish(1) | {"model": "nope"})

    assert answer.status_code == 200


async def test_a_caller_that_leaves_makes_room_for_the_next(engine: httpx.AsyncClient) -> None:
    async with engine.stream("POST", _CHAT, json=wish(CONTEXT_TOKENS - 100, stream=True)) as answer:
        chunks = answer.aiter_raw()
        assert await anext(chunks)

    # There is one slot, and the first had most of a context to go.
    async with asyncio.timeout(3):
        assert (await engine.post(_CHAT, json=wish(1))).status_code == 200


async def test_it_embeds(engine: httpx.AsyncClient) -> None:
    answer = await engine.post("/v1/embeddings", json={"model": "tiny", "input": ["hello", "goodbye"]})

    assert answer.status_code == 200
    body = answer.json()
    assert (body["object"], [row["index"] for row in body["data"]]) == ("list", [0, 1])
    first, second = (row["embedding"] for row in body["data"])
    assert len(first) == len(second) == 64
    assert first != second
    assert body["usage"]["total_tokens"] == body["usage"]["prompt_tokens"] > 0
