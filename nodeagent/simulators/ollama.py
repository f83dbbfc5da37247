"""A simulated Ollama: python -m nodeagent.simulators.ollama serve.

It heeds the variables of `ollama serve` (`OLLAMA_HOST`, `OLLAMA_KEEP_ALIVE`, `OLLAMA_MAX_LOADED_MODELS`,
`OLLAMA_NUM_PARALLEL`, `OLLAMA_MAX_QUEUE`, `OLLAMA_CONTEXT_LENGTH`, `OLLAMA_KV_CACHE_TYPE`), loads a model
when a request names it, and speaks as the real one does. `RUNG_SIM_MODELS` lists the names that are on its
disk, separated by commas; more can be pulled. See `_settings` for the rest of the environment.
"""

from __future__ import annotations

import asyncio
import hashlib
import math
import os
import sys
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from datetime import UTC, datetime, timedelta
from typing import Any, TypeVar

import msgspec
from aiohttp import web
from aiohttp.typedefs import Handler
from msgspec import Struct

from nodeagent.simulators._faults import Fault
from nodeagent.simulators._generation import count_tokens, embed, is_reasoner
from nodeagent.simulators._http import SimulatedEngine, json_response
from nodeagent.simulators._memory import GpuMemory, gpu_memory_from
from nodeagent.simulators._ollama_answers import (
    ModelDialect,
    ModelEngine,
    NativeRequest,
    is_embedder,
    line,
    nanoseconds,
)
from nodeagent.simulators._ollama_runners import (
    Limits,
    Runner,
    RunnerFailedError,
    Runners,
    limits_from,
    seconds_of,
)
from nodeagent.simulators._process import Listener, LoadFailedError, run_to_end, run_until_stopped, say
from nodeagent.simulators._settings import (
    Settings,
    billions_of,
    pace_of,
    settings_from,
    weight_bytes_of,
)
from nodeagent.simulators.gpu import SimulatedGpus

_T = TypeVar("_T")
_VERSION = "0.24.0"
_DEFAULT_HOST = "127.0.0.1:11434"
_BUSY = "server busy, please try again.  maximum pending requests exceeded"
#: How long Go can count, which is what Ollama makes of "for ever".
_FOR_EVER = timedelta(days=106_751)
_PULL_BYTES_PER_S = 100e6
_PULL_STEPS = 10
_CLOUD = (":cloud", "-cloud")


class _Asked(Struct):
    """What every request has."""

    model: str = ""
    name: str = ""


class _PullRequest(_Asked):
    stream: bool | None = None


class _EmbedRequest(_Asked):
    input: str | list[str] = []
    keep_alive: float | str | None = None

    @property
    def inputs(self) -> list[str]:
        """What is to be embedded."""
        return [self.input] if isinstance(self.input, str) and self.input else list(self.input)


class _RefusedError(Exception):
    """A request that is not served; the status and the text are Ollama's."""

    def __init__(self, status: int, text: str) -> None:
        super().__init__(text)
        self.status = status


class _Front(SimulatedEngine):
    """Finds the model that a request on OpenAI's routes names, and has it answer."""

    def __init__(self, ollama: Ollama, settings: Settings) -> None:
        dialect = ModelDialect("", 0)
        super().__init__(dialect, model="", slots=1, pace=pace_of("", settings), settings=settings)
        self._ollama = ollama

    async def _generate(self, http: web.Request, *, chat: bool) -> web.StreamResponse:
        return await self._with_model(http, lambda engine: engine.generate(http, chat=chat))

    async def _embeddings(self, http: web.Request) -> web.StreamResponse:
        return await self._with_model(http, lambda engine: engine.embeddings(http))

    async def _with_model(
        self, http: web.Request, answer: Callable[[ModelEngine], Awaitable[web.StreamResponse]]
    ) -> web.StreamResponse:
        try:
            model = msgspec.json.decode(await http.read(), type=_Asked).model
            return await self._ollama.with_model(model, None, lambda engine, _: answer(engine))
        except msgspec.DecodeError as error:
            return self.failure(400, str(error))
        except _RefusedError as error:
            return self.failure(error.status, str(error))


