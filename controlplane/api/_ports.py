"""What the servicers need of the rooms behind them."""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator, Collection, Sequence
from typing import Protocol

from controlplane.jobs import HEARTBEAT_S
from controlplane.pipelines._wish import Wish
from rung.types import (
    ArtifactChunk,
    Embeddings,
    Job,
    JobEvent,
    JobState,
    Model,
    Policy,
    Predictions,
    PredictionTask,
    RouteExplanation,
    Workflow,
)


class RunningJob(Protocol):
    """A job that was begun."""

    @property
    def id(self) -> str:
        """Its id."""
        ...

    def request_cancel(self, by: str) -> None:
        """Ask it to end; does nothing to one that has ended."""
        ...


class JobsPort(Protocol):
    """The jobs, as `controlplane.jobs.Jobs` has them."""

    async def get(self, job_id: str) -> Job:
        """One job. Raises UnknownJobError."""
        ...

    async def list(
        self, *, page_size: int, before: str | None = None, states: Collection[JobState] = ()
    ) -> Sequence[Job]:
        """Jobs, newest first, before the id of one."""
        ...

    async def cancel(self, job_id: str, by: str) -> Job:
        """Ask a job to end. Raises UnknownJobError."""
        ...

    def watch(
        self,
        job_id: str,
        after_sequence: int = 0,
        heartbeat_s: float = HEARTBEAT_S,
        *,
        with_data: bool = False,
    ) -> AsyncIterator[JobEvent]:
        """Events after a sequence to the terminal one. Raises UnknownJobError, OutOfRangeError."""
        ...


class ArtifactsPort(Protocol):
    """The artifacts, as `controlplane.artifacts.Artifacts` has them."""

    def chunks(self, artifact_id: str, offset_bytes: int = 0) -> AsyncGenerator[ArtifactChunk, None]:
        """One from a place on; the last piece has its SHA-256.

        Raises UnknownArtifactError, OutOfRangeError.
        """
        ...


class PipelinesPort(Protocol):
    """What carries wishes out, as `controlplane.pipelines.Pipelines` does."""

    async def prepare(self, wish: Wish) -> Wish:
        """The wish as it is to be begun."""
        ...

    def start(self, wish: Wish) -> RunningJob:
        """Begin a generation."""
        ...

    async def create_detached(self, wish: Wish) -> Job:
        """Begin a generation that outlives its caller; returns once its job is stored."""
        ...

    def models(self) -> Sequence[Model]:
        """What a request may ask for by name."""
        ...

    async def embed(self, wish: Wish) -> Embeddings:
        """Vectors for texts."""
        ...

    async def predict(
        self, task: PredictionTask, *, model: str, policy: Policy, request_id: str
    ) -> Predictions:
        """Classes, numbers or series, predicted from examples."""
        ...

    def explain(self, wish: Wish) -> RouteExplanation:
        """Who would answer, and why; starts nothing."""
        ...


class WorkflowsPort(Protocol):
    """The templates, as `controlplane.workflows.Workflows` has them."""

    def listed(self) -> Sequence[Workflow]:
        """All by name."""
        ...
