"""What is generated from, beside conversations, and what engines with dialects of their own answer."""

from __future__ import annotations

from typing import TypeAlias

from google.protobuf.json_format import MessageToDict
from google.protobuf.struct_pb2 import Struct

from rung import v1
from rung.codec._job import (
    artifact_chunk_from_proto,
    artifact_chunk_to_proto,
    phase_progress_from_proto,
    phase_progress_to_proto,
    token_from_proto,
    write_token,
)
from rung.codec._values import whole_numbers
from rung.types import (
    ArtifactChunk,
    EngineInput,
    GenerationInput,
    ImageInput,
    ImagePart,
    MeshInput,
    PhaseProgress,
    SpeechInput,
    TokenDelta,
    TranscriptionInput,
    Voice,
    Workflow,
    WorkflowFile,
    WorkflowInput,
    WorkflowParameter,
)

#: What happens while an engine generates.
GenerationEvent: TypeAlias = PhaseProgress | TokenDelta | ArtifactChunk

_Inputs: TypeAlias = v1.GenerateRequest | v1.RunGenerationRequest


def write_generation_input(value: EngineInput, message: _Inputs) -> None:
    """Set the `input` of a request.

    Raises:
        TypeError: a graph, which only an engine may be asked for.
    """
    match value:
        case ImageInput():
            message.image.CopyFrom(_image_to_proto(value))
        case SpeechInput():
            message.speech.CopyFrom(
                v1.SpeechInput(
                    text=value.text,
                    voice=value.voice,
                    format=value.format,
                    speed=value.speed,
                    language=value.language,
                )
            )
        case TranscriptionInput():
            message.transcription.CopyFrom(
                v1.TranscriptionInput(
                    audio=value.audio,
                    content_type=value.content_type,
                    language=value.language,
                    prompt=value.prompt,
                    format=value.format,
                    translate=value.translate,
                )
            )
        case MeshInput():
            message.mesh.CopyFrom(
                v1.MeshInput(
                    prompt=value.prompt,
                    image=None if value.image is None else image_part_to_proto(value.image),
                    seed=value.seed,
                    texture=value.texture,
                )
            )
        case WorkflowInput():
            if not isinstance(message, v1.RunGenerationRequest):
                raise TypeError("a graph is for an engine, not for a control plane")
            message.workflow.CopyFrom(
                v1.WorkflowInput(
                    graph_json=value.graph_json,
                    files=[
                        v1.WorkflowFile(name=each.name, content_type=each.content_type, data=each.data)
                        for each in value.files
                    ],
                    previews=value.previews,
                )
            )


def read_generation_input(message: _Inputs) -> GenerationInput | None:
    """The `input` of a request; None for none, and for a conversation."""
    match message.WhichOneof("input"):
        case "image":
            return _image_from_proto(message.image)
        case "speech":
            return _speech_from_proto(message.speech)
        case "transcription":
            return _transcription_from_proto(message.transcription)
        case "mesh":
            return _mesh_from_proto(message.mesh)
        case _:
            return None


def read_engine_input(message: v1.RunGenerationRequest) -> EngineInput | None:
    """The `input` of a request to an agent; None for one that this version does not know."""
    match message.WhichOneof("input"):
        case "workflow":
            return WorkflowInput(
                graph_json=message.workflow.graph_json,
                files=tuple(
                    WorkflowFile(name=each.name, content_type=each.content_type, data=each.data)
                    for each in message.workflow.files
                ),
                previews=message.workflow.previews,
            )
        case _:
            return read_generation_input(message)


def generation_event_to_proto(value: GenerationEvent) -> v1.RunGenerationResponse:
    """Encode what happens while an engine generates."""
    response = v1.RunGenerationResponse()
    match value:
        case PhaseProgress():
            response.progress.CopyFrom(phase_progress_to_proto(value))
        case TokenDelta():
            write_token(value, response.token)
        case ArtifactChunk():
            response.artifact.CopyFrom(artifact_chunk_to_proto(value))
    return response


