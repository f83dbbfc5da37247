"""A simulated speaches: python -m nodeagent.simulators.speaches.

It heeds `UVICORN_HOST`, `UVICORN_PORT`, `STT_MODEL_TTL`, `TTS_MODEL_TTL` and `API_KEY`, and ignores uvicorn's
arguments. `RUNG_SIM_MODELS` lists the models on its disk, separated by commas; more can be downloaded, but
for those with `missing` or `gated` in their names. See `_settings` for the rest of the environment.

As the real one it downloads nothing unasked, answers 201 for a download that was not needed, lists what is
not loaded yet and not what is still in use, takes Kokoro's first voice for OpenAI's, and fails after its 200.
What its voices say its ears hear: the words stand in the WAV files.
"""

from __future__ import annotations

import asyncio
import base64
import os
import sys
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager

import msgspec
from aiohttp import web
from aiohttp.typedefs import Handler
from msgspec import Struct

from nodeagent.simulators._control import add_control
from nodeagent.simulators._faults import Fault, Faults
from nodeagent.simulators._http import Counters, json_response
from nodeagent.simulators._memory import GpuMemory, gpu_memory_from
from nodeagent.simulators._process import Listener, LoadFailedError, run_to_end, run_until_stopped, say
from nodeagent.simulators._settings import Settings, settings_from
from nodeagent.simulators._sound import Segment, heard, hum, segments_of, spoken_s, wav_head
from nodeagent.simulators._speaches_models import ModelFailedError, SpeachesModels, voices_of
from nodeagent.simulators.gpu import SimulatedGpus

_MAX_BODY_BYTES = 256 * 1024 * 1024
_STT, _TTS = "automatic-speech-recognition", "text-to-speech"
_ON_DISK = (
    "Systran/faster-whisper-small,speaches-ai/Kokoro-82M-v1.0-ONNX,speaches-ai/piper-en_US-lessac-medium"
)
_TYPES = {
    "mp3": "audio/mpeg",
    "wav": "audio/wav",
    "flac": "audio/flac",
    "opus": "audio/opus",
    "aac": "audio/aac",
    "pcm": "audio/pcm",
}
#: How files of these formats begin. What follows is a hum all the same.
_HEADS = {"mp3": b"ID3\x04", "flac": b"fLaC", "opus": b"OggS", "aac": b"\xff\xf1\x50\x80", "pcm": b""}
_OPENAI_VOICES = frozenset({"alloy", "ash", "echo", "fable", "nova", "onyx", "shimmer"})
_TEXT_FORMATS = ("text", "json", "verbose_json", "srt", "vtt")
#: So much faster than one listens does it speak, and hear.
_FASTER = 20.0
_LOAD_S = 2.0


class _Speech(Struct):
    model: str
    input: str
    voice: str
    response_format: str = "mp3"
    speed: float = 1.0
    stream_format: str = "audio"
    sample_rate: int | None = None


class _Form(Struct):
    """A form with a file. `stream` and times are texts there."""

    file: bytes = b""
    model: str = ""
    response_format: str = "json"
    language: str = ""
    stream: str = "false"


