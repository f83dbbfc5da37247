"""The llama.cpp adapter against real llama.cpp servers with a tiny random model."""

from __future__ import annotations

import importlib.util
import shutil
import sys
from collections.abc import AsyncIterator
from contextlib import AbstractAsyncContextManager
from pathlib import Path
from typing import Any

import msgspec
import pytest

from nodeagent.engines import EngineHealth, LlamaCppAdapter, RunKind
from rung.service import EngineClient
from rung.types import DeploymentSpec, EngineSpec, LlamaCppEngine, LlamaCppServer, ProcessRuntime
from tests.integration.engine_process import (
    CHAT,
    EngineProcess,
    chat_body,
    engine_process,
    free_port,
    read_frames,
    until,
)
from tests.integration.tiny_gguf import CONTEXT_TOKENS, EMBEDDING_LENGTH, write_tiny_gguf

pytestmark = pytest.mark.llamacpp


def _needs(server: LlamaCppServer) -> Any:
    if server is LlamaCppServer.LLAMA_SERVER:
        missing = shutil.which("llama-server") is None
        reason = "llama-server is not on PATH"
    else:
        missing = importlib.util.find_spec("llama_cpp") is None
        reason = "llama-cpp-python is not installed"
    return pytest.param(server, id=server.value, marks=pytest.mark.skipif(missing, reason=reason))


@pytest.fixture(params=[_needs(LlamaCppServer.LLAMA_CPP_PYTHON), _needs(LlamaCppServer.LLAMA_SERVER)])
def server(request: pytest.FixtureRequest) -> LlamaCppServer:
    assert isinstance(request.param, LlamaCppServer)
    return request.param


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_gguf(tmp_path_factory.mktemp("models") / "tiny.gguf")


@pytest.fixture
async def adapter() -> AsyncIterator[LlamaCppAdapter]:
    client = EngineClient()
    yield LlamaCppAdapter(client)
    await client.aclose()


def _spec(model: Path, server: LlamaCppServer, *, embedding: bool = False) -> DeploymentSpec:
    engine = LlamaCppEngine(
        model_path=str(model), server=server, context_tokens=CONTEXT_TOKENS, embedding=embedding
    )
    runtime = ProcessRuntime(executable=server.value)
    return DeploymentSpec(
        id="tiny-1", node_id="n1", model="tiny", engine=EngineSpec(engine=engine, runtime=runtime)
    )


def _started(
    adapter: LlamaCppAdapter, spec: DeploymentSpec, tmp_path: Path
) -> AbstractAsyncContextManager[EngineProcess]:
    engine = spec.engine.engine
    assert isinstance(engine, LlamaCppEngine)
    port = free_port()
    line = adapter.command_line(spec, listen_host="127.0.0.1", listen_port=port)
    executable = ["llama-server"]
    if engine.server is LlamaCppServer.LLAMA_CPP_PYTHON:
        executable = [sys.executable, "-m", "llama_cpp.server"]
    return engine_process(
        [*executable, *line.arguments],
        port=port,
        log_path=tmp_path / "engine.log",
        environment=line.environment,
    )


async def test_it_loads_streams_and_stops_when_nobody_listens(
    adapter: LlamaCppAdapter, server: LlamaCppServer, model: Path, tmp_path: Path
) -> None:
    spec = _spec(model, server)
    assert (await adapter.probe("http://127.0.0.1:9", spec)).health is EngineHealth.ABSENT

    async with _started(adapter, spec, tmp_path) as engine:
        probe, seen = await engine.become(EngineHealth.READY, adapter, spec)
        assert seen[-1] is EngineHealth.READY
        assert set(seen) <= {EngineHealth.ABSENT, EngineHealth.LOADING, EngineHealth.READY}
        if server is LlamaCppServer.LLAMA_SERVER:
            assert (probe.models, probe.context_tokens) == (("tiny",), CONTEXT_TOKENS)
        await _check_stream(adapter, spec, engine)
        await _check_cancel(adapter, spec, engine, server)
        # It is as well as before.
        assert (await adapter.probe(engine.base_url, spec)).health is EngineHealth.READY
        await _check_stream(adapter, spec, engine)
        _check_progress(adapter, engine)


async def _check_stream(adapter: LlamaCppAdapter, spec: DeploymentSpec, engine: EngineProcess) -> None:
    body = chat_body("hello", model="tiny", max_tokens=12)
    async with adapter.run(engine.base_url, spec, CHAT, body, idle_timeout_s=30) as stream:
        assert stream.status == 200
        assert stream.content_type.startswith("text/event-stream")
        frames = await read_frames(stream)

    assert frames[-1] == "[DONE]"
    chunks = [msgspec.json.decode(data) for data in frames[:-1]]
    choices = [chunk["choices"][0] for chunk in chunks if chunk["choices"]]
    assert "".join(choice["delta"].get("content") or "" for choice in choices)
    assert choices[-1]["finish_reason"] == "length"


async def _check_cancel(
    adapter: LlamaCppAdapter, spec: DeploymentSpec, engine: EngineProcess, server: LlamaCppServer
) -> None:
    """Leave after the first bytes; the engine must notice, or it would work for nobody."""
    body = chat_body("hello", model="tiny", max_tokens=CONTEXT_TOKENS - 100)
    noticed = "Disconnected from client"
    if server is LlamaCppServer.LLAMA_SERVER:
        noticed = "cancel task"
    assert noticed not in engine.log()
    async with adapter.run(engine.base_url, spec, CHAT, body, idle_timeout_s=30) as stream:
        assert await anext(aiter(stream.chunks()))
        # A probe neither waits for the generation nor ends it.
        assert (await adapter.probe(engine.base_url, spec)).health is EngineHealth.READY
        assert noticed not in engine.log()
    await until(lambda: noticed in engine.log(), "the engine notices that its caller left")


def _check_progress(adapter: LlamaCppAdapter, engine: EngineProcess) -> None:
    steps = [found.detail for line in engine.log().splitlines() if (found := adapter.load_progress(line))]
    assert "loading weights" in steps
    assert "weights loaded" in steps
    assert steps[-1] == "ready"


async def test_it_embeds(
    adapter: LlamaCppAdapter, server: LlamaCppServer, model: Path, tmp_path: Path
) -> None:
    spec = _spec(model, server, embedding=True)
    body = msgspec.json.encode({"model": "tiny", "input": ["hello", "goodbye"]})

    async with _started(adapter, spec, tmp_path) as engine:
        await engine.become(EngineHealth.READY, adapter, spec)
        async with adapter.run(engine.base_url, spec, RunKind.EMBEDDINGS, body, idle_timeout_s=30) as stream:
            assert stream.status == 200
            answer = msgspec.json.decode(b"".join([chunk async for chunk in stream.chunks()]))

    vectors = [row["embedding"] for row in answer["data"]]
    assert [len(vector) for vector in vectors] == [EMBEDDING_LENGTH, EMBEDDING_LENGTH]
    assert vectors[0] != vectors[1]


async def test_a_file_that_is_no_model_ends_the_engine(
    adapter: LlamaCppAdapter, server: LlamaCppServer, tmp_path: Path
) -> None:
    broken = tmp_path / "broken.gguf"
    broken.write_bytes(b"GGUF, but no more than that")
    spec = _spec(broken, server)

    async with _started(adapter, spec, tmp_path) as engine:
        assert await engine.exit_code() != 0
        assert (await adapter.probe(engine.base_url, spec)).health is EngineHealth.ABSENT