def generation_event_from_proto(message: v1.RunGenerationResponse) -> GenerationEvent | None:
    """Decode what happens while an engine generates; None for a failure, and for what is not known."""
    match message.WhichOneof("event"):
        case "progress":
            return phase_progress_from_proto(message.progress)
        case "token":
            return token_from_proto(message.token)
        case "artifact":
            return artifact_chunk_from_proto(message.artifact)
        case _:
            return None


def image_part_to_proto(value: ImagePart) -> v1.ImagePart:
    """Encode a picture."""
    return v1.ImagePart(content_type=value.content_type, data=value.data)


def image_part_from_proto(message: v1.ImagePart) -> ImagePart:
    """Decode a picture."""
    return ImagePart(content_type=message.content_type, data=message.data)


def voice_to_proto(value: Voice) -> v1.Voice:
    """Encode a voice."""
    return v1.Voice(name=value.name, language=value.language)


def voice_from_proto(message: v1.Voice) -> Voice:
    """Decode a voice."""
    return Voice(name=message.name, language=message.language)


def workflow_to_proto(value: Workflow) -> v1.Workflow:
    """Encode a template."""
    return v1.Workflow(
        name=value.name,
        description=value.description,
        video=value.video,
        images=value.images,
        parameters=[
            v1.WorkflowParameter(
                name=each.name,
                type=each.type,
                description=each.description,
                default_json=each.default_json,
                minimum=each.minimum,
                maximum=each.maximum,
                choices=each.choices,
            )
            for each in value.parameters
        ],
    )


def workflow_from_proto(message: v1.Workflow) -> Workflow:
    """Decode a template."""
    return Workflow(
        name=message.name,
        description=message.description,
        video=message.video,
        images=tuple(message.images),
        parameters=tuple(
            WorkflowParameter(
                name=each.name,
                type=each.type,
                description=each.description,
                default_json=each.default_json,
                minimum=each.minimum if each.HasField("minimum") else None,
                maximum=each.maximum if each.HasField("maximum") else None,
                choices=tuple(each.choices),
            )
            for each in message.parameters
        ),
    )


def _image_to_proto(value: ImageInput) -> v1.ImageInput:
    parameters = Struct()
    parameters.update(value.parameters)
    return v1.ImageInput(
        prompt=value.prompt,
        negative_prompt=value.negative_prompt,
        operation=value.operation,
        tier=value.tier,
        width_pixels=value.width_pixels,
        height_pixels=value.height_pixels,
        seed=value.seed,
        images=[image_part_to_proto(each) for each in value.images],
        parameters=parameters,
        count=value.count,
        previews=value.previews,
    )


def _image_from_proto(message: v1.ImageInput) -> ImageInput:
    return ImageInput(
        prompt=message.prompt,
        negative_prompt=message.negative_prompt,
        operation=message.operation or "generate",
        tier=message.tier,
        width_pixels=message.width_pixels,
        height_pixels=message.height_pixels,
        seed=message.seed if message.HasField("seed") else None,
        images=tuple(image_part_from_proto(each) for each in message.images),
        parameters={name: whole_numbers(each) for name, each in MessageToDict(message.parameters).items()},
        count=message.count or 1,
        previews=message.previews,
    )


def _speech_from_proto(message: v1.SpeechInput) -> SpeechInput:
    return SpeechInput(
        text=message.text,
        voice=message.voice,
        format=message.format or "wav",
        speed=message.speed or 1.0,
        language=message.language,
    )


def _transcription_from_proto(message: v1.TranscriptionInput) -> TranscriptionInput:
    return TranscriptionInput(
        audio=message.audio,
        content_type=message.content_type or "audio/wav",
        language=message.language,
        prompt=message.prompt,
        format=message.format or "text",
        translate=message.translate,
    )


def _mesh_from_proto(message: v1.MeshInput) -> MeshInput:
    return MeshInput(
        prompt=message.prompt,
        image=image_part_from_proto(message.image) if message.HasField("image") else None,
        seed=message.seed if message.HasField("seed") else None,
        texture=message.texture,
    )
