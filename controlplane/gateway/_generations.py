"""What the routes of generations have in common: beginning a job, following it, and what came of it."""

from __future__ import annotations

import base64
from collections.abc import AsyncGenerator
from types import TracebackType

import msgspec

from controlplane.artifacts import Artifacts
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

#: A stream says what is under way at least once a second: this leaves time to send it.
KEEP_ALIVE_S = 0.8
#: After so long without a line, an event of which there is nothing to tell is one: the next event, or a
#: heartbeat, may be `KEEP_ALIVE_S` away, and both together are to be no more than a second.
_QUIET_S = 0.2


class Quiet:
    """How long a stream has said nothing, by the time of its job."""

    def __init__(self) -> None:
        self._told_s = 0.0

    def told(self, elapsed_s: float) -> None:
        """A line was sent."""
        self._told_s = elapsed_s

    def too_long(self, elapsed_s: float) -> bool:
        """Whether an event without a line of its own has to be one all the same."""
        return elapsed_s - self._told_s >= _QUIET_S


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

    async def events(self) -> AsyncGenerator[JobEvent, None]:
        """The events to the terminal one, with a heartbeat wherever nothing happens for a while."""
        watching = self._jobs.watch(
            self.job_id,
            heartbeat_s=KEEP_ALIVE_S,
            with_data=self._with_data,
            with_previews=self._with_previews,
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


async def artifact_base64(artifacts: Artifacts, artifact: Artifact) -> str:
    """A whole artifact as base64. Raises UnknownArtifactError, UnavailableError."""
    data = b"".join([piece async for piece in artifacts.pieces(artifact.id)])
    return base64.b64encode(data).decode()
