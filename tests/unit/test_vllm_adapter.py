"""The vLLM adapter: its command line, and the calls that put an engine to sleep and wake it."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

import pytest
from aiohttp import web
from aiohttp.test_utils import TestServer
from msgspec.structs import replace

from nodeagent.engines import EngineHealth, FreeControl, ShrinkControl, SleepControl, VllmAdapter
from rung.errors import EngineFailedError, EngineProtocolError, EngineUnreachableError, InvalidRequestError
from rung.service import EngineClient
from rung.types import (
    DeploymentSpec,
    DockerRuntime,
    EngineSpec,
    Mount,
    OpenAiCompatibleEngine,
    ProcessRuntime,
    VllmEngine,
)

VLLM = VllmEngine(model="nvidia/nemotron-8b", sleep_mode=True)
SPEC = DeploymentSpec(
    id="d1",
    node_id="n1",
    model="nemotron",
    engine=EngineSpec(engine=VLLM, runtime=ProcessRuntime(executable="vllm")),
)


def with_engine(engine: VllmEngine) -> DeploymentSpec:
    return replace(SPEC, engine=replace(SPEC.engine, engine=engine))


@pytest.fixture
async def adapter() -> AsyncIterator[VllmAdapter]:
    client = EngineClient()
    yield VllmAdapter(client)
    await client.aclose()


@dataclass
class Server:
    """Notes what it is told, and answers what a test wants."""

    sleeping: bool = False
    #: Path to status, for what should go wrong.
    statuses: dict[str, int] = field(default_factory=dict)
    metrics: str = ""
    deaf: bool = False
    calls: list[str] = field(default_factory=list)
    bodies: list[bytes] = field(default_factory=list)
    url: str = ""

    async def answer(self, request: web.Request) -> web.Response:
        path = request.path
        if path in self.statuses:
            return web.Response(status=self.statuses[path], text="no such luck")
        if path == "/is_sleeping":
            return web.json_response({"is_sleeping": self.sleeping})
        if path == "/metrics":
            return web.Response(text=self.metrics)
        if path == "/v1/models":
            return web.json_response({"data": [{"id": "nemotron", "max_model_len": 4096}]})
        if request.method == "POST":
            self.calls.append(request.path_qs)
            self.bodies.append(await request.read())
        if path == "/sleep" and not self.deaf:
            self.sleeping = True
        if path == "/wake_up" and request.query.getall("tags", ["kv_cache"]) == ["kv_cache"]:
            self.sleeping = self.deaf
        return web.Response()


@asynccontextmanager
async def a_server(server: Server) -> AsyncIterator[Server]:
    app = web.Application()
    app.router.add_route("*", "/{path:.*}", server.answer)
    test_server = TestServer(app)
    await test_server.start_server()
    server.url = str(test_server.make_url("")).rstrip("/")
    try:
        yield server
    finally:
        await test_server.close()


# Command lines.


async def test_a_bare_spec_becomes_a_bare_command(adapter: VllmAdapter) -> None:
    line = adapter.command_line(with_engine(VllmEngine(model="m")), listen_host="127.0.0.1", listen_port=8100)

    wanted = "serve m --host 127.0.0.1 --port 8100 --served-model-name nemotron"
    assert line.arguments == tuple(wanted.split())
    assert line.environment == {"VLLM_NO_USAGE_STATS": "1"}


async def test_every_parameter_becomes_an_option(adapter: VllmAdapter) -> None:
    engine = replace(
        VLLM,
        gpu_memory_utilization=0.45,
        max_model_len_tokens=32768,
        max_num_seqs=16,
        kv_cache_dtype="fp8",
        kv_cache_memory_bytes=8 << 30,
        tool_call_parser="hermes",
        reasoning_parser="qwen3",
    )
    line = adapter.command_line(with_engine(engine), listen_host="127.0.0.1", listen_port=8100)

    options = " ".join(line.arguments[7:])
    assert options == (
        "nemotron --gpu-memory-utilization 0.45 --kv-cache-memory-bytes 8589934592 --max-model-len 32768 "
        "--max-num-seqs 16 --kv-cache-dtype fp8 --enable-auto-tool-choice --tool-call-parser hermes "
        "--reasoning-parser qwen3 --enable-sleep-mode"
    )
    assert line.environment["VLLM_SERVER_DEV_MODE"] == "1"


async def test_an_image_of_vllm_serves_already_and_sees_models_through_its_mounts(
    adapter: VllmAdapter,
) -> None:
    docker = DockerRuntime(image="vllm:1", mounts=(Mount(source="/srv/models", target="/models"),))
    engine = EngineSpec(engine=VllmEngine(model="/srv/models/nemotron"), runtime=docker)

    line = adapter.command_line(replace(SPEC, engine=engine), listen_host="0.0.0.0", listen_port=8000)

    assert line.arguments[:3] == ("/models/nemotron", "--host", "0.0.0.0")


@pytest.mark.parametrize("engine", [VllmEngine(model=""), OpenAiCompatibleEngine()])
async def test_what_vllm_cannot_serve_is_refused(
    adapter: VllmAdapter, engine: VllmEngine | OpenAiCompatibleEngine
) -> None:
    spec = replace(SPEC, engine=replace(SPEC.engine, engine=engine))

    with pytest.raises(InvalidRequestError):
        adapter.command_line(spec, listen_host="127.0.0.1", listen_port=1)


async def test_only_an_engine_that_was_started_for_it_can_sleep(adapter: VllmAdapter) -> None:
    assert isinstance(adapter, SleepControl)
    assert not isinstance(adapter, FreeControl)
    assert adapter.sleep_levels(SPEC) == (1, 2)
    assert adapter.sleep_levels(with_engine(VllmEngine(model="m"))) == ()


# Probes.


async def test_a_probe_tells_one_that_sleeps_from_one_that_is_awake(adapter: VllmAdapter) -> None:
    async with a_server(Server()) as server:
        awake = await adapter.probe(server.url, SPEC)
        server.sleeping = True
        asleep = await adapter.probe(server.url, SPEC)

    assert (awake.health, awake.models, awake.context_tokens) == (EngineHealth.READY, ("nemotron",), 4096)
    assert asleep.health is EngineHealth.ASLEEP


@pytest.mark.parametrize(
    ("path", "status", "health"),
    [
        ("/health", 503, EngineHealth.LOADING),
        ("/health", 500, EngineHealth.UNWELL),
        # Without the development routes.
        ("/is_sleeping", 404, EngineHealth.READY),
        ("/v1/models", 401, EngineHealth.UNWELL),
    ],
)
async def test_what_a_status_says_of_its_health(
    adapter: VllmAdapter, path: str, status: int, health: EngineHealth
) -> None:
    async with a_server(Server(statuses={path: status})) as server:
        assert (await adapter.probe(server.url, SPEC)).health is health


# Sleeping and waking.


async def test_level_1_is_one_call_each_way(adapter: VllmAdapter) -> None:
    async with a_server(Server()) as server:
        await adapter.sleep(server.url, SPEC, 1)
        await adapter.wake(server.url, SPEC, 1)

    assert server.calls == ["/sleep?level=1", "/wake_up"]


async def test_from_level_2_the_weights_are_read_again_before_it_can_answer(adapter: VllmAdapter) -> None:
    async with a_server(Server()) as server:
        await adapter.sleep(server.url, SPEC, 2)
        await adapter.wake(server.url, SPEC, 2)

    assert server.calls == [
        "/sleep?level=2",
        "/wake_up?tags=weights",
        "/collective_rpc",
        "/wake_up?tags=kv_cache",
    ]
    assert server.bodies[2] == b'{"method":"reload_weights"}'


async def test_to_shrink_is_to_sleep_and_to_wake_the_weights_alone(adapter: VllmAdapter) -> None:
    assert isinstance(adapter, ShrinkControl)
    async with a_server(Server()) as server:
        await adapter.shrink(server.url, SPEC)
        assert server.sleeping
        await adapter.grow(server.url, SPEC)

    assert server.calls == [
        "/sleep?level=1",
        "/wake_up?tags=weights",
        # Ignored by an engine whose weights are there. One that broke off half-way needs it.
        "/wake_up?tags=weights",
        "/wake_up?tags=kv_cache",
    ]


async def test_one_that_does_not_shrink_or_grow_says_so(adapter: VllmAdapter) -> None:
    async with a_server(Server(deaf=True)) as server:
        with pytest.raises(EngineFailedError, match="still awake"):
            await adapter.shrink(server.url, SPEC)
        server.sleeping = True
        with pytest.raises(EngineFailedError, match="still asleep"):
            await adapter.grow(server.url, SPEC)


async def test_the_size_of_the_kv_cache_is_read_off_the_output(adapter: VllmAdapter) -> None:
    line = "INFO 11-20 10:00:00 [gpu_worker.py:298] Available KV cache memory: 7.25 GiB"

    assert adapter.kv_cache_bytes(line) == int(7.25 * (1 << 30))
    assert adapter.kv_cache_bytes("INFO GPU KV cache size: 58,000 tokens") is None


async def test_a_refusal_is_told_with_what_the_engine_said(adapter: VllmAdapter) -> None:
    async with a_server(Server(statuses={"/sleep": 404})) as server:
        with pytest.raises(EngineFailedError, match=r"answers /sleep\?level=1 with 404: no such luck"):
            await adapter.sleep(server.url, SPEC, 1)


async def test_what_is_not_reloaded_is_not_woken(adapter: VllmAdapter) -> None:
    async with a_server(Server(sleeping=True, statuses={"/collective_rpc": 500})) as server:
        with pytest.raises(EngineFailedError, match="with 500"):
            await adapter.wake(server.url, SPEC, 2)

        assert server.sleeping
        assert server.calls == ["/wake_up?tags=weights"]


@pytest.mark.parametrize("asleep", [False, True])
async def test_a_call_that_changed_nothing_is_not_believed(adapter: VllmAdapter, asleep: bool) -> None:
    async with a_server(Server(sleeping=asleep, deaf=True)) as server:
        call = adapter.wake if asleep else adapter.sleep

        with pytest.raises(EngineFailedError, match="says that it is still"):
            await call(server.url, SPEC, 1)


async def test_an_engine_that_is_away_cannot_be_put_to_sleep(
    adapter: VllmAdapter, unused_tcp_port: int
) -> None:
    with pytest.raises(EngineUnreachableError):
        await adapter.sleep(f"http://127.0.0.1:{unused_tcp_port}", SPEC, 1)


@pytest.mark.parametrize(
    ("metrics", "requests"),
    [
        (
            '# TYPE vllm:num_requests_running gauge\nvllm:num_requests_running{engine="0"} 2.0\n'
            '# TYPE vllm:num_requests_waiting gauge\nvllm:num_requests_waiting{engine="0"} 1.0\n',
            3,
        ),
        ("# TYPE vllm:num_requests_running gauge\nvllm:num_requests_running 0.0\n", 0),
        ("# TYPE up gauge\nup 1.0\n", None),
    ],
)
async def test_requests_of_others_are_counted_too(
    adapter: VllmAdapter, metrics: str, requests: int | None
) -> None:
    async with a_server(Server(metrics=metrics)) as server:
        assert await adapter.requests(server.url, SPEC) == requests


async def test_metrics_that_are_away_or_none_are_no_count(adapter: VllmAdapter) -> None:
    async with a_server(Server(statuses={"/metrics": 404})) as server:
        assert await adapter.requests(server.url, SPEC) is None
    async with a_server(Server(metrics="a { b\n")) as server:
        with pytest.raises(EngineProtocolError):
            await adapter.requests(server.url, SPEC)
