"""Which engines can make what is wanted. Pure."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from controlplane.ladder import Candidate, TargetKind
from rung.errors import InvalidRequestError
from rung.types import Engine, ServiceEngine, SpeechInput, TranscriptionInput

#: By dialect, the formats of its speech.
_SPEECH = {
    "piper": ("wav",),
    "xtts": ("wav",),
    "speaches": ("wav", "mp3", "flac", "opus", "aac", "pcm"),
}
#: By dialect, the forms of its transcriptions.
_TRANSCRIPTIONS = {"speaches": ("text", "verbose_json", "srt", "vtt")}


def able(
    targets: Iterable[Candidate],
    wanted: SpeechInput | TranscriptionInput,
    engine_of: Callable[[str], Engine | None],
) -> list[Candidate]:
    """The targets whose engines make the wanted format, in the same order.

    Args:
        targets: who may answer.
        wanted: what is asked for.
        engine_of: the engine of a deployment; None for one that is gone.

    Raises:
        InvalidRequestError: none does; with what each of them makes.
    """
    found: list[Candidate] = []
    others: list[str] = []
    for target in targets:
        engine = engine_of(target.id) if target.kind is TargetKind.DEPLOYMENT else None
        formats = _formats(engine, wanted)
        if wanted.format in formats:
            found.append(target)
        else:
            others.append(f"{target.id} makes {' and '.join(formats) or 'none that is known here'}")
    if not found:
        raise InvalidRequestError(
            f"nobody here makes the format {wanted.format}: {'; '.join(others)}", param="response_format"
        )
    return found


def _formats(engine: Engine | None, wanted: SpeechInput | TranscriptionInput) -> tuple[str, ...]:
    dialect = engine.dialect if isinstance(engine, ServiceEngine) else ""
    return (_SPEECH if isinstance(wanted, SpeechInput) else _TRANSCRIPTIONS).get(dialect, ())
