"""OpenAI's routes for pictures: generations, edits, variations."""

from __future__ import annotations

import base64
import time
from typing import Any

import msgspec
from aiohttp import web
from msgspec import Struct

from controlplane.artifacts import Artifacts
from controlplane.gateway._artifacts import artifact_url
from controlplane.gateway._errors import error_body, error_response
from controlplane.gateway._generate_stream import check_effort, checked, phase_told
from controlplane.gateway._generations import (
    Followed,
    Follower,
    artifact_base64,
    open_stream,
    send_lines,
)
from controlplane.gateway._openai import read_policy, read_request_id
from controlplane.gateway._pictures import picture_from_text, read_size
from controlplane.gateway._progress import progress_comment
from controlplane.pipelines import Wish, picture_of
from rung.errors import InvalidRequestError, RungError
from rung.types import Artifact, ArtifactChunk, ImageInput, ImagePart, JobEvent, JobKind, PhaseProgress, Usage

#: OpenAI's qualities, the old ones included, as tiers; None leaves it to the effort.
TIER_OF_QUALITY = {
    "auto": "",
    "low": "lightning",
    "medium": "quality",
    "high": "ultra",
    "xhigh": "ultra",
    "max": "ultra",
    "standard": "quality",
    "hd": "ultra",
}
_MAX_N = 10
_MAX_PARTIAL_IMAGES = 3
_FORMATS = ("url", "b64_json")


class _Body(Struct):
    """OpenAI's fields that matter to us, and from `tier` on our own.

    What is not here (`user`, `style`, `moderation` …) is taken and has no effect.
    """

    prompt: str = ""
    model: str = ""
    n: int | None = None
    size: str | None = None
    quality: str | None = None
    response_format: str | None = None
    output_format: str | None = None
    background: str | None = None
    stream: bool | None = None
    partial_images: int | None = None
    tier: str = ""
    seed: int | None = None
    negative_prompt: str = ""
    operation: str = ""
    parameters: dict[str, Any] = {}
    effort: int | None = None


class _PictureUrl(Struct):
    image_url: str


class _EditBody(_Body):
    """A JSON edit: pictures as base64 or `data:` URLs, as such or as OpenAI's `{"image_url": …}`."""

    image: str | list[str] | None = None
    images: list[str | _PictureUrl] = []
    mask: str | _PictureUrl | None = None


_generation_decoder = msgspec.json.Decoder(_Body)
_edit_decoder = msgspec.json.Decoder(_EditBody)
_encode = msgspec.json.encode


