"""Engine adapters: command lines, what output and probes mean, and the relay of a generation."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
from aiohttp import web
from aiohttp.test_utils import TestServer
from msgspec.structs import replace

from nodeagent.engines import (
    ComfyUiAdapter,
    EngineHealth,
    LlamaCppAdapter,
    LoadProgress,
    OllamaAdapter,
    OpenAiCompatibleAdapter,
    PiperAdapter,
    RunKind,
    SpeachesAdapter,
    VllmAdapter,
    XttsAdapter,
    adapter_for,
)
from rung.errors import EngineUnreachableError, InvalidRequestError, NotImplementedYetError
from rung.service import EngineClient
from rung.types import (
    ComfyUiEngine,
    DeploymentSpec,
    DockerRuntime,
    Engine,
    EngineSpec,
    LlamaCppEngine,
    LlamaCppServer,
    Mount,
    OllamaEngine,
    OpenAiCompatibleEngine,
    ProcessRuntime,
    Runtime,
    ServiceEngine,
    VllmEngine,
)

PROCESS = ProcessRuntime(executable="engine")
PYTHON_SERVER = LlamaCppServer.LLAMA_CPP_PYTHON


def spec_of(engine: Engine, runtime: Runtime = PROCESS, *, served: str = "") -> DeploymentSpec:
    return DeploymentSpec(
        id="d1",
        node_id="n1",
        model="tiny",
        served_model_name=served,
        engine=EngineSpec(engine=engine, runtime=runtime),
    )


@pytest.fixture
async def client() -> AsyncIterator[EngineClient]:
    made = EngineClient()
    yield made
    await made.aclose()


@asynccontextmanager
async def served(app: web.Application) -> AsyncIterator[str]:
    server = TestServer(app)
    await server.start_server()
    try:
        yield str(server.make_url("")).rstrip("/")
    finally:
        await server.close()


def route(app: web.Application, path: str, *, status: int = 200, body: object = None) -> None:
    async def answer(request: web.Request) -> web.Response:
        return web.json_response(body, status=status)

    app.router.add_get(path, answer)


# Command lines.


async def test_llama_server_in_a_process_listens_where_it_is_told(client: EngineClient) -> None:
    engine = LlamaCppEngine(model_path="/models/a.gguf", context_tokens=4096, gpu_layers=12, parallel=4)

    line = LlamaCppAdapter(client).command_line(
        spec_of(engine, served="other"), listen_host="127.0.0.1", listen_port=9000
    )

    assert line.arguments == (
        *("--model", "/models/a.gguf", "--alias", "other", "--host", "127.0.0.1", "--port", "9000"),
        *("--ctx-size", "4096", "--n-gpu-layers", "12", "--parallel", "4", "--jinja", "--metrics"),
    )
    assert line.environment == {}


async def test_every_parameter_of_llama_server_becomes_an_option(client: EngineClient) -> None:
    engine = LlamaCppEngine(
        model_path="/m/a.gguf",
        embedding=True,
        projector_path="/m/p.gguf",
        chat_template="chatml",
        kv_cache_type="q8_0",
    )

    line = LlamaCppAdapter(client).command_line(spec_of(engine), listen_host="127.0.0.1", listen_port=1)

    arguments = " ".join(line.arguments)
    assert "--n-gpu-layers 999" in arguments
    assert "--embedding --mmproj /m/p.gguf --no-mmproj-offload --chat-template chatml" in arguments
    assert "--cache-type-k q8_0 --cache-type-v q8_0" in arguments


async def test_a_projector_leaves_the_host_only_if_it_is_told_to(client: EngineClient) -> None:
    blind = LlamaCppEngine(model_path="/m/a.gguf")
    seeing = replace(blind, projector_path="/m/p.gguf")
    adapter = LlamaCppAdapter(client)
    offload = [
        "--no-mmproj-offload"
        in adapter.command_line(spec_of(engine), listen_host="127.0.0.1", listen_port=1).arguments
        for engine in (blind, seeing, replace(seeing, projector_on_gpu=True))
    ]
    assert offload == [False, True, False]


async def test_a_container_sees_files_through_its_innermost_mount(client: EngineClient) -> None:
    runtime = DockerRuntime(
        image="llama",
        mounts=(Mount(source="/data", target="/all"), Mount(source="/data/models", target="/models")),
    )
    engine = LlamaCppEngine(model_path="/data/models/deep/a.gguf", projector_path="/data/p.gguf")

    line = LlamaCppAdapter(client).command_line(
        spec_of(engine, runtime), listen_host="0.0.0.0", listen_port=8080
    )

    arguments = " ".join(line.arguments)
    assert "--model /models/deep/a.gguf" in arguments
    assert "--mmproj /all/p.gguf" in arguments
    assert "--host 0.0.0.0 --port 8080" in arguments


async def test_a_path_outside_all_mounts_is_the_images_own(client: EngineClient) -> None:
    runtime = DockerRuntime(image="llama", mounts=(Mount(source="/data", target="/all"),))

    line = LlamaCppAdapter(client).command_line(
        spec_of(LlamaCppEngine(model_path="/database/a.gguf"), runtime), listen_host="0.0.0.0", listen_port=1
    )

    assert line.arguments[:2] == ("--model", "/database/a.gguf")


async def test_llama_cpp_python_never_cuts_one_stream_for_another(client: EngineClient) -> None:
    engine = LlamaCppEngine(
        model_path="/m/a.gguf", server=PYTHON_SERVER, kv_cache_type="q8_0", embedding=True, chat_template="x"
    )

    line = LlamaCppAdapter(client).command_line(spec_of(engine), listen_host="127.0.0.1", listen_port=9000)

    assert line.arguments == (
        *("--model", "/m/a.gguf", "--model_alias", "tiny", "--host", "127.0.0.1", "--port", "9000"),
        *("--n_ctx", "0", "--n_gpu_layers", "-1", "--interrupt_requests", "false", "--embedding", "true"),
        *("--chat_format", "x", "--type_k", "8", "--type_v", "8", "--flash_attn", "true"),
    )
    assert line.environment == {"HOST": "127.0.0.1", "PORT": "9000", "PYTHONUNBUFFERED": "1"}


@pytest.mark.parametrize(
    ("engine", "complaint"),
    [
        (LlamaCppEngine(model_path=""), "model_path"),
        (LlamaCppEngine(model_path="/a", kv_cache_type="q3"), "kv_cache_type 'q3'"),
        (LlamaCppEngine(model_path="/a", server=PYTHON_SERVER, parallel=2), "one request at a time"),
        (OllamaEngine(model="x"), "not a llama.cpp deployment"),
    ],
)
async def test_a_spec_that_cannot_be_served_is_refused(
    client: EngineClient, engine: Engine, complaint: str
) -> None:
    with pytest.raises(InvalidRequestError, match=complaint):
        LlamaCppAdapter(client).command_line(spec_of(engine), listen_host="127.0.0.1", listen_port=1)


async def test_a_generic_server_is_told_its_port_by_the_environment(client: EngineClient) -> None:
    line = OpenAiCompatibleAdapter(client).command_line(
        spec_of(OpenAiCompatibleEngine()), listen_host="127.0.0.1", listen_port=9001
    )

    assert line.arguments == ()
    assert line.environment == {"HOST": "127.0.0.1", "PORT": "9001"}


@pytest.mark.parametrize(
    ("engine", "kind"),
    [
        (LlamaCppEngine(model_path="/a"), LlamaCppAdapter),
        (OpenAiCompatibleEngine(), OpenAiCompatibleAdapter),
        (VllmEngine(model="m"), VllmAdapter),
        (OllamaEngine(model="m"), OllamaAdapter),
        (ComfyUiEngine(), ComfyUiAdapter),
        (ServiceEngine(dialect="speaches"), SpeachesAdapter),
        (ServiceEngine(dialect="piper"), PiperAdapter),
        (ServiceEngine(dialect="xtts"), XttsAdapter),
    ],
)
async def test_each_engine_has_its_adapter(client: EngineClient, engine: Engine, kind: type[object]) -> None:
    assert isinstance(adapter_for(engine, client), kind)


async def test_an_unknown_dialect_has_no_adapter(client: EngineClient) -> None:
    with pytest.raises(NotImplementedYetError, match="'morse'"):
        adapter_for(ServiceEngine(dialect="morse"), client)


# Output while loading.


@pytest.mark.parametrize(
    ("line", "detail"),
    [
        # As llama-cpp-python 0.3.36 printed them.
        (
            "llama_model_loader: loaded meta data with 21 key-value pairs and 21 tensors from /t.gguf "
            "(version GGUF V3 (latest))",
            "reading the model file (21 tensors)",
        ),
        ("print_info: file size   = 0.44 MiB (32.00 BPW) ", "loading weights (0.44 MiB)"),
        (
            "load_tensors: loading model tensors, this can take a while... (load_mode = mmap+mlock)",
            "loading weights",
        ),
        (
            "load_tensors:   CPU_Mapped model buffer size =     0.44 MiB",
            "loading weights, 0.44 MiB to CPU_Mapped",
        ),
        ("................", "weights loaded"),
        ("llama_context: constructing llama_context", "preparing the context"),
        (
            "llama_kv_cache: size =    1.00 MiB (  2048 cells,   2 layers,  1/1 seqs), K (f16):    0.50 MiB",
            "KV cache of 1.00 MiB allocated",
        ),
        ("INFO:     Uvicorn running on http://127.0.0.1:18099 (Press CTRL+C to quit)", "ready"),
        # As llama-server prints them.
        ("load_tensors: offloaded 33/33 layers to GPU", "loading weights, 33 of 33 layers to the GPU"),
        ("0.00.812.113 I main: model loaded", "model loaded"),
        ("main: server is listening on http://127.0.0.1:8080 - starting the main loop", "ready"),
    ],
)
async def test_llama_cpp_tells_steps_but_no_percentage(client: EngineClient, line: str, detail: str) -> None:
    assert LlamaCppAdapter(client).load_progress(line) == LoadProgress(detail, None)


@pytest.mark.parametrize(
    "line",
    [
        "",
        "llama_perf_context_print:        load time =       0.36 ms",
        "print_info: n_layer               = 2",
        "main: HTTP server is listening, hostname: 127.0.0.1, port: 8080, http threads: 7",
        'INFO:     127.0.0.1:34014 - "GET /v1/models HTTP/1.1" 200 OK',
    ],
)
async def test_other_lines_of_llama_cpp_say_nothing(client: EngineClient, line: str) -> None:
    assert LlamaCppAdapter(client).load_progress(line) is None


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        (
            "Loading safetensors checkpoint shards:  25% Completed | 1/4 [00:00<00:02,  1.36it/s]",
            LoadProgress("loading weights, 1 of 4 shards", 25.0),
        ),
        (
            "INFO 11-20 10:00:00 [default_loader.py:268] Loading weights took 3.31 seconds",
            LoadProgress("weights read in 3.31 s"),
        ),
        (
            "INFO [gpu_model_runner.py:2392] Model loading took 14.9889 GiB and 3.9 seconds",
            LoadProgress("weights loaded (14.9889 GiB)"),
        ),
        (
            "INFO [gpu_worker.py:298] Available KV cache memory: 10.51 GiB",
            LoadProgress("10.51 GiB left for the KV cache"),
        ),
        (
            "\rCapturing CUDA graphs (mixed prefill-decode, PIECEWISE):  20%|██  | 7/35 [00:01<00:04]"
            "\rCapturing CUDA graphs (mixed prefill-decode, PIECEWISE):  40%|████| 14/35 [00:02<00:03]",
            LoadProgress("capturing CUDA graphs, 14 of 35", 40.0),
        ),
        (
            "INFO [gpu_model_runner.py:3] Graph capturing finished in 3 secs, took 0.50 GiB",
            LoadProgress("CUDA graphs captured in 3 s"),
        ),
        ("INFO:     Application startup complete.", LoadProgress("ready")),
        ("INFO [loggers.py:1] Avg generation throughput: 42.0 tokens/s, GPU KV cache usage: 3.1%", None),
    ],
)
async def test_vllm_tells_percentages_of_some_steps(
    client: EngineClient, line: str, expected: LoadProgress | None
) -> None:
    assert OpenAiCompatibleAdapter(client).load_progress(line) == expected


# Probes.


LLAMA = spec_of(LlamaCppEngine(model_path="/m/a.gguf"))
GENERIC = spec_of(OpenAiCompatibleEngine(health_path="/health"))


async def test_nothing_listening_is_absent(client: EngineClient, unused_tcp_port: int) -> None:
    url = f"http://127.0.0.1:{unused_tcp_port}"

    for adapter, spec in ((LlamaCppAdapter(client), LLAMA), (OpenAiCompatibleAdapter(client), GENERIC)):
        assert (await adapter.probe(url, spec)).health is EngineHealth.ABSENT


async def test_llama_server_loads_and_is_then_ready(client: EngineClient) -> None:
    app = web.Application()
    loading = {"error": {"code": 503, "message": "Loading model", "type": "unavailable_error"}}
    answers = [(503, loading), (200, {"status": "ok"})]

    async def health(request: web.Request) -> web.Response:
        status, body = answers.pop(0)
        return web.json_response(body, status=status)

    app.router.add_get("/health", health)
    route(app, "/v1/models", body={"object": "list", "data": [{"id": "tiny", "meta": {"n_params": 1}}]})
    route(app, "/props", body={"default_generation_settings": {"n_ctx": 2048}, "total_slots": 2})
    adapter = LlamaCppAdapter(client)

    async with served(app) as url:
        first = await adapter.probe(url, LLAMA)
        second = await adapter.probe(url, LLAMA)

    assert (first.health, first.detail) == (EngineHealth.LOADING, "Loading model")
    assert (second.health, second.models, second.context_tokens) == (EngineHealth.READY, ("tiny",), 2048)


async def test_a_server_that_is_no_llama_server_is_unwell(client: EngineClient) -> None:
    async with served(web.Application()) as url:
        probe = await LlamaCppAdapter(client).probe(url, LLAMA)

    assert (probe.health, probe.detail) == (EngineHealth.UNWELL, "/health answers 404")


async def test_llama_cpp_python_is_not_asked_for_its_models(client: EngineClient) -> None:
    """That route takes the lock of the running generation, and may end it."""
    app = web.Application()
    route(app, "/openapi.json", body={})
    route(app, "/v1/models", status=500)
    spec = spec_of(LlamaCppEngine(model_path="/a", server=PYTHON_SERVER))

    async with served(app) as url:
        probe = await LlamaCppAdapter(client).probe(url, spec)

    assert probe.health is EngineHealth.READY


async def test_vllm_tells_its_models_and_context(client: EngineClient) -> None:
    app = web.Application()
    route(app, "/health")
    rows = [{"id": "other", "max_model_len": 1}, {"id": "tiny", "max_model_len": 32768, "owned_by": "vllm"}]
    route(app, "/v1/models", body={"object": "list", "data": rows})

    async with served(app) as url:
        probe = await VllmAdapter(client).probe(url, spec_of(VllmEngine(model="m")))

    assert probe.health is EngineHealth.READY
    assert (probe.models, probe.context_tokens, probe.detail) == (("other", "tiny"), 32768, "")


async def test_a_model_that_is_not_listed_is_mentioned(client: EngineClient) -> None:
    app = web.Application()
    route(app, "/v1/models", body={"data": [{"id": "other"}]})

    async with served(app) as url:
        probe = await OpenAiCompatibleAdapter(client).probe(url, spec_of(OpenAiCompatibleEngine()))

    assert (probe.health, probe.detail) == (EngineHealth.READY, "does not list the model tiny")


@pytest.mark.parametrize(
    ("status", "health"),
    [(503, EngineHealth.LOADING), (500, EngineHealth.UNWELL), (404, EngineHealth.UNWELL)],
)
async def test_a_health_route_that_does_not_say_200(
    client: EngineClient, status: int, health: EngineHealth
) -> None:
    app = web.Application()
    route(app, "/health", status=status)

    async with served(app) as url:
        probe = await OpenAiCompatibleAdapter(client).probe(url, GENERIC)

    assert (probe.health, probe.detail) == (health, f"/health answers {status}")


async def test_models_that_are_no_json_do_not_hurt(client: EngineClient) -> None:
    app = web.Application()

    async def page(request: web.Request) -> web.Response:
        return web.Response(text="<html>")

    app.router.add_get("/v1/models", page)

    async with served(app) as url:
        probe = await OpenAiCompatibleAdapter(client).probe(url, spec_of(OpenAiCompatibleEngine()))

    assert (probe.health, probe.models) == (EngineHealth.READY, ())


async def test_an_endless_answer_is_unwell(client: EngineClient) -> None:
    app = web.Application()

    async def flood(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse()
        await response.prepare(request)
        while True:
            await response.write(b" " * 65536)

    app.router.add_get("/v1/models", flood)

    async with served(app) as url:
        probe = await OpenAiCompatibleAdapter(client).probe(url, spec_of(OpenAiCompatibleEngine()))

    assert probe.health is EngineHealth.UNWELL
    assert "more than" in probe.detail


async def test_a_key_that_is_configured_but_not_set_is_unwell(client: EngineClient) -> None:
    spec = spec_of(OpenAiCompatibleEngine(api_key_env="ENGINE_KEY"))

    probe = await OpenAiCompatibleAdapter(client, {}).probe("http://127.0.0.1:1", spec)

    assert probe.health is EngineHealth.UNWELL
    assert "ENGINE_KEY" in probe.detail


# Generations.


@pytest.mark.parametrize(
    ("kind", "path"),
    [
        (RunKind.CHAT_COMPLETIONS, "/v1/chat/completions"),
        (RunKind.COMPLETIONS, "/v1/completions"),
        (RunKind.EMBEDDINGS, "/v1/embeddings"),
    ],
)
async def test_a_body_reaches_its_route_untouched(client: EngineClient, kind: RunKind, path: str) -> None:
    seen: list[tuple[str, bytes, str | None]] = []
    app = web.Application()

    async def echo(request: web.Request) -> web.Response:
        seen.append((request.path, await request.read(), request.headers.get("Authorization")))
        return web.Response(status=429, body=b"busy", headers={"Retry-After": "3", "Content-Type": "text/x"})

    app.router.add_post("/v1/{rest:.*}", echo)
    spec = spec_of(OpenAiCompatibleEngine(api_key_env="ENGINE_KEY"))
    adapter = OpenAiCompatibleAdapter(client, {"ENGINE_KEY": "secret"})
    body = b'{ "model":"../../sleep", "odd" : 1.0e3 }'

    async with (
        served(app) as url,
        adapter.run(url + "/", spec, kind, body, idle_timeout_s=5) as stream,
    ):
        answer = b"".join([chunk async for chunk in stream.chunks()])

    assert seen == [(path, body, "Bearer secret")]
    assert (stream.status, stream.content_type, stream.retry_after) == (429, "text/x", "3")
    assert answer == b"busy"


async def test_an_engine_that_is_away_raises(client: EngineClient, unused_tcp_port: int) -> None:
    url = f"http://127.0.0.1:{unused_tcp_port}"

    with pytest.raises(EngineUnreachableError):
        async with LlamaCppAdapter(client).run(url, LLAMA, RunKind.CHAT_COMPLETIONS, b"{}", idle_timeout_s=1):
            pass
