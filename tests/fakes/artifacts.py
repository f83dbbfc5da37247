"""Artifacts in a directory that goes away, with their rows in memory."""

from __future__ import annotations

import asyncio
import tempfile
from collections.abc import AsyncIterator, Callable, Collection, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

from controlplane.artifacts import DEFAULT_MAX_BYTES, DEFAULT_RETENTION_S, Artifact, Artifacts
from controlplane.jobs import LiveJob
from rung.errors import UnavailableError
from rung.types import JobKind, Policy


class MemoryRows:
    """Keeps what it is given. With `failing` set, writes raise; with `gate` cleared, adding waits
    once the row is there, as it may be when a thread has written it.

    `jobs` are those that are stored; None for all.
    """

    def __init__(self) -> None:
        self.kept: dict[str, Artifact] = {}
        self.jobs: set[str] | None = None
        self.failing = False
        self.adding = asyncio.Event()
        self.gate = asyncio.Event()
        self.gate.set()

    async def add(self, artifact: Artifact) -> None:
        if self.failing:
            raise UnavailableError("the store cannot be used: disk is full")
        self.kept[artifact.id] = artifact
        self.adding.set()
        await self.gate.wait()

    async def get(self, artifact_id: str) -> Artifact | None:
        return self.kept.get(artifact_id)

    async def of_job(self, job_id: str) -> Sequence[Artifact]:
        return [each for each in await self.all() if each.job_id == job_id]

    async def all(self) -> Sequence[Artifact]:
        return sorted(self.kept.values(), key=lambda each: each.id)

    async def orphans(self) -> Sequence[Artifact]:
        return [each for each in await self.all() if self.jobs is not None and each.job_id not in self.jobs]

    async def delete(self, artifact_ids: Collection[str]) -> None:
        for artifact_id in artifact_ids:
            self.kept.pop(artifact_id, None)


@asynccontextmanager
async def some_artifacts(
    *,
    rows: MemoryRows | None = None,
    retention_s: float = DEFAULT_RETENTION_S,
    max_bytes: int = DEFAULT_MAX_BYTES,
    now_s: Callable[[], float] = lambda: 1_000_000.0,
) -> AsyncIterator[Artifacts]:
    """Artifacts, started."""
    with tempfile.TemporaryDirectory() as directory:
        artifacts = Artifacts(
            Path(directory) / "artifacts",
            rows or MemoryRows(),
            retention_s=retention_s,
            max_bytes=max_bytes,
            now_s=now_s,
        )
        await artifacts.start()
        yield artifacts
        await artifacts.aclose()


def a_job(job_id: str = "job-1") -> LiveJob:
    """A job that belongs to nobody."""
    return LiveJob(
        job_id=job_id,
        kind=JobKind.IMAGE,
        model="m",
        policy=Policy(),
        request_id="",
        on_change=lambda _: None,
    )