class ImageRoutes:
    """Handlers of `/v1/images`."""

    def __init__(self, follower: Follower, artifacts: Artifacts) -> None:
        self._follower = follower
        self._artifacts = artifacts

    async def generations(self, request: web.Request) -> web.StreamResponse:
        """`POST /v1/images/generations`."""
        try:
            body = _generation_decoder.decode(await request.read())
        except msgspec.DecodeError as error:
            raise InvalidRequestError(f"the request body is not valid: {error}") from None
        return await self._respond(request, body, (), body.operation or "generate", "image_generation")

    async def edits(self, request: web.Request) -> web.StreamResponse:
        """`POST /v1/images/edits`: `inpaint` with a mask, `img2img` without, or the `operation` it names."""
        body, pictures, mask = await _read_edit(request)
        if not pictures:
            raise InvalidRequestError("image is missing; send the picture to edit", param="image")
        operation = body.operation or ("inpaint" if mask is not None else "img2img")
        images = (*pictures, mask) if mask is not None else pictures
        return await self._respond(request, body, images, operation, "image_edit")

    async def variations(self, request: web.Request) -> web.StreamResponse:
        """`POST /v1/images/variations`: `img2img`, with a prompt or without."""
        body, pictures, _ = await _read_edit(request)
        if not pictures:
            raise InvalidRequestError("image is missing; send the picture to vary", param="image")
        return await self._respond(request, body, pictures, body.operation or "img2img", "image_edit")

    async def _respond(
        self,
        request: web.Request,
        body: _Body,
        images: tuple[ImagePart, ...],
        operation: str,
        event_name: str,
    ) -> web.StreamResponse:
        wish = _wish(request, body, images, operation)
        partial_images = (body.partial_images or 0) if body.stream else 0
        async with await self._follower.begin(wish, with_previews=partial_images > 0) as followed:
            if body.stream:
                return await self._stream(request, followed, event_name, partial_images)
            try:
                await followed.finish()
                data = [await self._image(request, body, artifact) for artifact in followed.artifacts]
            except RungError as error:
                return error_response(error, followed.headers)
            answer = {
                "created": int(time.time()),
                "data": data,
                "usage": _usage(followed.usage),
                "rung": followed.mark(),
            }
            return web.Response(
                body=_encode(answer), content_type="application/json", headers=followed.headers
            )

    async def _image(self, request: web.Request, body: _Body, artifact: Artifact) -> dict[str, object]:
        if body.response_format == "b64_json":
            return {"b64_json": await artifact_base64(self._artifacts, artifact), **_seed(artifact)}
        url = f"{request.scheme}://{request.host}{artifact_url(artifact.id)}"
        return {"url": url, **_seed(artifact)}

    async def _stream(
        self, request: web.Request, followed: Followed, event_name: str, partial_images: int
    ) -> web.StreamResponse:
        """Server-sent events: OpenAI's, and in comments, which its clients skip, `rung.progress`."""
        sent = 0

        async def line_of(event: JobEvent) -> bytes:
            nonlocal sent
            under_way = phase_told(event, followed)
            if under_way is not None:
                return progress_comment(under_way, event.elapsed_s)
            preview = event.payload
            if not (isinstance(preview, ArtifactChunk) and preview.preview and preview.data):
                return b""
            if not _is_due(sent, partial_images, followed.progress):
                return b""
            sent += 1
            return _partial_image(event_name, preview, sent - 1)

        response = await open_stream(request, followed, "text/event-stream")
        await send_lines(response, followed.lines(line_of))
        await response.write(await self._ending(followed, event_name))
        await response.write_eof()
        return response

    async def _ending(self, followed: Followed, event_name: str) -> bytes:
        try:
            error = followed.error()
            if error is not None:
                raise error
            completed = [
                _event(
                    f"{event_name}.completed",
                    await artifact_base64(self._artifacts, artifact),
                    artifact.content_type,
                    usage=_usage(followed.usage),
                    rung=followed.mark(),
                    **_seed(artifact),
                )
                for artifact in followed.artifacts
            ]
        except RungError as error:
            return b"event: error\ndata: " + error_body(error) + b"\n\n"
        return b"".join(completed)


def _partial_image(event_name: str, preview: ArtifactChunk, place: int) -> bytes:
    picture = base64.b64encode(preview.data).decode()
    return _event(f"{event_name}.partial_image", picture, preview.content_type, partial_image_index=place)


def _is_due(sent: int, wanted: int, progress: PhaseProgress | None) -> bool:
    """Whether a preview is one of the few that were asked for: they are spread over the sampling."""
    if sent >= wanted:
        return False
    percent = progress.percent if progress is not None else None
    return percent is None or percent * (wanted + 1) >= 100 * (sent + 1)


def _event(name: str, picture: str, content_type: str, **more: object) -> bytes:
    fields = {
        "type": name,
        "b64_json": picture,
        "created_at": int(time.time()),
        "background": "auto",
        "output_format": content_type.rpartition("/")[2],
        "quality": "auto",
        "size": "auto",
        **more,
    }
    return f"event: {name}\ndata: ".encode() + _encode(fields) + b"\n\n"


def _seed(artifact: Artifact) -> dict[str, int]:
    """Our own field beside OpenAI's, where there is one."""
    return {} if artifact.seed is None else {"seed": artifact.seed}


