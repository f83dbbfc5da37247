"""A simulated `llama-server`: python -m nodeagent.simulators.llama_server -m MODEL.gguf --port 8080.

It takes llama-server's options, opens its port at once, answers 503 while it loads and speaks as the
real one does afterwards. The model file need not exist: only its name is used, for its size. Without a
model it is a router: see `_llama_router`.
See `_settings` for the environment.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import signal
import sys
from collections.abc import Sequence
from pathlib import PurePath
from typing import Any, NoReturn

from aiohttp import web
from aiohttp.typedefs import Handler, Middleware

from nodeagent.simulators._faults import Fault
from nodeagent.simulators._generation import (
    EmbeddingRequest,
    GenerationRequest,
    is_picture,
    is_reasoner,
)
from nodeagent.simulators._http import SimulatedEngine, Timing, json_response
from nodeagent.simulators._llama_router import CHILD_VARIABLE, LlamaRouter, add_router_options
from nodeagent.simulators._memory import GpuMemory, SimulatedOutOfMemory, gpu_memory_from
from nodeagent.simulators._process import Listener, LoadFailedError, run_to_end, run_until_stopped, say
from nodeagent.simulators._settings import (
    Settings,
    billions_of,
    load_time_s,
    pace_of,
    settings_from,
    weight_bytes_of,
)
from nodeagent.simulators.gpu import SimulatedGpus

_DEFAULT_CONTEXT_TOKENS = 8192
_LOADING = {"error": {"code": 503, "message": "Loading model", "type": "unavailable_error"}}
_ERROR_TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    404: "not_found_error",
    501: "not_supported_error",
    503: "unavailable_error",
}
#: Routes that need no key.
_PUBLIC = frozenset({"/", "/health", "/v1/health", "/models", "/v1/models"})
_LOAD_STEPS = 20
_LAYERS = 33
#: Bytes a token in the KV cache of an 8B model at f16, and what other types make of it.
_KV_BYTES_OF_8B = 131_072
_KV_TYPES = {"f32": 2.0, "f16": 1.0, "bf16": 1.0, "q8_0": 0.53, "q5_1": 0.375, "q5_0": 0.34, "q4_1": 0.31}
_KV_TYPES |= {"q4_0": 0.28, "iq4_nl": 0.28}
_COMPUTE_BUFFER_BYTES = 300 * 1024**2
#: A projector of a 7B model at f16.
_PROJECTOR_BYTES = 1_400_000_000
_MIB = 1024**2


class _Parser(argparse.ArgumentParser):
    """Refuses what it does not know as llama-server does."""

    def error(self, message: str) -> NoReturn:
        unknown = message.removeprefix("unrecognized arguments: ")
        text = message if unknown == message else f"invalid argument: {unknown.split()[0]}"
        sys.stderr.write(f"error: {text}\n")
        sys.exit(1)


def _parser() -> _Parser:
    parser = _Parser(prog="llama-server", description=__doc__, allow_abbrev=False)
    add = parser.add_argument
    add("-m", "--model", default="")
    add("-a", "--alias", default="")
    add("-c", "--ctx-size", type=int, default=0)
    add("-ngl", "--n-gpu-layers", "--gpu-layers", default="auto")
    add("-np", "--parallel", type=int, default=1)
    add("--embedding", "--embeddings", action="store_true")
    add("-mm", "--mmproj", default="")
    add("--mmproj-offload", action=argparse.BooleanOptionalAction, default=True)
    add("--chat-template", default="")
    add("-ctk", "--cache-type-k", choices=sorted(_KV_TYPES), default="f16")
    add("-ctv", "--cache-type-v", choices=sorted(_KV_TYPES), default="f16")
    add("--metrics", action="store_true")
    add("--slots", action=argparse.BooleanOptionalAction, default=True)
    add("--jinja", action=argparse.BooleanOptionalAction, default=True)
    add("--pooling", default="")
    add("-fa", "--flash-attn", default="auto")
    add("--api-key", default=os.environ.get("LLAMA_API_KEY", ""))
    add("--sse-ping-interval", type=float, default=30.0)
    return parser


class LlamaServer:
    """The ways of llama-server: a `Dialect`, its own routes, and how it loads."""

    engine = "llama-server"
    event_stream_type = "text/event-stream"
    first_content: str | None = None

    def __init__(self, options: argparse.Namespace, settings: Settings, memory: GpuMemory | None) -> None:
        self._options = options
        self._settings = settings
        self._memory = memory
        self._name = options.alias or PurePath(options.model).name
        self.ping_interval_s: float | None = (
            options.sse_ping_interval if options.sse_ping_interval > 0 else None
        )
        self.reasons = is_reasoner(self._name)
        self._slots = max(options.parallel, 1)
        self._total_context = options.ctx_size or _DEFAULT_CONTEXT_TOKENS
        #: What one slot has of it.
        self.context_tokens = self._total_context // self._slots
        self._engine = SimulatedEngine(
            self,
            model=self._name,
            slots=self._slots,
            pace=pace_of(options.model, settings),
            settings=settings,
        )
        app = self._engine.application([self._loading, self._authentication])
        for path in ("/health", "/v1/health"):
            app.router.add_get(path, self._health)
        for path in ("/models", "/v1/models"):
            app.router.add_get(path, self._models)
        app.router.add_get("/props", self._props)
        app.router.add_get("/slots", self._slot_states)
        app.router.add_get("/metrics", self._metrics)
        self._listener = Listener(app, options.host, options.port)

    async def run(self) -> int:
        """Serve until stopped; returns the exit code."""
        return await run_until_stopped(
            self._live, listener=self._listener, counters=self._engine.counters, memory=self._memory
        )

    async def _live(self) -> None:
        try:
            url = await self._listener.open()
        except OSError:
            options = self._options
            say(f"couldn't bind HTTP server socket, hostname: {options.host}, port: {options.port}")
            raise LoadFailedError from None
        say("build: 9999 (simulated) with no weights and no GPU behind it")
        say("main: loading model")
        say(f"srv    load_model: loading model '{self._options.model}'")
        await self._load()
        self._engine.ready = True
        say("main: model loaded")
        say(f"main: server is listening on {url} - starting the main loop")

    async def _load(self) -> None:
        options = self._options
        weights = weight_bytes_of(options.model, default_bytes_per_weight=0.6)
        say("llama_model_loader: loaded meta data with 29 key-value pairs and 291 tensors")
        say(f"print_info: file size   = {weights / 1024**3:.2f} GiB (4.89 BPW)")
        say("load_tensors: loading model tensors, this can take a while... (mmap = true)")
        layers = self._gpu_layers() if self._memory is not None else 0
        say(f"load_tensors: offloaded {layers}/{_LAYERS} layers to GPU")
        wanted = self._gpu_bytes(weights, layers)
        pause_s = load_time_s(options.model, self._settings) / _LOAD_STEPS
        for step in range(1, _LOAD_STEPS + 1):
            await asyncio.sleep(pause_s)
            if Fault.DIE_WHILE_LOADING in self._engine.faults and step >= _LOAD_STEPS // 2:
                self._fail(
                    "tensor 'blk.17.ffn_down.weight' data is not within the file bounds, model is corrupted"
                )
            self._take(wanted * step // _LOAD_STEPS)
        await self._engine.faults.wait_until_off(Fault.NEVER_READY)
        say("." * 96)
        say("llama_context: constructing llama_context")
        say(f"llama_kv_cache: size = {self._kv_bytes() / _MIB:.2f} MiB ({self._total_context} cells)")
        say("common_init_from_params: warming up the model with an empty run - please wait ...")
        say(f"srv          init: initializing slots, n_slots = {self._slots}")

    def _take(self, memory_bytes: int) -> None:
        if self._memory is None:
            return
        try:
            self._memory.hold(memory_bytes)
        except SimulatedOutOfMemory as error:
            device = self._memory.gpu_index
            say(
                f"ggml_backend_cuda_buffer_type_alloc_buffer: allocating {memory_bytes / _MIB:.2f} MiB "
                f"on device {device}: cudaMalloc failed: out of memory ({error})"
            )
            say(f"alloc_tensor_range: failed to allocate CUDA{device} buffer of size {memory_bytes}")
            self._fail(f"unable to allocate CUDA{device} buffer")

    def _fail(self, why: str) -> NoReturn:
        say(f"llama_model_load: error loading model: {why}")
        say(f"common_init_from_params: failed to load model '{self._options.model}'")
        say("main: exiting due to model loading error")
        raise LoadFailedError

    def _gpu_layers(self) -> int:
        wanted = self._options.n_gpu_layers
        if wanted in ("auto", "all") or int(wanted) < 0:
            return _LAYERS
        return min(int(wanted), _LAYERS)

    def _gpu_bytes(self, weights: int, layers: int) -> int:
        if layers == 0:
            return 0
        if self._settings.vram_bytes is not None:
            return self._settings.vram_bytes
        options = self._options
        projector = _PROJECTOR_BYTES if options.mmproj and options.mmproj_offload else 0
        return (weights + self._kv_bytes()) * layers // _LAYERS + _COMPUTE_BUFFER_BYTES + projector

    def _kv_bytes(self) -> int:
        keys, values = (_KV_TYPES[name] for name in (self._options.cache_type_k, self._options.cache_type_v))
        size = billions_of(self._options.model) / 8
        return int(_KV_BYTES_OF_8B * size * self._total_context * (keys + values) / 2)

    # The dialect.

    def error(self, status: int, message: str) -> dict[str, Any]:
        """See `Dialect.error`."""
        kind = _ERROR_TYPES.get(status, "server_error")
        return {"error": {"code": status, "message": message, "type": kind}}

    def refuse_generation(self, request: GenerationRequest) -> web.Response | None:
        """See `Dialect.refuse_generation`. The model's name in a request is not looked at."""
        if self._options.embedding:
            return self._engine.failure(
                501, "This server does not support completions. Start it without `--embeddings`"
            )
        if refused := self._refuse_pictures(request):
            return refused
        tokens = request.prompt_tokens
        if tokens < self.context_tokens:
            return None
        message = (
            f"request ({tokens} tokens) exceeds the available context size ({self.context_tokens} tokens)"
        )
        body = self.error(400, message + ", try increasing it")
        body["error"] |= {"type": "exceed_context_size_error", "n_prompt_tokens": tokens}
        body["error"]["n_ctx"] = self.context_tokens
        return json_response(body, status=400)

    def _refuse_pictures(self, request: GenerationRequest) -> web.Response | None:
        images = request.images
        if images and not self._options.mmproj:
            message = "image input is not supported - hint: if this is unexpected, you may need to provide"
            return self._engine.failure(500, f"{message} the mmproj")
        # The real one fetches those of other URLs itself; this one has nowhere to fetch from.
        if all(image.startswith(("http://", "https://")) or is_picture(image) for image in images):
            return None
        return self._engine.failure(400, "Failed to load image or audio file")

    def refuse_embedding(self, request: EmbeddingRequest) -> web.Response | None:
        """See `Dialect.refuse_embedding`."""
        if self._options.embedding:
            return None
        return self._engine.failure(
            501, "This server does not support embeddings. Start it with `--embeddings`"
        )

    def extras(self, timing: Timing) -> dict[str, Any]:
        """See `Dialect.extras`."""
        return {
            "timings": {
                "cache_n": 0,
                "prompt_n": timing.prompt_tokens,
                "prompt_ms": round(timing.prompt_s * 1000, 3),
                "predicted_n": timing.completion_tokens,
                "predicted_ms": round(timing.generation_s * 1000, 3),
                "predicted_per_second": round(timing.completion_tokens / timing.generation_s, 3),
            }
        }

    # Routes.

    @property
    def _loading(self) -> Middleware:
        @web.middleware
        async def loading(request: web.Request, handler: Handler) -> web.StreamResponse:
            if not self._engine.ready and not request.path.startswith("/sim/"):
                return json_response(_LOADING, status=503)
            try:
                return await handler(request)
            except web.HTTPException as error:
                return self._engine.failure(
                    error.status, "File Not Found" if error.status == 404 else error.reason
                )

        return loading

    @property
    def _authentication(self) -> Middleware:
        @web.middleware
        async def authentication(request: web.Request, handler: Handler) -> web.StreamResponse:
            key = self._options.api_key
            public = request.path in _PUBLIC or request.path.startswith("/sim/")
            if key and not public and request.headers.get("Authorization") != f"Bearer {key}":
                return self._engine.failure(401, "Invalid API Key")
            return await handler(request)

        return authentication

    async def _health(self, http: web.Request) -> web.Response:
        if Fault.HANG_HEALTH in self._engine.faults:
            await asyncio.Event().wait()
        return json_response({"status": "ok"})

    async def _models(self, http: web.Request) -> web.Response:
        meta = {"n_ctx_train": self._total_context, "n_params": int(billions_of(self._options.model) * 1e9)}
        row = {"id": self._name, "object": "model", "created": 0, "owned_by": "llamacpp", "meta": meta}
        return json_response({"object": "list", "data": [row]})

    async def _props(self, http: web.Request) -> web.Response:
        return json_response(
            {
                "default_generation_settings": {"n_ctx": self.context_tokens},
                "total_slots": self._slots,
                "model_path": self._options.model,
                "chat_template": self._options.chat_template,
                "modalities": {"vision": bool(self._options.mmproj), "audio": False},
                "build_info": "b9999-simulated",
                "is_sleeping": False,
            }
        )

    async def _slot_states(self, http: web.Request) -> web.Response:
        if not self._options.slots:
            return self._engine.failure(501, "This server does not support slots endpoint.")
        active = self._engine.counters.active
        if http.query.get("fail_on_no_slot") and active >= self._slots:
            return self._engine.failure(503, "no slot available")
        return json_response(
            [
                {"id": index, "is_processing": index < active, "n_ctx": self.context_tokens}
                for index in range(self._slots)
            ]
        )

    async def _metrics(self, http: web.Request) -> web.Response:
        if not self._options.metrics:
            return self._engine.failure(
                501, "This server does not support metrics endpoint. Start it with `--metrics`"
            )
        counters = self._engine.counters
        values = {
            "prompt_tokens_total counter": counters.prompt_tokens,
            "tokens_predicted_total counter": counters.tokens_generated,
            "requests_processing gauge": counters.active,
            "requests_deferred gauge": counters.waiting,
        }
        lines = []
        for key, value in values.items():
            name, kind = key.split()
            lines += [f"# TYPE llamacpp:{name} {kind}", f"llamacpp:{name} {value}"]
        return web.Response(text="\n".join(lines) + "\n", content_type="text/plain")


async def _serve(options: argparse.Namespace) -> int:
    settings = settings_from(os.environ)
    gpus = SimulatedGpus(settings.gpus) if settings.gpus is not None else None
    if CHILD_VARIABLE in os.environ:
        asyncio.get_running_loop().add_reader(sys.stdin, _end_with_router)
    return await LlamaServer(options, settings, gpu_memory_from(gpus, os.environ)).run()


def _end_with_router() -> None:
    if not os.read(sys.stdin.fileno(), 1024):
        asyncio.get_running_loop().remove_reader(sys.stdin)
        os.kill(os.getpid(), signal.SIGTERM)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the simulated engine; returns the exit code."""
    # A router understands all options, its own and those for its models.
    parser = _Parser(prog="llama-server", add_help=False, allow_abbrev=False)
    add_router_options(parser)
    router, passed_on = parser.parse_known_args(arguments)
    options = _parser().parse_args(passed_on, router)
    if not options.model:
        return run_to_end(lambda: LlamaRouter(router, passed_on).run(), "error")
    return run_to_end(lambda: _serve(options), "error")


if __name__ == "__main__":
    sys.exit(main())
