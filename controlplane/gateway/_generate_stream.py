"""`POST /generate/stream`: a picture, with a line for everything that happens until it is there."""

from __future__ import annotations

import base64
from collections.abc import AsyncGenerator, Sequence
from typing import Any

import msgspec
from aiohttp import web
from msgspec import Struct
from msgspec.structs import replace

from controlplane.artifacts import Artifacts
from controlplane.gateway._artifacts import artifact_url
from controlplane.gateway._generations import (
    Followed,
    Follower,
    artifact_base64,
    open_stream,
    send_lines,
)
from controlplane.gateway._openai import read_policy, read_request_id
from controlplane.gateway._pictures import picture_from_text
from controlplane.gateway._progress import progress_line, tenths
from controlplane.pipelines import Wish, check_side
from rung.errors import InvalidRequestError, RungError
from rung.types import (
    Artifact,
    ArtifactChunk,
    ImageInput,
    JobCancelled,
    JobDone,
    JobEvent,
    JobFailed,
    JobKind,
    Phase,
    PhaseProgress,
)

#: Pictures in one job; more are more jobs, between which others get their turn.
MAX_COUNT = 16


class _Body(Struct, forbid_unknown_fields=True):
    """What is asked for; as `ImageInput`, whose fields say more.

    `images` are base64 or `data:` URLs; `response_format` is `url`, or `b64_json` for pictures in the last
    line, too; a `detached` job goes on when its caller goes away.
    """

    prompt: str = ""
    tier: str = ""
    negative_prompt: str = ""
    width: int = 0
    height: int = 0
    seed: int | None = None
    operation: str = "generate"
    images: list[str] = []
    parameters: dict[str, Any] = {}
    effort: int | None = None
    local_only: bool = False
    count: int = 1
    previews: bool = False
    model: str = ""
    detached: bool = False
    response_format: str = "url"


_decoder = msgspec.json.Decoder(_Body)
_encode = msgspec.json.encode


class GenerateStreamRoutes:
    """Handlers of `/generate`."""

    def __init__(self, follower: Follower, artifacts: Artifacts) -> None:
        self._follower = follower
        self._artifacts = artifacts

    async def stream(self, request: web.Request) -> web.StreamResponse:
        """`POST /generate/stream`: NDJSON, or server-sent events if the caller accepts them.

        The last line has the phase `done`, `failed` or `cancelled`; before it there is one at least once a
        second. What is wrong with a request is answered with a status instead.
        """
        body = _read_body(await request.read())
        wish = _wish(body, request)
        sse = "text/event-stream" in request.headers.get("Accept", "")
        async with await self._follower.begin(wish, with_previews=body.previews) as followed:
            content_type = "text/event-stream" if sse else "application/x-ndjson"
            response = await open_stream(request, followed, content_type)
            await send_lines(
                response, self.lines(followed, sse=sse, inline=body.response_format == "b64_json")
            )
            await response.write_eof()
        return response

    def lines(
        self, followed: Followed, *, sse: bool = False, inline: bool = False
    ) -> AsyncGenerator[bytes, None]:
        """A job as `/generate/stream` tells it, from its first line to the last.

        Args:
            followed: the job.
            sse: as server-sent events instead of NDJSON.
            inline: the last line has the pictures themselves, too.

        Raises:
            UnavailableError: the log of the job cannot be read.
        """

        async def line_of(event: JobEvent) -> bytes:
            line = await self._line(event, followed, inline=inline)
            if line is None:
                return b""
            return _sse(event, line) if sse else _encode(line) + b"\n"

        return followed.lines(line_of)

    async def _line(self, event: JobEvent, followed: Followed, *, inline: bool) -> dict[str, object] | None:
        under_way = phase_told(event, followed)
        if under_way is not None:
            return progress_line(under_way, event.elapsed_s)
        match event.payload:
            case ArtifactChunk(preview=True, content_type=content_type, data=data) if data:
                progress = followed.progress or PhaseProgress(Phase.SAMPLING)
                preview = {"content_type": content_type, "b64_json": base64.b64encode(data).decode()}
                return progress_line(progress, event.elapsed_s) | {"preview": preview}
            case JobDone():
                images = [await self._image(artifact, inline=inline) for artifact in followed.artifacts]
                detail = _made_words(followed.artifacts)
                return {
                    "phase": "done",
                    "elapsed_s": tenths(event.elapsed_s),
                    "detail": detail,
                    "images": images,
                }
            case JobFailed(reason, detail):
                return {
                    "phase": "failed",
                    "elapsed_s": tenths(event.elapsed_s),
                    "reason": reason.value,
                    "detail": detail,
                }
            case JobCancelled(by):
                return {"phase": "cancelled", "elapsed_s": tenths(event.elapsed_s), "by": by}
            case _:
                return None

    async def _image(self, artifact: Artifact, *, inline: bool) -> dict[str, object]:
        image: dict[str, object] = {
            "url": artifact_url(artifact.id),
            "content_type": artifact.content_type,
            "size_bytes": artifact.size_bytes,
            "sha256": artifact.sha256,
        }
        if artifact.seed is not None:
            image["seed"] = artifact.seed
        if inline:
            try:
                image["b64_json"] = await artifact_base64(self._artifacts, artifact)
            except RungError as error:
                # The job did well and says so; only this copy of its picture cannot be had.
                image["error"] = error.message
        return image


