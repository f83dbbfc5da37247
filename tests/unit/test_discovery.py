"""Discovery against small servers that answer as the engines do, and as strangers do."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path

import pytest
from aiohttp import web

from nodeagent.config import AgentConfig, DiscoverPorts, load_agent_config
from nodeagent.discovery import discover
from rung.errors import ConfigError
from rung.types import (
    ComfyUiEngine,
    ExternalRuntime,
    LlamaCppEngine,
    LlamaCppServer,
    OllamaEngine,
    OpenAiCompatibleEngine,
    ResidencyClass,
    VllmEngine,
)

Routes = dict[str, object]


@asynccontextmanager
async def serving(routes: Routes) -> AsyncIterator[int]:
    """A server with these answers (text, or JSON), on a port of its own; gives the port."""

    async def answer(request: web.Request) -> web.Response:
        if request.path not in routes:
            return web.json_response({"detail": "Not Found"}, status=404)
        body = routes[request.path]
        return web.Response(text=body if isinstance(body, str) else json.dumps(body))

    app = web.Application()
    app.router.add_get("/{path:.*}", answer)
    runner = web.AppRunner(app)
    await runner.setup()
    try:
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        yield runner.addresses[0][1]
    finally:
        await runner.cleanup()


def models(owner: str, *ids: str, **more: object) -> Routes:
    rows = [{"id": name, "object": "model", "created": 1, "owned_by": owner, **more} for name in ids]
    return {"/v1/models": {"object": "list", "data": rows}}


VLLM: Routes = {
    "/version": {"version": "0.11.0"},
    **models("vllm", "qwen3-8b", root="Qwen/Qwen3-8B", parent=None, max_model_len=40960),
}
LLAMA_SERVER: Routes = {
    "/": "<html>chat</html>",
    "/health": {"status": "ok"},
    "/props": {
        "total_slots": 4,
        "model_path": "/models/Tiny-Q4.gguf",
        "default_generation_settings": {"n_ctx": 8192, "params": {}},
    },
    **models("llamacpp", "/models/Tiny-Q4.gguf", meta={"n_params": 1}),
}
LLAMA_CPP_PYTHON: Routes = models("me", "/models/tiny.gguf", permissions=[])
OLLAMA: Routes = {
    "/": "Ollama is running",
    "/api/tags": {
        "models": [
            {"name": "llama3.2:3b", "size": 1, "capabilities": ["completion", "tools"]},
            {"name": "nomic-embed-text:latest", "capabilities": ["embedding"]},
            {"name": "gpt-oss:120b-cloud"},
            {"name": "old:latest"},
            {"name": "far:latest", "remote_host": "https://example.invalid"},
        ]
    },
    **models("library", "llama3.2:3b"),
}
COMFYUI: Routes = {
    "/": "<html></html>",
    "/system_stats": {
        "system": {"os": "linux", "comfyui_version": "0.3.60"},
        "devices": [{"name": "cuda:0", "vram_total": 1}],
    },
}


async def test_vllm() -> None:
    async with serving(VLLM) as port:
        (spec,) = await discover("box", [port])
    assert spec.id == f"vllm-{port}"
    assert spec.node_id == "box"
    assert spec.model == spec.engine_model_name == "qwen3-8b"
    assert spec.engine.engine == VllmEngine(model="Qwen/Qwen3-8B", max_model_len_tokens=40960)
    assert spec.engine.runtime == ExternalRuntime(base_url=f"http://127.0.0.1:{port}")
    assert spec.context_tokens == 40960
    assert spec.residency_class is ResidencyClass.PINNED


async def test_further_names_of_vllms_model_are_aliases_and_adapters_are_not() -> None:
    rows = [
        {"id": "a", "owned_by": "vllm", "root": "org/a", "parent": None},
        {"id": "b", "owned_by": "vllm", "root": "org/a", "parent": None},
        {"id": "lora", "owned_by": "vllm", "root": "/lora", "parent": "a"},
    ]
    async with serving({"/version": {"version": "1"}, "/v1/models": {"data": rows}}) as port:
        (spec,) = await discover("box", [port])
    assert spec.model == "a"
    assert spec.aliases == ("b",)


async def test_llama_server() -> None:
    async with serving(LLAMA_SERVER) as port:
        (spec,) = await discover("box", [port])
    assert spec.id == f"llamacpp-{port}"
    assert spec.model == "Tiny-Q4"
    assert spec.engine_model_name == "/models/Tiny-Q4.gguf"
    assert spec.slots == 4
    assert spec.context_tokens == 8192
    assert spec.engine.engine == LlamaCppEngine(
        model_path="/models/Tiny-Q4.gguf",
        server=LlamaCppServer.LLAMA_SERVER,
        context_tokens=8192,
        parallel=4,
    )


async def test_each_model_of_a_llama_server_that_is_a_router() -> None:
    rows = [
        {"id": "qwen3-8b", "owned_by": "llamacpp", "status": {"value": "loaded"}},
        {"id": "gemma:Q4", "owned_by": "llamacpp", "status": {"value": "unloaded", "failed": True}},
    ]
    async with serving({"/v1/models": {"object": "list", "data": rows}}) as port:
        qwen, gemma = await discover("box", [port])
    assert (qwen.id, gemma.id) == (f"llamacpp-{port}-qwen3-8b", f"llamacpp-{port}-gemma-q4")
    assert gemma.engine.engine == LlamaCppEngine(router_model="gemma:Q4")
    assert gemma.engine_model_name == "gemma:Q4"
    assert gemma.residency_class is ResidencyClass.ON_DEMAND


async def test_llama_cpp_python_takes_one_request_at_a_time() -> None:
    async with serving(LLAMA_CPP_PYTHON) as port:
        (spec,) = await discover("box", [port])
    assert spec.id == f"llamacpp-{port}"
    assert (spec.model, spec.slots) == ("tiny", 1)
    assert isinstance(spec.engine.engine, LlamaCppEngine)
    assert spec.engine.engine.server is LlamaCppServer.LLAMA_CPP_PYTHON


async def test_ollama_gives_a_deployment_for_each_local_model() -> None:
    async with serving(OLLAMA) as port:
        specs = await discover("box", [port])
    assert [spec.model for spec in specs] == ["llama3.2:3b", "nomic-embed-text:latest", "old:latest"]
    assert specs[0].id == f"ollama-{port}-llama3-2-3b"
    assert specs[0].engine.engine == OllamaEngine(model="llama3.2:3b")
    assert [spec.capabilities for spec in specs] == [("chat", "tools"), ("embedding",), ("chat",)]
    assert {spec.residency_class for spec in specs} == {ResidencyClass.ON_DEMAND}


async def test_comfyui() -> None:
    async with serving(COMFYUI) as port:
        (spec,) = await discover("box", [port])
    assert spec.id == f"comfyui-{port}"
    assert spec.engine.engine == ComfyUiEngine()
    assert spec.residency_class is ResidencyClass.CACHE


async def test_a_server_that_only_speaks_openais_dialect() -> None:
    async with serving(models("sglang", "a/b", "C d", "a:b")) as port:
        specs = await discover("box", [port])
    assert [(spec.id, spec.model) for spec in specs] == [
        (f"openai-{port}-a-b", "a/b"),
        (f"openai-{port}-c-d", "C d"),
        (f"openai-{port}-a-b-2", "a:b"),
    ]
    assert isinstance(specs[0].engine.engine, OpenAiCompatibleEngine)


async def test_all_at_once_in_order_of_ports() -> None:
    async with AsyncExitStack() as stack:
        every = (COMFYUI, VLLM, OLLAMA, LLAMA_SERVER)
        ports = [await stack.enter_async_context(serving(routes)) for routes in every]
        specs = await discover("box", [*ports, *ports])
    assert [spec.engine.port for spec in specs] == [ports[0], ports[1], *[ports[2]] * 3, ports[3]]
    assert len({spec.id for spec in specs}) == len(specs)


STRANGERS: dict[str, Routes] = {
    "a web page": {"/": "<html>hello</html>", "/v1/models": "<html>hello</html>"},
    "a web page for everything": dict.fromkeys(
        ["/", "/v1/models", "/props", "/system_stats"], "<html></html>"
    ),
    "nothing at all": {},
    "models of another shape": {"/v1/models": {"data": {"a": 1}}},
    "models without ids": {"/v1/models": {"data": [{"name": "x"}]}},
    "no models": {"/v1/models": {"data": []}},
    "statistics of another program": {"/system_stats": {"system": "up"}},
    "Ollama without models": {"/": "Ollama is running", "/api/tags": {"models": None}},
    "Ollama that is broken": {"/": "Ollama is running", "/api/tags": "oops"},
    "ourselves": models("rung", "qwen3-8b"),
    "an endless page": {"/": "x" * 5_000_000},
}


@pytest.mark.parametrize("routes", STRANGERS.values(), ids=STRANGERS.keys())
async def test_strangers_are_left_alone(routes: Routes) -> None:
    async with serving(routes) as port:
        assert await discover("box", [port]) == ()


@pytest.mark.parametrize("greeting", [b"SSH-2.0-OpenSSH_9.6\r\n", b"\x00\xff\x00", b""])
async def test_what_is_not_http_is_left_alone(greeting: bytes) -> None:
    async def greet(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(greeting)
        await writer.drain()
        writer.close()
        await writer.wait_closed()

    server = await asyncio.start_server(greet, "127.0.0.1", 0)
    async with server:
        assert await discover("box", [server.sockets[0].getsockname()[1]]) == ()


async def test_what_never_answers_holds_nothing_up_for_long() -> None:
    released = asyncio.Event()

    async def stay_silent(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await released.wait()
        writer.close()

    server = await asyncio.start_server(stay_silent, "127.0.0.1", 0)
    async with server, serving(VLLM) as port, asyncio.timeout(10):
        (spec,) = await discover("box", [server.sockets[0].getsockname()[1], port])
        assert spec.id == f"vllm-{port}"
        released.set()


async def test_nothing_listens() -> None:
    server = await asyncio.start_server(lambda reader, writer: None, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    server.close()
    await server.wait_closed()
    assert await discover("box", [port]) == ()


def test_our_own_ports_are_not_asked() -> None:
    assert not {8150, 8151, 8152} & set(DiscoverPorts().all)


def test_ports_of_a_kind_replace_its_usual_ones_and_no_others() -> None:
    usual = DiscoverPorts()
    ports = AgentConfig.model_validate(
        {"discover_ports": {"vllm": [9000, 9001], "ollama": []}}
    ).discover_ports
    assert ports.all == (9000, 9001, *usual.llamacpp, *usual.comfyui)


@pytest.mark.parametrize(
    ("given", "where"),
    [
        ({"vllm": [0]}, "discover_ports.vllm[0]"),
        ({"comfyui": [65536]}, "discover_ports.comfyui[0]"),
        ({"vllm": 9000}, "discover_ports.vllm"),
        ({"lmstudio": [1234]}, "discover_ports.lmstudio"),
    ],
)
def test_ports_that_cannot_be_meant_are_refused(tmp_path: Path, given: dict[str, object], where: str) -> None:
    file = tmp_path / "agent.yaml"
    file.write_text(json.dumps({"discover_ports": given}))
    with pytest.raises(ConfigError, match=re.escape(where)):
        load_agent_config(file)