class Ollama:
    """Ollama's own routes, and how it runs."""

    def __init__(
        self, *, host: str, port: int, models: Sequence[str], settings: Settings, limits: Limits
    ) -> None:
        gpus = SimulatedGpus(settings.gpus) if settings.gpus is not None else None
        self._memory: GpuMemory | None = gpu_memory_from(gpus, os.environ)
        self._settings = settings
        self._limits = limits
        self._on_disk = {_full_name(name): time.time() for name in models}
        #: What was fetched of a model whose pull was broken off.
        self._fetched: dict[str, int] = {}
        self._engines: dict[str, ModelEngine] = {}
        self._pending = 0
        self._front = _Front(self, settings)
        self._runners = Runners(
            memory=self._memory, settings=settings, faults=self._front.faults, limits=limits
        )
        self._listener = Listener(self._application(), host, port)

    def _application(self) -> web.Application:
        app = self._front.application([_errors])
        add = app.router
        add.add_get("/", self._root)
        add.add_get("/api/version", self._version)
        add.add_get("/api/tags", self._tags)
        add.add_get("/api/ps", self._ps)
        add.add_post("/api/show", self._show)
        add.add_post("/api/generate", self._generate)
        add.add_post("/api/chat", self._chat)
        add.add_post("/api/embed", self._embed)
        add.add_post("/api/pull", self._pull)
        add.add_get("/v1/models", self._models)
        return app

    async def run(self) -> int:
        """Serve until stopped; returns the exit code."""
        return await run_until_stopped(
            self._live, listener=self._listener, counters=self._front.counters, memory=self._memory
        )

    async def _live(self) -> None:
        try:
            url = await self._listener.open()
        except OSError as error:
            say(f"Error: listen tcp: bind: {error.strerror}")
            raise LoadFailedError from None
        self._front.ready = True
        address = url.removeprefix("http://")
        say(f'level=INFO source=routes.go:1 msg="Listening on {address} (version {_VERSION}, simulated)"')

    async def with_model(
        self,
        asked_name: str,
        keep_alive: float | str | None,
        answer: Callable[[ModelEngine, float], Awaitable[web.StreamResponse]],
    ) -> web.StreamResponse:
        """Have the model of that name answer, loaded first if it is not; with the seconds that this took.

        Raises:
            _RefusedError: there is no such model, it cannot be loaded, or too many wait.
        """
        name = self._known(asked_name)
        keep_alive_s = _keep_alive_s(keep_alive)
        if self._pending + self._front.counters.waiting >= self._limits.max_queue:
            raise _RefusedError(503, _BUSY)
        started_s = time.monotonic()
        self._pending += 1
        waiting = True
        try:
            async with self._runners.use(name, keep_alive_s):
                self._pending -= 1
                waiting = False
                return await answer(self._engine(name), time.monotonic() - started_s)
        except RunnerFailedError as error:
            raise _RefusedError(500, str(error)) from error
        finally:
            if waiting:
                self._pending -= 1

    def _engine(self, name: str) -> ModelEngine:
        if name not in self._engines:
            self._engines[name] = ModelEngine(
                ModelDialect(name, self._limits.context_tokens),
                slots=self._limits.parallel,
                settings=self._settings,
                server=self._front,
            )
        return self._engines[name]

    def _known(self, asked_name: str) -> str:
        """The full name of a model on disk. Nothing of a simulation leaves the machine."""
        name = _full_name(asked_name)
        if asked_name.endswith(_CLOUD):
            raise _RefusedError(401, "unauthorized")
        if not asked_name or name not in self._on_disk:
            raise _RefusedError(404, f"model '{asked_name}' not found")
        return name

    # Routes.

    async def _root(self, http: web.Request) -> web.Response:
        return web.Response(text="Ollama is running")

    async def _version(self, http: web.Request) -> web.Response:
        await self._maybe_hang()
        return json_response({"version": _VERSION})

    async def _tags(self, http: web.Request) -> web.Response:
        await self._maybe_hang()
        return json_response({"models": [_tag(name, at) for name, at in sorted(self._on_disk.items())]})

    async def _ps(self, http: web.Request) -> web.Response:
        models = [_loaded(runner, self._limits.context_tokens) for runner in self._runners.loaded()]
        return json_response({"models": models})

    async def _show(self, http: web.Request) -> web.Response:
        asked = await _decoded(http, _Asked)
        name = self._known(asked.model or asked.name)
        return json_response(
            {
                "modelfile": f"FROM {name}",
                "details": _details(name),
                "model_info": {
                    "general.architecture": "simulated",
                    "general.parameter_count": int(billions_of(name) * 1e9),
                },
                "capabilities": _capabilities(name),
            }
        )

    async def _generate(self, http: web.Request) -> web.StreamResponse:
        return await self._answer(http, chat=False)

    async def _chat(self, http: web.Request) -> web.StreamResponse:
        return await self._answer(http, chat=True)

    async def _answer(self, http: web.Request, *, chat: bool) -> web.StreamResponse:
        asked = await _decoded(http, NativeRequest)
        name = self._known(asked.model)
        if asked.empty and asked.keep_alive is not None and _keep_alive_s(asked.keep_alive) == 0:
            self._runners.unload(name)
            return _no_words(asked, chat=chat, reason="unload")
        if is_embedder(name):
            raise _RefusedError(400, f'"{asked.model}" does not support {"chat" if chat else "generate"}')

        async def answer(engine: ModelEngine, load_s: float) -> web.StreamResponse:
            if asked.empty:
                return _no_words(asked, chat=chat, reason="load")
            return await engine.native(http, asked, chat=chat, load_s=load_s)

        return await self.with_model(asked.model, asked.keep_alive, answer)

    async def _embed(self, http: web.Request) -> web.StreamResponse:
        asked = await _decoded(http, _EmbedRequest)

        async def answer(engine: ModelEngine, load_s: float) -> web.StreamResponse:
            body: dict[str, Any] = {
                "model": asked.model,
                "embeddings": [embed(text) for text in asked.inputs],
            }
            if asked.inputs:
                body["total_duration"] = body["load_duration"] = nanoseconds(load_s)
                body["prompt_eval_count"] = sum(count_tokens(text) for text in asked.inputs)
            return json_response(body)

        return await self.with_model(asked.model, asked.keep_alive, answer)

    async def _models(self, http: web.Request) -> web.Response:
        rows = [
            {"id": name, "object": "model", "created": int(at), "owned_by": "library"}
            for name, at in sorted(self._on_disk.items())
        ]
        return json_response({"object": "list", "data": rows})

    async def _pull(self, http: web.Request) -> web.StreamResponse:
        asked = await _decoded(http, _PullRequest)
        name = asked.model or asked.name
        if not name or any(sign.isspace() for sign in name):
            raise _RefusedError(400, "invalid model name")
        if asked.stream is False:
            await self._fetch(_full_name(name), None)
            return json_response({"status": "success"})
        response = web.StreamResponse(headers={"Content-Type": "application/x-ndjson"})
        response.enable_chunked_encoding()
        await response.prepare(http)
        await response.write(line({"status": "pulling manifest"}))
        if Fault.ERROR_FRAME_THEN_DONE in self._front.faults:
            await response.write(line({"error": "pull model manifest: file does not exist"}))
        else:
            await self._fetch(_full_name(name), response)
        await response.write_eof()
        return response

    async def _fetch(self, name: str, response: web.StreamResponse | None) -> None:
        """Fetch a model; what was fetched before is not fetched again."""

        async def tell(value: dict[str, Any]) -> None:
            if response is not None:
                await response.write(line(value))

        total = weight_bytes_of(name, default_bytes_per_weight=0.6)
        digest = _digest(name)
        status = {"status": f"pulling {digest[7:19]}", "digest": digest, "total": total}
        small = _digest(f"{name}/template")
        template = {"status": f"pulling {small[7:19]}", "digest": small, "total": 1_481}
        pause_s = total / _PULL_BYTES_PER_S / _PULL_STEPS / self._settings.speed
        await tell(status)
        for step in range(_PULL_STEPS * self._fetched.get(name, 0) // total + 1, _PULL_STEPS + 1):
            await asyncio.sleep(pause_s)
            if Fault.CUT_MID_STREAM in self._front.faults and step > _PULL_STEPS // 2:
                return
            self._fetched[name] = total * step // _PULL_STEPS
            # Layers come side by side, and so do their lines.
            if step <= 2:
                await tell(template if step == 1 else {**template, "completed": 1_481})
            await tell({**status, "completed": self._fetched[name]})
        for last in ("verifying sha256 digest", "writing manifest", "success"):
            await tell({"status": last})
        self._on_disk[name] = time.time()

    async def _maybe_hang(self) -> None:
        if Fault.HANG_HEALTH in self._front.faults:
            await asyncio.Event().wait()


@web.middleware
async def _errors(request: web.Request, handler: Handler) -> web.StreamResponse:
    try:
        return await handler(request)
    except _RefusedError as error:
        return json_response({"error": str(error)}, status=error.status)
    except web.HTTPException as error:
        return web.Response(text=f"{error.status} {error.reason}", status=error.status)


async def _decoded(http: web.Request, kind: type[_T]) -> _T:
    try:
        return msgspec.json.decode(await http.read(), type=kind)
    except msgspec.DecodeError as error:
        raise _RefusedError(400, str(error)) from error


def _keep_alive_s(keep_alive: float | str | None) -> float | None:
    try:
        return None if keep_alive is None else seconds_of(keep_alive)
    except ValueError as error:
        raise _RefusedError(400, str(error)) from error


def _no_words(asked: NativeRequest, *, chat: bool, reason: str) -> web.Response:
    said: dict[str, Any] = {"message": {"role": "assistant", "content": ""}} if chat else {"response": ""}
    head = {"model": asked.model, "created_at": _stamp(datetime.now(UTC))}
    body = line({**head, **said, "done": True, "done_reason": reason})
    kind = "application/json" if asked.stream is False else "application/x-ndjson"
    return web.Response(body=body, content_type=kind)


def _full_name(name: str) -> str:
    return name if ":" in name.rpartition("/")[2] else f"{name}:latest"


def _tag(name: str, modified_at_s: float) -> dict[str, Any]:
    cloud = {"remote_model": name, "remote_host": "https://ollama.com:443"} if name.endswith(_CLOUD) else {}
    return {
        "name": name,
        "model": name,
        **cloud,
        "modified_at": _stamp(datetime.fromtimestamp(modified_at_s, UTC)),
        "size": weight_bytes_of(name, default_bytes_per_weight=0.6),
        "digest": _digest(name)[7:],
        "details": _details(name),
        "capabilities": _capabilities(name),
    }


def _loaded(runner: Runner, context_tokens: int) -> dict[str, Any]:
    now = datetime.now(UTC)
    if math.isfinite(runner.expires_at_s):
        expires = datetime.fromtimestamp(runner.expires_at_s, UTC)
    else:
        # For ever, or for as long as it is in use, and then anew.
        kept = timedelta(seconds=runner.keep_alive_s) if math.isfinite(runner.keep_alive_s) else _FOR_EVER
        expires = now + kept
    return {
        "name": runner.name,
        "model": runner.name,
        "size": runner.size_bytes,
        "digest": _digest(runner.name)[7:],
        "details": _details(runner.name),
        "expires_at": _stamp(expires),
        "size_vram": runner.vram_bytes,
        "context_length": context_tokens,
    }


def _details(name: str) -> dict[str, Any]:
    family = name.rpartition("/")[2].partition(":")[0]
    return {
        "parent_model": "",
        "format": "gguf",
        "family": family,
        "families": [family],
        "parameter_size": f"{billions_of(name):.1f}B",
        "quantization_level": "Q4_K_M",
    }


def _capabilities(name: str) -> list[str]:
    if is_embedder(name):
        return ["embedding"]
    return ["completion", "tools", *(["thinking"] if is_reasoner(name) else [])]


def _digest(name: str) -> str:
    return f"sha256:{hashlib.sha256(name.encode()).hexdigest()}"


def _stamp(moment: datetime) -> str:
    return moment.isoformat().replace("+00:00", "Z")


def _address(environment: Mapping[str, str]) -> tuple[str, int]:
    given = (environment.get("OLLAMA_HOST") or _DEFAULT_HOST).removeprefix("http://").rstrip("/")
    host, _, port = given.rpartition(":")
    return host or "127.0.0.1", int(port)


async def _serve(environment: Mapping[str, str]) -> int:
    host, port = _address(environment)
    names = [name.strip() for name in environment.get("RUNG_SIM_MODELS", "").split(",") if name.strip()]
    settings, limits = settings_from(environment), limits_from(environment)
    return await Ollama(host=host, port=port, models=names, settings=settings, limits=limits).run()


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the simulated engine; returns the exit code."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    if given != ["serve"]:
        sys.stderr.write(f'Error: unknown command "{" ".join(given)}" for "ollama"\n')
        return 1
    return run_to_end(lambda: _serve(os.environ), "Error")


if __name__ == "__main__":
    sys.exit(main())
