"""Jobs: one writer, any number of readers, and an honest end whatever happens."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from controlplane.jobs import SEQUENCE_JUMP_AFTER_CRASH, Jobs, LiveJob
from rung.errors import DrainingError, OutOfRangeError, UnavailableError, UnknownJobError
from rung.types import (
    FailureReason,
    Job,
    JobCancelled,
    JobDone,
    JobEvent,
    JobFailed,
    JobKind,
    JobState,
    Policy,
    TokenDelta,
    Usage,
)
from tests.fakes.store import MemoryStore
from tests.fakes.virtual_time import in_virtual_time


@pytest.fixture
async def store() -> MemoryStore:
    return MemoryStore()


@pytest.fixture
async def jobs(store: MemoryStore) -> AsyncIterator[Jobs]:
    made = Jobs(store)
    await made.start()
    yield made
    store.failing = False
    await made.drain(0.0)


def _open(jobs: Jobs) -> LiveJob:
    return jobs.open(kind=JobKind.CHAT, model="m", policy=Policy())


async def _all(jobs: Jobs, job_id: str, after: int = 0) -> list[JobEvent]:
    return [event async for event in jobs.watch(job_id, after) if event.sequence]


def _say(job: LiveJob, words: int) -> None:
    for number in range(words):
        job.text(TokenDelta(f"{number} "))


@settings(max_examples=40, deadline=None)
@given(words=st.integers(0, 30), stored_at=st.integers(0, 30), after=st.integers(0, 31))
def test_a_reader_that_resumes_gets_exactly_the_rest(words: int, stored_at: int, after: int) -> None:
    async def scenario() -> None:
        jobs = Jobs(MemoryStore())
        job = _open(jobs)
        for number in range(words):
            job.text(TokenDelta(str(number)))
            if number == stored_at:
                await jobs.store_now()
        job.done("stop")
        after_end = after > job.last_sequence
        live = None if after_end else [event.sequence for event in await _all(jobs, job.id, after)]
        await jobs.store_now()
        if after_end:
            with pytest.raises(OutOfRangeError):
                await _all(jobs, job.id, after)
        else:
            stored = [event.sequence for event in await _all(jobs, job.id, after)]
            assert live == stored == list(range(after + 1, job.last_sequence + 1))

    asyncio.run(scenario())


async def test_readers_follow_and_do_not_hold_up_the_writer(jobs: Jobs) -> None:
    job = _open(jobs)
    slow = jobs.watch(job.id)
    assert (await anext(slow)).sequence == 1
    quick = [asyncio.create_task(_all(jobs, job.id)) for _ in range(20)]
    _say(job, 6_000)
    job.done("stop")
    results = await asyncio.gather(*quick)

    assert {len(events) for events in results} == {6_002}
    rest = [event.sequence async for event in slow if event.sequence]
    assert rest == list(range(2, 6_003))


async def test_silence_is_told_outside_the_log(jobs: Jobs) -> None:
    job = _open(jobs)
    watch = jobs.watch(job.id, 1, heartbeat_s=0.01)

    heartbeat = await anext(watch)

    assert heartbeat.sequence == 0
    assert job.last_sequence == 1
    await watch.aclose()  # type: ignore[attr-defined]  # it is a generator


@in_virtual_time
async def test_silence_is_between_what_a_reader_tells() -> None:
    clock = asyncio.get_running_loop().time
    jobs = Jobs(MemoryStore(), monotonic_s=clock)
    job = _open(jobs)
    told: list[float] = []

    async def tell_heartbeats() -> None:
        event: JobEvent | None = None
        watching = jobs.watch(
            job.id, heartbeat_s=0.5, has_told=lambda: event is not None and not event.sequence
        )
        async for event in watching:
            if not event.sequence:
                told.append(round(event.elapsed_s, 3))

    reader = asyncio.create_task(tell_heartbeats())
    for _ in range(16):
        await asyncio.sleep(0.1)
        _say(job, 1)
    job.done("stop")
    await reader

    assert told == [0.5, 1.0, 1.5]


async def test_a_request_to_cancel_is_not_lost(jobs: Jobs) -> None:
    early, late, ended = _open(jobs), _open(jobs), _open(jobs)
    called: list[str] = []
    early.request_cancel("caller")
    early.on_cancel(lambda: called.append("early"))
    late.on_cancel(lambda: called.append("late"))
    await jobs.cancel(late.id, "caller")
    ended.on_cancel(lambda: called.append("ended"))
    ended.done("stop")
    await jobs.cancel(ended.id, "caller")

    assert called == ["early", "late"]
    with pytest.raises(UnknownJobError):
        await jobs.cancel("none", "caller")


async def test_a_restart_ends_what_ran_with_a_sequence_that_nobody_saw(store: MemoryStore) -> None:
    first = Jobs(store)
    job = _open(first)
    _say(job, 3)
    await first.store_now()
    _say(job, 2)
    seen = job.last_sequence
    second = Jobs(store)

    await second.start()

    events = await _all(second, job.id, after=seen)
    assert [type(event.payload) for event in events] == [JobFailed]
    assert events[0].sequence == 4 + SEQUENCE_JUMP_AFTER_CRASH
    record = await second.get(job.id)
    assert (record.state, record.failure_reason) == (JobState.FAILED, FailureReason.CONTROL_PLANE_RESTARTED)
    await second.drain(0.0)


async def test_what_cannot_be_stored_is_kept_and_stored_later(jobs: Jobs, store: MemoryStore) -> None:
    store.failing = True
    job = _open(jobs)
    _say(job, 2)
    job.done("stop")
    with pytest.raises(UnavailableError):
        await jobs.store_now()
    assert len(await _all(jobs, job.id)) == 4

    store.failing = False
    await jobs.store_now()

    assert store.jobs[job.id].state is JobState.DONE
    assert len(await _all(jobs, job.id)) == 4


async def test_draining_takes_nothing_new_and_ends_what_runs(store: MemoryStore) -> None:
    jobs = Jobs(store)
    await jobs.start()
    job, stubborn = _open(jobs), _open(jobs)
    job.on_cancel(lambda: job.cancelled("drain"))
    stubborn.on_cancel(lambda: stubborn.done("stop"))

    await jobs.drain(0.0)

    with pytest.raises(DrainingError):
        _open(jobs)
    assert isinstance((await _all(jobs, job.id))[-1].payload, JobCancelled)
    assert isinstance((await _all(jobs, stubborn.id))[-1].payload, JobDone)


async def test_a_job_is_found_by_its_callers_own_id(jobs: Jobs) -> None:
    job = jobs.open(kind=JobKind.CHAT, model="m", policy=Policy(), request_id="mine")
    found: Job | None = await jobs.find_by_request_id("mine")
    assert found is not None
    job.done("stop")
    await jobs.store_now()
    again = await jobs.find_by_request_id("mine")

    assert (found.id, again and again.id) == (job.id, job.id)


async def test_what_was_spent_adds_up_whenever_the_tokens_are_told(jobs: Jobs) -> None:
    job = _open(jobs)

    job.spent(0.25)
    job.consumed(Usage(10, 5))
    job.spent(0.5)
    job.done("stop")

    assert job.usage == Usage(10, 5, cost_usd=0.75)
    assert job.record().usage == job.usage
