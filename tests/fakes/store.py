"""Stores in memory, which a test can make fail or wait."""

from __future__ import annotations

import asyncio
from collections.abc import Collection, Sequence

from controlplane.store import ProfileState, StoredSegment
from rung.errors import UnavailableError
from rung.types import Job, JobState


class MemoryStore:
    """Keeps what it is given. With `failing` set, writes raise; with `gate` cleared, they wait."""

    def __init__(self) -> None:
        self.jobs: dict[str, Job] = {}
        self.segments_of: dict[str, list[StoredSegment]] = {}
        self.failing = False
        self.gate = asyncio.Event()
        self.gate.set()

    async def write(self, jobs: Sequence[Job], segments: Sequence[StoredSegment]) -> None:
        await self.gate.wait()
        if self.failing:
            raise UnavailableError("the disk is full")
        for job in jobs:
            self.jobs[job.id] = job
        for segment in segments:
            self.segments_of.setdefault(segment.job_id, []).append(segment)

    async def get(self, job_id: str) -> Job | None:
        return self.jobs.get(job_id)

    async def by_request_id(self, request_id: str) -> Job | None:
        found = [job for job in self.jobs.values() if job.request_id == request_id]
        return max(found, key=lambda job: job.id, default=None)

    async def list(
        self, *, page_size: int, before: str | None, states: Collection[JobState]
    ) -> Sequence[Job]:
        found = [job for job in self.jobs.values() if not states or job.state in states]
        found.sort(key=lambda job: job.id, reverse=True)
        if before is not None:
            found = [job for job in found if job.id < before]
        return found[:page_size]

    async def segments(self, job_id: str, after_sequence: int, limit: int = 100) -> Sequence[StoredSegment]:
        found = self.segments_of.get(job_id, [])
        return [segment for segment in found if segment.last_sequence > after_sequence][:limit]

    async def unfinished(self) -> Sequence[Job]:
        return [job for job in self.jobs.values() if not job.state.ended]

    async def delete_ended_before(self, time_s: float) -> int:
        old = [job.id for job in self.jobs.values() if job.end_time_s is not None and job.end_time_s < time_s]
        for job_id in old:
            del self.jobs[job_id]
            self.segments_of.pop(job_id, None)
        return len(old)


class MemoryProfileStore:
    """Remembers in memory; `written` is all that it was ever told. With `failing` set, writes raise."""

    def __init__(self) -> None:
        self.written: list[ProfileState] = []
        self.failing = False

    async def read(self) -> ProfileState:
        return self.written[-1] if self.written else ProfileState()

    async def write(self, state: ProfileState) -> None:
        if self.failing:
            raise UnavailableError("the disk is full")
        self.written.append(state)
