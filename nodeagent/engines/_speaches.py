"""speaches: faster-whisper, Kokoro and Piper in one server, with OpenAI's audio routes."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import AsyncGenerator
from typing import TypeVar
from urllib.parse import quote

import msgspec
from msgspec import Struct

from nodeagent.engines._artifact import PIECE_BYTES, pieces_of
from nodeagent.engines._base import (
    CommandLine,
    EngineHealth,
    Generation,
    LoadProgress,
    Probe,
)
from nodeagent.engines._loading import milestone, recognise
from nodeagent.engines._openai_relay import Answer, ask, guarded
from nodeagent.engines._service import NoOpenAiRoutes, require_dialect
from nodeagent.engines._speech import failure, read_whole, require_voice, says, speech_of
from nodeagent.engines._tell import drop, tell
from nodeagent.engines._transcript import TranscriptReader, read_text
from rung.codec import GenerationEvent
from rung.errors import EngineFailedError, EngineProtocolError, InvalidRequestError
from rung.service import EngineClient, EngineReply, FormFile, form
from rung.types import (
    ArtifactChunk,
    DeploymentSpec,
    Phase,
    PhaseProgress,
    SpeechInput,
    TokenDelta,
    TranscriptionInput,
    Voice,
)

_T = TypeVar("_T")

_NAME = "speaches"
#: Residency is ours to decide: a model stays until it is told to go.
_FOR_EVER = "-1"
#: The level of sleep at which weights are dropped.
_UNLOADED = 2
_UNLOAD_TIMEOUT_S = 15.0
_LOADED = (200, 201)
#: Already loaded, or being loaded; and, of an unload, in use.
_CONFLICT = 409
_NO_KEY = (401, 403)
_AUDIO_TYPES = {
    "wav": "audio/wav",
    "mp3": "audio/mpeg",
    "flac": "audio/flac",
    "opus": "audio/opus",
    "aac": "audio/aac",
    "pcm": "audio/pcm",
}
_FILE_TYPES = {"verbose_json": "application/json", "srt": "application/x-subrip", "vtt": "text/vtt"}
#: It finds out by itself what is in a file; some decoders look at the name.
_FILE_ENDS = {"audio/mpeg": "mp3", "audio/mp4": "m4a", "audio/ogg": "ogg", "audio/flac": "flac"}
_MILESTONES = (
    milestone(r"Loading model (?P<model>\S+)", "loading {model}"),
    milestone(r"Model (?P<model>\S+) loaded in (?P<time>[\d.]+)s", "loaded in {time} s"),
    milestone(r"Uvicorn running on ", "listening"),
)


class _Voice(Struct):
    name: str = ""
    language: str = ""


class _Model(Struct):
    id: str
    #: Of models that speak, in newer versions.
    voices: list[_Voice] | None = None


class _Models(Struct):
    data: list[_Model]


class _Voices(Struct):
    voices: list[_Voice]


class _Running(Struct):
    models: list[str]


class _Refusal(Struct):
    detail: object = ""


class SpeachesAdapter(NoOpenAiRoutes):
    """Speaks to speaches, for one of its models, which it names as Hugging Face does.

    A deployment whose model is not loaded sleeps at level 2, as with Ollama: its server runs, and holds
    none of its weights. It lists a model as loaded from the moment that it begins to load it, also if that
    comes to nothing; and one that it was told to unload while somebody used it, not any more, although it
    holds its memory until that request has ended. So a load of ours is told apart, one that failed is taken
    off the list again, and what an unload gave back is for the meter to say.

    It fetches no model by itself, and neither do we: a start without it says how to get it.
    """

    engine_name = _NAME

    def __init__(self, client: EngineClient) -> None:
        self._client = client
        #: By URL and model, loads of ours that go on.
        self._loading: Counter[tuple[str, str]] = Counter()

    def command_line(self, spec: DeploymentSpec, *, listen_host: str, listen_port: int) -> CommandLine:
        """Environment of `uvicorn --factory speaches.main:create_app`, whose arguments are the runtime's.

        Raises:
            InvalidRequestError: the spec is for another kind of engine.
        """
        require_dialect(spec, "speaches")
        environment = {
            "UVICORN_HOST": listen_host,
            "UVICORN_PORT": str(listen_port),
            "STT_MODEL_TTL": _FOR_EVER,
            "TTS_MODEL_TTL": _FOR_EVER,
            "PYTHONUNBUFFERED": "1",
        }
        return CommandLine(arguments=(), environment=environment)

    async def probe(self, base_url: str, spec: DeploymentSpec) -> Probe:
        """See `EngineAdapter.probe`."""
        return await guarded(self._probe(base_url, spec))

    def load_progress(self, line: str) -> LoadProgress | None:
        """See `EngineAdapter.load_progress`. It has no percentage."""
        return recognise(_MILESTONES, line.strip())

    @property
    def frees_model(self) -> bool:
        """See `FreeControl.frees_model`: what it keeps loaded is the model."""
        return True

    def sleep_levels(self, spec: DeploymentSpec) -> tuple[int, ...]:
        """See `SleepControl.sleep_levels`."""
        return (_UNLOADED,)

    async def requests(self, base_url: str, spec: DeploymentSpec) -> int | None:
        """Always None: it does not say."""
        return None

    async def sleep(self, base_url: str, spec: DeploymentSpec, level: int) -> None:
        """See `SleepControl.sleep`."""
        await self.free(base_url, spec)

    async def wake(self, base_url: str, spec: DeploymentSpec, level: int) -> None:
        """Load the deployment's model. It takes as long as that takes: within the time for a start.

        Raises:
            EngineUnreachableError, EngineTimeoutError, EngineProtocolError: as the engine client does.
            EngineFailedError: it has no such model, or could not load it.
        """
        path, key = _path_of(spec), (base_url, spec.engine_model_name)
        self._loading[key] += 1
        try:
            timeout_s = spec.engine.start_timeout_s
            answer = await tell(self._client, base_url, path, b"", what=spec.id, timeout_s=timeout_s)
            if answer.status in _LOADED or answer.status == _CONFLICT:
                return
            # It is listed as loaded all the same.
            await drop(self._client, base_url, path, what=spec.id, timeout_s=_UNLOAD_TIMEOUT_S)
            raise self._refused(spec, base_url, path, answer)
        finally:
            self._loading[key] -= 1

    async def free(self, base_url: str, spec: DeploymentSpec) -> None:
        """Unload the deployment's model.

        Raises:
            EngineUnreachableError, EngineTimeoutError, EngineProtocolError: as the engine client does.
            EngineFailedError: somebody uses it. It is no longer listed, and goes when that has ended.
        """
        path = _path_of(spec)
        answer = await drop(self._client, base_url, path, what=spec.id, timeout_s=_UNLOAD_TIMEOUT_S)
        # What is not there needs not go; and a load that failed is "not loaded", which is a conflict as well.
        if answer.status in (200, 204, 404):
            return
        detail = _detail(answer)
        if answer.status == _CONFLICT and "is not loaded" in detail:
            return
        if answer.status == _CONFLICT:
            raise EngineFailedError(
                f"{spec.id}: somebody uses {spec.engine_model_name}; speaches no longer lists it, and holds "
                "its memory until that has ended"
            )
        raise self._refused(spec, base_url, path, answer)

    async def voices(self, base_url: str, spec: DeploymentSpec) -> tuple[Voice, ...]:
        """See `VoiceControl.voices`: those of the deployment's model, where it tells them apart."""
        model = next(
            (each for each in await self._models(base_url, spec) if each.id == spec.engine_model_name), None
        )
        voices = model.voices if model is not None else None
        if voices is None:
            answer = await ask(self._client, base_url, "/v1/audio/voices", what=spec.id)
            voices = _decoded(answer, _Voices, f"{spec.id}: /v1/audio/voices").voices
        return tuple(
            Voice(name=voice.name, language=voice.language)
            for voice in sorted(voices, key=lambda each: each.name)
        )

    async def generate(
        self, base_url: str, spec: DeploymentSpec, generation: Generation
    ) -> AsyncGenerator[GenerationEvent, None]:
        """See `GenerateControl.generate`."""
        wanted = generation.input
        if isinstance(wanted, TranscriptionInput):
            events = self._transcribe(base_url, spec, wanted, generation.idle_timeout_s)
        else:
            speech = speech_of(spec, generation, engine=_NAME, formats=_AUDIO_TYPES)
            events = self._speak(base_url, spec, speech, generation.idle_timeout_s)
        try:
            async for event in events:
                yield event
        finally:
            await events.aclose()

    async def _speak(
        self, base_url: str, spec: DeploymentSpec, wanted: SpeechInput, idle_timeout_s: float
    ) -> AsyncGenerator[GenerationEvent, None]:
        voices = await self.voices(base_url, spec)
        voice = wanted.voice or (voices[0].name if voices else "")
        require_voice(spec, voice, voices)
        yield PhaseProgress(phase=Phase.GENERATING, detail=says(len(wanted.text), voice))
        path = "/v1/audio/speech"
        question = {
            "model": spec.engine_model_name,
            "input": wanted.text,
            "voice": voice,
            "response_format": wanted.format,
            "speed": wanted.speed,
        }
        reply = await self._client.post(
            base_url.rstrip("/") + path,
            msgspec.json.encode(question),
            what=spec.id,
            idle_timeout_s=idle_timeout_s,
        )
        async with reply:
            await self._require_ok(spec, base_url, path, reply)
            if not reply.content_type.startswith("audio/"):
                raise EngineProtocolError(f"{spec.id}: {path} answers with {reply.content_type}, not audio")
            content_type, size_bytes, digest = _AUDIO_TYPES[wanted.format], 0, hashlib.sha256()
            async for data in reply.chunks():
                for start in range(0, len(data), PIECE_BYTES):
                    piece = data[start : start + PIECE_BYTES]
                    yield ArtifactChunk(
                        artifact_id="0",
                        content_type=content_type,
                        offset_bytes=size_bytes,
                        data=piece,
                        length_bytes=len(piece),
                    )
                    size_bytes += len(piece)
                    digest.update(piece)
        if not size_bytes:
            # What goes wrong in its models comes after its 200.
            raise EngineFailedError(f"{spec.id}: speaches gave no audio; its log says why")
        yield ArtifactChunk(
            artifact_id="0",
            content_type=content_type,
            offset_bytes=size_bytes,
            sha256=digest.hexdigest(),
            size_bytes=size_bytes,
        )

    async def _transcribe(
        self, base_url: str, spec: DeploymentSpec, wanted: TranscriptionInput, idle_timeout_s: float
    ) -> AsyncGenerator[GenerationEvent, None]:
        fields = {"model": spec.engine_model_name}
        if wanted.format == "text":
            # Of a translation it has no stream.
            fields |= {"response_format": "json"} | ({} if wanted.translate else {"stream": "true"})
        elif wanted.format in _FILE_TYPES:
            # Without times it would join what is said within half a minute.
            fields |= {"response_format": wanted.format, "without_timestamps": "false"}
        else:
            formats = ", ".join(("text", *_FILE_TYPES))
            raise InvalidRequestError(
                f"{spec.id}: {_NAME} transcribes to {formats}, not {wanted.format}", deployment=spec.id
            )
        if wanted.language and not wanted.translate:
            fields["language"] = wanted.language.partition("-")[0].lower()
        if wanted.prompt:
            fields["prompt"] = wanted.prompt
        yield PhaseProgress(
            phase=Phase.GENERATING,
            detail=f"{'translating' if wanted.translate else 'transcribing'} {_size(len(wanted.audio))}",
        )
        path = "/v1/audio/translations" if wanted.translate else "/v1/audio/transcriptions"
        end = _FILE_ENDS.get(wanted.content_type, wanted.content_type.rpartition("/")[2])
        content_type, body = form(
            fields,
            FormFile(
                name="file",
                file_name=f"audio.{end if end.isalnum() else 'wav'}",
                content_type=wanted.content_type,
                data=wanted.audio,
            ),
        )
        reply = await self._client.post(
            base_url.rstrip("/") + path,
            body,
            what=spec.id,
            idle_timeout_s=idle_timeout_s,
            content_type=content_type,
        )
        async with reply:
            await self._require_ok(spec, base_url, path, reply)
            if reply.content_type.startswith("text/event-stream"):
                reader = TranscriptReader(spec.id)
                async for data in reply.chunks():
                    for text in reader.feed(data):
                        yield TokenDelta(text)
                for text in reader.finish():
                    yield TokenDelta(text)
                return
            data = await read_whole(reply, spec.id)
        if wanted.format == "text":
            yield TokenDelta(read_text(data, reply.content_type, spec.id))
            return
        for piece in pieces_of("0", _FILE_TYPES[wanted.format], data):
            yield piece

    async def _require_ok(self, spec: DeploymentSpec, base_url: str, path: str, reply: EngineReply) -> None:
        if reply.status == 200:
            return
        answer = Answer(reply.status, await read_whole(reply, spec.id))
        if reply.status in (400, 413, 415, 422):
            raise InvalidRequestError(
                f"{spec.id}: {_detail(answer) or f'{path} answers {reply.status}'}", deployment=spec.id
            )
        raise self._refused(spec, base_url, path, answer)

    def _refused(self, spec: DeploymentSpec, base_url: str, path: str, answer: Answer) -> EngineFailedError:
        if answer.status == 404:
            return EngineFailedError(f"{spec.id}: {_missing(spec, base_url)}", engine_status="404")
        if answer.status in _NO_KEY:
            return EngineFailedError(f"{spec.id}: {_KEY_WANTED}", engine_status=str(answer.status))
        return failure(spec.id, path, answer.status, _detail(answer))

    async def _models(self, base_url: str, spec: DeploymentSpec) -> list[_Model]:
        answer = await ask(self._client, base_url, "/v1/models", what=spec.id)
        if answer.status in _NO_KEY:
            raise EngineProtocolError(f"{spec.id}: {_KEY_WANTED}")
        return _decoded(answer, _Models, f"{spec.id}: /v1/models").data

    async def _probe(self, base_url: str, spec: DeploymentSpec) -> Probe:
        models = await self._models(base_url, spec)
        names, wanted = tuple(model.id for model in models), spec.engine_model_name
        if wanted not in names:
            return Probe(health=EngineHealth.NO_MODEL, detail=_missing(spec, base_url), models=names)
        if self._loading[base_url, wanted]:
            return Probe(health=EngineHealth.LOADING, detail="loading its model", models=names)
        answer = await ask(self._client, base_url, "/api/ps", what=spec.id)
        if wanted in _decoded(answer, _Running, f"{spec.id}: /api/ps").models:
            return Probe(health=EngineHealth.READY, models=names)
        return Probe(health=EngineHealth.ASLEEP, detail="its model is not loaded", models=names)


