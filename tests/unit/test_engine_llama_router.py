"""The adapter of a llama-server in router mode: what probes mean, loading and unloading one model."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest
from aiohttp import web
from aiohttp.test_utils import TestServer

from nodeagent.engines import (
    EngineHealth,
    FreeControl,
    LlamaCppAdapter,
    LlamaRouterAdapter,
    RunKind,
    SleepControl,
    adapter_for,
)
from rung.errors import EngineFailedError, EngineProtocolError, InvalidRequestError
from rung.service import EngineClient
from rung.types import DeploymentSpec, EngineSpec, ExternalRuntime, LlamaCppEngine

NAME = "qwen/3:8b"
SPEC = DeploymentSpec(
    id="d1",
    node_id="n1",
    model="qwen3",
    engine=EngineSpec(
        engine=LlamaCppEngine(router_model=NAME),
        runtime=ExternalRuntime(base_url="http://127.0.0.1:1"),
        start_timeout_s=5.0,
    ),
)
FAILED = {"value": "unloaded", "failed": True, "exit_code": 1}


@pytest.fixture
async def client() -> AsyncIterator[EngineClient]:
    made = EngineClient()
    yield made
    await made.aclose()


@pytest.fixture
def adapter(client: EngineClient) -> LlamaRouterAdapter:
    return LlamaRouterAdapter(client, unload_timeout_s=0.3)


class Script:
    """A router that answers as it was told, and keeps what it was asked."""

    def __init__(self, *statuses: object) -> None:
        #: Of our model, the last one for ever; a word is short for the value.
        self.statuses = [{"value": each} if isinstance(each, str) else each for each in statuses]
        self.name = NAME
        self.health = 200
        self.answer: tuple[int, object] = (200, {"success": True})
        self.asked: list[tuple[str, Any]] = []

    async def _health(self, http: web.Request) -> web.Response:
        return web.json_response({"status": "ok"}, status=self.health)

    async def _models(self, http: web.Request) -> web.Response:
        status = self.statuses.pop(0) if len(self.statuses) > 1 else self.statuses[0]
        row = {"id": self.name} | ({} if status is None else {"status": status})
        return web.json_response({"data": [{"id": "other", "status": {"value": "loaded"}}, row]})

    async def _get(self, http: web.Request) -> web.Response:
        self.asked.append((http.path, dict(http.query)))
        if http.path == "/slots":
            return web.json_response([{"id": 0, "is_processing": True}, {"id": 1, "is_processing": False}])
        return web.json_response({"default_generation_settings": {"n_ctx": 4096}})

    async def _post(self, http: web.Request) -> web.Response:
        self.asked.append((http.path_qs, await http.json()))
        status, body = self.answer
        return web.json_response(body, status=status)

    @asynccontextmanager
    async def serve(self) -> AsyncIterator[str]:
        """Its URL, while it runs."""
        app = web.Application()
        app.router.add_get("/health", self._health)
        app.router.add_get("/models", self._models)
        app.router.add_get("/{path:.*}", self._get)
        app.router.add_post("/{path:.*}", self._post)
        server = TestServer(app)
        await server.start_server()
        try:
            yield str(server.make_url("")).rstrip("/")
        finally:
            await server.close()


async def test_it_is_chosen_for_a_routers_model_and_controls_what_ollamas_does(client: EngineClient) -> None:
    routed = adapter_for(SPEC.engine.engine, client)

    assert isinstance(routed, LlamaRouterAdapter)
    assert isinstance(routed, SleepControl)
    assert isinstance(routed, FreeControl)
    assert (routed.frees_model, routed.sleep_levels(SPEC)) == (True, (2,))
    assert isinstance(adapter_for(LlamaCppEngine(model_path="/m.gguf"), client), LlamaCppAdapter)


async def test_a_router_is_not_ours_to_start(adapter: LlamaRouterAdapter) -> None:
    with pytest.raises(InvalidRequestError, match="its runtime must be external"):
        adapter.command_line(SPEC, listen_host="127.0.0.1", listen_port=1)


@pytest.mark.parametrize(
    ("status", "health", "detail"),
    [
        ("loaded", EngineHealth.READY, ""),
        ("unloaded", EngineHealth.ASLEEP, "its model is unloaded"),
        ("sleeping", EngineHealth.ASLEEP, "its model is sleeping"),
        ("loading", EngineHealth.LOADING, "the router is loading it"),
        ("downloading", EngineHealth.LOADING, "the router is downloading it"),
        (FAILED, EngineHealth.ASLEEP, "the process of its model ended with exit code 1"),
        (None, EngineHealth.UNWELL, "it is no router: /models does not say which models are loaded"),
    ],
)
async def test_the_status_of_its_model_says_how_it_is(
    adapter: LlamaRouterAdapter, status: object, health: EngineHealth, detail: str
) -> None:
    async with Script(status).serve() as url:
        probe = await adapter.probe(url, SPEC)

    assert (probe.health, probe.detail) == (health, detail)
    assert probe.models == ("other", NAME)
    assert probe.context_tokens == (4096 if health is EngineHealth.READY else 0)


async def test_a_probe_and_a_count_of_requests_load_nothing(adapter: LlamaRouterAdapter) -> None:
    script = Script("loaded")
    async with script.serve() as url:
        await adapter.probe(url, SPEC)
        count = await adapter.requests(url, SPEC)

    asked = {"model": NAME, "autoload": "false"}
    assert (count, script.asked) == (1, [("/props", asked), ("/slots", asked)])


async def test_a_router_without_its_model_or_not_well_is_told_of(adapter: LlamaRouterAdapter) -> None:
    script = Script("loaded")
    async with script.serve() as url:
        script.name = "another"
        absent = await adapter.probe(url, SPEC)
        script.health = 500
        unwell = await adapter.probe(url, SPEC)

    assert absent.health is EngineHealth.NO_MODEL
    assert absent.detail == f"the router has no model {NAME}; it has other, another"
    assert (unwell.health, unwell.detail) == (EngineHealth.UNWELL, "/health answers 500")


async def test_a_generation_never_loads_its_model(adapter: LlamaRouterAdapter) -> None:
    script = Script("unloaded")
    async with script.serve() as url:
        body = b'{"model":"qwen/3:8b"}'
        async with adapter.run(url, SPEC, RunKind.CHAT_COMPLETIONS, body, idle_timeout_s=5.0) as stream:
            assert stream.status == 200

    assert script.asked == [("/v1/chat/completions?autoload=false", {"model": NAME})]


@pytest.mark.parametrize(
    ("statuses", "told"),
    [
        (("unloaded", "unloaded", "loading", "loaded"), ["load"]),
        ((FAILED, FAILED, "loading", "loaded"), ["load"]),
        # Somebody else has begun, or is done.
        (("loading", "loading", "loading", "loaded"), []),
        (("loaded",), []),
        # It freed its memory by itself, and its process is there.
        (("sleeping", "sleeping", "unloaded", "unloaded", "loaded"), ["unload", "load"]),
    ],
)
async def test_a_wake_loads_the_model_and_waits_for_it(
    adapter: LlamaRouterAdapter, statuses: tuple[object, ...], told: list[str]
) -> None:
    script = Script(*statuses)
    async with script.serve() as url:
        await adapter.wake(url, SPEC, 2)

    assert script.asked == [(f"/models/{each}", {"model": NAME}) for each in told]
    assert script.statuses == [{"value": "loaded"}]


async def test_a_load_that_fails_is_told_with_the_routers_words(adapter: LlamaRouterAdapter) -> None:
    script = Script("unloaded", "unloaded", "loading", FAILED)
    async with script.serve() as url:
        with pytest.raises(EngineFailedError, match="d1: the process of its model ended with exit code 1"):
            await adapter.wake(url, SPEC, 2)
        script.statuses = [{"value": "unloaded"}]
        script.answer = (500, {"error": {"message": "model limit reached, try again later"}})
        with pytest.raises(EngineFailedError, match="/models/load answers 500: model limit reached, try"):
            await adapter.wake(url, SPEC, 2)


async def test_a_sleep_unloads_the_model_and_waits_until_its_process_is_gone(
    adapter: LlamaRouterAdapter,
) -> None:
    script = Script("loaded", "loaded", "unloaded")
    async with script.serve() as url:
        await adapter.sleep(url, SPEC, 2)
        await adapter.sleep(url, SPEC, 2)

    assert script.asked == [("/models/unload", {"model": NAME})]


async def test_a_sleep_that_is_not_done_or_not_to_be_seen_is_no_sleep(adapter: LlamaRouterAdapter) -> None:
    script = Script("loaded")
    async with script.serve() as url:
        with pytest.raises(EngineFailedError, match=r"it is loaded 0\.3 s later"):
            await adapter.free(url, SPEC)
        script.name = "another"
        with pytest.raises(EngineProtocolError, match="without a status of qwen/3:8b"):
            await adapter.free(url, SPEC)