def phase_told(event: JobEvent, followed: Followed) -> PhaseProgress | None:
    """The phase that an event tells of, for streams whose last line says that the job is done.

    That is not for a phase to say, since readers stop at the first `done`: a heartbeat after it says what was
    under way before, and nothing of how much longer.
    """
    phase = event.payload
    if not isinstance(phase, PhaseProgress):
        return None
    if phase.phase is not Phase.DONE:
        return phase
    if event.sequence:
        return None
    return replace(followed.progress or PhaseProgress(Phase.ROUTE), remaining_s=None, job_remaining_s=None)


def _sse(event: JobEvent, line: dict[str, object]) -> bytes:
    # The id is the place in the job's log, from which `/v1/jobs/{id}/events` goes on.
    identity = f"id: {event.sequence}\n".encode() if event.sequence else b""
    return identity + b"data: " + _encode(line) + b"\n\n"


def _made_words(artifacts: Sequence[Artifact]) -> str:
    stills = all(artifact.content_type.startswith("image/") for artifact in artifacts)
    return f"{len(artifacts)} {'image' if stills else 'file'}(s) generated"


def _read_body(text: bytes) -> _Body:
    try:
        body = _decoder.decode(text)
    except msgspec.DecodeError as error:
        raise InvalidRequestError(f"the request body is not valid: {error}") from None
    if body.response_format not in ("url", "b64_json"):
        raise InvalidRequestError(
            f"response_format is {body.response_format[:40]!r}; it must be url or b64_json",
            param="response_format",
        )
    return body


def _wish(body: _Body, request: web.Request) -> Wish:
    policy = read_policy(request)
    return Wish(
        kind=JobKind.IMAGE,
        model=body.model,
        input=checked(
            ImageInput(
                prompt=body.prompt,
                negative_prompt=body.negative_prompt,
                operation=body.operation or "generate",
                tier=body.tier,
                width_pixels=body.width,
                height_pixels=body.height,
                seed=body.seed,
                images=tuple(
                    picture_from_text(text, f"images[{place}]") for place, text in enumerate(body.images)
                ),
                parameters=body.parameters,
                count=body.count,
                previews=body.previews,
            )
        ),
        policy=replace(
            policy, local_only=policy.local_only or body.local_only, detached=policy.detached or body.detached
        ),
        effort=check_effort(body.effort),
        request_id=read_request_id(request),
    )


def checked(wanted: ImageInput) -> ImageInput:
    """An input as it came, if any engine could make it. Raises InvalidRequestError."""
    if not wanted.prompt.strip() and not wanted.images:
        raise InvalidRequestError("prompt is empty; say what to draw", param="prompt")
    if not 1 <= wanted.count <= MAX_COUNT:
        raise InvalidRequestError(f"count is {wanted.count}; it must be 1 to {MAX_COUNT}", param="count")
    if wanted.seed is not None and not 0 <= wanted.seed < 2**63:
        raise InvalidRequestError(f"seed is {wanted.seed}; it must be 0 to 2^63 - 1", param="seed")
    check_side("width", wanted.width_pixels)
    check_side("height", wanted.height_pixels)
    return wanted


def check_effort(effort: int | None) -> int | None:
    """An effort as it came. Raises InvalidRequestError for one that is not 1 to 10."""
    if effort is not None and not 1 <= effort <= 10:
        raise InvalidRequestError(f"effort is {effort}; it must be 1 to 10", param="effort")
    return effort
