"""Pictures by cloud models, in OpenAI's way: asked for, checked, and given on as artifacts."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Awaitable, Callable, Mapping

import msgspec
from msgspec import Struct

from controlplane.cloud._drawing import CloudDrawing
from controlplane.cloud._targets import CloudTargets, PaidCall
from controlplane.cloud._values import MICRO_USD_PER_USD, CloudModel
from rung.codec import GenerationEvent
from rung.errors import EngineProtocolError, UnsuitableTargetError
from rung.service import FormFile, form
from rung.types import ArtifactChunk, ImageInput, ImagePart, Phase, PhaseProgress

_GENERATIONS, _EDITS = "/images/generations", "/images/edits"
#: Operations that are drawn by it, with how many pictures each starts from.
_OPERATIONS = {"generate": 0, "img2img": 1, "inpaint": 2}
#: A picture is not larger, as base64; what surrounds pictures is far less.
_LARGEST_IMAGE_BYTES = 48 * 1024 * 1024
_PIECE_BYTES = 256 * 1024
#: Colour types of a PNG with transparency, in the byte that has it.
_PNG_COLOUR_TYPE_AT = 25
_PNG_WITH_ALPHA = frozenset({4, 6})
_ENDINGS = {"image/png": "png", "image/jpeg": "jpg", "image/webp": "webp"}


class _Row(Struct):
    b64_json: str | None = None
    url: str | None = None


class _Answer(Struct):
    data: list[_Row]


_decoder = msgspec.json.Decoder(_Answer)


class CloudPictures:
    """Has cloud models draw.

    A seed, steps and the like mean nothing to them; what not to draw is said in the prompt.

    Args:
        targets: the models, with their keys and what may be spent on them.
        idle_timeout_s: longest silence of a provider, which says nothing until it has drawn.
    """

    def __init__(self, targets: CloudTargets, *, idle_timeout_s: float) -> None:
        self._targets = targets
        self._idle_timeout_s = idle_timeout_s

    def model_name(self, target_id: str) -> str:
        """The provider's own name of a model. Raises UnknownModelError."""
        return self._targets.model_name(target_id)

    async def generate(
        self, target_id: str, wanted: ImageInput, on_event: Callable[[GenerationEvent], Awaitable[None]]
    ) -> float:
        """Have pictures drawn; returns what they cost in US dollars. Cancelled, it lets go of the call.

        Args:
            target_id: `provider/model`.
            wanted: what to draw.
            on_event: told of progress, and given the pictures.

        Raises:
            UnsuitableTargetError: it cannot do what is wanted; another may.
            EngineRejectedError: the provider refuses this wish, its content included.
            EngineProtocolError: what it sent are no pictures.
            BudgetExhaustedError, UnavailableError, EngineTimeoutError: as `CloudTargets.paid_call`.
        """
        model = self._targets.model(target_id)
        drawing = _drawing_of(model, wanted)
        size = drawing.size_for(wanted.width_pixels, wanted.height_pixels)
        quality = drawing.quality_for(wanted.tier)
        price_usd = drawing.price_usd(quality, size)
        price_micro_usd = round(price_usd * MICRO_USD_PER_USD)
        fields = _fields(model, drawing, wanted, size, quality)
        path, content_type, body = _request(fields, wanted.images)
        said = " ".join(each for each in (model.model, "draws", size, quality) if each)
        await on_event(PhaseProgress(Phase.SAMPLING, f"{said}: {wanted.count} for ${price_usd:g} each"))
        call = self._targets.paid_call(
            target_id,
            path,
            body,
            content_type=content_type,
            most_micro_usd=price_micro_usd * wanted.count,
            idle_timeout_s=self._idle_timeout_s,
        )
        async with call as paid:
            pictures = _pictures(await _read(paid, target_id, wanted.count), target_id)
            paid.cost_micro_usd = price_micro_usd * len(pictures)
        for place, (type_, data) in enumerate(pictures):
            await _give(on_event, str(place), type_, data)
        return paid.cost_micro_usd / MICRO_USD_PER_USD