_KEY_WANTED = "it wants an API key, and is reached over loopback only: start it without API_KEY"


def _missing(spec: DeploymentSpec, base_url: str) -> str:
    name = spec.engine_model_name
    url = f"{base_url.rstrip('/')}/v1/models/{quote(name)}"
    return f"speaches has no model {name}; `curl -X POST {url}` fetches it from Hugging Face"


def _path_of(spec: DeploymentSpec) -> str:
    return f"/api/ps/{quote(spec.engine_model_name)}"


def _detail(answer: Answer) -> str:
    try:
        found = msgspec.json.decode(answer.body, type=_Refusal).detail
    except msgspec.DecodeError:
        return answer.body.decode(errors="replace").strip()
    return found if isinstance(found, str) else msgspec.json.encode(found).decode()


def _decoded(answer: Answer, kind: type[_T], what: str) -> _T:
    if answer.status != 200:
        raise EngineProtocolError(f"{what} answers {answer.status}")
    try:
        return msgspec.json.decode(answer.body, type=kind)
    except msgspec.DecodeError as error:
        raise EngineProtocolError(f"{what} answers with what is not speaches': {error}") from error


def _size(size_bytes: int) -> str:
    return f"{size_bytes / 1024**2:.1f} MiB" if size_bytes >= 1024**2 else f"{max(1, size_bytes // 1024)} KiB"