def _usage(usage: Usage) -> dict[str, object]:
    tokens_in, tokens_out = usage.prompt_tokens, usage.completion_tokens
    return {
        "input_tokens": tokens_in,
        "input_tokens_details": {"image_tokens": 0, "text_tokens": tokens_in},
        "output_tokens": tokens_out,
        "total_tokens": tokens_in + tokens_out,
    }


def _wish(request: web.Request, body: _Body, images: tuple[ImagePart, ...], operation: str) -> Wish:
    _check(body)
    width, height = read_size(body.size or "auto")
    return Wish(
        kind=JobKind.IMAGE,
        model=body.model,
        input=checked(
            ImageInput(
                prompt=body.prompt,
                negative_prompt=body.negative_prompt,
                operation=operation,
                tier=body.tier or TIER_OF_QUALITY[body.quality or "auto"],
                width_pixels=width,
                height_pixels=height,
                seed=body.seed,
                images=images,
                parameters=body.parameters,
                count=body.n or 1,
                previews=bool(body.stream and body.partial_images),
            )
        ),
        policy=read_policy(request),
        effort=check_effort(body.effort),
        request_id=read_request_id(request),
    )


def _check(body: _Body) -> None:
    """Refuse values that would otherwise mean something else than their caller thinks."""
    if body.n is not None and not 1 <= body.n <= _MAX_N:
        raise _refusal("n", body.n, f"1 to {_MAX_N}")
    if body.partial_images is not None and not 0 <= body.partial_images <= _MAX_PARTIAL_IMAGES:
        raise _refusal("partial_images", body.partial_images, f"0 to {_MAX_PARTIAL_IMAGES}")
    if body.quality is not None and body.quality not in TIER_OF_QUALITY:
        raise _refusal("quality", body.quality, f"one of {', '.join(TIER_OF_QUALITY)}")
    if body.response_format is not None and body.response_format not in _FORMATS:
        raise _refusal("response_format", body.response_format, "url or b64_json")
    if body.output_format not in (None, "auto", "png"):
        raise _refusal("output_format", body.output_format, "png, which is what the engines make")
    if body.background not in (None, "auto", "opaque"):
        raise _refusal("background", body.background, "auto or opaque")


def _refusal(name: str, value: object, allowed: str) -> InvalidRequestError:
    return InvalidRequestError(f"{name} is {value!r:.60}; it must be {allowed}", param=name)


async def _read_edit(request: web.Request) -> tuple[_Body, tuple[ImagePart, ...], ImagePart | None]:
    """The fields, the pictures and the mask of an edit, sent as a form or as JSON."""
    if request.content_type == "multipart/form-data":
        return await _read_form(request)
    try:
        body = _edit_decoder.decode(await request.read())
    except msgspec.DecodeError as error:
        raise InvalidRequestError(f"the request body is not valid: {error}") from None
    given = [body.image] if isinstance(body.image, str) else list(body.image or ())
    texts = [*given, *map(_text, body.images)]
    name = "image" if given else "images"
    pictures = tuple(picture_from_text(text, f"{name}[{place}]") for place, text in enumerate(texts))
    mask = picture_from_text(_text(body.mask), "mask") if body.mask is not None else None
    return body, pictures, mask


def _text(picture: str | _PictureUrl) -> str:
    return picture if isinstance(picture, str) else picture.image_url


async def _read_form(request: web.Request) -> tuple[_Body, tuple[ImagePart, ...], ImagePart | None]:
    fields: dict[str, Any] = {}
    pictures: list[ImagePart] = []
    mask: ImagePart | None = None
    form = await request.post()
    for name, value in form.items():
        if isinstance(value, web.FileField):
            picture = picture_of(value.file.read(), name)
            if name == "mask":
                mask = picture
            else:
                pictures.append(picture)
        elif isinstance(value, str):
            fields[name] = value
    try:
        if "parameters" in fields:
            fields["parameters"] = msgspec.json.decode(fields["parameters"])
        body = msgspec.convert(fields, _Body, strict=False)
    except msgspec.DecodeError as error:
        raise InvalidRequestError(f"the form is not valid: {error}") from None
    return body, tuple(pictures), mask
