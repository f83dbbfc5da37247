"""The router mode of a simulated `llama-server`: models that are loaded and unloaded by name.

Each loaded model is a process of its own, a simulated llama-server with one model, and holds the memory;
the router itself has none. Models are the GGUF files of `--models-dir`. There are no downloads, no presets
and no events.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import re
import sys
import time
from asyncio.subprocess import PIPE, Process
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import aiohttp
import msgspec
from aiohttp import web
from msgspec import Struct

from nodeagent.simulators._http import Counters, json_response
from nodeagent.simulators._process import Listener, run_until_stopped, say

#: Tells a process of a router's model that it is one; it ends with its standard input.
CHILD_VARIABLE = "LLAMA_SERVER_ROUTER_PORT"
_LISTENING = re.compile(r"server is listening on (http://\S+)")
_STOP_TIMEOUT_S = 10.0
_MAX_BODY_BYTES = 64 * 1024 * 1024
#: What is between two servers, and no part of an answer.
_HOP_HEADERS = frozenset({"connection", "content-length", "date", "server", "transfer-encoding"})
_PASSED_HEADERS = frozenset({"authorization", "content-type"})
_ERROR_TYPES = {400: "invalid_request_error", 404: "not_found_error"}


class _Asked(Struct):
    model: str = ""


class _RefusedError(Exception):
    """A request that is not served; the status and the text are llama-server's."""

    def __init__(self, status: int, text: str) -> None:
        super().__init__(text)
        self.status = status


class _Model:
    """A model on disk, and its process if it is loaded."""

    def __init__(self, name: str, path: Path) -> None:
        self.name = name
        self.path = path
        self.status = "unloaded"
        self.exit_code = 0
        self.base_url = ""
        #: It was told to end, so that its end is no failure.
        self.leaving = False
        self.used_at_s = 0.0
        self.process: Process | None = None
        #: Ends when its process has.
        self.running: asyncio.Task[None] | None = None
        self.changed = asyncio.Event()

    def become(self, status: str) -> None:
        """Have another status."""
        self.status = status
        self.changed.set()
        self.changed = asyncio.Event()

    def row(self) -> dict[str, object]:
        """Its row in the list of models."""
        status: dict[str, object] = {"value": self.status}
        if self.exit_code:
            status |= {"failed": True, "exit_code": self.exit_code}
        return {"id": self.name, "object": "model", "created": 0, "owned_by": "llamacpp", "status": status}


