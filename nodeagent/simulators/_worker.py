"""What simulated workers share: loading, unloading, health, and one piece of work at a time.

They keep the contract of workers (see `nodeagent.engines._worker`) and start unloaded. See `_settings` for
the environment; `free_ignored` keeps the memory of a model that was unloaded, `http_500` lets all work fail,
and `hang` lets none end.
"""

from __future__ import annotations

import argparse
import asyncio
import os
from collections.abc import Awaitable, Callable, Mapping, Sequence

from aiohttp import web
from aiohttp.typedefs import Handler

from nodeagent.simulators._control import add_control
from nodeagent.simulators._faults import Fault, Faults
from nodeagent.simulators._http import Counters, json_response
from nodeagent.simulators._memory import GpuMemory, SimulatedOutOfMemory, gpu_memory_from
from nodeagent.simulators._process import Listener, LoadFailedError, run_to_end, run_until_stopped, say
from nodeagent.simulators._settings import Settings, load_time_s, settings_from, weight_bytes_of
from nodeagent.simulators.gpu import SimulatedGpus

_RETRY_AFTER_S = "0.2"
_MAX_BODY_BYTES = 64 * 1024 * 1024


class RefusedError(Exception):
    """A request that is not served, with the status of its answer."""

    def __init__(self, status: int, text: str) -> None:
        super().__init__(text)
        self.status = status


class SimulatedWorker:
    """The routes of a worker but its work, which `work_path` and `_work` are.

    Args:
        options: of the command line.
        settings: of the environment.
        memory: where it takes its bytes; None for nowhere.
    """

    #: What it calls itself, the route of its work, and what that takes on top of the weights.
    engine: str
    work_path: str
    work_bytes: int

    def __init__(self, options: argparse.Namespace, settings: Settings, memory: GpuMemory | None) -> None:
        self.model: str = options.model
        self.settings = settings
        self.faults = Faults(settings.faults)
        self._memory = memory
        self._counters = Counters()
        self._status = "unloaded"
        self._busy = asyncio.Lock()
        self._works: set[asyncio.Task[web.Response]] = set()
        self._held_bytes = 0
        self._died = asyncio.Event()
        self._listener = Listener(self._application(), options.host, options.port)

    def read(self, body: bytes) -> Callable[[], Awaitable[web.Response]]:
        """The work that a request asks for, to be done when it is its turn. Raises RefusedError."""
        raise NotImplementedError

    async def run(self) -> int:
        """Serve until stopped; returns the exit code."""
        return await run_until_stopped(
            self._live, listener=self._listener, counters=self._counters, memory=self._memory
        )

    def _application(self) -> web.Application:
        app = web.Application(client_max_size=_MAX_BODY_BYTES, middlewares=[_errors])
        app.router.add_get("/health", self._health)
        app.router.add_get("/memory", self._memory_now)
        app.router.add_post("/load", self._load)
        app.router.add_post("/unload", self._unload)
        app.router.add_post(self.work_path, self._work)
        add_control(
            app,
            engine=self.engine,
            counters=self._counters,
            faults=self.faults,
            state=lambda: {"model": self.model, "ready": self._status == "ready"},
        )
        return app

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
        if Fault.HANG_HEALTH in self.faults:
            await asyncio.Event().wait()
        return json_response({"status": self._status, "model": self.model, "active": self._counters.active})

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
                    raise RefusedError(507, f"CUDA out of memory. {error}") from error
                finally:
                    self._status = "ready" if self._held_bytes else "unloaded"
            return json_response({"status": self._status})

    async def _load_weights(self) -> None:
        await asyncio.sleep(load_time_s(self.model, self.settings))
        if Fault.DIE_WHILE_LOADING in self.faults:
            say("OSError: weights are corrupt (simulated fault)")
            self._died.set()
            raise RefusedError(500, "weights are corrupt (simulated fault)")
        await self.faults.wait_until_off(Fault.NEVER_READY)
        self._hold(self._weight_bytes)

    async def _unload(self, http: web.Request) -> web.Response:
        self._require_idle()
        async with self._busy:
            if Fault.FREE_IGNORED not in self.faults:
                self._hold(0)
            self._status = "unloaded"
            return json_response({"status": self._status})

    async def _work(self, http: web.Request) -> web.Response:
        self._counters.requests += 1
        work = self.read(await http.read())
        self._require_idle()
        if self._status != "ready":
            raise RefusedError(409, f"{self.model} is not loaded")
        # What it began it finishes.
        task = asyncio.ensure_future(self._worked(work))
        self._works.add(task)
        task.add_done_callback(self._works.discard)
        return await asyncio.shield(task)

    async def _worked(self, work: Callable[[], Awaitable[web.Response]]) -> web.Response:
        counters = self._counters
        async with self._busy:
            counters.active += 1
            try:
                self._hold(self._weight_bytes + self.work_bytes)
                if Fault.HTTP_500 in self.faults:
                    raise RefusedError(500, f"{self.work_path} failed (simulated fault)")
                await self.faults.wait_until_off(Fault.HANG)
                answer = await work()
                counters.completed += 1
                return answer
            except SimulatedOutOfMemory as error:
                raise RefusedError(500, f"CUDA out of memory. {error}") from error
            finally:
                counters.active -= 1
                self._hold(self._weight_bytes)

    def _require_idle(self) -> None:
        if self._busy.locked():
            raise RefusedError(503, "busy with something else")

    @property
    def _weight_bytes(self) -> int:
        given = self.settings.vram_bytes
        return weight_bytes_of(self.model, default_bytes_per_weight=2.0) if given is None else given

    def _hold(self, memory_bytes: int) -> None:
        if self._memory is not None:
            self._memory.hold(memory_bytes)
        self._held_bytes = memory_bytes


@web.middleware
async def _errors(request: web.Request, handler: Handler) -> web.StreamResponse:
    try:
        return await handler(request)
    except RefusedError as error:
        headers = {"Retry-After": _RETRY_AFTER_S} if error.status == 503 else {}
        response = json_response({"error": str(error)}, status=error.status)
        response.headers.update(headers)
        return response


def worker_main(
    worker: type[SimulatedWorker], program: str, description: str | None, arguments: Sequence[str] | None
) -> int:
    """Run a simulated worker; returns the exit code.

    Args:
        worker: which kind.
        program: what the real one is called.
        description: for `--help`.
        arguments: without the program's name; None takes those of the process.
    """
    parser = argparse.ArgumentParser(prog=program, description=description, allow_abbrev=False)
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=8300)
    parser.add_argument("--model", required=True)
    options = parser.parse_args(arguments)
    return run_to_end(lambda: _serve(worker, options, os.environ), f"{program}: error")


async def _serve(
    worker: type[SimulatedWorker], options: argparse.Namespace, environment: Mapping[str, str]
) -> int:
    settings = settings_from(environment)
    gpus = SimulatedGpus(settings.gpus) if settings.gpus is not None else None
    return await worker(options, settings, gpu_memory_from(gpus, environment)).run()
