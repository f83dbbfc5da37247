"""A simulated Hunyuan3D: python -m nodeagent.simulators.hunyuan3d --port 8081.

It takes the options of both versions' `api_server.py`, and is as little help as the real one: every failure
is a 404 or eternal processing, `/generate` keeps everything else waiting, and jobs that are sent run at once
until memory is out. `RUNG_SIM_HUNYUAN3D_VERSION` is 2.1 (by default) or 2.0. See `_settings` for the rest of
the environment: `http_500` lets every generation fail, `hang` lets none end, and `cut_mid_stream` gives out
meshes that are not whole.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import binascii
import os
import sys
import uuid
from collections.abc import Mapping, Sequence
from typing import Any

import msgspec
from aiohttp import web
from aiohttp.typedefs import Handler
from msgspec import Struct

from nodeagent.simulators._control import add_control
from nodeagent.simulators._faults import Fault, Faults
from nodeagent.simulators._glb import model_glb
from nodeagent.simulators._http import Counters, json_response
from nodeagent.simulators._memory import GpuMemory, SimulatedOutOfMemory, gpu_memory_from
from nodeagent.simulators._process import Listener, LoadFailedError, run_to_end, run_until_stopped, say
from nodeagent.simulators._settings import Settings, settings_from
from nodeagent.simulators.gpu import SimulatedGpus

_VERSIONS = ("2.0", "2.1")
_MAX_BODY_BYTES = 64 * 1024 * 1024
#: Weights of shape and paint, and what one generation takes on top of them.
_WEIGHT_BYTES = 8_000_000_000
_WORK_BYTES = 3_000_000_000
_LOAD_S = 12.0
_SHAPE_S = 15.0
_TEXTURE_S = 30.0
_LOAD_STEPS = 10
#: What the real one answers for all that can go wrong.
_NETWORK_ERROR = {
    "text": "**NETWORK ERROR DUE TO HIGH TRAFFIC. PLEASE REGENERATE OR REFRESH THIS PAGE.**",
    "error_code": 1,
}
_PICTURES = (b"\x89PNG", b"\xff\xd8\xff", b"RIFF", b"GIF8", b"BM")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="api_server.py", description=__doc__, allow_abbrev=False)
    add = parser.add_argument
    add("--host", default="0.0.0.0")  # noqa: S104 - as the real one
    add("--port", type=int, default=8081)
    for name in ("model_path", "tex_model_path", "subfolder", "device", "mc_algo", "cache-path"):
        add(f"--{name}", default="")
    add("--limit-model-concurrency", type=int, default=5)
    for name in ("enable_tex", "mv", "enable_flashvdm", "compile", "low_vram_mode"):
        add(f"--{name}", action="store_true")
    return parser


class _FailedError(Exception):
    """A generation came to nothing."""


class _Job(Struct):
    """What there is of a job that was sent: the files that the real one would have written."""

    shape: bytes = b""
    textured: bytes = b""


class Hunyuan3d:
    """The routes of `api_server.py`, and how it starts."""

    def __init__(
        self, options: argparse.Namespace, *, version: str, settings: Settings, memory: GpuMemory | None
    ) -> None:
        if version not in _VERSIONS:
            raise ValueError(f"RUNG_SIM_HUNYUAN3D_VERSION is {version!r}; it must be 2.0 or 2.1")
        self._new = version == "2.1"
        self._paints = self._new or options.enable_tex
        self._model = options.model_path or (
            "tencent/Hunyuan3D-2.1" if self._new else "tencent/Hunyuan3D-2mini"
        )
        self._settings = settings
        self._memory = memory
        self._faults = Faults(settings.faults)
        self._counters = Counters()
        self._worker_id = uuid.uuid4().hex[:6]
        self._jobs: dict[str, _Job] = {}
        self._work: set[asyncio.Task[Any]] = set()
        #: Clear while `/generate` has the event loop for itself.
        self._loop_is_free = asyncio.Event()
        self._loop_is_free.set()
        self._died = asyncio.Event()
        self._listener = Listener(self._application(), options.host, options.port)

    def _application(self) -> web.Application:
        app = web.Application(client_max_size=_MAX_BODY_BYTES, middlewares=[self._in_loop])
        app.router.add_post("/generate", self._generate)
        app.router.add_post("/send", self._send)
        app.router.add_get("/status/{uid}", self._status)
        if self._new:
            app.router.add_get("/health", self._health)
        add_control(
            app,
            engine="Hunyuan3D",
            counters=self._counters,
            faults=self._faults,
            state=lambda: {"model": self._model, "ready": True},
        )
        return app

    async def run(self) -> int:
        """Serve until stopped; returns the exit code."""
        try:
            return await run_until_stopped(
                self._live, listener=self._listener, counters=self._counters, memory=self._memory
            )
        finally:
            for task in self._work:
                task.cancel()

    async def _live(self) -> None:
        say(f"Loading the model {self._model} on worker {self._worker_id} ...")
        load_s = self._settings.load_s
        load_s = _LOAD_S / self._settings.speed if load_s is None else load_s
        try:
            for step in range(1, _LOAD_STEPS + 1):
                await asyncio.sleep(load_s / _LOAD_STEPS)
                if Fault.DIE_WHILE_LOADING in self._faults and step > _LOAD_STEPS // 2:
                    say("OSError: Unable to load weights from pytorch checkpoint file (simulated fault)")
                    raise LoadFailedError
                self._hold(self._weight_bytes * step // _LOAD_STEPS)
                say(f"Loading pipeline components...:  {100 * step // _LOAD_STEPS}%|###")
        except SimulatedOutOfMemory as error:
            say(f"torch.OutOfMemoryError: CUDA out of memory. {error}")
            raise LoadFailedError from error
        await self._faults.wait_until_off(Fault.NEVER_READY)
        try:
            url = await self._listener.open()
        except OSError as error:
            say(f"ERROR:    [Errno {error.errno}] error while attempting to bind: {error.strerror}")
            raise LoadFailedError from None
        say("INFO:     Application startup complete.")
        say(f"INFO:     Uvicorn running on {url} (Press CTRL+C to quit)")
        await self._died.wait()
        raise LoadFailedError

    @property
    def _weight_bytes(self) -> int:
        given = self._settings.vram_bytes
        return _WEIGHT_BYTES if given is None else given

    def _hold(self, memory_bytes: int) -> None:
        if self._memory is not None:
            self._memory.hold(memory_bytes)

    # Routes.

    @web.middleware
    async def _in_loop(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        """Nothing is answered while `/generate` runs, but for what tests ask."""
        if not request.path.startswith("/sim/"):
            await self._loop_is_free.wait()
        try:
            return await handler(request)
        except web.HTTPNotFound:
            return json_response({"detail": "Not Found"}, status=404)

    async def _health(self, http: web.Request) -> web.Response:
        if Fault.HANG_HEALTH in self._faults:
            await asyncio.Event().wait()
        return json_response({"status": "healthy", "worker_id": self._worker_id})

    async def _generate(self, http: web.Request) -> web.Response:
        asked = await self._asked(http)
        if isinstance(asked, web.Response):
            return asked
        self._loop_is_free.clear()
        task = self._begin(self._make(asked, _Job()))
        task.add_done_callback(lambda _: self._loop_is_free.set())
        try:
            # Who leaves is not noticed: the loop is busy.
            mesh = await asyncio.shield(task)
        except _FailedError:
            return json_response(_NETWORK_ERROR, status=404)
        return web.Response(body=self._given(mesh), content_type="model/gltf-binary")

    async def _send(self, http: web.Request) -> web.Response:
        asked = await self._asked(http)
        if isinstance(asked, web.Response):
            return asked
        uid = str(uuid.uuid4())
        self._jobs[uid] = _Job()
        self._begin(self._make(asked, self._jobs[uid]))
        return json_response({"uid": uid})

    async def _status(self, http: web.Request) -> web.Response:
        job = self._jobs.get(http.match_info["uid"], _Job())
        if not self._new:
            mesh = job.textured or job.shape
            if not mesh:
                return json_response({"status": "processing"})
            return json_response({"status": "completed", "model_base64": self._base64(mesh)})
        if not job.shape:
            return json_response({"status": "processing"})
        if not job.textured:
            # Also of one that was to have none.
            return json_response({"status": "texturing"})
        return json_response(
            {
                "status": "completed",
                "model_base64": self._base64(job.textured),
                "initial_model_base64": self._base64(job.shape),
            }
        )

    # Work.

    async def _asked(self, http: web.Request) -> dict[str, Any] | web.Response:
        self._counters.requests += 1
        asked = msgspec.json.decode(await http.read(), type=dict[str, Any])
        if self._new and not isinstance(asked.get("image"), str):
            missing = {"type": "missing", "loc": ["body", "image"], "msg": "Field required"}
            return json_response({"detail": [missing]}, status=422)
        return asked

    def _begin(self, work: Any) -> asyncio.Task[bytes]:
        task: asyncio.Task[bytes] = asyncio.ensure_future(work)
        self._work.add(task)

        def ended(task: asyncio.Task[bytes]) -> None:
            self._work.discard(task)
            if not task.cancelled() and task.exception() is not None:
                say(f"Exception in thread (generate): {task.exception()}")

        task.add_done_callback(ended)
        return task

    async def _make(self, asked: Mapping[str, Any], job: _Job) -> bytes:
        """One generation, to its end whoever listens. Raises _FailedError."""
        counters = self._counters
        counters.active += 1
        try:
            try:
                self._hold(self._weight_bytes + _WORK_BYTES * counters.active)
            except SimulatedOutOfMemory as error:
                if Fault.OUT_OF_MEMORY_KILLS in self._faults:
                    self._died.set()
                raise _FailedError(f"CUDA out of memory. {error}") from error
            picture = _picture(asked)
            texture = bool(asked.get("texture"))
            # 2.1 takes a seed, and does not use it.
            seen = picture if self._new else picture + str(asked.get("seed", 1234)).encode()
            await self._misbehave()
            await asyncio.sleep(_SHAPE_S / self._settings.speed)
            shape = model_glb(seen, texture=False)
            if self._new or not texture:
                job.shape = shape
            if texture:
                if not self._paints:
                    raise _FailedError("'ModelWorker' object has no attribute 'pipeline_tex'")
                await asyncio.sleep(_TEXTURE_S / self._settings.speed)
                job.textured = model_glb(seen, texture=True)
            counters.completed += 1
            return job.textured or job.shape
        finally:
            counters.active -= 1
            self._hold(self._weight_bytes + _WORK_BYTES * counters.active)

    async def _misbehave(self) -> None:
        if Fault.HTTP_500 in self._faults:
            raise _FailedError("Failed to generate 3D mesh (simulated fault)")
        await self._faults.wait_until_off(Fault.HANG)

    def _given(self, mesh: bytes) -> bytes:
        return mesh[: len(mesh) // 2] if Fault.CUT_MID_STREAM in self._faults else mesh

    def _base64(self, mesh: bytes) -> str:
        return base64.b64encode(self._given(mesh)).decode()


def _picture(asked: Mapping[str, Any]) -> bytes:
    """The picture in a request. Raises _FailedError: there is none."""
    if "image" not in asked:
        # What would make one of a text is commented out.
        text = "has no attribute 'pipeline_t2i'" if "text" in asked else "No input image or text provided"
        raise _FailedError(text)
    try:
        picture = base64.b64decode(asked["image"], validate=True)
    except (binascii.Error, TypeError) as error:
        raise _FailedError(str(error)) from error
    if not picture.startswith(_PICTURES):
        raise _FailedError("cannot identify image file")
    return picture


async def _serve(options: argparse.Namespace, environment: Mapping[str, str]) -> int:
    settings = settings_from(environment)
    gpus = SimulatedGpus(settings.gpus) if settings.gpus is not None else None
    server = Hunyuan3d(
        options,
        version=environment.get("RUNG_SIM_HUNYUAN3D_VERSION") or "2.1",
        settings=settings,
        memory=gpu_memory_from(gpus, environment),
    )
    return await server.run()


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the simulated engine; returns the exit code."""
    options = _parser().parse_args(arguments)
    return run_to_end(lambda: _serve(options, os.environ), "api_server.py: error")


if __name__ == "__main__":
    sys.exit(main())
