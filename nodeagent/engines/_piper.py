"""Piper's own HTTP server: one voice from the start, others from the disk, all of it on the CPU."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Sequence

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
    read_whole,
    require_voice,
    require_wav,
    says,
    speech_of,
)
from rung.codec import GenerationEvent
from rung.errors import EngineProtocolError
from rung.service import EngineClient, EngineReply
from rung.types import DeploymentSpec, ExternalRuntime, Phase, PhaseProgress, Voice

_NAME = "Piper"
_FORMATS = ("wav",)
#: Newer servers speak at the first, and have a web page at the second; older ones know only the second.
_PATHS = ("/synthesize", "/")
_NOT_THERE = (404, 405)
#: It takes these off the ends of names when it lists them, whichever of them are there.
_STRIPPED = ".onnx.json"
_MILESTONES = (milestone(r"Running on \S+:\d+", "ready"),)


class _Language(Struct, frozen=True):
    code: str = ""


class _VoiceConfig(Struct, frozen=True):
    language: _Language = _Language()


class PiperAdapter(NoOpenAiRoutes):
    """Starts Piper, and has it speak. Its model is a voice, by the name that it has among its files.

    It makes a whole WAV file before its first byte leaves, and does not notice that its caller has left.
    Where its voices are is for the runtime's arguments to say (`--data-dir`), and that it may use a GPU
    (`--cuda`). An unknown voice would be answered with the usual one: it is refused here.
    """

    engine_name = _NAME

    def __init__(self, client: EngineClient) -> None:
        self._client = client

    def command_line(self, spec: DeploymentSpec, *, listen_host: str, listen_port: int) -> CommandLine:
        """Arguments of `python -m piper.http_server`.

        Raises:
            InvalidRequestError: the spec is for another kind of engine.
        """
        require_dialect(spec, "piper")
        arguments = ("-m", spec.engine_model_name, "--host", listen_host, "--port", str(listen_port))
        return CommandLine(arguments=arguments, environment={"PYTHONUNBUFFERED": "1"})

    async def probe(self, base_url: str, spec: DeploymentSpec) -> Probe:
        """See `EngineAdapter.probe`. Its port opens only when its voice is loaded."""
        return await guarded(self._probe(base_url, spec))

    def load_progress(self, line: str) -> LoadProgress | None:
        """See `EngineAdapter.load_progress`."""
        return recognise(_MILESTONES, line.strip())

    async def voices(self, base_url: str, spec: DeploymentSpec) -> tuple[Voice, ...]:
        """See `VoiceControl.voices`. Names that end in one of `.onxjs` lack that end: so it lists them."""
        answer = await ask(self._client, base_url, "/voices", what=spec.id)
        try:
            listed = (
                msgspec.json.decode(answer.body, type=dict[str, _VoiceConfig])
                if answer.status == 200
                else None
            )
        except msgspec.DecodeError:
            listed = None
        if listed is None:
            raise EngineProtocolError(f"{spec.id}: /voices answers {answer.status} without a list of voices")
        return tuple(
            Voice(name=name, language=config.language.code.replace("_", "-"))
            for name, config in sorted(listed.items())
        )

    async def generate(
        self, base_url: str, spec: DeploymentSpec, generation: Generation
    ) -> AsyncGenerator[GenerationEvent, None]:
        """See `GenerateControl.generate`."""
        wanted = speech_of(spec, generation, engine=_NAME, formats=_FORMATS)
        voice = self._voice(spec, wanted.voice, await self.voices(base_url, spec))
        yield PhaseProgress(phase=Phase.GENERATING, detail=says(len(wanted.text), voice))
        question: dict[str, object] = {"text": wanted.text}
        if voice:
            question["voice"] = voice
        if wanted.speed != 1.0:
            question["length_scale"] = 1.0 / wanted.speed
        reply = await self._ask(base_url, spec, msgspec.json.encode(question), generation.idle_timeout_s)
        async with reply:
            data = await read_whole(reply, spec.id)
        require_wav(data, spec.id)
        for piece in pieces_of("0", "audio/wav", data):
            yield piece

    def _voice(self, spec: DeploymentSpec, wanted: str, voices: Sequence[Voice]) -> str:
        """The voice to ask for; empty for the one that it was started with, from a file of any name."""
        own = spec.engine_model_name
        if wanted and wanted != own:
            require_voice(spec, wanted, voices)
            return wanted
        if _is_listed(own, voices):
            return own
        if wanted or isinstance(spec.engine.runtime, ExternalRuntime):
            require_voice(spec, own, voices)
        return ""

    async def _ask(
        self, base_url: str, spec: DeploymentSpec, body: bytes, idle_timeout_s: float
    ) -> EngineReply:
        status = 0
        for path in _PATHS:
            url = base_url.rstrip("/") + path
            reply = await self._client.post(url, body, what=spec.id, idle_timeout_s=idle_timeout_s)
            status = reply.status
            if status == 200:
                return reply
            # What it says is a web page.
            await reply.aclose()
            if status not in _NOT_THERE:
                break
        raise failure(spec.id, path, status, "")

    async def _probe(self, base_url: str, spec: DeploymentSpec) -> Probe:
        voices, own = await self.voices(base_url, spec), spec.engine_model_name
        names = tuple(voice.name for voice in voices)
        if isinstance(spec.engine.runtime, ExternalRuntime) and not _is_listed(own, voices):
            detail = (
                f"Piper has no voice {own}; `python -m piper.download_voices {own}` in its folder gets it"
            )
            return Probe(health=EngineHealth.NO_MODEL, detail=detail, models=names)
        return Probe(health=EngineHealth.READY, models=names)


def _is_listed(name: str, voices: Sequence[Voice]) -> bool:
    return any(voice.name in (name, name.rstrip(_STRIPPED)) for voice in voices)
