"""A simulated XTTS server: python -m nodeagent.simulators.xtts --port 8020.

It takes the options of `python -m xtts_api_server`. `RUNG_SIM_SPEAKERS` lists the voices of which it has
recordings, separated by commas. See `_settings` for the rest of the environment.

As the real one it answers nothing else while it speaks, calls every failure a 500, reads out a text file
if the text is the path of one, and in streaming mode answers with a second of silence.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import msgspec
from aiohttp import web
from aiohttp.typedefs import Handler
from msgspec import Struct

from nodeagent.simulators._control import add_control
from nodeagent.simulators._faults import Fault, Faults
from nodeagent.simulators._http import Counters, json_response
from nodeagent.simulators._memory import GpuMemory, SimulatedOutOfMemory, gpu_memory_from
from nodeagent.simulators._process import Listener, LoadFailedError, run_to_end, run_until_stopped, say
from nodeagent.simulators._settings import Settings, settings_from
from nodeagent.simulators._sound import silence, spoken_s, wav
from nodeagent.simulators.gpu import SimulatedGpus

_LANGUAGES = {
    "Chinese": "zh-cn",
    "English": "en",
    "French": "fr",
    "German": "de",
    "Japanese": "ja",
    "Spanish": "es",
}
_SPEAKERS = "calm_female,female,male"
_WEIGHT_BYTES = 2_100_000_000
_LOAD_S = 20.0
_LOAD_STEPS = 4
#: On a large GPU it speaks so much faster than one listens.
_FASTER = 3.0


class _Asked(Struct):
    text: str
    speaker_wav: str
    language: str


class _FailedError(Exception):
    """What the real one calls a 500, with its words."""


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="xtts_api_server", description=__doc__, allow_abbrev=False)
    add = parser.add_argument
    add("-hs", "--host", default="localhost")
    add("-p", "--port", type=int, default=8020)
    add("-d", "--device", default="cuda")
    add("-sf", "--speaker-folder", default="speakers/")
    add("-o", "--output", default="output/")
    add("-t", "--tunnel", default="")
    add("-mf", "--model-folder", default="xtts_models/")
    add("-ms", "--model-source", default="local", choices=["api", "apiManual", "local"])
    add("-v", "--version", default="v2.0.2")
    for name in (
        "listen",
        "lowvram",
        "deepspeed",
        "use-cache",
        "streaming-mode",
        "streaming-mode-improve",
        "stream-play-sync",
    ):
        add(f"--{name}", action="store_true")
    return parser


class Xtts:
    """The routes of `xtts_api_server`, and how it starts."""

    def __init__(
        self,
        options: argparse.Namespace,
        *,
        speakers: Sequence[str],
        settings: Settings,
        memory: GpuMemory | None,
    ) -> None:
        self._version: str = options.version
        self._plays: bool = options.streaming_mode or options.streaming_mode_improve
        self._speakers = speakers
        self._settings = settings
        self._memory = memory
        self._faults = Faults(settings.faults)
        self._counters = Counters()
        #: Clear while it speaks: it does so in its event loop.
        self._loop_is_free = asyncio.Event()
        self._loop_is_free.set()
        self._work: set[asyncio.Task[bytes]] = set()
        self._listener = Listener(self._application(), options.host, options.port)

    def _application(self) -> web.Application:
        app = web.Application(middlewares=[self._in_loop])
        app.router.add_get("/speakers_list", self._list)
        app.router.add_get("/languages", self._languages)
        app.router.add_post("/tts_to_audio/", self._speak)
        add_control(
            app,
            engine="XTTS",
            counters=self._counters,
            faults=self._faults,
            state=lambda: {"model": self._version, "ready": True},
        )
        return app

    async def run(self) -> int:
        """Serve until stopped; returns the exit code."""
        return await run_until_stopped(
            self._live, listener=self._listener, counters=self._counters, memory=self._memory
        )

    async def _live(self) -> None:
        say(f"Model: '{self._version}' starts to load,wait until it loads")
        load_s = self._settings.load_s
        load_s = _LOAD_S / self._settings.speed if load_s is None else load_s
        weight_bytes = self._settings.vram_bytes or _WEIGHT_BYTES
        try:
            for step in range(1, _LOAD_STEPS + 1):
                await asyncio.sleep(load_s / _LOAD_STEPS)
                if Fault.DIE_WHILE_LOADING in self._faults and step > _LOAD_STEPS // 2:
                    say("FileNotFoundError: model.pth (simulated fault)")
                    raise LoadFailedError
                if self._memory is not None:
                    self._memory.hold(weight_bytes * step // _LOAD_STEPS)
        except SimulatedOutOfMemory as error:
            say(f"torch.OutOfMemoryError: CUDA out of memory. {error}")
            raise LoadFailedError from error
        say("Pre-create latents for all current speakers")
        await self._faults.wait_until_off(Fault.NEVER_READY)
        try:
            url = await self._listener.open()
        except OSError as error:
            say(f"ERROR:    [Errno {error.errno}] error while attempting to bind: {error.strerror}")
            raise LoadFailedError from None
        say("INFO:     Application startup complete.")
        say(f"INFO:     Uvicorn running on {url} (Press CTRL+C to quit)")

    @web.middleware
    async def _in_loop(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        """Nothing is answered while it speaks, but for what tests ask."""
        if not request.path.startswith("/sim/"):
            await self._loop_is_free.wait()
        try:
            return await handler(request)
        except _FailedError as error:
            return json_response({"detail": f"Error: {error}"}, status=500)
        except web.HTTPNotFound:
            return json_response({"detail": "Not Found"}, status=404)

    async def _list(self, http: web.Request) -> web.Response:
        return json_response(list(self._speakers))

    async def _languages(self, http: web.Request) -> web.Response:
        if Fault.HANG_HEALTH in self._faults:
            await asyncio.Event().wait()
        return json_response({"languages": _LANGUAGES})

    async def _speak(self, http: web.Request) -> web.Response:
        self._counters.requests += 1
        try:
            asked = msgspec.json.decode(await http.read(), type=_Asked)
        except msgspec.ValidationError as error:
            return json_response({"detail": [{"type": "missing", "msg": str(error)}]}, status=422)
        if asked.language.lower() not in _LANGUAGES.values():
            raise _FailedError("400: Language code sent is either unsupported or misspelled.")
        if asked.speaker_wav not in self._speakers and not _is_file(asked.speaker_wav):
            raise _FailedError(f"Speaker {asked.speaker_wav} not found.")
        if Fault.HTTP_500 in self._faults:
            raise _FailedError("CUDA error: device-side assert triggered (simulated fault)")
        if self._plays:
            # It plays on the loudspeakers of its machine.
            return web.Response(body=silence(), content_type="audio/wav")
        self._loop_is_free.clear()
        task = asyncio.create_task(self._make(_read_out(asked.text), asked))
        self._work.add(task)
        task.add_done_callback(self._ended)
        # Who leaves is not noticed: the loop is busy.
        audio = await asyncio.shield(task)
        if Fault.CUT_MID_STREAM in self._faults:
            audio = audio[: len(audio) // 2]
        return web.Response(body=audio, content_type="audio/wav")

    def _ended(self, task: asyncio.Task[bytes]) -> None:
        self._work.discard(task)
        self._loop_is_free.set()

    async def _make(self, text: str, asked: _Asked) -> bytes:
        counters = self._counters
        counters.active += 1
        try:
            await self._faults.wait_until_off(Fault.HANG)
            await asyncio.sleep(spoken_s(text) / _FASTER / self._settings.speed)
            counters.completed += 1
            return wav(text, note=f"[{asked.speaker_wav}/{asked.language}] {text}")
        finally:
            counters.active -= 1


def _is_file(path: str) -> bool:
    return Path(path).is_file()


def _read_out(text: str) -> str:
    """The text, or what is in the file that it is the path of."""
    return Path(text).read_text() if text.lower().endswith(".txt") and _is_file(text) else text


async def _serve(options: argparse.Namespace, environment: Mapping[str, str]) -> int:
    settings = settings_from(environment)
    gpus = SimulatedGpus(settings.gpus) if settings.gpus is not None else None
    speakers = environment.get("RUNG_SIM_SPEAKERS", _SPEAKERS)
    server = Xtts(
        options,
        speakers=[name.strip() for name in speakers.split(",") if name.strip()],
        settings=settings,
        memory=gpu_memory_from(gpus, environment),
    )
    return await server.run()


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the simulated engine; returns the exit code."""
    options = _parser().parse_args(arguments)
    return run_to_end(lambda: _serve(options, os.environ), "xtts_api_server: error")


if __name__ == "__main__":
    sys.exit(main())
