"""What a caller wants generated."""

from __future__ import annotations

from msgspec import Struct

from rung.types import (
    GenerationInput,
    ImageInput,
    JobKind,
    MeshInput,
    Policy,
    SpeechInput,
    TranscriptionInput,
)

#: The kind of job that an input makes.
GENERATION_KINDS: dict[type, JobKind] = {
    ImageInput: JobKind.IMAGE,
    SpeechInput: JobKind.SPEECH,
    TranscriptionInput: JobKind.TRANSCRIPTION,
    MeshInput: JobKind.MESH,
}


class Wish(Struct, frozen=True, kw_only=True):
    """One request, from whichever API it came.

    `body` is the JSON of the OpenAI route of its kind; `model` is what the caller named, and may be
    empty. `effort` is 1 to 10, or None when the caller left it open; `effort_why` says who else than the
    caller set it. What has no OpenAI body (pictures, speech, meshes) has an `input` instead.
    """

    kind: JobKind
    model: str
    body: bytes = b""
    input: GenerationInput | None = None
    policy: Policy = Policy()
    effort: int | None = None
    effort_why: str = ""
    request_id: str = ""
