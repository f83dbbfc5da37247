"""What the engines that speak have in common: what they are asked, voices by name, and WAV files."""

from __future__ import annotations

from collections.abc import Collection, Iterable

from nodeagent.engines._base import Generation
from rung.errors import EngineFailedError, EngineProtocolError, InvalidRequestError
from rung.service import EngineReply
from rung.types import DeploymentSpec, SpeechInput, Voice

#: An hour of speech as a WAV file; what sends more does not end.
_MOST_BYTES = 512 * 1024 * 1024
#: The size in the header of a WAV file that was begun before its end was known.
_UNKNOWN_SIZES = (0, 0x7FFFFFFF, 0xFFFFFFFF)
_RIFF_HEAD_BYTES = 12
_SHOWN_VOICES = 12
_SHOWN_CHARACTERS = 300


def speech_of(
    spec: DeploymentSpec, generation: Generation, *, engine: str, formats: Collection[str]
) -> SpeechInput:
    """What is to be said.

    Raises:
        InvalidRequestError: nothing is, or not by this kind of engine, or in a format that it does not make.
    """
    wanted = generation.input
    if not isinstance(wanted, SpeechInput):
        raise InvalidRequestError(f"{spec.id}: {engine} speaks, and does nothing else", deployment=spec.id)
    if not wanted.text.strip():
        raise InvalidRequestError(f"{spec.id}: there is nothing to say", deployment=spec.id)
    if wanted.format not in formats:
        raise InvalidRequestError(
            f"{spec.id}: {engine} makes {' and '.join(formats)}, not {wanted.format}", deployment=spec.id
        )
    return wanted


def require_voice(spec: DeploymentSpec, name: str, voices: Iterable[Voice]) -> None:
    """Refuse a voice that there is not: engines take another one without a word.

    Raises:
        InvalidRequestError: with the voices that there are.
    """
    names = sorted(voice.name for voice in voices)
    if name in names:
        return
    shown = ", ".join(names[:_SHOWN_VOICES]) or "none"
    more = f" and {len(names) - _SHOWN_VOICES} more" if len(names) > _SHOWN_VOICES else ""
    raise InvalidRequestError(
        f"{spec.id} has no voice {name!r}; it has {shown}{more}", deployment=spec.id, param="voice"
    )


def says(characters: int, voice: str) -> str:
    """What goes on, for a person."""
    return f"saying {characters} character{'' if characters == 1 else 's'} as {voice or 'its own voice'}"


async def read_whole(reply: EngineReply, what: str) -> bytes:
    """A whole answer.

    Raises:
        EngineTimeoutError, EngineProtocolError: as the engine client does; or it does not end.
    """
    pieces: list[bytes] = []
    size_bytes = 0
    async for piece in reply.chunks():
        size_bytes += len(piece)
        if size_bytes > _MOST_BYTES:
            raise EngineProtocolError(f"{what} sends audio without end", engine=what)
        pieces.append(piece)
    return b"".join(pieces)


def require_wav(data: bytes, what: str) -> bytes:
    """The samples of a WAV file, as bytes. The content type does not tell: Piper's is that of a web page.

    Raises:
        EngineProtocolError: it is none, or its end is missing.
    """
    if data[:4] != b"RIFF" or data[8:_RIFF_HEAD_BYTES] != b"WAVE":
        raise EngineProtocolError(f"{what} answers with {_shown(data)} instead of a WAV file", engine=what)
    place = _RIFF_HEAD_BYTES
    while place + 8 <= len(data):
        name, size_bytes = data[place : place + 4], int.from_bytes(data[place + 4 : place + 8], "little")
        place += 8
        if name == b"data":
            samples = data[place:]
            if size_bytes in _UNKNOWN_SIZES or size_bytes <= len(samples):
                return samples
            raise EngineProtocolError(
                f"{what} broke off after {len(samples)} of {size_bytes} bytes of audio", engine=what
            )
        place += size_bytes + size_bytes % 2
    raise EngineProtocolError(f"{what} answers with a WAV file without samples", engine=what)


def is_silent(samples: bytes) -> bool:
    """Whether nothing at all is to be heard."""
    return not samples.strip(b"\0")


def failure(what: str, path: str, status: int, detail: str) -> EngineFailedError:
    """The error for an answer that is none."""
    why = f": {detail[:_SHOWN_CHARACTERS]}" if detail else ""
    return EngineFailedError(f"{what}: {path} answers {status}{why}", engine_status=str(status))


def _shown(data: bytes) -> str:
    return repr(data[:24]) if data else "nothing"
