"""A simulated vLLM: python -m nodeagent.simulators.vllm MODEL --port 8000.

It takes a part of the options of `vllm serve`, tells how far loading is in vLLM's words, opens its
port only when it is ready, and speaks as the real one does from then on. With `VLLM_SERVER_DEV_MODE=1`
it has the routes of sleep mode. The model need not exist: only its name is used, for its size. See
`_settings` for the environment; `PORT` and `HOST` are what `--port` and `--host` are by default.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import sys
import time
from collections.abc import Sequence
from typing import Any, NoReturn

from aiohttp import web
from aiohttp.typedefs import Handler, Middleware

from nodeagent.simulators._faults import Fault
from nodeagent.simulators._generation import EmbeddingRequest, GenerationRequest, is_reasoner
from nodeagent.simulators._http import SimulatedEngine, Timing, json_response
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
from nodeagent.simulators._vllm_sleep import Parts, SleepMode
from nodeagent.simulators.gpu import SimulatedGpus

_VERSION = "0.32.0+simulated"
_DEFAULT_MAX_MODEL_LEN = 8192
_DEFAULT_UTILIZATION = 0.9
_DEFAULT_MAX_NUM_SEQS = 256
_ERROR_TYPES = {
    400: "BadRequestError",
    404: "NotFoundError",
    422: "UnprocessableEntityError",
    501: "NotImplementedError",
}
_GIB = 1024**3
#: Bytes a token in the KV cache of an 8B model.
_KV_BYTES_OF_8B = 131_072
#: What CUDA graphs and activations take beside the weights.
_OVERHEAD_BYTES = _GIB
#: How loading time divides, measured on a real start with a warm compile cache.
_WEIGHTS_SHARE = 0.6
_GRAPHS_SHARE = 0.3
_SHARDS = 4
#: From the death of the engine to that of its server.
_LAST_ANSWER_S = 0.1
_GRAPHS = 35
#: Of a reservation that was given in bytes, weights take so much at most.
_WEIGHTS_OF_RESERVED = 0.75


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="vllm", description=__doc__, allow_abbrev=False)
    add = parser.add_argument
    add("model")
    add("--host", default=os.environ.get("HOST") or "127.0.0.1")
    add("--port", type=int, default=int(os.environ.get("PORT") or 8000))
    add("--served-model-name", nargs="+", default=[])
    add("--max-model-len", type=int, default=_DEFAULT_MAX_MODEL_LEN)
    add("--gpu-memory-utilization", type=float, default=_DEFAULT_UTILIZATION)
    add("--kv-cache-memory-bytes", type=int, default=0)
    add("--max-num-seqs", type=int, default=_DEFAULT_MAX_NUM_SEQS)
    add("--kv-cache-dtype", default="auto")
    add("--runner", choices=["auto", "generate", "pooling"], default="auto")
    add("--enable-sleep-mode", action="store_true")
    add("--enforce-eager", action="store_true")
    add("--enable-auto-tool-choice", action="store_true")
    add("--tool-call-parser", default="")
    add("--reasoning-parser", default="")
    add("--api-key", default=os.environ.get("VLLM_API_KEY", ""))
    return parser


class Vllm:
    """The ways of vLLM: a `Dialect`, its own routes, and how it loads."""

    engine = "vLLM"
    event_stream_type = "text/event-stream; charset=utf-8"
    first_content: str | None = ""
    ping_interval_s: float | None = None

    def __init__(self, options: argparse.Namespace, settings: Settings, memory: GpuMemory | None) -> None:
        self._options = options
        self._settings = settings
        self._memory = memory
        self._names: list[str] = options.served_model_name or [options.model]
        self.reasons = is_reasoner(options.model) or is_reasoner(self._names[0])
        self.context_tokens: int = options.max_model_len
        self._embeds = options.runner == "pooling" or "embed" in options.model.lower()
        self._created = int(time.time())
        self._engine = SimulatedEngine(
            self,
            model=self._names[0],
            slots=options.max_num_seqs,
            pace=pace_of(options.model, settings),
            settings=settings,
        )
        app = self._engine.application([self._gate])
        app.router.add_get("/health", self._health)
        app.router.add_route("*", "/ping", self._health)
        app.router.add_get("/version", self._version)
        app.router.add_get("/v1/models", self._models)
        app.router.add_get("/metrics", self._metrics)
        self._dead = asyncio.Event()
        self._sleep = SleepMode(
            self._engine, settings, memory, enabled=options.enable_sleep_mode, die=self._die
        )
        if os.environ.get("VLLM_SERVER_DEV_MODE") == "1":
            self._sleep.add_routes(app)
        self._listener = Listener(app, options.host, options.port)

    async def run(self) -> int:
        """Serve until stopped; returns the exit code."""
        return await run_until_stopped(
            self._live, listener=self._listener, counters=self._engine.counters, memory=self._memory
        )

    async def _live(self) -> None:
        _info("api_server.py", f"vLLM API server version {_VERSION} (simulated: no weights, no GPU)")
        if early := Fault.LISTEN_WHILE_LOADING in self._engine.faults:
            await self._listen()
        await self._load()
        await self._engine.faults.wait_until_off(Fault.NEVER_READY)
        self._engine.ready = True
        if not early:
            # As with the real one, nothing listens until everything is loaded.
            await self._listen()
        say("INFO:     Application startup complete.")
        await self._dead.wait()
        raise LoadFailedError

    async def _listen(self) -> None:
        try:
            url = await self._listener.open()
        except OSError as error:
            say(f"OSError: {error}")
            raise LoadFailedError from None
        _info("api_server.py", f"Starting vLLM API server 0 on {url}")

    def _die(self, last_words: str) -> None:
        """The engine is dead; the server that told somebody so ends after it."""
        say("(EngineCore pid=0) ERROR [core.py:1100] EngineCore encountered a fatal error.")
        say(f"(EngineCore pid=0) {last_words}")
        self._engine.ready = False
        asyncio.get_running_loop().call_later(_LAST_ANSWER_S, self._dead.set)

    async def _load(self) -> None:
        reserved, weights = self._sizes()
        load_s = load_time_s(self._options.model, self._settings)
        _info("gpu_model_runner.py", f"Starting to load model {self._options.model}...")
        for shard in range(_SHARDS + 1):
            say(
                f"Loading safetensors checkpoint shards: {100 * shard // _SHARDS:3d}% Completed "
                f"| {shard}/{_SHARDS} [00:00<00:00, 1.00it/s]"
            )
            if shard == _SHARDS:
                break
            await asyncio.sleep(load_s * _WEIGHTS_SHARE / _SHARDS)
            if Fault.DIE_WHILE_LOADING in self._engine.faults and shard >= _SHARDS // 2:
                self._fail("safetensors_rust.SafetensorError: Error while deserializing header")
            self._hold(weights * (shard + 1) // _SHARDS)
        _info("default_loader.py", f"Loading weights took {load_s * _WEIGHTS_SHARE:.2f} seconds")
        taken = f"{weights / _GIB:.4f} GiB and {load_s * _WEIGHTS_SHARE:.6f} seconds"
        _info("gpu_model_runner.py", f"Model loading took {taken}")
        await asyncio.sleep(load_s * (1 - _WEIGHTS_SHARE - _GRAPHS_SHARE))
        self._hold(reserved)
        overhead = max(min(_OVERHEAD_BYTES, reserved - weights), 0)
        self._sleep.parts = Parts(
            weights=weights, kv_cache=max(reserved - weights - overhead, 0), overhead=overhead
        )
        self._tell_cache(max(reserved - weights - _OVERHEAD_BYTES, 0))
        if not self._options.enforce_eager:
            await self._capture_graphs(load_s * _GRAPHS_SHARE)

    def _sizes(self) -> tuple[int, int]:
        """Bytes to reserve, and of these the weights. Fails as vLLM does if they are not free."""
        weights = weight_bytes_of(self._options.model, default_bytes_per_weight=2.0)
        wanted = self._settings.vram_bytes
        if self._memory is None:
            return wanted or weights + 4 * _GIB, weights
        total, free = self._memory.total_bytes(), self._memory.free_bytes()
        reserved = wanted if wanted is not None else int(total * self._options.gpu_memory_utilization)
        if wanted is None and self._options.kv_cache_memory_bytes:
            return weights + _OVERHEAD_BYTES + self._options.kv_cache_memory_bytes, weights
        if free < reserved:
            share = reserved / total
            self._fail(
                f"ValueError: Free memory on device cuda:{self._memory.gpu_index} ({free / _GIB:.2f}/"
                f"{total / _GIB:.2f} GiB) on startup is less than desired GPU memory utilization "
                f"({share:.2f}, {reserved / _GIB:.2f} GiB). Decrease GPU memory utilization or reduce GPU "
                "memory used by other processes."
            )
        if wanted is not None:
            weights = min(weights, int(wanted * _WEIGHTS_OF_RESERVED))
        elif weights + _OVERHEAD_BYTES > reserved:
            self._fail(
                "ValueError: No available memory for the cache blocks. Try increasing "
                "`gpu_memory_utilization` when initializing the engine."
            )
        return reserved, weights

    def _hold(self, memory_bytes: int) -> None:
        if self._memory is None:
            return
        try:
            self._memory.hold(memory_bytes)
        except SimulatedOutOfMemory as error:
            device = self._memory.gpu_index
            self._fail(
                f"torch.OutOfMemoryError: CUDA out of memory. Tried to allocate "
                f"{memory_bytes / _GIB:.2f} GiB. GPU {device} has a total capacity of "
                f"{self._memory.total_bytes() / _GIB:.2f} GiB of which "
                f"{self._memory.free_bytes() / _GIB:.2f} GiB is free. ({error})"
            )

    def _tell_cache(self, kv_bytes: int) -> None:
        each = int(_KV_BYTES_OF_8B * billions_of(self._options.model) / 8)
        if self._options.kv_cache_dtype.startswith("fp8"):
            each //= 2
        tokens = kv_bytes // max(each, 1)
        _info("gpu_worker.py", f"Available KV cache memory: {kv_bytes / _GIB:.2f} GiB")
        _info("kv_cache_utils.py", f"GPU KV cache size: {tokens:,} tokens")
        concurrency = f"{self.context_tokens:,} tokens per request: {tokens / self.context_tokens:.2f}x"
        _info("kv_cache_utils.py", f"Maximum concurrency for {concurrency}")

    async def _capture_graphs(self, duration_s: float) -> None:
        steps = 5
        for step in range(steps + 1):
            done = _GRAPHS * step // steps
            # Drawn anew on the same line, as tqdm does.
            sys.stdout.write(
                f"\rCapturing CUDA graphs (mixed prefill-decode, PIECEWISE): {100 * done // _GRAPHS:3d}%|"
                f"{'█' * (2 * step):10}| {done}/{_GRAPHS} [00:00<00:00, 18.20it/s]"
            )
            sys.stdout.flush()
            if step < steps:
                await asyncio.sleep(duration_s / steps)
        say("")
        _info("gpu_model_runner.py", f"Graph capturing finished in {max(duration_s, 1):.0f} secs")

    def _fail(self, last_words: str) -> NoReturn:
        say("(EngineCore pid=0) ERROR [core.py:1100] EngineCore failed to start.")
        say(f"(EngineCore pid=0) {last_words}")
        say("RuntimeError: Engine core initialization failed. See root cause above.")
        raise LoadFailedError

    # The dialect.

    def error(self, status: int, message: str) -> dict[str, Any]:
        """See `Dialect.error`."""
        return _error(status, message, param=None)

    def refuse_generation(self, request: GenerationRequest) -> web.Response | None:
        """See `Dialect.refuse_generation`."""
        unknown = self._refuse_model(request.model)
        if unknown is not None:
            return unknown
        if self._embeds:
            return self._engine.failure(400, "The model does not support Chat Completions API")
        if request.tools and not self._options.tool_call_parser and request.tool_choice != "none":
            return self._engine.failure(400, _no_tools(request.tool_choice))
        tokens = request.prompt_tokens
        wanted = request.max_completion_tokens or request.max_tokens or 0
        if tokens + wanted <= self.context_tokens and tokens < self.context_tokens:
            return None
        return json_response(
            _error(
                400,
                f"This model's maximum context length is {self.context_tokens} tokens. However, you "
                f"requested {tokens + wanted} tokens ({tokens} in the messages, {wanted} in the "
                "completion). Please reduce the length of the messages or completion.",
                param="input_tokens",
            ),
            status=400,
        )

    def refuse_embedding(self, request: EmbeddingRequest) -> web.Response | None:
        """See `Dialect.refuse_embedding`."""
        if not self._embeds:
            # The route is only there for models that embed.
            return json_response({"detail": "Not Found"}, status=404)
        return self._refuse_model(request.model)

    def extras(self, timing: Timing) -> dict[str, Any]:
        """See `Dialect.extras`."""
        return {}

    def _refuse_model(self, model: str) -> web.Response | None:
        if not model or model in self._names:
            return None
        message = f"The model `{model}` does not exist. Valid aliases: {', '.join(self._names)}."
        return json_response(_error(404, message, param="model"), status=404)

    # Routes.

    @property
    def _gate(self) -> Middleware:
        @web.middleware
        async def gate(request: web.Request, handler: Handler) -> web.StreamResponse:
            if not self._engine.ready and not request.path.startswith("/sim/"):
                return web.Response(status=503)
            key = self._options.api_key
            if (
                key
                and request.path.startswith("/v1/")
                and request.headers.get("Authorization") != f"Bearer {key}"
            ):
                return json_response({"error": "Unauthorized"}, status=401)
            try:
                return await handler(request)
            except web.HTTPException as error:
                # FastAPI's own shape, for what never reaches a route.
                return json_response({"detail": error.reason}, status=error.status)

        return gate

    async def _health(self, http: web.Request) -> web.Response:
        if Fault.HANG_HEALTH in self._engine.faults:
            await asyncio.Event().wait()
        return web.Response()

    async def _version(self, http: web.Request) -> web.Response:
        return json_response({"version": _VERSION})

    async def _models(self, http: web.Request) -> web.Response:
        rows = [
            {
                "id": name,
                "object": "model",
                "created": self._created,
                "owned_by": "vllm",
                "root": self._options.model,
                "parent": None,
                "max_model_len": self.context_tokens,
                "permission": [],
            }
            for name in self._names
        ]
        return json_response({"object": "list", "data": rows})

    async def _metrics(self, http: web.Request) -> web.Response:
        counters = self._engine.counters
        # Those that wait for a sleeper are not counted.
        waiting = 0 if self._sleep.sleeping else counters.waiting
        states = ("awake", "weights_offloaded", "discard_all")
        ends = {"stop": counters.completed, "length": 0, "abort": counters.aborted, "error": 0}
        families: list[tuple[str, str, dict[str, float]]] = [
            ("num_requests_running", "gauge", {"": counters.active}),
            ("num_requests_waiting", "gauge", {"": waiting}),
            (
                "num_requests_waiting_by_reason",
                "gauge",
                {'reason="capacity"': waiting, 'reason="deferred"': 0},
            ),
            (
                "engine_sleep_state",
                "gauge",
                {f'sleep_state="{state}"': state == self._sleep.state for state in states},
            ),
            ("kv_cache_usage_perc", "gauge", {"": counters.active / self._options.max_num_seqs}),
            ("prompt_tokens_total", "counter", {"": counters.prompt_tokens}),
            ("generation_tokens_total", "counter", {"": counters.tokens_generated}),
            (
                "request_success_total",
                "counter",
                {f'finished_reason="{reason}"': count for reason, count in ends.items()},
            ),
        ]
        lines = []
        for name, kind, samples in families:
            lines.append(f"# TYPE vllm:{name} {kind}")
            for label, value in samples.items():
                labels = ",".join(filter(None, (f'engine="0",model_name="{self._names[0]}"', label)))
                lines.append(f"vllm:{name}{{{labels}}} {float(value)}")
        return web.Response(text="\n".join(lines) + "\n", content_type="text/plain")


def _error(status: int, message: str, *, param: str | None) -> dict[str, Any]:
    kind = _ERROR_TYPES.get(status, "InternalServerError")
    return {"error": {"message": message, "type": kind, "param": param, "code": status}}


def _no_tools(choice: str | dict[str, Any] | None) -> str:
    """Why it takes no tools, in the words of vLLM 0.32 (`renderers/online_renderer.py`)."""
    if choice in (None, "auto"):
        return '"auto" tool choice requires --enable-auto-tool-choice and --tool-call-parser to be set'
    name = choice["function"]["name"] if isinstance(choice, dict) else ""
    wanted = f'function "{name}"' if name else f'"{choice}"'
    return f"tool_choice={wanted} requires --tool-call-parser to be set"


def _info(source: str, message: str) -> None:
    stamp = time.strftime("%m-%d %H:%M:%S")
    say(f"INFO {stamp} [{source}:1] {message}")


async def _serve(options: argparse.Namespace) -> int:
    settings = settings_from(os.environ)
    gpus = SimulatedGpus(settings.gpus) if settings.gpus is not None else None
    return await Vllm(options, settings, gpu_memory_from(gpus, os.environ)).run()


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the simulated engine; returns the exit code."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    options = _parser().parse_args(given[1:] if given[:1] == ["serve"] else given)
    return run_to_end(lambda: _serve(options), "vllm: error")


if __name__ == "__main__":
    sys.exit(main())
