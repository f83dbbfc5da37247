"""Pictures for meshes, drawn by jobs of their own."""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextlib import aclosing
from typing import Protocol

from msgspec.structs import replace

from controlplane.jobs import LiveJob
from controlplane.pipelines._wish import Wish
from rung import error_of_failure
from rung.errors import EngineProtocolError, JobCancelledError, RungError
from rung.types import (
    ArtifactChunk,
    ImageInput,
    ImagePart,
    JobCancelled,
    JobEvent,
    JobFailed,
    JobKind,
    Phase,
    PhaseProgress,
    Policy,
)

#: What a picture has to be like for a mesh to come of it.
_STYLE = "one object, whole, seen from the front, centred, plain white background, even light, no shadow"
_NOT = "several objects, cropped, people, scenery, text, watermark, busy background"


class Watch(Protocol):
    """The logs of jobs, as `controlplane.jobs.Jobs` has them."""

    def watch(self, job_id: str) -> AsyncIterator[JobEvent]:
        """The events of a job to its terminal one, with heartbeats of sequence 0."""
        ...


class Stored(Protocol):
    """What jobs made, as `controlplane.artifacts.Artifacts` has it."""

    def pieces(self, artifact_id: str) -> AsyncGenerator[bytes, None]:
        """The bytes of an artifact. Raises UnknownArtifactError, UnavailableError."""
        ...


class ChainedPictures:
    """Has each picture drawn by a job of its own, which keeps it, and tells of it to the job it is for.

    Args:
        start: begins a job, as `Pipelines.start`.
        jobs: their logs.
        artifacts: what they made.
    """

    def __init__(self, start: Callable[[Wish], LiveJob], jobs: Watch, artifacts: Stored) -> None:
        self._start = start
        self._jobs = jobs
        self._artifacts = artifacts

    async def make(self, prompt: str, *, job: LiveJob, policy: Policy, effort: int | None) -> ImagePart:
        """See `Pictures.make`. A job has let go of the GPU when it has ended."""
        wanted = ImageInput(prompt=f"{prompt.strip()}; {_STYLE}", negative_prompt=_NOT)
        drawing = self._start(
            Wish(
                kind=JobKind.IMAGE,
                model="",
                input=wanted,
                policy=replace(policy, detached=False),
                effort=effort,
            )
        )
        job.progress(Phase.HEALTH_CHECK, f"picture: drawn first, by job {drawing.id}")
        try:
            artifact = await self._drawn(drawing, job)
        finally:
            # One that has ended does not mind.
            drawing.request_cancel("caller")
        async with aclosing(self._artifacts.pieces(artifact.artifact_id)) as pieces:
            data = b"".join([piece async for piece in pieces])
        return ImagePart(content_type=artifact.content_type, data=data)

    async def _drawn(self, drawing: LiveJob, job: LiveJob) -> ArtifactChunk:
        """The last piece of the picture, once its job has ended well."""
        last: ArtifactChunk | None = None
        failure: RungError | None = None
        async for event in self._jobs.watch(drawing.id):
            match event.payload:
                case PhaseProgress() as step if event.sequence and step.phase is not Phase.DONE:
                    _pass_on(step, job)
                case ArtifactChunk(sha256=sha256, preview=False) as chunk if sha256:
                    last = chunk
                case JobFailed(reason, detail):
                    failure = error_of_failure(JobFailed(reason, f"no picture to model: {detail}"))
                case JobCancelled(by):
                    failure = JobCancelledError(f"the job of its picture was cancelled by {by}", by=by)
                case _:
                    pass
        if failure is not None:
            raise failure
        if last is None:
            raise EngineProtocolError(f"no picture to model: job {drawing.id} ended without one")
        return last


def _pass_on(step: PhaseProgress, job: LiveJob) -> None:
    job.progress(
        step.phase,
        f"picture: {step.detail}" if step.detail else "picture",
        step=step.step,
        total=step.total,
        percent=step.percent,
        remaining_s=step.remaining_s,
    )