class LlamaRouter:
    """A router and the processes of its models.

    Args:
        options: the router's own.
        passed_on: options for each model's process.
    """

    def __init__(self, options: argparse.Namespace, passed_on: Sequence[str]) -> None:
        self._options = options
        self._passed_on = tuple(passed_on)
        found = sorted(Path(options.models_dir).glob("*.gguf")) if options.models_dir else []
        self._models = {path.stem: _Model(path.stem, path) for path in found}
        self._loads = asyncio.Lock()
        self._unloads: set[asyncio.Task[None]] = set()
        app = web.Application(client_max_size=_MAX_BODY_BYTES)
        for path in ("/health", "/v1/health"):
            app.router.add_get(path, self._health)
        for path in ("/models", "/v1/models"):
            app.router.add_get(path, self._list)
        app.router.add_post("/models/load", self._on_load)
        app.router.add_post("/models/unload", self._on_unload)
        app.router.add_route("*", "/{path:.*}", self._pass)
        self._listener = Listener(app, options.host, options.port)

    async def run(self) -> int:
        """Serve until stopped, and end all models' processes; returns the exit code."""
        try:
            return await run_until_stopped(
                self._live, listener=self._listener, counters=Counters(), memory=None
            )
        finally:
            await asyncio.gather(*(self._end(model) for model in self._models.values()))

    async def _live(self) -> None:
        url = await self._listener.open()
        say(f"srv   load_models: Loaded {len(self._models)} models from {self._options.models_dir}")
        say(f"main: router server is listening on {url}")

    async def _load(self, model: _Model) -> None:
        """Begin to load it; one of the others may have to go first."""
        async with self._loads:
            if model.status != "unloaded":
                raise _RefusedError(400, "model is already running")
            limit = self._options.models_max
            running = [other for other in self._models.values() if other.status != "unloaded"]
            if limit and len(running) >= limit:
                loaded = [other for other in running if other.status == "loaded"]
                if not loaded:
                    raise _RefusedError(500, "model limit reached, try again later")
                await self._end(min(loaded, key=lambda other: other.used_at_s))
            model.exit_code, model.leaving, model.used_at_s = 0, False, time.monotonic()
            command = [sys.executable, "-m", "nodeagent.simulators.llama_server", *self._passed_on]
            command += ["--model", str(model.path), "--alias", model.name]
            model.process = await asyncio.create_subprocess_exec(
                *command,
                *("--host", "127.0.0.1", "--port", "0"),
                env={**os.environ, CHILD_VARIABLE: str(self._options.port)},
                stdin=PIPE,
                stdout=PIPE,
            )
            model.become("loading")
            model.running = asyncio.create_task(self._follow(model, model.process))

    async def _follow(self, model: _Model, process: Process) -> None:
        assert process.stdout is not None
        async for raw in process.stdout:
            line = raw.decode().rstrip()
            say(f"[{model.name}] {line}")
            if found := _LISTENING.search(line):
                model.base_url = found.group(1)
                model.become("loaded")
        exit_code = await process.wait()
        model.exit_code = 0 if model.leaving else exit_code
        model.become("unloaded")

    async def _end(self, model: _Model) -> None:
        """End its process, if it has one; one that loads at once, another after what it is doing."""
        process, running = model.process, model.running
        if process is None or running is None or model.status == "unloaded":
            return
        assert process.stdin is not None
        model.leaving = True
        process.stdin.close()
        if model.status == "loading":
            with suppress(ProcessLookupError):
                process.kill()
        try:
            async with asyncio.timeout(_STOP_TIMEOUT_S):
                await asyncio.shield(running)
        except TimeoutError:
            process.kill()
            await running

    # Routes.

    async def _health(self, http: web.Request) -> web.Response:
        return json_response({"status": "ok"})

    async def _list(self, http: web.Request) -> web.Response:
        return json_response({"object": "list", "data": [model.row() for model in self._models.values()]})

    async def _on_load(self, http: web.Request) -> web.Response:
        model = self._models.get(_named(await http.read()))
        if model is None:
            return _failure(404, "model is not found")
        try:
            await self._load(model)
        except _RefusedError as error:
            return _failure(error.status, str(error))
        return json_response({"success": True})

    async def _on_unload(self, http: web.Request) -> web.Response:
        model = self._models.get(_named(await http.read()))
        if model is None:
            return _failure(400, "model is not found")
        if model.status == "unloaded":
            return _failure(400, "model is not running")
        unload = asyncio.create_task(self._end(model))
        self._unloads.add(unload)
        unload.add_done_callback(self._unloads.discard)
        return json_response({"success": True})

    async def _pass(self, http: web.Request) -> web.StreamResponse:
        body = await http.read()
        name = _named(body) if http.method == "POST" else http.query.get("model", "")
        try:
            model = await self._ready(name, http.query.get("autoload", ""))
        except _RefusedError as error:
            return _failure(error.status, str(error))
        model.used_at_s = time.monotonic()
        kept = {key: value for key, value in http.headers.items() if key.lower() in _PASSED_HEADERS}
        url = f"{model.base_url}{http.path_qs}"
        async with (
            aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=None)) as session,
            session.request(http.method, url, data=body or None, headers=kept) as answer,
        ):
            headers = {key: value for key, value in answer.headers.items() if key.lower() not in _HOP_HEADERS}
            response = web.StreamResponse(status=answer.status, headers=headers)
            await response.prepare(http)
            async for piece in answer.content.iter_any():
                await response.write(piece)
            await response.write_eof()
            return response

    async def _ready(self, name: str, autoload: str) -> _Model:
        """The model, loaded; a request waits for that if it is to load it."""
        if not name:
            raise _RefusedError(400, "model name is missing from the request")
        model = self._models.get(name)
        if model is None:
            raise _RefusedError(400, f"model '{name}' not found")
        loads = autoload in ("true", "1") if autoload else self._options.models_autoload
        if model.status != "loaded" and not loads:
            raise _RefusedError(400, "model is not loaded")
        if model.status == "unloaded":
            await self._load(model)
        while model.status == "loading":
            await model.changed.wait()
        if model.status != "loaded":
            raise _RefusedError(500, f"model name={name} failed to load")
        return model


def add_router_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of a router itself; others are for the processes of its models."""
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=8080)
    parser.add_argument("--models-dir", default="")
    parser.add_argument("--models-max", type=int, default=4)
    parser.add_argument("--models-autoload", action=argparse.BooleanOptionalAction, default=True)


def _named(body: bytes) -> str:
    try:
        return msgspec.json.decode(body, type=_Asked).model
    except msgspec.DecodeError:
        return ""


def _failure(status: int, message: str) -> web.Response:
    error = {"code": status, "message": message, "type": _ERROR_TYPES.get(status, "server_error")}
    return json_response({"error": error}, status=status)