def _drawing_of(model: CloudModel, wanted: ImageInput) -> CloudDrawing:
    """How the model draws. Raises UnsuitableTargetError: not this."""
    drawing = model.drawing
    if drawing is None:
        raise UnsuitableTargetError(f"{model.id} does not draw")
    images = _OPERATIONS.get(wanted.operation)
    if images is None or images != len(wanted.images):
        raise UnsuitableTargetError(f"{model.id} cannot do {wanted.operation}; that is for ComfyUI")
    if images and not drawing.edits:
        raise UnsuitableTargetError(f"{model.id} draws from words only")
    if images == 2 and not _has_alpha_png(wanted.images[1].data):
        raise UnsuitableTargetError(f"{model.id} takes only a mask that is a PNG with transparency")
    if wanted.count > drawing.most:
        raise UnsuitableTargetError(f"{model.id} draws at most {drawing.most} pictures at once")
    return drawing


def _has_alpha_png(data: bytes) -> bool:
    return (
        data.startswith(b"\x89PNG\r\n\x1a\n")
        and len(data) > _PNG_COLOUR_TYPE_AT
        and data[_PNG_COLOUR_TYPE_AT] in _PNG_WITH_ALPHA
    )


def _fields(
    model: CloudModel, drawing: CloudDrawing, wanted: ImageInput, size: str, quality: str
) -> dict[str, str | int]:
    prompt = wanted.prompt
    if wanted.negative_prompt:
        prompt = f"{prompt}\n\nAvoid: {wanted.negative_prompt}"
    fields: dict[str, str | int] = {"model": model.model, "prompt": prompt, "n": wanted.count}
    if size:
        fields["size"] = size
    if quality:
        fields["quality"] = quality
    if drawing.asks_for_data:
        fields["response_format"] = "b64_json"
    return {name: value for name, value in fields.items() if name not in model.drop_fields}


def _request(fields: Mapping[str, str | int], images: tuple[ImagePart, ...]) -> tuple[str, str, bytes]:
    """Path, content type and body."""
    if not images:
        return _GENERATIONS, "application/json", msgspec.json.encode(fields)
    files = [
        FormFile(
            name=name,
            file_name=f"{name}.{_ENDINGS.get(image.content_type, 'bin')}",
            content_type=image.content_type,
            data=image.data,
        )
        for name, image in zip(("image", "mask"), images, strict=False)
    ]
    return _EDITS, *form({name: str(value) for name, value in fields.items()}, *files)


async def _read(paid: PaidCall, target_id: str, count: int) -> bytes:
    """The whole answer. Raises EngineProtocolError: it is longer than pictures are."""
    limit, body = count * _LARGEST_IMAGE_BYTES, bytearray()
    async for chunk in paid.reply.chunks():
        body += chunk
        if len(body) > limit:
            raise EngineProtocolError(
                f"{target_id} sent more than {limit >> 20} MiB for {count} pictures", engine=target_id
            )
    return bytes(body)


def _pictures(body: bytes, target_id: str) -> list[tuple[str, bytes]]:
    """Types and data of the pictures in an answer. Raises EngineProtocolError: there are none."""
    try:
        rows = _decoder.decode(body).data
    except msgspec.DecodeError as error:
        raise EngineProtocolError(
            f"{target_id} sent an answer that is not understood: {error}", engine=target_id
        ) from None
    return [_picture(row, target_id) for row in rows]


def _picture(row: _Row, target_id: str) -> tuple[str, bytes]:
    if row.b64_json is None:
        what = "a link, which is not followed" if row.url else "nothing"
        raise EngineProtocolError(f"{target_id} sent {what}, in place of a picture", engine=target_id)
    try:
        data = base64.b64decode(row.b64_json, validate=True)
    except ValueError:
        raise EngineProtocolError(f"{target_id} sent a picture in broken base64", engine=target_id) from None
    if data.startswith(b"\x89PNG\r\n\x1a\n"):
        return "image/png", data
    if data.startswith(b"\xff\xd8\xff"):
        return "image/jpeg", data
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return "image/webp", data
    raise EngineProtocolError(f"{target_id} sent something that is no picture", engine=target_id)


async def _give(
    on_event: Callable[[GenerationEvent], Awaitable[None]], artifact_id: str, content_type: str, data: bytes
) -> None:
    for offset in range(0, len(data), _PIECE_BYTES):
        piece = data[offset : offset + _PIECE_BYTES]
        last = offset + len(piece) == len(data)
        await on_event(
            ArtifactChunk(
                artifact_id=artifact_id,
                content_type=content_type,
                offset_bytes=offset,
                data=piece,
                length_bytes=len(piece),
                sha256=hashlib.sha256(data).hexdigest() if last else "",
                size_bytes=len(data),
            )
        )
