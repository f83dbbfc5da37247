"""XTTS behind `xtts-api-server`: speaks with any voice of which it has a recording."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import AsyncGenerator, Collection
from typing import TypeVar

import msgspec
from msgspec import Struct

from nodeagent.engines._artifact import pieces_of
from nodeagent.engines._base import (
    CommandLine,
    EngineHealth,
    Generation,
    LoadProgress,
    Probe,
)
from nodeagent.engines._loading import milestone, recognise
from nodeagent.engines._openai_relay import ask, guarded
from nodeagent.engines._service import NoOpenAiRoutes, require_dialect
from nodeagent.engines._speech import (
    failure,
    is_silent,
    read_whole,
    require_voice,
    require_wav,
    says,
    speech_of,
)
from rung.codec import GenerationEvent
from rung.errors import EngineFailedError, EngineProtocolError, InvalidRequestError
from rung.service import EngineClient
from rung.types import DeploymentSpec, Phase, PhaseProgress, Voice

_T = TypeVar("_T")

_NAME = "XTTS"
_FORMATS = ("wav",)
#: With the slash; without it there is nothing.
_PATH = "/tts_to_audio/"
_DEFAULT_LANGUAGE = "en"
#: What is a 400 of its making comes as a 500 that says so.
_REFUSED = re.compile(r"Error: (?:4\d\d: )(?P<why>.+)", re.DOTALL)
_MILESTONES = (
    milestone(r"Model: '(?P<version>[^']+)' starts to load", "loading XTTS {version}"),
    milestone(r"Pre-create latents for all current speakers", "preparing the voices"),
    milestone(r"Uvicorn running on ", "ready"),
)


class _Languages(Struct):
    #: By their English names, the codes.
    languages: dict[str, str]


class _Refusal(Struct):
    detail: str = ""


class XttsAdapter(NoOpenAiRoutes):
    """Starts XTTS, and has it speak. Its model is always loaded; a voice is one of its recordings.

    It does one thing at a time, and answers nothing else meanwhile: while it speaks for us it is taken to
    be well. In its streaming mode it would play on the loudspeakers of its machine and answer with silence.

    Folders, device and version are for the runtime's arguments to say.
    """

    engine_name = _NAME

    def __init__(self, client: EngineClient) -> None:
        self._client = client
        #: By URL, how much it has to say.
        self._speaking: Counter[str] = Counter()

    def command_line(self, spec: DeploymentSpec, *, listen_host: str, listen_port: int) -> CommandLine:
        """Arguments of `python -m xtts_api_server`. Raises InvalidRequestError for another kind of engine."""
        require_dialect(spec, "xtts")
        return CommandLine(
            arguments=("--host", listen_host, "--port", str(listen_port)),
            environment={"PYTHONUNBUFFERED": "1"},
        )

    async def probe(self, base_url: str, spec: DeploymentSpec) -> Probe:
        """See `EngineAdapter.probe`. Its port opens only when its model is loaded."""
        if self._speaking[base_url]:
            return Probe(health=EngineHealth.READY, detail="speaking")
        return await guarded(self._probe(base_url, spec))

    def load_progress(self, line: str) -> LoadProgress | None:
        """See `EngineAdapter.load_progress`."""
        return recognise(_MILESTONES, line.strip())

    async def voices(self, base_url: str, spec: DeploymentSpec) -> tuple[Voice, ...]:
        """See `VoiceControl.voices`: its recordings, which speak any language."""
        names = await self._asked(base_url, spec, "/speakers_list", list[str])
        return tuple(Voice(name=name) for name in sorted(names))

    async def generate(
        self, base_url: str, spec: DeploymentSpec, generation: Generation
    ) -> AsyncGenerator[GenerationEvent, None]:
        """See `GenerateControl.generate`."""
        wanted = speech_of(spec, generation, engine=_NAME, formats=_FORMATS)
        if wanted.speed != 1.0:
            # It has one for all who use it, until somebody sets another.
            raise InvalidRequestError(f"{spec.id}: {_NAME} has one pace; leave speed at 1", param="speed")
        voices = await self.voices(base_url, spec)
        # By name only: it would read any file that a path leads to.
        voice = wanted.voice or (voices[0].name if voices else "")
        require_voice(spec, voice, voices)
        known = await self._asked(base_url, spec, "/languages", _Languages)
        language = _language(spec, wanted.language, known.languages.values())
        yield PhaseProgress(phase=Phase.GENERATING, detail=says(len(wanted.text), voice))
        question = {"text": _spoken(wanted.text), "speaker_wav": voice, "language": language}
        data = await self._say(base_url, spec, msgspec.json.encode(question), generation.idle_timeout_s)
        if is_silent(require_wav(data, spec.id)):
            raise EngineFailedError(
                f"{spec.id}: XTTS answers with silence, as it does in its streaming mode, which plays on the "
                "loudspeakers of its machine; start it without --streaming-mode"
            )
        for piece in pieces_of("0", "audio/wav", data):
            yield piece

    async def _say(self, base_url: str, spec: DeploymentSpec, body: bytes, idle_timeout_s: float) -> bytes:
        self._speaking[base_url] += 1
        try:
            url = base_url.rstrip("/") + _PATH
            reply = await self._client.post(url, body, what=spec.id, idle_timeout_s=idle_timeout_s)
            async with reply:
                data = await read_whole(reply, spec.id)
        finally:
            self._speaking[base_url] -= 1
        if reply.status == 200:
            return data
        try:
            detail = msgspec.json.decode(data, type=_Refusal).detail
        except msgspec.DecodeError:
            detail = ""
        refused = _REFUSED.fullmatch(detail)
        if refused is not None:
            raise InvalidRequestError(f"{spec.id}: {refused['why']}", deployment=spec.id)
        raise failure(spec.id, _PATH, reply.status, detail)

    async def _asked(self, base_url: str, spec: DeploymentSpec, path: str, kind: type[_T]) -> _T:
        answer = await ask(self._client, base_url, path, what=spec.id)
        if answer.status != 200:
            raise EngineProtocolError(f"{spec.id}: {path} answers {answer.status}")
        try:
            return msgspec.json.decode(answer.body, type=kind)
        except msgspec.DecodeError as error:
            raise EngineProtocolError(
                f"{spec.id}: {path} answers with what is not XTTS's: {error}"
            ) from error

    async def _probe(self, base_url: str, spec: DeploymentSpec) -> Probe:
        await self._asked(base_url, spec, "/languages", _Languages)
        return Probe(health=EngineHealth.READY)


def _language(spec: DeploymentSpec, tag: str, codes: Collection[str]) -> str:
    """Its own code for a BCP 47 tag. Raises InvalidRequestError for a language that it does not speak."""
    wanted = tag.lower() or _DEFAULT_LANGUAGE
    primary = wanted.partition("-")[0]
    for code in sorted(codes):
        if code == wanted or code.partition("-")[0] == primary:
            return code
    raise InvalidRequestError(
        f"{spec.id} does not speak {tag!r}; it speaks {', '.join(sorted(codes))}",
        deployment=spec.id,
        param="language",
    )


def _spoken(text: str) -> str:
    """A text that is not a path: it would read out a file of its machine whose name ends so."""
    return f"{text} " if text.lower().endswith(".txt") else text
