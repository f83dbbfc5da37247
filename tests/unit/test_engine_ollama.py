"""The adapter of Ollama: its command line, what probes mean, loading and unloading."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest
from aiohttp import web
from aiohttp.test_utils import TestServer
from msgspec.structs import replace

from nodeagent.engines import EngineHealth, FreeControl, LoadProgress, OllamaAdapter, RunKind, SleepControl
from rung.errors import (
    EngineFailedError,
    EngineProtocolError,
    EngineTimeoutError,
    EngineUnreachableError,
    InvalidRequestError,
)
from rung.service import EngineClient
from rung.types import DeploymentSpec, EngineSpec, LlamaCppEngine, OllamaEngine, ProcessRuntime

SPEC = DeploymentSpec(
    id="d1",
    node_id="n1",
    model="qwen3:8b",
    engine=EngineSpec(
        engine=OllamaEngine(model="qwen3:8b"),
        runtime=ProcessRuntime(executable="ollama"),
        start_timeout_s=5.0,
    ),
)
LOADED = {"name": "qwen3:8b", "model": "qwen3:8b", "size": 6_000, "size_vram": 6_000, "context_length": 8192}
TAGS = {"models": [{"name": "qwen3:8b", "size": 5_000}, {"name": "nomic-embed-text:latest"}]}


@pytest.fixture
async def client() -> AsyncIterator[EngineClient]:
    made = EngineClient()
    yield made
    await made.aclose()


@pytest.fixture
def adapter(client: EngineClient) -> OllamaAdapter:
    return OllamaAdapter(client)


_NOT_THERE = "Ollama has no model qwen3:8b; `ollama pull qwen3:8b` gets it"


class Script:
    """An Ollama that answers as it was told, and keeps what it was asked."""

    def __init__(self) -> None:
        self.tags: object = TAGS
        #: Answers of `/api/ps`, the last one for ever.
        self.loaded: list[object] = [{"models": [LOADED]}]
        self.answer: tuple[int, object] = (200, {"model": "qwen3:8b", "done": True, "done_reason": "load"})
        self.asked: list[tuple[str, dict[str, Any]]] = []

    async def _tags(self, http: web.Request) -> web.Response:
        return web.json_response(self.tags)

    async def _ps(self, http: web.Request) -> web.Response:
        return web.json_response(self.loaded.pop(0) if len(self.loaded) > 1 else self.loaded[0])

    async def _post(self, http: web.Request) -> web.Response:
        self.asked.append((http.path, await http.json()))
        status, body = self.answer
        return web.json_response(body, status=status)

    @asynccontextmanager
    async def serve(self) -> AsyncIterator[str]:
        """Its URL, while it runs."""
        app = web.Application()
        app.router.add_get("/api/tags", self._tags)
        app.router.add_get("/api/ps", self._ps)
        app.router.add_post("/{path:.*}", self._post)
        server = TestServer(app)
        await server.start_server()
        try:
            yield str(server.make_url("")).rstrip("/")
        finally:
            await server.close()


# Command lines.


async def test_it_serves_one_model_that_stays(adapter: OllamaAdapter) -> None:
    line = adapter.command_line(SPEC, listen_host="127.0.0.1", listen_port=9000)

    assert line.arguments == ("serve",)
    assert line.environment == {
        "OLLAMA_HOST": "127.0.0.1:9000",
        "OLLAMA_KEEP_ALIVE": "-1",
        "OLLAMA_MAX_LOADED_MODELS": "1",
    }


async def test_a_context_that_is_configured_is_not_cut_short(adapter: OllamaAdapter) -> None:
    line = adapter.command_line(replace(SPEC, context_tokens=32768), listen_host="h", listen_port=1)

    assert line.environment["OLLAMA_CONTEXT_LENGTH"] == "32768"


@pytest.mark.parametrize(
    ("model", "engine", "complaint"),
    [
        ("qwen3:8b", LlamaCppEngine(model_path="/a"), "is not an Ollama deployment"),
        ("kimi:cloud", OllamaEngine(model="kimi:cloud"), "not on this node"),
    ],
)
async def test_a_spec_that_cannot_be_served_is_refused(
    adapter: OllamaAdapter, model: str, engine: OllamaEngine | LlamaCppEngine, complaint: str
) -> None:
    spec = replace(SPEC, model=model, engine=replace(SPEC.engine, engine=engine))

    with pytest.raises(InvalidRequestError, match=complaint):
        adapter.command_line(spec, listen_host="127.0.0.1", listen_port=1)


async def test_a_name_that_ollama_does_not_know_is_refused(adapter: OllamaAdapter) -> None:
    spec = replace(SPEC, served_model_name="reasoner")

    with pytest.raises(InvalidRequestError, match="set served_model_name to 'qwen3:8b'"):
        adapter.command_line(spec, listen_host="h", listen_port=1)


async def test_requests_name_the_tag_whatever_the_deployment_is_called(adapter: OllamaAdapter) -> None:
    spec = replace(SPEC, model="the-house-model")

    adapter.command_line(spec, listen_host="h", listen_port=1)

    assert spec.engine_model_name == "qwen3:8b"


async def test_a_name_without_a_tag_is_the_latest(adapter: OllamaAdapter) -> None:
    spec = replace(
        SPEC, model="qwen3", engine=replace(SPEC.engine, engine=OllamaEngine(model="qwen3:latest"))
    )

    assert adapter.command_line(spec, listen_host="127.0.0.1", listen_port=1).arguments == ("serve",)


@pytest.mark.parametrize(
    ("line", "detail"),
    [
        (
            'time=2026-11-21T10:00:00Z level=INFO source=routes.go:1405 msg="Listening on 127.0.0.1:9 '
            '(version 0.24.0)"',
            "listening",
        ),
        ("load_tensors: offloaded 33/33 layers to GPU", "loading weights, 33 of 33 layers to the GPU"),
        ('source=server.go:630 msg="llama runner started in 2.01 seconds"', "loaded in 2.01 s"),
    ],
)
async def test_its_output_tells_steps(adapter: OllamaAdapter, line: str, detail: str) -> None:
    assert adapter.load_progress(line) == LoadProgress(detail, None)
    assert adapter.load_progress("[GIN] 2026/11/21 | 200 | 27µs | 127.0.0.1 | GET /api/ps") is None


# Probes.


async def test_a_loaded_model_is_ready(adapter: OllamaAdapter) -> None:
    async with Script().serve() as url:
        probe = await adapter.probe(url, SPEC)

    assert (probe.health, probe.detail, probe.context_tokens) == (EngineHealth.READY, "", 8192)
    assert probe.models == ("qwen3:8b", "nomic-embed-text:latest")


@pytest.mark.parametrize(
    ("loaded", "detail"),
    [
        ([{**LOADED, "size_vram": 1_500}], "75 % of it is on the CPU"),
        ([{**LOADED, "size_vram": 0}], "100 % of it is on the CPU"),
    ],
)
async def test_a_probe_tells_where_the_model_is(
    adapter: OllamaAdapter, loaded: list[object], detail: str
) -> None:
    script = Script()
    script.loaded = [{"models": loaded}]

    async with script.serve() as url:
        probe = await adapter.probe(url, SPEC)

    assert (probe.health, probe.detail) == (EngineHealth.READY, detail)


@pytest.mark.parametrize("loaded", [[], [{"name": "other:latest", "size": 1, "size_vram": 1}]])
async def test_one_whose_model_is_not_loaded_sleeps(adapter: OllamaAdapter, loaded: list[object]) -> None:
    script = Script()
    script.loaded = [{"models": loaded}]

    async with script.serve() as url:
        probe = await adapter.probe(url, SPEC)

    assert (probe.health, probe.detail) == (EngineHealth.ASLEEP, "its model is not loaded")
    assert probe.models == ("qwen3:8b", "nomic-embed-text:latest")


@pytest.mark.parametrize(
    ("tags", "health", "detail"),
    [
        ({"models": [{"name": "qwen3:4b"}]}, EngineHealth.NO_MODEL, _NOT_THERE),
        ({"models": None}, EngineHealth.NO_MODEL, _NOT_THERE),
        ("no object", EngineHealth.UNWELL, "/api/tags answers with no list of models"),
    ],
)
async def test_without_the_model_nothing_can_be_answered(
    adapter: OllamaAdapter, tags: object, health: EngineHealth, detail: str
) -> None:
    script = Script()
    script.tags = tags

    async with script.serve() as url:
        probe = await adapter.probe(url, SPEC)

    assert (probe.health, probe.detail) == (health, detail)


async def test_a_model_of_ollamas_cloud_is_not_well_though_it_is_listed(adapter: OllamaAdapter) -> None:
    script = Script()
    script.tags = {"models": [{"name": "kimi:cloud"}]}
    spec = replace(SPEC, engine=replace(SPEC.engine, engine=OllamaEngine(model="kimi:cloud")))

    async with script.serve() as url:
        probe = await adapter.probe(url, spec)

    assert probe.health is EngineHealth.UNWELL
    assert probe.detail == "kimi:cloud runs on Ollama's servers, not on this node"


async def test_a_context_that_is_shorter_than_was_said_is_not_well(adapter: OllamaAdapter) -> None:
    script = Script()
    script.loaded = [{"models": [{**LOADED, "context_length": 4096}]}]

    async with script.serve() as url:
        short = await adapter.probe(url, replace(SPEC, context_tokens=4097))
        enough = await adapter.probe(url, replace(SPEC, context_tokens=4096))

    assert (short.health, short.context_tokens) == (EngineHealth.UNWELL, 4096)
    assert "a context of 4096 tokens where context_tokens says 4097" in short.detail
    assert enough.health is EngineHealth.READY


async def test_a_model_that_loads_with_too_short_a_context_is_not_woken_and_goes_again(
    adapter: OllamaAdapter,
) -> None:
    script = Script()
    short = {"models": [{**LOADED, "context_length": 4096}]}
    script.loaded = [short, short, {"models": []}]
    script.answer = (200, {"model": "qwen3:8b", "done": True, "done_reason": "unload"})

    async with script.serve() as url:
        with pytest.raises(EngineFailedError, match="set OLLAMA_CONTEXT_LENGTH for that server"):
            await adapter.wake(url, replace(SPEC, context_tokens=16384), 2)

    assert [body["keep_alive"] for _, body in script.asked] == [-1, 0]
    assert script.loaded == [{"models": []}]


async def test_nothing_listening_is_absent(adapter: OllamaAdapter, unused_tcp_port: int) -> None:
    probe = await adapter.probe(f"http://127.0.0.1:{unused_tcp_port}", SPEC)

    assert probe.health is EngineHealth.ABSENT


# Loading and unloading.


async def test_its_only_sleep_drops_the_weights(adapter: OllamaAdapter) -> None:
    assert isinstance(adapter, SleepControl)
    assert isinstance(adapter, FreeControl)
    assert adapter.frees_model
    assert adapter.sleep_levels(SPEC) == (2,)
    script = Script()
    script.answer = (200, {"model": "qwen3:8b", "done": True, "done_reason": "unload"})
    script.loaded = [{"models": []}]

    async with script.serve() as url:
        await adapter.sleep(url, SPEC, 2)

    assert script.asked == [("/api/generate", {"model": "qwen3:8b", "keep_alive": 0, "stream": False})]


async def test_waking_loads_for_ever(adapter: OllamaAdapter) -> None:
    script = Script()

    async with script.serve() as url:
        await adapter.wake(url, SPEC, 1)
        assert await adapter.requests(url, SPEC) is None

    assert script.asked == [("/api/generate", {"model": "qwen3:8b", "keep_alive": -1, "stream": False})]


async def test_a_model_that_only_embeds_is_loaded_by_its_own_route(adapter: OllamaAdapter) -> None:
    script = Script()
    script.answer = (200, {"model": "qwen3:8b", "embeddings": []})

    async with script.serve() as url:
        await adapter.wake(url, replace(SPEC, capabilities=("embedding",)), 1)

    assert script.asked == [("/api/embed", {"model": "qwen3:8b", "input": [], "keep_alive": -1})]


async def test_a_load_that_the_list_does_not_show_has_failed(adapter: OllamaAdapter) -> None:
    script = Script()
    script.loaded = [{"models": []}]

    async with script.serve() as url:
        with pytest.raises(EngineFailedError, match="says that it loaded qwen3:8b, and does not list it"):
            await adapter.wake(url, SPEC, 1)


async def test_a_refusal_is_passed_on_in_ollamas_words(adapter: OllamaAdapter) -> None:
    script = Script()
    script.answer = (404, {"error": "model 'qwen3:8b' not found"})

    async with script.serve() as url:
        with pytest.raises(EngineFailedError, match="answers 404: model 'qwen3:8b' not found") as caught:
            await adapter.wake(url, SPEC, 1)

    assert caught.value.metadata == {"engine_status": "404"}


async def test_a_load_that_takes_too_long_is_given_up(adapter: OllamaAdapter) -> None:
    app = web.Application()

    async def hang(http: web.Request) -> web.Response:
        response = web.StreamResponse()
        await response.prepare(http)
        while True:
            # Alive, and never done: silence alone must not be what is measured.
            await response.write(b" ")
            await asyncio.sleep(0.01)

    app.router.add_post("/api/generate", hang)
    server = TestServer(app)
    await server.start_server()
    spec = replace(SPEC, engine=replace(SPEC.engine, start_timeout_s=0.1))
    try:
        with pytest.raises(EngineTimeoutError, match=r"has not answered /api/generate within 0\.1 s"):
            await adapter.wake(str(server.make_url("")), spec, 1)
    finally:
        await server.close()


async def test_freeing_waits_until_the_list_is_without_it(adapter: OllamaAdapter) -> None:
    script = Script()
    script.answer = (200, {"model": "qwen3:8b", "done": True, "done_reason": "unload"})
    script.loaded = [{"models": [LOADED]}, {"models": [LOADED]}, {"models": [{**LOADED, "name": "other"}]}]

    async with script.serve() as url:
        await adapter.free(url, SPEC)

    assert script.asked == [("/api/generate", {"model": "qwen3:8b", "keep_alive": 0, "stream": False})]
    assert len(script.loaded) == 1


async def test_a_model_that_stays_listed_was_not_freed(client: EngineClient) -> None:
    adapter = OllamaAdapter(client, unload_timeout_s=0.0)
    script = Script()
    script.answer = (200, {"done_reason": "unload"})

    async with script.serve() as url:
        with pytest.raises(EngineFailedError, match="said that it unloads qwen3:8b, and lists it"):
            await adapter.free(url, SPEC)


async def test_an_answer_that_does_not_speak_of_unloading_is_no_success(adapter: OllamaAdapter) -> None:
    script = Script()
    script.loaded = [{"models": []}]

    async with script.serve() as url:
        with pytest.raises(EngineFailedError, match="does not say that it unloads"):
            await adapter.free(url, SPEC)


async def test_a_list_that_is_none_says_nothing(adapter: OllamaAdapter) -> None:
    script = Script()
    script.loaded = [{"oops": 1}]

    async with script.serve() as url:
        with pytest.raises(EngineProtocolError, match="/api/ps answers 200 without a list of models"):
            await adapter.loaded(url, SPEC)


async def test_an_engine_that_is_away_raises(adapter: OllamaAdapter, unused_tcp_port: int) -> None:
    with pytest.raises(EngineUnreachableError):
        await adapter.free(f"http://127.0.0.1:{unused_tcp_port}", SPEC)


# Generations.


@pytest.mark.parametrize(
    ("kind", "path"),
    [
        (RunKind.CHAT_COMPLETIONS, "/v1/chat/completions"),
        (RunKind.COMPLETIONS, "/v1/completions"),
        (RunKind.EMBEDDINGS, "/v1/embeddings"),
    ],
)
async def test_generations_take_openais_routes(adapter: OllamaAdapter, kind: RunKind, path: str) -> None:
    script = Script()

    async with (
        script.serve() as url,
        adapter.run(url, SPEC, kind, b'{"model": "qwen3:8b"}', idle_timeout_s=5) as stream,
    ):
        assert stream.status == 200

    assert script.asked == [(path, {"model": "qwen3:8b"})]


@pytest.mark.parametrize("tag", ["gpt-oss:120b-cloud", "kimi:cloud"])
async def test_what_would_leave_the_node_is_refused(adapter: OllamaAdapter, tag: str) -> None:
    spec = replace(SPEC, engine=replace(SPEC.engine, engine=OllamaEngine(model=tag)))

    with pytest.raises(InvalidRequestError, match="not on this node"):
        adapter.run("http://127.0.0.1:1", spec, RunKind.CHAT_COMPLETIONS, b"{}", idle_timeout_s=1)
    with pytest.raises(InvalidRequestError, match="not on this node"):
        await adapter.wake("http://127.0.0.1:1", spec, 1)
