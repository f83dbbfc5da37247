"""`POST /v1/meshes`: a mesh of a picture or of words, as a GLB or with all that happens until it is there."""

from __future__ import annotations

from typing import Any

import msgspec
from aiohttp import web
from msgspec import Struct
from msgspec.structs import replace

from controlplane.artifacts import Artifacts
from controlplane.gateway._artifacts import artifact_url, send_pieces
from controlplane.gateway._errors import error_response
from controlplane.gateway._generate_stream import check_effort
from controlplane.gateway._generations import Followed, Follower, open_stream, send_lines
from controlplane.gateway._jobs import ndjson_event, sse_event
from controlplane.gateway._openai import read_policy, read_request_id
from controlplane.gateway._pictures import picture_from_text
from controlplane.pipelines import Wish, picture_of
from rung.errors import InvalidRequestError, RungError
from rung.types import ImagePart, JobEvent, JobKind, MeshInput


class _Body(Struct, forbid_unknown_fields=True):
    """What is asked for; as `MeshInput`, whose fields say more.

    `image` is base64 or a `data:` URL; in a form it is a file. With `stream` the answer is the job's log as
    it grows, without it the mesh.
    """

    prompt: str = ""
    image: str = ""
    seed: int | None = None
    texture: bool = False
    model: str = ""
    effort: int | None = None
    local_only: bool = False
    stream: bool = False


_decoder = msgspec.json.Decoder(_Body)


class MeshRoutes:
    """Handlers of `/v1/meshes`."""

    def __init__(self, follower: Follower, artifacts: Artifacts) -> None:
        self._follower = follower
        self._artifacts = artifacts

    async def create(self, request: web.Request) -> web.StreamResponse:
        """`POST /v1/meshes`, as JSON or as a form.

        A stream has the events of the job's log, as `/v1/jobs/{id}/events` has them: NDJSON, or server-sent
        events if the caller accepts them.
        """
        body, picture = await _read(request)
        async with await self._follower.begin(_wish(request, body, picture)) as followed:
            if body.stream:
                return await _stream(request, followed)
            try:
                await followed.finish()
            except RungError as error:
                return error_response(error, followed.headers)
            return await self._mesh(request, followed)

    async def _mesh(self, request: web.Request, followed: Followed) -> web.StreamResponse:
        """The file itself. Raises UnknownArtifactError, UnavailableError: it is not there any more."""
        mesh = followed.artifacts[0]
        response = web.StreamResponse(headers=followed.headers)
        response.headers["Content-Location"] = artifact_url(mesh.id)
        response.content_type = mesh.content_type
        response.content_length = mesh.size_bytes
        return await send_pieces(request, response, self._artifacts.pieces(mesh.id))


async def _stream(request: web.Request, followed: Followed) -> web.StreamResponse:
    sse = "text/event-stream" in request.headers.get("Accept", "")
    write = sse_event if sse else ndjson_event

    async def line_of(event: JobEvent) -> bytes:
        return write(event)

    response = await open_stream(request, followed, "text/event-stream" if sse else "application/x-ndjson")
    await send_lines(response, followed.lines(line_of))
    await response.write_eof()
    return response


async def _read(request: web.Request) -> tuple[_Body, ImagePart | None]:
    """The fields, and the picture. Raises InvalidRequestError."""
    if request.content_type == "multipart/form-data":
        return await _read_form(request)
    try:
        body = _decoder.decode(await request.read())
    except msgspec.DecodeError as error:
        raise InvalidRequestError(f"the request body is not valid: {error}") from None
    return body, picture_from_text(body.image, "image") if body.image else None


async def _read_form(request: web.Request) -> tuple[_Body, ImagePart | None]:
    fields: dict[str, Any] = {}
    picture: ImagePart | None = None
    for name, value in (await request.post()).items():
        if isinstance(value, web.FileField):
            if name != "image" or picture is not None:
                raise InvalidRequestError(f"{name} is one file too many; send one as image", param=name)
            picture = picture_of(value.file.read(), name)
        else:
            fields[name] = value
    try:
        body = msgspec.convert(fields, _Body, strict=False)
    except msgspec.ValidationError as error:
        raise InvalidRequestError(f"the form is not valid: {error}") from None
    if picture is None and body.image:
        picture = picture_from_text(body.image, "image")
    return body, picture


def _wish(request: web.Request, body: _Body, picture: ImagePart | None) -> Wish:
    policy = read_policy(request)
    return Wish(
        kind=JobKind.MESH,
        model=body.model,
        input=MeshInput(prompt=body.prompt, image=picture, seed=body.seed, texture=body.texture),
        policy=replace(policy, local_only=policy.local_only or body.local_only),
        effort=check_effort(body.effort),
        request_id=read_request_id(request),
    )
