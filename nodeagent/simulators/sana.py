"""A simulated Sana worker: python -m nodeagent.simulators.sana --model sana-sprint-1.6b --port 8300.

It keeps the contract of workers (see `nodeagent.engines._worker`), starts unloaded, and paints a disc. See
`_settings` for the environment: `http_500` lets every picture fail, `hang` lets none end, and
`free_ignored` keeps the memory of a model that was unloaded.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import sys
from collections.abc import Mapping, Sequence

import msgspec
from aiohttp import web
from aiohttp.typedefs import Handler
from msgspec import Struct

from nodeagent.simulators._control import add_control
from nodeagent.simulators._faults import Fault, Faults
from nodeagent.simulators._http import Counters, json_response
from nodeagent.simulators._memory import GpuMemory, SimulatedOutOfMemory, gpu_memory_from
from nodeagent.simulators._png import paint_png
from nodeagent.simulators._process import Listener, LoadFailedError, run_until_stopped, say
from nodeagent.simulators._settings import Settings, load_time_s, settings_from, weight_bytes_of
from nodeagent.simulators.gpu import SimulatedGpus

_SIDE_PIXELS = 1024
_LARGEST_SIDE_PIXELS = 4096
_STEP_S = 0.3
_WORK_BYTES = 1_500_000_000
_RETRY_AFTER_S = "0.2"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="sana_worker.py", description=__doc__, allow_abbrev=False)
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=8300)
    parser.add_argument("--model", required=True)
    return parser


class _Wanted(Struct, forbid_unknown_fields=True):
    """The body of `/generate`."""

    prompt: str
    negative_prompt: str = ""
    width: int = _SIDE_PIXELS
    height: int = _SIDE_PIXELS
    seed: int = 0
    steps: int = 1
    guidance_scale: float = 4.5


class _RefusedError(Exception):
    """A request that is not served."""

    def __init__(self, status: int, text: str) -> None:
        super().__init__(text)
        self.status = status


class SanaWorker:
    """The routes of a worker, and its one picture at a time."""

    def __init__(self, options: argparse.Namespace, *, settings: Settings, memory: GpuMemory | None) -> None:
        self._model = options.model
        self._settings = settings
        self._memory = memory
        self._faults = Faults(settings.faults)
        self._counters = Counters()
        self._status = "unloaded"
        self._busy = asyncio.Lock()
        self._work: set[asyncio.Task[web.Response]] = set()
        self._held_bytes = 0
        self._died = asyncio.Event()
        self._listener = Listener(self._application(), options.host, options.port)

    def _application(self) -> web.Application:
        app = web.Application(middlewares=[_errors])
        app.router.add_get("/health", self._health)
        app.router.add_get("/memory", self._memory_now)
        app.router.add_post("/load", self._load)
        app.router.add_post("/unload", self._unload)
        app.router.add_post("/generate", self._generate)
        add_control(
            app,
            engine="Sana",
            counters=self._counters,
            faults=self._faults,
            state=lambda: {"model": self._model, "ready": self._status == "ready"},
        )
        return app

    async def run(self) -> int:
        """Serve until stopped; returns the exit code."""
        return await run_until_stopped(
            self._live, listener=self._listener, counters=self._counters, memory=self._memory
        )

    async def _live(self) -> None:
        try:
            url = await self._listener.open()
        except OSError as error:
            say(f"cannot listen: {error}")
            raise LoadFailedError from None
        say(f"listening on {url}")
        await self._died.wait()
        raise LoadFailedError

    # Routes.

    async def _health(self, http: web.Request) -> web.Response:
        if Fault.HANG_HEALTH in self._faults:
            await asyncio.Event().wait()
        return json_response({"status": self._status, "model": self._model, "active": self._counters.active})

    async def _memory_now(self, http: web.Request) -> web.Response:
        return json_response({"allocated_bytes": self._held_bytes, "reserved_bytes": self._held_bytes})

    async def _load(self, http: web.Request) -> web.Response:
        self._require_idle()
        async with self._busy:
            if self._status != "ready":
                self._status = "loading"
                try:
                    await self._load_weights()
                except SimulatedOutOfMemory as error:
                    raise _RefusedError(507, f"CUDA out of memory. {error}") from error
                finally:
                    self._status = "ready" if self._held_bytes else "unloaded"
            return json_response({"status": self._status})

    async def _load_weights(self) -> None:
        await asyncio.sleep(load_time_s(self._model, self._settings))
        if Fault.DIE_WHILE_LOADING in self._faults:
            say("OSError: weights are corrupt (simulated fault)")
            self._died.set()
            raise _RefusedError(500, "weights are corrupt (simulated fault)")
        await self._faults.wait_until_off(Fault.NEVER_READY)
        self._hold(self._weight_bytes)

    async def _unload(self, http: web.Request) -> web.Response:
        self._require_idle()
        async with self._busy:
            if Fault.FREE_IGNORED not in self._faults:
                self._hold(0)
            self._status = "unloaded"
            return json_response({"status": self._status})

    async def _generate(self, http: web.Request) -> web.Response:
        self._counters.requests += 1
        try:
            wanted = msgspec.json.decode(await http.read(), type=_Wanted)
        except msgspec.DecodeError as error:
            raise _RefusedError(400, str(error)) from error
        sides = (wanted.width, wanted.height)
        if not all(0 < side <= _LARGEST_SIDE_PIXELS and side % 32 == 0 for side in sides):
            raise _RefusedError(400, f"width and height must be multiples of 32, not {sides}")
        if wanted.steps < 1:
            raise _RefusedError(400, f"steps is {wanted.steps}; it must be at least 1")
        self._require_idle()
        if self._status != "ready":
            raise _RefusedError(409, f"{self._model} is not loaded")
        # What it began it finishes.
        task = asyncio.ensure_future(self._paint(wanted))
        self._work.add(task)
        task.add_done_callback(self._work.discard)
        return await asyncio.shield(task)

    async def _paint(self, wanted: _Wanted) -> web.Response:
        async with self._busy:
            return await self._painted(wanted)

    async def _painted(self, wanted: _Wanted) -> web.Response:
        counters = self._counters
        counters.active += 1
        try:
            self._hold(self._weight_bytes + _WORK_BYTES)
            if Fault.HTTP_500 in self._faults:
                raise _RefusedError(500, "the picture could not be made (simulated fault)")
            await self._faults.wait_until_off(Fault.HANG)
            await asyncio.sleep(_STEP_S * wanted.steps / self._settings.speed)
            picture = paint_png(msgspec.json.encode(wanted), wanted.width, wanted.height)
            if Fault.CUT_MID_STREAM in self._faults:
                picture = picture[: len(picture) // 2]
            counters.completed += 1
            return web.Response(body=picture, content_type="image/png")
        except SimulatedOutOfMemory as error:
            raise _RefusedError(500, f"CUDA out of memory. {error}") from error
        finally:
            counters.active -= 1
            self._hold(self._weight_bytes)

    def _require_idle(self) -> None:
        if self._busy.locked():
            raise _RefusedError(503, "busy with something else")

    @property
    def _weight_bytes(self) -> int:
        given = self._settings.vram_bytes
        return weight_bytes_of(self._model, default_bytes_per_weight=2.0) if given is None else given

    def _hold(self, memory_bytes: int) -> None:
        if self._memory is not None:
            self._memory.hold(memory_bytes)
        self._held_bytes = memory_bytes


@web.middleware
async def _errors(request: web.Request, handler: Handler) -> web.StreamResponse:
    try:
        return await handler(request)
    except _RefusedError as error:
        headers = {"Retry-After": _RETRY_AFTER_S} if error.status == 503 else {}
        response = json_response({"error": str(error)}, status=error.status)
        response.headers.update(headers)
        return response


async def _serve(options: argparse.Namespace, environment: Mapping[str, str]) -> int:
    settings = settings_from(environment)
    gpus = SimulatedGpus(settings.gpus) if settings.gpus is not None else None
    worker = SanaWorker(options, settings=settings, memory=gpu_memory_from(gpus, environment))
    return await worker.run()


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the simulated engine; returns the exit code."""
    options = _parser().parse_args(arguments)
    try:
        return asyncio.run(_serve(options, os.environ))
    except (ValueError, FileNotFoundError) as error:
        sys.stderr.write(f"sana_worker.py: error: {error}\n")
        return 1


if __name__ == "__main__":
    sys.exit(main())
