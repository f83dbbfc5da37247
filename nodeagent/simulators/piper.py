"""A simulated Piper server: python -m nodeagent.simulators.piper -m en_US-lessac-medium --port 5000.

It takes the options of `python -m piper.http_server`. `RUNG_SIM_VOICES` lists the voices on its disk,
separated by commas; by default its own and a German one. `RUNG_SIM_PIPER_VERSION` is 1.8 (by default), which
speaks at `/synthesize`, or 1.3, which does at `/`. See `_settings` for the rest of the environment.

As the real one it answers with WAV files that it calls web pages, takes its usual voice for one that it does
not know, lists voices without the letters of `.onnx.json` at their ends, and does not notice who leaves.
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
from nodeagent.simulators._process import Listener, LoadFailedError, run_to_end, run_until_stopped, say
from nodeagent.simulators._settings import Settings, settings_from
from nodeagent.simulators._sound import spoken_s, wav

_PATHS = {"1.3": "/", "1.8": "/synthesize"}
_DEFAULT_VOICES = "de_DE-thorsten-medium"
_LOAD_S = 1.0
#: On a desktop's CPU it speaks so much faster than one listens.
_FASTER = 12.0
_ERROR_PAGE = (
    "<!doctype html>\n<html lang=en>\n<title>500 Internal Server Error</title>\n"
    "<h1>Internal Server Error</h1>\n"
)


class _Asked(Struct):
    text: str = ""
    voice: str | None = None
    speaker: str = ""
    speaker_id: int | None = None
    length_scale: float = 1.0
    noise_scale: float = 0.667
    noise_w_scale: float = 0.8


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="http_server.py", description=__doc__, allow_abbrev=False)
    add = parser.add_argument
    add("--host", default="0.0.0.0")  # noqa: S104 - as the real one
    add("--port", type=int, default=5000)
    add("-m", "--model", required=True)
    add("-s", "--speaker", type=int)
    add("--length-scale", "--length_scale", type=float, default=1.0)
    add("--sentence-silence", "--sentence_silence", type=float, default=0.0)
    add("--data-dir", "--data_dir", action="append", default=[])
    add("--download-dir", "--download_dir")
    add("--cuda", action="store_true")
    add("--debug", action="store_true")
    return parser


class Piper:
    """The routes of Piper's server, and how it starts."""

    def __init__(
        self, options: argparse.Namespace, *, voices: Sequence[str], version: str, settings: Settings
    ) -> None:
        if version not in _PATHS:
            raise ValueError(f"RUNG_SIM_PIPER_VERSION is {version!r}; it must be 1.3 or 1.8")
        self._model: str = options.model
        self._voices = voices
        self._length_scale: float = options.length_scale
        self._version = version
        self._settings = settings
        self._faults = Faults(settings.faults)
        self._counters = Counters()
        self._work: set[asyncio.Task[bytes]] = set()
        self._listener = Listener(self._application(), options.host, options.port)

    def _application(self) -> web.Application:
        app = web.Application(middlewares=[_pages])
        app.router.add_get("/voices", self._list)
        app.router.add_post(_PATHS[self._version], self._synthesize)
        if self._version != "1.3":
            app.router.add_get("/", self._page)
            app.router.add_get("/info", self._info)
        add_control(
            app,
            engine="Piper",
            counters=self._counters,
            faults=self._faults,
            state=lambda: {"model": self._model, "ready": True},
        )
        return app

    async def run(self) -> int:
        """Serve until stopped; returns the exit code."""
        return await run_until_stopped(
            self._live, listener=self._listener, counters=self._counters, memory=None
        )

    async def _live(self) -> None:
        load_s = self._settings.load_s
        await asyncio.sleep(_LOAD_S / self._settings.speed if load_s is None else load_s)
        if self._model not in self._voices or Fault.DIE_WHILE_LOADING in self._faults:
            say(f"ValueError: Unable to find voice: {self._model} (use piper.download_voices)")
            raise LoadFailedError
        await self._faults.wait_until_off(Fault.NEVER_READY)
        try:
            url = await self._listener.open()
        except OSError as error:
            say(f"Address already in use: {error.strerror}")
            raise LoadFailedError from None
        say(" * Serving Flask app 'http_server'")
        say(f" * Running on {url}")

    async def _page(self, http: web.Request) -> web.Response:
        return web.Response(text="<!doctype html><title>Piper</title>", content_type="text/html")

    async def _info(self, http: web.Request) -> web.Response:
        voice = {"name": self._model, "language": _language(self._model), "num_speakers": 1}
        return json_response({"voice": voice, "last": None})

    async def _list(self, http: web.Request) -> web.Response:
        if Fault.HANG_HEALTH in self._faults:
            await asyncio.Event().wait()
        listed = {
            name.rstrip(".onnx.json"): {  # noqa: B005 - the real one does so, too
                "audio": {"sample_rate": 22050},
                "espeak": {"voice": _language(name).lower().replace("_", "-")},
                "language": {"code": _language(name)},
                "num_speakers": 1,
            }
            for name in self._voices
        }
        return json_response(listed)

    async def _synthesize(self, http: web.Request) -> web.Response:
        self._counters.requests += 1
        asked = msgspec.json.decode(await http.read(), type=_Asked)
        text = asked.text.strip()
        if not text or Fault.HTTP_500 in self._faults:
            raise ValueError("No text provided")
        voice = asked.voice or self._model
        if voice not in self._voices:
            say(f"WARNING:root:Voice not found: {voice}. Using default voice.")
            voice = self._model
        task = asyncio.create_task(self._make(text, voice, asked.length_scale * self._length_scale))
        self._work.add(task)
        task.add_done_callback(self._work.discard)
        # It makes all of it before it looks whether anybody still listens.
        audio = await asyncio.shield(task)
        if Fault.CUT_MID_STREAM in self._faults:
            audio = audio[: len(audio) // 2]
        return web.Response(body=audio, headers={"Content-Type": "text/html; charset=utf-8"})

    async def _make(self, text: str, voice: str, length_scale: float) -> bytes:
        counters = self._counters
        counters.active += 1
        try:
            await self._faults.wait_until_off(Fault.HANG)
            await asyncio.sleep(spoken_s(text) / _FASTER / self._settings.speed)
            counters.completed += 1
            return wav(text, 1.0 / length_scale, note=f"[{voice}] {text}" if voice != self._model else text)
        finally:
            counters.active -= 1


@web.middleware
async def _pages(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Whatever goes wrong comes as a web page."""
    try:
        return await handler(request)
    except (ValueError, msgspec.MsgspecError):
        return web.Response(text=_ERROR_PAGE, status=500, content_type="text/html")
    except web.HTTPException as error:
        page = f"<!doctype html>\n<title>{error.status} {error.reason}</title>\n"
        return web.Response(text=page, status=error.status, content_type="text/html")


def _language(voice: str) -> str:
    return voice.partition("-")[0]


async def _serve(options: argparse.Namespace, environment: Mapping[str, str]) -> int:
    given = environment.get("RUNG_SIM_VOICES", f"{options.model},{_DEFAULT_VOICES}")
    return await Piper(
        options,
        voices=[name.strip() for name in given.split(",") if name.strip()],
        version=environment.get("RUNG_SIM_PIPER_VERSION") or "1.8",
        settings=settings_from(environment),
    ).run()


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the simulated engine; returns the exit code."""
    options = _parser().parse_args(arguments)
    return run_to_end(lambda: _serve(options, os.environ), "http_server.py: error")


if __name__ == "__main__":
    sys.exit(main())
