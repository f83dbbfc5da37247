"""The adapter of ComfyUI: its command line, how it is, what it holds, and giving it back."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest
from aiohttp import web
from aiohttp.test_utils import TestServer
from msgspec.structs import replace

from nodeagent.engines import (
    ComfyUiAdapter,
    ComfyUiQueue,
    EngineHealth,
    FreeControl,
    LoadProgress,
    RunKind,
    SleepControl,
)
from rung.errors import EngineFailedError, EngineProtocolError, EngineUnreachableError, InvalidRequestError
from rung.service import EngineClient
from rung.types import ComfyUiEngine, DeploymentSpec, EngineSpec, OllamaEngine, ProcessRuntime

SPEC = DeploymentSpec(
    id="d1",
    node_id="n1",
    model="comfyui",
    engine=EngineSpec(engine=ComfyUiEngine(), runtime=ProcessRuntime(executable="comfyui")),
)
STATS = {
    "system": {"os": "posix", "comfyui_version": "0.3.64", "ram_total": 1},
    "devices": [
        {
            "name": "cuda:0 NVIDIA GeForce RTX 5090",
            "type": "cuda",
            "index": 0,
            "vram_total": 32_000,
            "vram_free": 20_000,
            "torch_vram_total": 12_000,
            "torch_vram_free": 3_000,
        }
    ],
}


@pytest.fixture
async def client() -> AsyncIterator[EngineClient]:
    made = EngineClient()
    yield made
    await made.aclose()


@pytest.fixture
def adapter(client: EngineClient) -> ComfyUiAdapter:
    return ComfyUiAdapter(client)


@asynccontextmanager
async def answering(path: str, body: object, *, status: int = 200) -> AsyncIterator[tuple[str, list[Any]]]:
    """A server with one route; also what was sent to it."""
    sent: list[Any] = []

    async def answer(http: web.Request) -> web.Response:
        sent.append((http.method, await http.json() if http.can_read_body else None))
        return web.json_response(body, status=status)

    app = web.Application()
    app.router.add_route("*", path, answer)
    server = TestServer(app)
    await server.start_server()
    try:
        yield str(server.make_url("")).rstrip("/"), sent
    finally:
        await server.close()


async def test_it_is_told_where_to_listen(adapter: ComfyUiAdapter) -> None:
    line = adapter.command_line(SPEC, listen_host="127.0.0.1", listen_port=8188)

    assert line.arguments == ("--listen", "127.0.0.1", "--port", "8188", "--preview-method", "auto")
    assert line.environment == {"PYTHONUNBUFFERED": "1"}


async def test_what_it_leaves_to_others_is_in_gib(adapter: ComfyUiAdapter) -> None:
    engine = ComfyUiEngine(reserve_vram_bytes=3 * 1024**3 // 2)
    spec = replace(SPEC, engine=replace(SPEC.engine, engine=engine))

    line = adapter.command_line(spec, listen_host="127.0.0.1", listen_port=1)

    assert line.arguments[-2:] == ("--reserve-vram", "1.500")


async def test_another_engines_spec_is_refused(adapter: ComfyUiAdapter) -> None:
    spec = replace(SPEC, engine=replace(SPEC.engine, engine=OllamaEngine(model="m")))

    with pytest.raises(InvalidRequestError, match="not a ComfyUI deployment"):
        adapter.command_line(spec, listen_host="127.0.0.1", listen_port=1)


@pytest.mark.parametrize(
    ("line", "detail"),
    [
        ("Total VRAM 32607 MB, total RAM 64199 MB", "found a GPU with 32607 MB"),
        ("Import times for custom nodes:", "custom nodes imported"),
        ("To see the GUI go to: http://127.0.0.1:8188", "ready"),
    ],
)
async def test_its_output_tells_steps(adapter: ComfyUiAdapter, line: str, detail: str) -> None:
    assert adapter.load_progress(line) == LoadProgress(detail)
    assert adapter.load_progress("Prompt executed in 3.20 seconds") is None


async def test_its_statistics_say_that_it_is_ready(adapter: ComfyUiAdapter) -> None:
    async with answering("/system_stats", STATS) as (url, _):
        assert (await adapter.probe(url, SPEC)).health is EngineHealth.READY


@pytest.mark.parametrize(("body", "status"), [(STATS, 500), ({"no": "devices"}, 200), ("oops", 200)])
async def test_other_answers_are_not_those_of_a_comfyui_that_is_well(
    adapter: ComfyUiAdapter, body: object, status: int
) -> None:
    async with answering("/system_stats", body, status=status) as (url, _):
        probe = await adapter.probe(url, SPEC)

    assert probe.health is EngineHealth.UNWELL
    assert probe.detail.startswith("/system_stats answers")


async def test_a_closed_port_is_absent(adapter: ComfyUiAdapter, unused_tcp_port: int) -> None:
    url = f"http://127.0.0.1:{unused_tcp_port}"

    assert (await adapter.probe(url, SPEC)).health is EngineHealth.ABSENT
    with pytest.raises(EngineUnreachableError):
        await adapter.free(url, SPEC)


async def test_what_pytorch_keeps_is_free_to_comfyui_alone(adapter: ComfyUiAdapter) -> None:
    async with answering("/system_stats", STATS) as (url, _):
        (device,) = await adapter.devices(url, SPEC)

    assert (device.vram_total_bytes, device.vram_free_bytes) == (32_000, 20_000)
    assert (device.torch_total_bytes, device.torch_free_bytes) == (12_000, 3_000)
    assert device.free_for_others_bytes == 17_000


@pytest.mark.parametrize(
    ("running", "pending", "busy"), [([], [], False), ([[1, "id", {"3": {}}]], [], True), ([], [[2]], True)]
)
async def test_its_queue_tells_whether_it_is_busy(
    adapter: ComfyUiAdapter, running: list[object], pending: list[object], busy: bool
) -> None:
    async with answering("/queue", {"queue_running": running, "queue_pending": pending}) as (url, _):
        queue = await adapter.queue(url, SPEC)

    assert queue == ComfyUiQueue(running=len(running), pending=len(pending))
    assert queue.busy is busy


async def test_a_queue_that_is_none_raises(adapter: ComfyUiAdapter) -> None:
    async with answering("/queue", {}) as (url, _):
        with pytest.raises(EngineProtocolError, match="d1: /queue answers with what is not ComfyUI's"):
            await adapter.queue(url, SPEC)


async def test_freeing_asks_for_models_and_memory(adapter: ComfyUiAdapter) -> None:
    assert isinstance(adapter, FreeControl)
    assert not isinstance(adapter, SleepControl)

    async with answering("/free", None) as (url, sent):
        await adapter.free(url, SPEC)

    assert sent == [("POST", {"unload_models": True, "free_memory": True})]


async def test_a_refusal_to_free_raises(adapter: ComfyUiAdapter) -> None:
    async with answering("/free", None, status=500) as (url, _):
        with pytest.raises(EngineFailedError, match="/free answers 500") as caught:
            await adapter.free(url, SPEC)

    assert caught.value.metadata == {"engine_status": "500"}


async def test_it_has_no_route_of_openais(adapter: ComfyUiAdapter) -> None:
    with pytest.raises(InvalidRequestError, match="ComfyUI has no route for embeddings"):
        adapter.run("http://127.0.0.1:1", SPEC, RunKind.EMBEDDINGS, b"{}", idle_timeout_s=1)