class Speaches:
    """The routes of speaches, and how it starts."""

    def __init__(
        self,
        *,
        host: str,
        port: int,
        on_disk: Sequence[str],
        ttl_s: dict[str, float],
        api_key: str,
        settings: Settings,
        memory: GpuMemory | None,
    ) -> None:
        self._api_key = api_key
        self._settings = settings
        self._memory = memory
        self._faults = Faults(settings.faults)
        self._counters = Counters()
        self._models = SpeachesModels(
            on_disk, ttl_s=ttl_s, settings=settings, faults=self._faults, memory=memory
        )
        self._listener = Listener(self._application(), host, port)

    def _application(self) -> web.Application:
        app = web.Application(client_max_size=_MAX_BODY_BYTES, middlewares=[self._guard])
        app.add_routes(
            [
                web.get("/health", self._health),
                web.get("/v1/models", self._list),
                web.post("/v1/models/{model:.+}", self._download),
                web.delete("/v1/models/{model:.+}", self._delete),
                web.get("/v1/audio/voices", self._voices),
                web.get("/api/ps", self._running),
                web.post("/api/ps/{model:.+}", self._load),
                web.delete("/api/ps/{model:.+}", self._unload),
                web.post("/v1/audio/transcriptions", self._transcribe),
                web.post("/v1/audio/translations", self._translate),
                web.post("/v1/audio/speech", self._speak),
            ]
        )
        add_control(
            app,
            engine="speaches",
            counters=self._counters,
            faults=self._faults,
            state=lambda: {"model": ",".join(self._models.listed), "ready": True},
        )
        return app

    async def run(self) -> int:
        """Serve until stopped; returns the exit code."""
        return await run_until_stopped(
            self._live, listener=self._listener, counters=self._counters, memory=self._memory
        )

    async def _live(self) -> None:
        await asyncio.sleep(_LOAD_S / self._settings.speed)
        if Fault.DIE_WHILE_LOADING in self._faults:
            say("pydantic_core.ValidationError: 1 validation error for Config (simulated fault)")
            raise LoadFailedError
        try:
            url = await self._listener.open()
        except OSError as error:
            say(f"ERROR:    [Errno {error.errno}] error while attempting to bind: {error.strerror}")
            raise LoadFailedError from None
        say("INFO:     Application startup complete.")
        say(f"INFO:     Uvicorn running on {url} (Press CTRL+C to quit)")

    @web.middleware
    async def _guard(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        open_to_all = request.path == "/health" or request.path.startswith("/sim/")
        if self._api_key and not open_to_all:
            given = request.headers.get("Authorization", "").removeprefix("Bearer ")
            if given != self._api_key:
                return json_response({"detail": "Invalid API key"}, status=403)
        try:
            return await handler(request)
        except ModelFailedError as error:
            return json_response({"detail": str(error)}, status=error.status)
        except msgspec.ValidationError as error:
            return json_response({"detail": [{"type": "missing", "msg": str(error)}]}, status=422)
        except web.HTTPNotFound:
            return json_response({"detail": "Not Found"}, status=404)

    # Models.

    async def _health(self, http: web.Request) -> web.Response:
        return json_response({"message": "OK"})

    async def _list(self, http: web.Request) -> web.Response:
        if Fault.HANG_HEALTH in self._faults:
            await asyncio.Event().wait()
        return json_response({"data": self._models.rows(http.query.get("task", "")), "object": "list"})

    async def _voices(self, http: web.Request) -> web.Response:
        rows = self._models.rows(_TTS)
        voices = [voice for row in rows for voice in voices_of(str(row["id"]))]
        return json_response({"voices": voices, "object": "list"})

    async def _download(self, http: web.Request) -> web.Response:
        name = http.match_info["model"]
        if name in self._models.on_disk:
            # One would think it the other way round.
            return web.Response(text=f"Model '{name}' already exists", status=201)
        if "gated" in name:
            raise ModelFailedError(401, f"Model '{name}' is a gated repository and requires authentication.")
        if "missing" in name or "/" not in name:
            raise ModelFailedError(404, f"Model '{name}' not found")
        await asyncio.sleep(1.0 / self._settings.speed)
        self._models.on_disk.append(name)
        return web.Response(text=f"Model '{name}' downloaded", status=200)

    async def _delete(self, http: web.Request) -> web.Response:
        name = http.match_info["model"]
        if name not in self._models.on_disk:
            raise ModelFailedError(404, f"Model '{name}' not found")
        self._models.on_disk.remove(name)
        return json_response({"detail": f"Model '{name}' deleted"})

    async def _running(self, http: web.Request) -> web.Response:
        return json_response({"models": list(self._models.listed)})

    async def _load(self, http: web.Request) -> web.Response:
        name = http.match_info["model"]
        if name in self._models.listed:
            raise ModelFailedError(409, "Model already loaded")
        if name not in self._models.on_disk:
            raise ModelFailedError(404, f"Model '{name}' is not installed locally.")
        async with self._models.use(name):
            return web.Response(status=201)

    async def _unload(self, http: web.Request) -> web.Response:
        self._models.unload(http.match_info["model"])
        return json_response({"detail": "Model unloaded"})

    # Hearing.

    async def _transcribe(self, http: web.Request) -> web.StreamResponse:
        asked = await self._asked(http)
        say("ERROR:speaches: Unexpected streaming response type")  # as the real one, whatever is asked
        return await self._hear(http, asked, "", stream=asked.stream.lower() in ("true", "1"))

    async def _translate(self, http: web.Request) -> web.StreamResponse:
        return await self._hear(http, await self._asked(http), "[en] ", stream=False)

    async def _asked(self, http: web.Request) -> _Form:
        self._counters.requests += 1
        form = await http.post()
        fields: dict[str, object] = {}
        for name in _Form.__struct_fields__:
            value = form.get(name)
            if isinstance(value, web.FileField):
                fields[name] = value.file.read()
            elif isinstance(value, str):
                fields[name] = value
        asked = msgspec.convert(fields, _Form)
        if not asked.file or not asked.model or asked.response_format not in _TEXT_FORMATS:
            raise msgspec.ValidationError("Field required")
        self._models.require(asked.model, _STT)
        return asked

    async def _hear(self, http: web.Request, asked: _Form, mark: str, *, stream: bool) -> web.StreamResponse:
        async with self._counted(), self._models.use(asked.model):
            await self._misbehave()
            segments = segments_of(mark + heard(asked.file))
            if stream:
                return await self._stream_words(http, segments)
            await asyncio.sleep(segments[-1].end_s / _FASTER / self._settings.speed)
            return _written(segments, asked)

    async def _stream_words(self, http: web.Request, segments: Sequence[Segment]) -> web.StreamResponse:
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream; charset=utf-8"})
        response.enable_chunked_encoding()
        await response.prepare(http)
        for place, segment in enumerate(segments):
            await asyncio.sleep((segment.end_s - segment.start_s) / _FASTER / self._settings.speed)
            data = _event({"type": "transcript.text.delta", "delta": segment.text, "logprobs": None})
            if place == 1 and Fault.BROKEN_SSE in self._faults:
                data = data[: len(data) // 2] + b"\n\n"
            if place == 1 and Fault.CUT_MID_STREAM in self._faults:
                _cut(http)
            await response.write(data)
        text = "".join(segment.text for segment in segments)
        await response.write(_event({"type": "transcript.text.done", "text": text, "logprobs": None}))
        await response.write_eof()
        return response

    # Speaking.

    async def _speak(self, http: web.Request) -> web.StreamResponse:
        self._counters.requests += 1
        asked = msgspec.json.decode(await http.read(), type=_Speech)
        self._models.require(asked.model, _TTS)
        if asked.response_format not in _TYPES:
            raise msgspec.ValidationError("Input should be 'pcm', 'mp3', 'wav', 'flac', 'opus' or 'aac'")
        if not 0.25 <= asked.speed <= 4.0:
            raise ModelFailedError(422, f"Speed must be between 0.25 and 4.0, got {asked.speed}")
        events = asked.stream_format == "sse"
        async with self._counted():
            await self._misbehave()
            content_type = "text/event-stream" if events else _TYPES[asked.response_format]
            response = web.StreamResponse(headers={"Content-Type": content_type})
            response.enable_chunked_encoding()
            await response.prepare(http)
            # From here on whatever goes wrong shows as an answer without an end.
            if not self._has_voice(asked):
                say(f"ValueError: Voice '{asked.voice}' is not supported.")
                _cut(http)
            async with self._models.use(asked.model):
                async for place, piece in self._sound(asked):
                    if place == 2 and Fault.CUT_MID_STREAM in self._faults:
                        _cut(http)
                    delta = {"type": "speech.audio.delta", "audio": base64.b64encode(piece).decode()}
                    await response.write(_event(delta) if events else piece)
            if events:
                usage = {"input_tokens": 0, "output_tokens": 0, "total_tokens": 0}
                await response.write(_event({"type": "speech.audio.done", "token_usage": usage}))
            await response.write_eof()
            return response

    def _has_voice(self, asked: _Speech) -> bool:
        """Whether it goes on; with Kokoro's first voice for OpenAI's, and with its one of a Piper model."""
        if "kokoro" not in asked.model.lower():
            return True
        names = {voice["name"] for voice in voices_of(asked.model)}
        return asked.voice in names or asked.voice in _OPENAI_VOICES

    async def _sound(self, asked: _Speech) -> AsyncIterator[tuple[int, bytes]]:
        head = _HEADS.get(asked.response_format)
        yield 0, wav_head(asked.input) if head is None else head
        words = asked.input.split() or ["."]
        for place, word in enumerate(words, 1):
            await asyncio.sleep(spoken_s(word, asked.speed) / _FASTER / self._settings.speed)
            yield place, b"".join(hum(word, asked.speed))

    # Faults.

    async def _misbehave(self) -> None:
        if Fault.HTTP_500 in self._faults:
            raise ModelFailedError(500, "Internal Server Error")
        await self._faults.wait_until_off(Fault.HANG)
        if Fault.SLOW_FIRST_BYTE in self._faults:
            await asyncio.sleep(self._settings.slow_first_byte_s)

    @asynccontextmanager
    async def _counted(self) -> AsyncIterator[None]:
        counters = self._counters
        counters.active += 1
        try:
            yield
        except (asyncio.CancelledError, ConnectionError):
            counters.aborted += 1
            raise
        finally:
            counters.active -= 1
        counters.completed += 1


def _cut(http: web.Request) -> None:
    """Drop the connection. Raises ConnectionResetError."""
    if http.transport is not None:
        http.transport.abort()
    raise ConnectionResetError("cut off after the head of an answer")


def _event(value: Mapping[str, object]) -> bytes:
    return b"data: " + msgspec.json.encode(value) + b"\n\n"


def _written(segments: Sequence[Segment], asked: _Form) -> web.Response:
    text = "".join(segment.text for segment in segments).strip()
    match asked.response_format:
        case "text":
            return web.Response(text=text)
        case "srt":
            return web.Response(
                text="".join(_cue(place, each, ",") for place, each in enumerate(segments, 1))
            )
        case "vtt":
            cues = "".join(_cue(place, each, ".") for place, each in enumerate(segments, 1))
            return web.Response(text="WEBVTT\n\n" + cues, content_type="text/vtt")
        case "verbose_json":
            return json_response(
                {
                    "task": "transcribe",
                    "language": asked.language or "en",
                    "duration": segments[-1].end_s,
                    "text": text,
                    "segments": [
                        {"id": place, "start": each.start_s, "end": each.end_s, "text": each.text}
                        for place, each in enumerate(segments)
                    ],
                    "words": None,
                }
            )
        case _:
            return json_response({"text": text, "logprobs": None, "usage": None})


def _cue(place: int, segment: Segment, point: str) -> str:
    times = f"{_clock(segment.start_s, point)} --> {_clock(segment.end_s, point)}"
    return f"{place}\n{times}\n{segment.text.strip()}\n\n"


def _clock(seconds: float, point: str) -> str:
    minutes, rest_s = divmod(seconds, 60)
    hours, minutes = divmod(int(minutes), 60)
    return f"{hours:02d}:{minutes:02d}:{int(rest_s):02d}{point}{int(rest_s * 1000) % 1000:03d}"


async def _serve(environment: Mapping[str, str]) -> int:
    settings = settings_from(environment)
    gpus = SimulatedGpus(settings.gpus) if settings.gpus is not None else None
    names = environment.get("RUNG_SIM_MODELS", _ON_DISK)
    server = Speaches(
        host=environment.get("UVICORN_HOST") or "127.0.0.1",
        port=int(environment.get("UVICORN_PORT") or 8000),
        on_disk=[name.strip() for name in names.split(",") if name.strip()],
        ttl_s={
            _STT: float(environment.get("STT_MODEL_TTL") or 300),
            _TTS: float(environment.get("TTS_MODEL_TTL") or 300),
        },
        api_key=environment.get("API_KEY", ""),
        settings=settings,
        memory=gpu_memory_from(gpus, environment),
    )
    return await server.run()


def main() -> int:
    """Run the simulated engine; returns the exit code."""
    return run_to_end(lambda: _serve(os.environ), "uvicorn: error")


if __name__ == "__main__":
    sys.exit(main())
