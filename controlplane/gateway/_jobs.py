"""Jobs over HTTP: create, list, cancel, and their logs as NDJSON or server-sent events."""

from __future__ import annotations

import msgspec
from aiohttp import web

from controlplane.gateway._artifacts import artifact_url, break_off
from controlplane.gateway._job_wish import read_job_wish
from controlplane.gateway._openai import read_request_id
from controlplane.jobs import Jobs
from controlplane.pipelines import Pipelines
from rung.errors import InvalidRequestError, RungError
from rung.types import ArtifactChunk, JobEvent, JobState

_PAGE_BOUNDS = (1, 1000)


_encode = msgspec.json.encode


class JobRoutes:
    """Handlers of `/v1/jobs`."""

    def __init__(self, jobs: Jobs, pipelines: Pipelines) -> None:
        self._jobs = jobs
        self._pipelines = pipelines

    async def create(self, request: web.Request) -> web.StreamResponse:
        """`POST /v1/jobs`: a detached job, stored before the answer.

        The same `request_id` is the same job.
        """
        wish = read_job_wish(await request.read(), read_request_id(request))
        job = await self._pipelines.create_detached(await self._pipelines.prepare(wish))
        return web.Response(
            status=201,
            body=_encode(job),
            content_type="application/json",
            headers={"Location": f"/v1/jobs/{job.id}"},
        )

    async def index(self, request: web.Request) -> web.StreamResponse:
        """`GET /v1/jobs?limit=&state=`: newest first."""
        limit = _read_number(request, "limit", 50)
        if not _PAGE_BOUNDS[0] <= limit <= _PAGE_BOUNDS[1]:
            raise InvalidRequestError("limit must be 1 to 1000")
        try:
            states = [JobState(state) for state in request.query.getall("state", [])]
        except ValueError:
            raise InvalidRequestError(f"state must be one of {', '.join(JobState)}") from None
        found = await self._jobs.list(page_size=limit, states=states)
        return _json({"object": "list", "data": found})

    async def show(self, request: web.Request) -> web.StreamResponse:
        """`GET /v1/jobs/{id}`."""
        return _json(await self._jobs.get(request.match_info["id"]))

    async def cancel(self, request: web.Request) -> web.StreamResponse:
        """`POST /v1/jobs/{id}/cancel`."""
        return _json(await self._jobs.cancel(request.match_info["id"], "caller"))

    async def events(self, request: web.Request) -> web.StreamResponse:
        """`GET /v1/jobs/{id}/events`: the log from any place to its end, with a heartbeat a second.

        Server-sent events if the caller accepts them, NDJSON otherwise. Resumes after `Last-Event-ID`, which
        an EventSource sends when it reconnects, else after `?after=`, which stays in its URL all along. A
        caller that has all of it, with the terminal event, gets 204, and an EventSource reconnects no more.
        Heartbeats have sequence 0 and no SSE id. Pieces of artifacts have the URL of the whole, and their
        data only with `?data=inline`.
        """
        job_id = request.match_info["id"]
        await self._jobs.get(job_id)
        sse = "text/event-stream" in request.headers.get("Accept", "")
        last_seen = request.headers.get("Last-Event-ID", "")
        after = _number("Last-Event-ID", last_seen) if last_seen else _read_number(request, "after", 0)
        write = sse_event if sse else ndjson_event
        inline = request.query.get("data", "url")
        if inline not in ("inline", "url"):
            raise InvalidRequestError(f"data is {inline[:40]!r}; it must be inline or url")
        events = self._jobs.watch(job_id, after, with_data=inline == "inline")
        # What is wrong with the place to resume from is known with the first event, before any byte.
        first = await anext(events, None)
        if first is None:
            return web.Response(status=204)
        response = web.StreamResponse(headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"})
        response.content_type = "text/event-stream" if sse else "application/x-ndjson"
        response.charset = "utf-8"
        await response.prepare(request)
        try:
            await response.write(write(first))
            async for event in events:
                await response.write(write(event))
        except RungError:
            # The reader resumes from where it is.
            break_off(request)
        else:
            await response.write_eof()
        return response


def event_fields(event: JobEvent) -> bytes:
    """An event as one flat JSON object: sequence, times, then the fields of its kind; bytes are base64."""
    head = _encode(
        {"sequence": event.sequence, "elapsed_s": round(event.elapsed_s, 3), "time_s": event.time_s}
    )
    payload = event.payload
    fields = head[:-1] + b"," + _encode(payload)[1:]
    if isinstance(payload, ArtifactChunk) and not payload.preview:
        return fields[:-1] + b',"url":' + _encode(artifact_url(payload.artifact_id)) + b"}"
    return fields


def ndjson_event(event: JobEvent) -> bytes:
    """An event as a line."""
    return event_fields(event) + b"\n"


def sse_event(event: JobEvent) -> bytes:
    """An event as a server-sent event; its id is the sequence, so that a browser resumes by itself."""
    identity = f"id: {event.sequence}\n".encode() if event.sequence else b""
    return identity + b"data: " + event_fields(event) + b"\n\n"


def _read_number(request: web.Request, name: str, default: int) -> int:
    """A number from the query. Raises InvalidRequestError."""
    text = request.query.get(name)
    return _number(name, text) if text else default


def _number(name: str, text: str) -> int:
    if not text.isascii() or not text.isdigit() or len(text) > 18:
        raise InvalidRequestError(f"{name} is {text[:40]!r}; it must be a whole number")
    return int(text)


def _json(value: object) -> web.Response:
    return web.Response(body=_encode(value), content_type="application/json")
