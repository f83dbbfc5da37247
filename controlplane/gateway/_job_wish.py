"""The body of `POST /v1/jobs`, as a wish."""

from __future__ import annotations

from typing import TypeAlias

import msgspec
from msgspec import Struct
from msgspec.structs import replace

from controlplane.gateway._generate_stream import check_effort, checked
from controlplane.pipelines import Wish, looked_into
from rung.errors import InvalidRequestError
from rung.types import (
    GenerationInput,
    ImageInput,
    JobKind,
    MeshInput,
    Policy,
    SpeechInput,
    TranscriptionInput,
)

_InputType: TypeAlias = type[ImageInput | SpeechInput | TranscriptionInput | MeshInput]

#: What a job is made from that has no OpenAI body.
_INPUTS: dict[JobKind, _InputType] = {
    JobKind.IMAGE: ImageInput,
    JobKind.VIDEO: ImageInput,
    JobKind.SPEECH: SpeechInput,
    JobKind.TRANSCRIPTION: TranscriptionInput,
    JobKind.MESH: MeshInput,
}
_KINDS = (JobKind.CHAT, JobKind.EMBEDDING, *_INPUTS)
#: A template that makes moving pictures, where a video's is not named.
_VIDEO_OPERATION = "animate"


class _CreateJob(Struct, forbid_unknown_fields=True):
    """Body of `POST /v1/jobs`.

    A chat or an embedding has a `request`, the body of its OpenAI route; everything else an `input`, with the
    fields of `rung.types` and files in base64.
    """

    request: msgspec.Raw = msgspec.Raw()
    input: msgspec.Raw = msgspec.Raw()
    kind: str = "chat"
    model: str = ""
    effort: int | None = None
    request_id: str = ""
    policy: Policy = Policy()


class _Model(Struct):
    model: str = ""


_decoder = msgspec.json.Decoder(_CreateJob)


def read_job_wish(body: bytes, request_id: str) -> Wish:
    """The wish for a detached job.

    Args:
        body: of the request.
        request_id: where the body has none.

    Raises:
        InvalidRequestError: it is malformed, or what it asks for cannot be made.
    """
    try:
        wanted = _decoder.decode(body)
        kind = _kind(wanted.kind)
        model, value = wanted.model, _input(kind, wanted.input)
        if value is None:
            if not wanted.request:
                raise InvalidRequestError(
                    f"request is missing; a job of kind {kind} has one", param="request"
                )
            model = model or msgspec.json.decode(wanted.request, type=_Model).model
    except msgspec.DecodeError as error:
        raise InvalidRequestError(f"the request body is not valid: {error}") from None
    return Wish(
        kind=kind,
        model=model,
        body=bytes(wanted.request),
        input=value,
        policy=replace(wanted.policy, detached=True),
        effort=check_effort(wanted.effort),
        request_id=wanted.request_id or request_id,
    )


def _kind(name: str) -> JobKind:
    try:
        kind = JobKind(name)
    except ValueError:
        kind = None
    if kind is None or kind not in _KINDS:
        raise InvalidRequestError(
            f"kind is {name[:40]!r}; it must be one of {', '.join(_KINDS)}", param="kind"
        )
    return kind


def _input(kind: JobKind, text: msgspec.Raw) -> GenerationInput | None:
    input_type = _INPUTS.get(kind)
    if input_type is None:
        if text:
            raise InvalidRequestError(f"input is not for jobs of kind {kind}; give a request", param="input")
        return None
    if not text:
        raise InvalidRequestError(f"input is missing; a job of kind {kind} is made from one", param="input")
    value = looked_into(msgspec.json.decode(text, type=input_type), "input")
    if not isinstance(value, ImageInput):
        return value
    if kind is JobKind.VIDEO and value.operation == "generate":
        value = replace(value, operation=_VIDEO_OPERATION)
    return checked(value)
