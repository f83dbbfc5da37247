"""What a log says of artifacts to who watches, late, slow or many; and what a heartbeat says."""

from __future__ import annotations

import asyncio
import gc
from collections.abc import AsyncIterator

import pytest

from controlplane.jobs import HEARTBEAT_S, Jobs, LiveJob
from rung.errors import UnavailableError, UnknownArtifactError
from rung.types import ArtifactChunk, JobEvent, JobKind, Phase, PhaseProgress, Policy
from tests.fakes.artifacts import a_job
from tests.fakes.store import MemoryStore


class Piece(bytes):
    """Bytes of which one can see whether anybody still holds them."""

    reader: WatchedArtifacts

    def __del__(self) -> None:
        self.reader.held -= 1


class WatchedArtifacts:
    """Gives a piece of the asked length, and knows which of them are still held."""

    def __init__(self) -> None:
        self.held = 0
        self.most_held = 0
        self.error: Exception | None = None
        self.expired = asyncio.Event()

    async def read(self, artifact_id: str, offset_bytes: int, length_bytes: int) -> bytes:
        if self.error is not None:
            raise self.error
        made = Piece(offset_bytes.to_bytes(8, "big") * (length_bytes // 8))
        made.reader = self
        self.held += 1
        self.most_held = max(self.most_held, self.held)
        return made

    async def expire(self) -> None:
        self.expired.set()


@pytest.fixture
async def artifacts() -> WatchedArtifacts:
    return WatchedArtifacts()


@pytest.fixture
async def jobs(artifacts: WatchedArtifacts) -> AsyncIterator[Jobs]:
    made = Jobs(MemoryStore(), artifacts=artifacts)
    await made.start()
    yield made
    await made.drain(0.0)


def begin(jobs: Jobs) -> LiveJob:
    return jobs.open(kind=JobKind.IMAGE, model="m", policy=Policy())


def tell(job: LiveJob, pieces: int) -> None:
    for number in range(pieces):
        job.artifact(ArtifactChunk("artifact-0", "video/mp4", 64 * number, length_bytes=64))


def chunk_of(event: JobEvent) -> ArtifactChunk:
    assert isinstance(event.payload, ArtifactChunk)
    return event.payload


async def chunks(jobs: Jobs, job: LiveJob, after: int = 0, *, with_data: bool = True) -> list[ArtifactChunk]:
    events = [event async for event in jobs.watch(job.id, after, with_data=with_data)]
    return [event.payload for event in events if isinstance(event.payload, ArtifactChunk)]


async def test_data_is_read_for_who_asks_for_it_live_late_and_resumed(jobs: Jobs) -> None:
    job = begin(jobs)
    following = asyncio.create_task(chunks(jobs, job))
    tell(job, 3)
    job.done("stop")
    live = await following
    await jobs.store_now()

    assert [chunk.data[:8] for chunk in live] == [n.to_bytes(8, "big") for n in (0, 64, 128)]
    assert await chunks(jobs, job) == live
    assert await chunks(jobs, job, after=3) == live[2:]
    assert [chunk.data for chunk in await chunks(jobs, job, with_data=False)] == [b"", b"", b""]


async def test_what_was_deleted_comes_without_data(jobs: Jobs, artifacts: WatchedArtifacts) -> None:
    job = begin(jobs)
    tell(job, 1)
    job.done("stop")
    artifacts.error = UnknownArtifactError("there is no artifact")
    assert [(chunk.data, chunk.length_bytes) for chunk in await chunks(jobs, job)] == [(b"", 64)]

    artifacts.error = UnavailableError("the disk is gone")
    with pytest.raises(UnavailableError):
        await chunks(jobs, job)


async def test_a_preview_has_its_data_live_and_none_in_the_store(jobs: Jobs) -> None:
    job = begin(jobs)
    live, plain = jobs.watch(job.id, 1, with_data=True), jobs.watch(job.id, 1)
    job.artifact(ArtifactChunk("artifact-0", "image/png", data=b"blurred", length_bytes=7, preview=True))

    assert chunk_of(await anext(live)).data == b"blurred"
    assert chunk_of(await anext(plain)).data == b""
    await jobs.store_now()
    job.done("stop")
    await jobs.store_now()
    (stored,) = await chunks(jobs, job)
    assert (stored.data, stored.length_bytes, stored.preview) == (b"", 7, True)


async def test_no_log_has_the_data_of_an_artifact_even_if_it_was_given_any(jobs: Jobs) -> None:
    job = begin(jobs)
    job.artifact(ArtifactChunk("artifact-0", "image/png", data=b"much", length_bytes=4))

    assert chunk_of((job.kept_after(1) or [])[0]).data == b""
    job.done("stop")


async def test_two_hundred_watchers_hold_a_piece_each_at_most_and_the_job_waits_for_none(
    jobs: Jobs, artifacts: WatchedArtifacts
) -> None:
    job = begin(jobs)
    stalled = [jobs.watch(job.id, 1, with_data=True) for _ in range(10)]
    tell(job, 1)
    holding = [await anext(events) for events in stalled]
    quick = [asyncio.create_task(chunks_counted(jobs, job)) for _ in range(190)]
    before = job.last_sequence
    # Nothing is awaited here: whoever writes a log cannot be held up by who reads it.
    tell(job, 300)
    job.done("stop")
    assert job.last_sequence == before + 301

    counts = await asyncio.gather(*quick)
    assert set(counts) == {301}
    gc.collect()
    assert artifacts.held == len(holding) == 10
    assert artifacts.most_held <= 200
    assert not any(chunk_of(event).data for event in job.kept_after(1) or [] if _is_chunk(event))

    # The slow ones find all the rest, whenever they come for it.
    holding.clear()
    rest = [event async for event in stalled[0] if _is_chunk(event)]
    assert [event.sequence for event in rest] == list(range(3, 303))
    for events in stalled:
        await events.aclose()  # type: ignore[attr-defined]  # they are generators


async def chunks_counted(jobs: Jobs, job: LiveJob) -> int:
    """Counts and keeps nothing."""
    count = 0
    async for event in jobs.watch(job.id, with_data=True):
        if _is_chunk(event):
            count += 1
            del event
            await asyncio.sleep(0)
    return count


def _is_chunk(event: JobEvent) -> bool:
    return isinstance(event.payload, ArtifactChunk)


async def test_artifacts_expire_with_the_jobs(jobs: Jobs, artifacts: WatchedArtifacts) -> None:
    async with asyncio.timeout(10):
        await artifacts.expired.wait()


def test_a_heartbeat_keeps_what_is_counted_and_counts_down_what_remains() -> None:
    now_s = [100.0]
    job = LiveJob(
        job_id="job-1",
        kind=JobKind.IMAGE,
        model="m",
        policy=Policy(),
        request_id="",
        on_change=lambda _: None,
        monotonic_s=lambda: now_s[0],
    )
    job.progress(Phase.SAMPLING, "drawing", step=1, total=20, percent=5.0)
    now_s[0] += 2
    job.progress(
        Phase.SAMPLING, "drawing", step=4, total=20, percent=20.0, remaining_s=8.0, job_remaining_s=10.0
    )
    now_s[0] += 3

    beat = job.heartbeat()
    assert beat.payload == PhaseProgress(
        Phase.SAMPLING,
        "drawing",
        step=4,
        total=20,
        percent=20.0,
        phase_elapsed_s=5.0,
        remaining_s=5.0,
        job_remaining_s=7.0,
    )
    assert (beat.sequence, beat.elapsed_s) == (0, 5.0)

    now_s[0] += 5
    late = job.heartbeat().payload
    assert isinstance(late, PhaseProgress)
    assert (late.remaining_s, late.job_remaining_s) == (None, 2.0), "what is over says nothing, not zero"
    now_s[0] += 60
    later = job.heartbeat().payload
    assert isinstance(later, PhaseProgress)
    assert (later.remaining_s, later.job_remaining_s, later.step) == (None, None, 4)
    assert later.phase_elapsed_s == 70.0


def test_a_job_that_said_nothing_yet_has_a_heartbeat() -> None:
    beat = a_job().heartbeat().payload
    assert isinstance(beat, PhaseProgress)
    assert beat.phase is Phase.ROUTE


def test_no_second_is_silent() -> None:
    assert HEARTBEAT_S < 1.0


async def test_who_wants_previews_is_not_made_to_read_artifacts(
    jobs: Jobs, artifacts: WatchedArtifacts
) -> None:
    job = begin(jobs)
    job.artifact(ArtifactChunk("preview", "image/jpeg", data=b"seen", preview=True))
    tell(job, 1)
    events = jobs.watch(job.id, 1, with_previews=True)
    found = [chunk_of(await anext(events)) for _ in range(2)]

    assert [chunk.data for chunk in found] == [b"seen", b""]
    assert artifacts.most_held == 0
