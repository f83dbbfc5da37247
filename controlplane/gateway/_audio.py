"""OpenAI's routes for audio: speech, transcriptions, translations; and the voices there are."""

from __future__ import annotations

import asyncio
import base64
import re
from collections.abc import Mapping
from contextlib import aclosing

import msgspec
from aiohttp import web
from msgspec import Struct

from controlplane.artifacts import Artifacts
from controlplane.fleet import DeploymentView, Fleet
from controlplane.gateway._artifacts import break_off
from controlplane.gateway._errors import error_body, error_response
from controlplane.gateway._generations import Followed, Follower, open_stream, send_lines
from controlplane.gateway._openai import read_policy, read_request_id
from controlplane.gateway._progress import progress_comment
from controlplane.pipelines import Wish
from rung.errors import InvalidRequestError, RungError
from rung.types import (
    ArtifactChunk,
    JobEvent,
    JobKind,
    PhaseProgress,
    Residency,
    SpeechInput,
    TokenDelta,
    TranscriptionInput,
    Voice,
)

#: OpenAI's formats of a transcription; the first two come as text.
_TEXTS = ("json", "text")
_FILES = ("verbose_json", "srt", "vtt")
_LANGUAGE = re.compile(r"[A-Za-z]{2,3}(-[A-Za-z0-9]{1,8})*")
_NO_USAGE = {"input_tokens": 0, "output_tokens": 0, "total_tokens": 0}
_encode = msgspec.json.encode


class _VoiceId(Struct):
    id: str


class _Speech(Struct):
    """OpenAI's fields that matter to us, and `language`, for engines that have to be told.

    Without `response_format` it is WAV and not MP3: every engine makes it. What is not here
    (`instructions`) is taken and has no effect.
    """

    input: str = ""
    model: str = ""
    voice: str | _VoiceId = ""
    response_format: str = "wav"
    speed: float = 1.0
    stream_format: str = "audio"
    language: str = ""


class _Form(Struct):
    """The fields of a form; numbers and truths are texts there."""

    model: str = ""
    language: str = ""
    prompt: str = ""
    response_format: str = "json"
    stream: str = "false"


_speech_decoder = msgspec.json.Decoder(_Speech)


class AudioRoutes:
    """Handlers of `/v1/audio`."""

    def __init__(self, follower: Follower, artifacts: Artifacts, fleet: Fleet) -> None:
        self._follower = follower
        self._artifacts = artifacts
        self._fleet = fleet

    async def speech(self, request: web.Request) -> web.StreamResponse:
        """`POST /v1/audio/speech`: audio as it is made, or with `stream_format: sse` events with it."""
        try:
            body = _speech_decoder.decode(await request.read())
        except msgspec.DecodeError as error:
            raise InvalidRequestError(f"the request body is not valid: {error}") from None
        if body.stream_format not in ("audio", "sse"):
            raise InvalidRequestError(
                f"stream_format is {body.stream_format!r}; it must be audio or sse", param="stream_format"
            )
        wanted = SpeechInput(
            text=body.input,
            voice=body.voice if isinstance(body.voice, str) else body.voice.id,
            format=body.response_format,
            speed=body.speed,
            language=_language(body.language),
        )
        wish = _wish(request, JobKind.SPEECH, body.model, wanted)
        async with await self._follower.begin(wish, with_data=True) as followed:
            if body.stream_format == "sse":
                return await _speech_events(request, followed)
            return await _audio(request, followed)

    async def transcriptions(self, request: web.Request) -> web.StreamResponse:
        """`POST /v1/audio/transcriptions`: text, with `stream` as it comes, or a file with times."""
        return await self._hear(request, translate=False)

    async def translations(self, request: web.Request) -> web.StreamResponse:
        """`POST /v1/audio/translations`: the same in English, as a whole."""
        return await self._hear(request, translate=True)

    async def voices(self, request: web.Request) -> web.StreamResponse:
        """`GET /v1/audio/voices?model=`: those of what is awake; of the rest, why they are not known."""
        model = request.query.get("model", "")
        found = [view for view in self._fleet.view.deployments.values() if _speaks(view, model)]
        listed = await asyncio.gather(*(self._voices_of(view) for view in found))
        voices, unknown = [], []
        for view, answer in zip(found, listed, strict=True):
            spec = view.deployment.spec
            if isinstance(answer, str):
                unknown.append({"deployment": spec.id, "model": spec.model, "reason": answer})
                continue
            voices += [
                {"id": voice.name, "name": voice.name, "language": voice.language or None}
                | {"model": spec.model, "deployment": spec.id}
                for voice in answer
            ]
        return _json({"object": "list", "voices": voices, "unknown": unknown})

    async def _voices_of(self, view: DeploymentView) -> tuple[Voice, ...] | str:
        deployment = view.deployment
        if deployment.residency is not Residency.AWAKE:
            return f"it is {deployment.residency}"
        try:
            return await self._fleet.voices(deployment.spec.id)
        except RungError as error:
            return error.message

    async def _hear(self, request: web.Request, *, translate: bool) -> web.StreamResponse:
        form, wanted = await _read_form(request, translate=translate)
        stream = form.stream.lower() in ("true", "1")
        if stream and (translate or wanted.format != "text"):
            what = "a translation" if translate else f"the format {wanted.format}"
            raise InvalidRequestError(f"{what} comes as a whole; leave out stream", param="stream")
        wish = _wish(request, JobKind.TRANSCRIPTION, form.model, wanted)
        async with await self._follower.begin(wish) as followed:
            if stream:
                return await _transcript_events(request, followed)
            text = ""
            async with aclosing(followed.events()) as events:
                async for event in events:
                    if isinstance(event.payload, TokenDelta):
                        text += event.payload.content
            error = followed.error()
            if error is not None:
                return error_response(error, followed.headers)
            if wanted.format != "text":
                return await self._file(followed)
            if form.response_format == "text":
                return web.Response(text=text, headers=followed.headers)
            return _json({"text": text, "rung": followed.mark()}, followed.headers)

    async def _file(self, followed: Followed) -> web.Response:
        artifact = followed.artifacts[0]
        data = b"".join([piece async for piece in self._artifacts.pieces(artifact.id)])
        headers = followed.headers | {"Content-Type": f"{artifact.content_type}; charset=utf-8"}
        return web.Response(body=data, headers=headers)


