"""What the routes of generations have in common: beginning a job, following it, and what came of it."""

from __future__ import annotations

import base64
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import aclosing
from types import TracebackType
from typing import TypeAlias

import msgspec
from aiohttp import web

from controlplane.artifacts import Artifacts
from controlplane.gateway._keep_alive import KEEP_ALIVE_S
from controlplane.gateway._openai import job_headers
from controlplane.jobs import Jobs
from controlplane.pipelines import Begun, Pipelines, Wish
from rung import error_of_failure
from rung.errors import JobCancelledError, RungError, UnavailableError
from rung.types import (
    TERMINAL_EVENTS,
    Artifact,
    JobCancelled,
    JobDone,
    JobEvent,
    JobFailed,
    Phase,
    PhaseProgress,
    Terminal,
    Usage,
    UsageReported,
    whole_artifact,
)

#: An event as a route tells it; empty for one of which it has nothing to tell. Of a heartbeat it always has.
LineOf: TypeAlias = Callable[[JobEvent], Awaitable[bytes]]


class Follower:
    """Begins generations and follows them, each over one request."""

    def __init__(self, jobs: Jobs, pipelines: Pipelines) -> None:
        self._jobs = jobs
        self._pipelines = pipelines

    async def begin(self, wish: Wish, *, with_data: bool = False, with_previews: bool = False) -> Followed:
        """Begin a job.

        Args:
            wish: what is wanted.
            with_data: its events come with the data of artifacts and previews.
            with_previews: they come with the data of previews.

        Raises:
            RungError: as `Pipelines.launch`.
        """
        wish = await self._pipelines.prepare(wish)
        if wish.policy.detached:
            job = await self._pipelines.create_detached(wish)
            return Followed(self._jobs, job.id, None, with_data=with_data, with_previews=with_previews)
        begun = self._pipelines.launch(wish)
        return Followed(self._jobs, begun.job.id, begun, with_data=with_data, with_previews=with_previews)


class Followed:
    """A job that was begun for a request, and what its events add up to so far.

    As a context manager it is cancelled when it is left before its end, unless it is detached.
    """

    def __init__(
        self,
        jobs: Jobs,
        job_id: str,
        begun: Begun | None,
        *,
        with_data: bool = False,
        with_previews: bool = False,
    ) -> None:
        self._jobs = jobs
        self._with_data = with_data
        self._with_previews = with_previews
        self._begun = begun
        self.job_id = job_id
        self.progress: PhaseProgress | None = None
        self.artifacts: list[Artifact] = []
        self.usage = Usage()
        self.end: Terminal | None = None

    async def __aenter__(self) -> Followed:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._begun is not None:
            # A job that has ended does not mind.
            self._begun.job.request_cancel("caller_disconnected")

    @property
    def headers(self) -> dict[str, str]:
        """Which job it is, and, as far as that is known, who works on it."""
        return {"X-Rung-Job": self.job_id} if self._begun is None else job_headers(self._begun)

    def mark(self) -> msgspec.Raw:
        """Who was asked and who answered, as JSON."""
        if self._begun is not None:
            return msgspec.Raw(self._begun.mark())
        return msgspec.Raw(msgspec.json.encode({"job": self.job_id}))

    async def lines(self, line_of: LineOf) -> AsyncGenerator[bytes, None]:
        """What a route streams of the job, to its end: never silent for a second.

        Silence is between lines, not between events: `line_of` is given a heartbeat `KEEP_ALIVE_S` after the
        last event of which it made a line, whatever else happened meanwhile.

        Args:
            line_of: makes the lines.

        Raises:
            UnavailableError: the log of the job cannot be read.
        """
        line = b""
        async with aclosing(self.events(has_told=lambda: bool(line))) as events:
            async for event in events:
                line = await line_of(event)
                if line:
                    yield line

    async def events(self, *, has_told: Callable[[], bool] | None = None) -> AsyncGenerator[JobEvent, None]:
        """The events to the terminal one, for what is answered as a whole; streams have `lines`.

        Args:
            has_told: as `Jobs.watch`.

        Raises:
            UnavailableError: the log of the job cannot be read.
        """
        watching = self._jobs.watch(
            self.job_id,
            heartbeat_s=KEEP_ALIVE_S,
            with_data=self._with_data,
            with_previews=self._with_previews,
            has_told=has_told,
        )
        async for event in watching:
            self._take(event)
            yield event

    async def finish(self) -> None:
        """Follow to the end.

        Raises:
            RungError: the job did not end with a result.
        """
        async for _ in self.events():
            pass
        error = self.error()
        if error is not None:
            raise error

    def error(self) -> RungError | None:
        """Why there is no result; None if there is one."""
        match self.end:
            case JobDone():
                return None
            case JobFailed() as failed:
                return error_of_failure(failed)
            case JobCancelled(by):
                return JobCancelledError(f"the job was cancelled by {by}", job=self.job_id, by=by)
            case None:
                return UnavailableError("the log of the job ended before its last event", job=self.job_id)

    def _take(self, event: JobEvent) -> None:
        payload = event.payload
        if isinstance(payload, PhaseProgress):
            # That it is done is for the terminal event to say.
            self.progress = self.progress if payload.phase is Phase.DONE else payload
        elif (artifact := whole_artifact(event)) is not None:
            self.artifacts.append(artifact)
        elif isinstance(payload, UsageReported):
            self.usage = payload.usage
        elif isinstance(payload, TERMINAL_EVENTS):
            self.end = payload


async def open_stream(request: web.Request, followed: Followed, content_type: str) -> web.StreamResponse:
    """Begin an answer that is sent line by line."""
    response = web.StreamResponse(
        headers={**followed.headers, "Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
    )
    response.content_type = content_type
    response.charset = "utf-8"
    await response.prepare(request)
    return response


async def send_lines(response: web.StreamResponse, lines: AsyncGenerator[bytes, None]) -> None:
    """Send lines as they come, to the last one. Raises what making them raises."""
    async with aclosing(lines):
        async for line in lines:
            await response.write(line)


async def artifact_base64(artifacts: Artifacts, artifact: Artifact) -> str:
    """A whole artifact as base64. Raises UnknownArtifactError, UnavailableError."""
    data = b"".join([piece async for piece in artifacts.pieces(artifact.id)])
    return base64.b64encode(data).decode()
