"""What is generated from, beside conversations: pictures, speech, meshes, and graphs for engines."""

from __future__ import annotations

from typing import Any, TypeAlias

from msgspec import Struct

from rung.types._chat import ImagePart


class ImageInput(Struct, frozen=True, kw_only=True):
    """A wish for pictures, still or moving.

    Attributes:
        prompt: what to draw.
        negative_prompt: what not to draw.
        operation: workflow template: `generate`, `img2img`, `inpaint`, …, or a user's own.
        tier: `lightning`, `quality` or `ultra`; empty lets effort decide.
        width_pixels: 0 for the tier's own.
        height_pixels: 0 for the tier's own.
        seed: None for a random one.
        images: pictures to start from: the picture itself, then its mask where the operation takes one.
        parameters: further typed parameters of the template.
        count: how many pictures.
        previews: send pictures of what is there while it is sampled, where the engine makes them.
    """

    prompt: str = ""
    negative_prompt: str = ""
    operation: str = "generate"
    tier: str = ""
    width_pixels: int = 0
    height_pixels: int = 0
    seed: int | None = None
    images: tuple[ImagePart, ...] = ()
    parameters: dict[str, Any] = {}
    count: int = 1
    previews: bool = False


class SpeechInput(Struct, frozen=True, kw_only=True):
    """A wish for speech.

    Attributes:
        text: what to say.
        voice: its name; empty for the engine's own.
        format: `wav`, `mp3`, …
        speed: pace; 1 is as usual.
        language: a BCP 47 tag, for engines that have to be told.
    """

    text: str
    voice: str = ""
    format: str = "wav"
    speed: float = 1.0
    language: str = ""


class TranscriptionInput(Struct, frozen=True, kw_only=True):
    """A wish for the text of a recording.

    Attributes:
        audio: the file.
        content_type: its media type.
        language: a BCP 47 tag; empty to detect it.
        prompt: text that came before, or words that are to be expected.
        format: `text` for text as it comes; `verbose_json`, `srt` or `vtt` for a file with times, from
            engines that make one.
        translate: into English.
    """

    audio: bytes
    content_type: str = "audio/wav"
    language: str = ""
    prompt: str = ""
    format: str = "text"
    translate: bool = False


class Voice(Struct, frozen=True, kw_only=True):
    """A voice that speech may be made with; `language` is a BCP 47 tag, empty where it is not known."""

    name: str
    language: str = ""


class MeshInput(Struct, frozen=True, kw_only=True):
    """A wish for a 3D mesh.

    Attributes:
        prompt: what to model; used when there is no picture.
        image: picture to model.
        seed: None for a random one.
        texture: paint it, too.
    """

    prompt: str = ""
    image: ImagePart | None = None
    seed: int | None = None
    texture: bool = False


#: In a graph, a text that begins so stands for the file of that name.
FILE_PREFIX = "@file:"


class WorkflowFile(Struct, frozen=True, kw_only=True):
    """A file that a graph reads, by the name under which the graph has it after `FILE_PREFIX`."""

    name: str
    content_type: str
    data: bytes


class WorkflowInput(Struct, frozen=True, kw_only=True):
    """A graph, filled in.

    Attributes:
        graph_json: the graph in ComfyUI's API format.
        files: what it reads.
        previews: send pictures of what is there while it is sampled, where the engine makes them.
    """

    graph_json: bytes
    files: tuple[WorkflowFile, ...] = ()
    previews: bool = False


#: What a caller may ask to have generated, beside a conversation.
GenerationInput: TypeAlias = ImageInput | SpeechInput | TranscriptionInput | MeshInput
#: What an engine with a dialect of its own may be asked to generate.
EngineInput: TypeAlias = WorkflowInput | GenerationInput


class WorkflowParameter(Struct, frozen=True, kw_only=True):
    """A typed parameter of a template.

    Attributes:
        name: as `ImageInput.parameters` takes it.
        type: `integer`, `number`, `text`, `choice`, `boolean`, or `loras`: a list of `{"name", "strength"}`.
        description: one line for a person.
        default_json: value where none is given, as JSON; `null`: the tier's own; empty if it has to be given.
        minimum: least value, of numbers only.
        maximum: greatest value, of numbers only.
        choices: permitted values, of choices only.
    """

    name: str
    type: str
    description: str = ""
    default_json: str = ""
    minimum: float | None = None
    maximum: float | None = None
    choices: tuple[str, ...] = ()


class Workflow(Struct, frozen=True, kw_only=True):
    """A template of a graph.

    Attributes:
        name: as `ImageInput.operation` takes it.
        description: one line for a person.
        video: it makes moving pictures.
        images: pictures that it starts from, in order: `image`, `mask`; those with a `?` may be left out.
        parameters: its further parameters.
    """

    name: str
    description: str = ""
    video: bool = False
    images: tuple[str, ...] = ()
    parameters: tuple[WorkflowParameter, ...] = ()