async def _audio(request: web.Request, followed: Followed) -> web.StreamResponse:
    """The audio itself. What goes wrong once it has begun cuts it off, so that nobody takes it for whole."""
    # Nothing says what is under way meanwhile: every byte is sound, and whoever wants to know takes events.
    response = web.StreamResponse()
    async with aclosing(followed.events()) as events:
        async for event in events:
            if not isinstance(event.payload, ArtifactChunk):
                continue
            if not response.prepared:
                response.headers.update(followed.headers)
                response.content_type = event.payload.content_type
                await response.prepare(request)
            await response.write(event.payload.data)
    error = followed.error()
    if error is not None and not response.prepared:
        return error_response(error, followed.headers)
    if error is not None:
        break_off(request)
    else:
        await response.write_eof()
    return response


async def _speech_events(request: web.Request, followed: Followed) -> web.StreamResponse:
    async def line_of(event: JobEvent) -> bytes:
        match event.payload:
            case PhaseProgress() as progress:
                return progress_comment(progress, event.elapsed_s)
            case ArtifactChunk(data=data) if data:
                audio = base64.b64encode(data).decode()
                return _event({"type": "speech.audio.delta", "audio": audio})
            case _:
                return b""

    response = await open_stream(request, followed, "text/event-stream")
    await send_lines(response, followed.lines(line_of))
    done = {"type": "speech.audio.done", "usage": _NO_USAGE, "rung": followed.mark()}
    return await _end(response, followed, done)


async def _transcript_events(request: web.Request, followed: Followed) -> web.StreamResponse:
    text = ""

    async def line_of(event: JobEvent) -> bytes:
        nonlocal text
        match event.payload:
            case PhaseProgress() as progress:
                return progress_comment(progress, event.elapsed_s)
            case TokenDelta(content):
                text += content
                return _event({"type": "transcript.text.delta", "delta": content})
            case _:
                return b""

    response = await open_stream(request, followed, "text/event-stream")
    await send_lines(response, followed.lines(line_of))
    done = {"type": "transcript.text.done", "text": text, "rung": followed.mark()}
    return await _end(response, followed, done)


async def _end(
    response: web.StreamResponse, followed: Followed, done: Mapping[str, object]
) -> web.StreamResponse:
    error = followed.error()
    if error is None:
        await response.write(_event(done))
    else:
        await response.write(b"event: error\ndata: " + error_body(error) + b"\n\n")
    await response.write_eof()
    return response


async def _read_form(request: web.Request, *, translate: bool) -> tuple[_Form, TranscriptionInput]:
    """The fields, and what is to be heard. Raises InvalidRequestError."""
    if request.content_type != "multipart/form-data":
        raise InvalidRequestError("send a form (multipart/form-data) with the audio as file", param="file")
    sent = await request.post()
    file = sent.get("file")
    if not isinstance(file, web.FileField):
        raise InvalidRequestError("file is missing; send the audio as file", param="file")
    fields = {
        name: value
        for name in _Form.__struct_fields__
        if isinstance(value := sent.get(name), str)  # a file has no business there
    }
    form = msgspec.convert(fields, _Form)
    if form.response_format not in (*_TEXTS, *_FILES):
        raise InvalidRequestError(
            f"response_format is {form.response_format!r}; it must be one of {', '.join((*_TEXTS, *_FILES))}",
            param="response_format",
        )
    if "word" in sent.getall("timestamp_granularities[]", []):
        raise InvalidRequestError(
            "times of words are not told here; those of segments are", param="timestamp_granularities"
        )
    return form, TranscriptionInput(
        audio=file.file.read(),
        content_type=file.content_type,
        language=_language(form.language),
        prompt=form.prompt,
        format="text" if form.response_format in _TEXTS else form.response_format,
        translate=translate,
    )


def _language(tag: str) -> str:
    if tag and not _LANGUAGE.fullmatch(tag):
        raise InvalidRequestError(
            f"language is {tag[:40]!r}; it must be a tag such as de or pt-BR", param="language"
        )
    return tag


def _wish(request: web.Request, kind: JobKind, model: str, wanted: SpeechInput | TranscriptionInput) -> Wish:
    return Wish(
        kind=kind,
        model=model,
        input=wanted,
        policy=read_policy(request),
        request_id=read_request_id(request),
    )


def _speaks(view: DeploymentView, model: str) -> bool:
    spec = view.deployment.spec
    return JobKind.SPEECH.value in spec.capabilities and model in ("", spec.id, spec.model, *spec.aliases)


def _event(fields: Mapping[str, object]) -> bytes:
    return b"data: " + _encode(fields) + b"\n\n"


def _json(value: object, headers: dict[str, str] | None = None) -> web.Response:
    return web.Response(body=_encode(value), content_type="application/json", headers=headers)
