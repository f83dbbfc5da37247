"""What jobs rely on of a store; the suite runs on each store there is."""

from __future__ import annotations

import sqlite3
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import closing
from pathlib import Path

import pytest
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from msgspec.structs import replace
from sqlalchemy import create_engine

from controlplane.store import JobStore, StoredSegment, migrate
from controlplane.store._tables import metadata
from rung.errors import FailedPreconditionError, UnavailableError
from rung.types import FailureReason, Job, JobKind, JobState, Policy, Priority, Served, Usage


@pytest.fixture
async def store(tmp_path: Path) -> AsyncIterator[JobStore]:
    opened = await JobStore.open(tmp_path / "rung.db")
    yield opened
    await opened.aclose()


def _job(name: str, time_s: float = 1.0, state: JobState = JobState.RUNNING) -> Job:
    return Job(id=name, kind=JobKind.CHAT, state=state, model="m", create_time_s=time_s)


FULL = Job(
    id="job-full",
    kind=JobKind.EMBEDDING,
    state=JobState.FAILED,
    model="m",
    create_time_s=5.5,
    request_id="mine",
    served=Served("m", "m-1", "box", "m-served"),
    end_time_s=6.5,
    last_sequence=7,
    failure_reason=FailureReason.TIMEOUT,
    detail="it said nothing",
    usage=Usage(1, 2, 3),
    policy=Policy(local_only=True, priority=Priority.USER, detached=True),
)


async def test_a_job_comes_back_as_it_was(store: JobStore) -> None:
    await store.write([FULL], [])

    assert await store.get("job-full") == FULL
    assert await store.get("other") is None
    assert await store.by_request_id("mine") == FULL
    assert await store.by_request_id("") is None


async def test_a_later_write_replaces_what_may_change(store: JobStore) -> None:
    await store.write([_job("a")], [])
    ended = replace(_job("a", state=JobState.DONE), end_time_s=2.0, last_sequence=9, usage=Usage(1, 1))
    await store.write([ended], [])

    assert await store.get("a") == ended
    assert await store.unfinished() == []


async def test_pages_have_no_gaps(store: JobStore) -> None:
    jobs = [_job(f"job-{number:02}", time_s=float(number // 4)) for number in range(20)]
    await store.write(jobs, [])
    seen: list[Job] = []
    before: str | None = None
    while page := await store.list(page_size=3, before=before, states=()):
        seen.extend(page)
        before = page[-1].id

    assert [job.id for job in seen] == [job.id for job in reversed(jobs)]


async def test_jobs_are_listed_by_state(store: JobStore) -> None:
    await store.write([_job("a"), _job("b", state=JobState.DONE)], [])

    found = await store.list(page_size=9, before=None, states=[JobState.DONE])

    assert [job.id for job in found] == ["b"]


async def test_segments_come_in_order_after_a_sequence(store: JobStore) -> None:
    segments = [StoredSegment("a", first, first + 4, b"%d" % first) for first in (1, 6, 11)]
    await store.write([_job("a"), _job("b")], [*reversed(segments), StoredSegment("b", 1, 2, b"b")])
    await store.write([_job("a")], segments)

    assert await store.segments("a", 0) == segments
    assert await store.segments("a", 5) == segments[1:]
    assert await store.segments("a", 6) == segments[1:]
    assert await store.segments("a", 15) == []
    assert await store.segments("a", 0, limit=1) == segments[:1]


async def test_a_batch_of_any_size_is_stored(store: JobStore) -> None:
    jobs = [_job(f"job-{number:05}", time_s=float(number)) for number in range(1500)]
    segments = [StoredSegment(job.id, 1, 1, b"x") for job in jobs]

    await store.write(jobs, segments)

    assert len(await store.list(page_size=2000, before=None, states=())) == 1500
    assert await store.segments("job-01499", 0) == segments[-1:]


async def test_a_log_is_read_from_the_job_and_from_what_follows(store: JobStore) -> None:
    await store.write([_job("a")], [StoredSegment("a", 1, 4, b"first")])
    await store.write([_job("a")], [StoredSegment("a", 5, 6, b"second")])
    await store.write([_job("a")], [StoredSegment("a", 1, 9, b"again")])

    assert [each.events for each in await store.segments("a", 0)] == [b"first", b"second"]
    assert [each.events for each in await store.segments("a", 3)] == [b"first", b"second"]
    assert [each.events for each in await store.segments("a", 4)] == [b"second"]


async def test_old_jobs_go_with_their_logs(store: JobStore) -> None:
    old = replace(_job("old", 1.0, JobState.DONE), end_time_s=2.0)
    new = replace(_job("new", 1.0, JobState.DONE), end_time_s=20.0)
    await store.write([old, new, _job("running")], [StoredSegment("old", 1, 1, b"x")])

    assert await store.delete_ended_before(10.0) == 1
    assert await store.get("old") is None
    assert await store.segments("old", 0) == []
    assert {job.id for job in await store.list(page_size=9, before=None, states=())} == {"new", "running"}


async def test_a_second_process_is_refused(store: JobStore, tmp_path: Path) -> None:
    with pytest.raises(FailedPreconditionError, match=r"another control plane \(pid \d+\)"):
        await JobStore.open(tmp_path / "rung.db")


async def test_a_place_that_cannot_be_written_is_said(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")

    with pytest.raises(UnavailableError, match="cannot be used"):
        await JobStore.open(tmp_path / "file" / "rung.db")


async def test_a_store_of_a_later_version_is_left_as_it_is(tmp_path: Path) -> None:
    path = tmp_path / "rung.db"
    await (await JobStore.open(path)).aclose()
    with closing(sqlite3.connect(path)) as database:
        database.execute("UPDATE alembic_version SET version_num = '9999'")
        database.commit()

    with pytest.raises(FailedPreconditionError, match="was made by a later version of Rung"):
        await JobStore.open(path)
    with closing(sqlite3.connect(path)) as database:
        assert database.execute("PRAGMA journal_mode").fetchone() == ("wal",)


_WRITER = """
import asyncio, sys
from pathlib import Path
from controlplane.store import JobStore, StoredSegment
from rung.types import Job, JobKind, JobState
async def main():
    store = await JobStore.open(Path(sys.argv[1]))
    for n in range(100000):
        name = f"job-{n:06}"
        job = Job(id=name, kind=JobKind.CHAT, state=JobState.RUNNING, model="m", create_time_s=float(n))
        await store.write([job], [StoredSegment(job.id, 1, 1, b"x")])
        print(job.id, flush=True)
asyncio.run(main())
"""


async def test_what_was_acknowledged_survives_a_kill(tmp_path: Path) -> None:
    path = tmp_path / "killed.db"
    with subprocess.Popen([sys.executable, "-c", _WRITER, str(path)], stdout=subprocess.PIPE) as writer:  # noqa: ASYNC220
        assert writer.stdout is not None
        acknowledged = [writer.stdout.readline().decode().strip() for _ in range(200)]
        writer.kill()
        acknowledged += writer.stdout.read().decode().split()[:-1]
    opened = await JobStore.open(path)

    try:
        stored = {job.id for job in await opened.unfinished()}
    finally:
        await opened.aclose()

    assert set(acknowledged) <= stored


def test_the_migrations_make_what_the_tables_say(tmp_path: Path) -> None:
    engine = create_engine(f"sqlite:///{tmp_path}/empty.db")
    with engine.begin() as connection:
        migrate(connection)
        migrate(connection)
        differences = compare_metadata(MigrationContext.configure(connection), metadata)
    engine.dispose()

    assert differences == []
