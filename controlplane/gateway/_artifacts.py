"""Artifacts over HTTP: fetched whole or in ranges, and listed by job.

What they hold was made by a model from anybody's words, so nothing of it may run in a browser: only media
types that cannot are served as themselves, and all in a sandbox.
"""

from __future__ import annotations

import re
from collections.abc import AsyncGenerator
from contextlib import aclosing

import msgspec
from aiohttp import web

from controlplane.artifacts import Artifacts
from controlplane.jobs import Jobs
from rung.errors import RungError
from rung.types import Artifact, artifact_file_name

_RANGE = re.compile(r"bytes=(\d{0,18})-(\d{0,18})", re.ASCII)
_SHOWN = re.compile(r"(?:audio|image|video)/[a-z0-9][a-z0-9.+-]*")
_SAVED = frozenset({"application/json", "model/gltf-binary", "model/gltf+json", "model/obj", "model/stl"})
_UNKNOWN_TYPE = "application/octet-stream"


class ArtifactRoutes:
    """Handlers of `/v1/artifacts`, and of the artifacts of a job."""

    def __init__(self, artifacts: Artifacts, jobs: Jobs) -> None:
        self._artifacts = artifacts
        self._jobs = jobs

    async def of_job(self, request: web.Request) -> web.StreamResponse:
        """`GET /v1/jobs/{id}/artifacts`: those that are whole and still there, in order."""
        job = await self._jobs.get(request.match_info["id"])
        found = await self._artifacts.of_job(job.id)
        listed = [msgspec.structs.asdict(each) | {"url": artifact_url(each.id)} for each in found]
        return web.Response(
            body=msgspec.json.encode({"object": "list", "data": listed}), content_type="application/json"
        )

    async def fetch(self, request: web.Request) -> web.StreamResponse:
        """`GET` or `HEAD /v1/artifacts/{id}`, with `Range`, `If-Range` and `If-None-Match`.

        An artifact never changes: its SHA-256 is its ETag, and a cache may keep it for good.
        """
        artifact = await self._artifacts.get(request.match_info["id"])
        headers = _headers(artifact)
        etag = headers["ETag"]
        if _names(request.headers.get("If-None-Match", ""), etag):
            return web.Response(status=304, headers=headers)
        headers["Content-Type"], headers["Content-Disposition"] = _presentation(artifact)
        wanted = request.headers.get("Range", "") if request.headers.get("If-Range", etag) == etag else ""
        size = artifact.size_bytes
        part = parse_range(wanted, size)
        if part is not None and not part:
            headers |= {"Content-Range": f"bytes */{size}", "Content-Type": "text/plain"}
            return web.Response(status=416, headers=headers)
        response = web.StreamResponse(status=200 if part is None else 206, headers=headers)
        if part is not None:
            response.headers["Content-Range"] = f"bytes {part.start}-{part.stop - 1}/{size}"
        else:
            part = range(size)
        response.content_length = len(part)
        if request.method == "HEAD":
            await response.prepare(request)
            return response
        return await send_pieces(
            request, response, self._artifacts.pieces(artifact.id, part.start, len(part))
        )


async def send_pieces(
    request: web.Request, response: web.StreamResponse, pieces: AsyncGenerator[bytes, None]
) -> web.StreamResponse:
    """Send a file piece by piece; one that ends too early breaks the answer off.

    Raises:
        UnknownArtifactError, UnavailableError: it is not there any more; nothing was sent.
    """
    try:
        async with aclosing(pieces):
            async for piece in pieces:
                if not response.prepared:
                    # Only now: that it was deleted a moment ago is known with the first piece.
                    await response.prepare(request)
                await response.write(piece)
    except RungError:
        if not response.prepared:
            raise
        break_off(request)
    else:
        await response.write_eof()
    return response


def artifact_url(artifact_id: str) -> str:
    """Where an artifact can be fetched, on this server."""
    return f"/v1/artifacts/{artifact_id}"


def break_off(request: web.Request) -> None:
    """Close the connection in the middle of an answer, so that nobody takes what was sent for all of it."""
    if request.transport is not None:
        request.transport.abort()


def parse_range(text: str, size_bytes: int) -> range | None:
    """Which bytes a `Range` header wants; None for all of them, an empty range for none that there are.

    Several ranges at once, and what is malformed, mean all, as RFC 9110 allows.
    """
    found = _RANGE.fullmatch(text.strip())
    if found is None or found[0] == "bytes=-":
        return None
    first, last = found[1], found[2]
    if not first:
        return range(max(0, size_bytes - int(last)), size_bytes)
    if last and int(last) < int(first):
        return None
    end = min(int(last) + 1, size_bytes) if last else size_bytes
    return range(int(first), end)


def _headers(artifact: Artifact) -> dict[str, str]:
    return {
        "ETag": f'"{artifact.sha256}"',
        "Accept-Ranges": "bytes",
        "Cache-Control": "private, max-age=31536000, immutable",
        "X-Content-Type-Options": "nosniff",
        "Content-Security-Policy": "sandbox; default-src 'none'",
    }


def _presentation(artifact: Artifact) -> tuple[str, str]:
    """Media type and disposition: pictures, sound and films are shown, all else is saved."""
    media_type = artifact.content_type.partition(";")[0].strip().lower()
    shown = bool(_SHOWN.fullmatch(media_type)) and media_type != "image/svg+xml"
    if not shown and media_type not in _SAVED:
        media_type = _UNKNOWN_TYPE
    name = artifact_file_name(artifact.id, artifact.content_type)
    return media_type, f'{"inline" if shown else "attachment"}; filename="{name}"'


def _names(header: str, etag: str) -> bool:
    """Whether an `If-None-Match` header names what there is."""
    tags = [tag.strip().removeprefix("W/") for tag in header.split(",")]
    return etag in tags or tags == ["*"]
