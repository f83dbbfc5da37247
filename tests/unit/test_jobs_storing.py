"""When jobs are stored: what happens to them soon, what they only say later and all together."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager, suppress
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from controlplane.jobs import STORE_INTERVAL_S, TEXT_INTERVAL_S, Jobs, LiveJob
from controlplane.simulation import run_in_virtual_time
from controlplane.store import StoredSegment
from rung.errors import UnavailableError
from rung.types import (
    Job,
    JobEvent,
    JobKind,
    JobState,
    Phase,
    Policy,
    TokenDelta,
    ToolCallDelta,
    Usage,
)
from tests.fakes.store import MemoryStore
from tests.fakes.virtual_time import in_virtual_time

#: What two sums of floats may differ by.
ROUNDING_S = 1e-6


class TimedStore(MemoryStore):
    """Knows what was written when, by the loop's clock."""

    def __init__(self) -> None:
        super().__init__()
        self.writes: list[tuple[float, tuple[StoredSegment, ...]]] = []

    async def write(self, jobs: Sequence[Job], segments: Sequence[StoredSegment]) -> None:
        await super().write(jobs, segments)
        self.writes.append((asyncio.get_running_loop().time(), tuple(segments)))

    def places(self, job: LiveJob) -> list[tuple[int, int]]:
        """The first and last sequence of each segment of a job."""
        return [(each.first_sequence, each.last_sequence) for each in self.segments_of.get(job.id, [])]


@asynccontextmanager
async def running(store: MemoryStore) -> AsyncIterator[Jobs]:
    jobs = Jobs(store, monotonic_s=asyncio.get_running_loop().time)
    await jobs.start()
    try:
        yield jobs
    finally:
        store.failing = False
        await jobs.drain(0.0)


def begin(jobs: Jobs) -> LiveJob:
    return jobs.open(kind=JobKind.CHAT, model="m", policy=Policy())


async def talk(job: LiveJob, for_s: float) -> None:
    for _ in range(round(for_s / 0.01)):
        job.text(TokenDelta("word "))
        await asyncio.sleep(0.01)


async def soon() -> None:
    """Until what happened is stored, but nothing that was only said."""
    await asyncio.sleep(STORE_INTERVAL_S + 0.01)


@in_virtual_time
async def test_what_happens_is_stored_soon_and_what_is_said_later() -> None:
    store = TimedStore()
    async with running(store) as jobs:
        job = begin(jobs)
        await soon()
        assert store.places(job) == [(1, 1)]

        job.text(TokenDelta("one "))
        job.tool_call(ToolCallDelta(arguments="{}"))
        await asyncio.sleep(TEXT_INTERVAL_S - 0.01)
        assert store.places(job) == [(1, 1)]

        await soon()
        assert store.places(job) == [(1, 1), (2, 3)]
        assert store.jobs[job.id].last_sequence == 3


@in_virtual_time
async def test_what_happens_is_stored_with_all_that_was_said_before_it() -> None:
    store = TimedStore()
    async with running(store) as jobs:
        job = begin(jobs)
        await soon()
        job.text(TokenDelta("one "))
        job.progress(Phase.REASONING)
        job.text(TokenDelta("two "))
        await soon()

        assert store.places(job) == [(1, 1), (2, 4)]


@in_virtual_time
async def test_what_happens_to_one_job_does_not_hurry_what_another_says() -> None:
    store = TimedStore()
    async with running(store) as jobs:
        busy, talking = begin(jobs), begin(jobs)
        await soon()
        talking.text(TokenDelta("one "))
        for _ in range(5):
            busy.progress(Phase.REASONING)
            await soon()

        assert len(store.places(busy)) == 6
        assert store.places(talking) == [(1, 1)]
        await asyncio.sleep(TEXT_INTERVAL_S)
        assert store.places(talking) == [(1, 1), (2, 2)]


@in_virtual_time
async def test_many_that_talk_are_stored_together_and_seldom() -> None:
    store = TimedStore()
    async with running(store) as jobs:
        all_of_them = [begin(jobs) for _ in range(64)]
        await soon()
        store.writes.clear()
        async with asyncio.TaskGroup() as group:
            for job in all_of_them:
                group.create_task(talk(job, 10.0))
                await asyncio.sleep(0.007)

        assert len(store.writes) <= (10.0 + 64 * 0.007) / TEXT_INTERVAL_S
        assert sum(len(segments) == 64 for _, segments in store.writes) >= 17


@in_virtual_time
async def test_a_short_answer_is_one_write() -> None:
    store = TimedStore()
    async with running(store) as jobs:
        job = begin(jobs)
        await talk(job, 0.03)
        job.consumed(Usage(1, 3))
        job.done("stop")
        await asyncio.sleep(5.0)

        assert [len(segments) for _, segments in store.writes] == [1]
        assert store.places(job) == [(1, 6)]
        assert store.jobs[job.id].state is JobState.DONE


@in_virtual_time
async def test_nothing_is_written_while_nothing_is_new() -> None:
    store = TimedStore()
    async with running(store) as jobs:
        await talk(begin(jobs), 0.2)
        await asyncio.sleep(1.0)
        before = len(store.writes)
        await asyncio.sleep(60.0)

        assert len(store.writes) == before == 2


@in_virtual_time
async def test_who_asks_for_it_has_all_stored_at_once() -> None:
    store = TimedStore()
    async with running(store) as jobs:
        job, other = begin(jobs), begin(jobs)
        await soon()
        job.text(TokenDelta("one "))
        other.text(TokenDelta("two "))
        await jobs.store_now()
        assert (store.places(job)[-1], store.places(other)[-1]) == ((2, 2), (2, 2))

        # What is said next has its whole time again.
        await asyncio.sleep(TEXT_INTERVAL_S - 0.1)
        job.text(TokenDelta("three "))
        await asyncio.sleep(TEXT_INTERVAL_S - 0.1)
        assert store.places(job)[-1] == (2, 2)


@in_virtual_time
async def test_words_are_kept_while_the_store_fails_and_new_jobs_are_refused() -> None:
    store = TimedStore()
    async with running(store) as jobs:
        job = begin(jobs)
        await soon()
        store.failing = True
        # Nothing but text tells that the store fails.
        await talk(job, 7.0)
        with pytest.raises(UnavailableError, match="cannot be stored"):
            begin(jobs)
        assert store.places(job) == [(1, 1)]

        store.failing = False
        await asyncio.sleep(1.5)
        begin(jobs)
        assert store.places(job) == [(1, 1), (2, 701)]


Happens = tuple[str, int]
_happens: st.SearchStrategy[Happens] = st.tuples(
    st.sampled_from(["text", "text", "text", "tool", "phase", "end", "wait", "wait"]), st.integers(0, 2)
)
WAITS_S = (0.01, 0.13, 0.7)


async def live(jobs: Jobs, happens: Sequence[Happens], at: Callable[[str], None]) -> list[LiveJob]:
    """Three jobs of which that happens; what is none of a job's is for `at`."""
    three = [begin(jobs) for _ in range(3)]
    for what, number in happens:
        job = three[number]
        if what == "wait":
            await asyncio.sleep(WAITS_S[number])
        elif what == "store":
            with suppress(UnavailableError):
                await jobs.store_now()
        elif what in ("break", "mend"):
            at(what)
        elif job.terminal is not None:
            continue
        elif what == "text":
            job.text(TokenDelta("word "))
        elif what == "tool":
            job.tool_call(ToolCallDelta(arguments="{"))
        elif what == "phase":
            job.progress(Phase.REASONING)
        else:
            job.done("stop")
    return three


async def log_of(jobs: Jobs, job: LiveJob) -> list[JobEvent]:
    """What the store has of a job, which `jobs` has not in memory."""
    events = jobs.watch(job.id)
    try:
        return [await anext(events) for _ in range(job.last_sequence)]
    finally:
        await events.aclose()  # type: ignore[attr-defined]  # it is a generator


async def check_logs(store: TimedStore, three: Sequence[LiveJob]) -> None:
    for job in three:
        places = store.places(job)
        assert [first for first, _ in places] == [1, *(last + 1 for _, last in places[:-1])], "a gap"
        assert places[-1][1] == store.jobs[job.id].last_sequence == job.last_sequence
        other = Jobs(store)
        stored = await log_of(other, job)
        assert [event.payload for event in stored] == [event.payload for event in job.kept_after(0) or []]


def _is_text(event: JobEvent) -> bool:
    return isinstance(event.payload, TokenDelta | ToolCallDelta)


@settings(max_examples=100, deadline=None)
@given(happens=st.lists(_happens, max_size=40))
def test_nothing_waits_for_longer_than_is_said_and_text_is_stored_no_oftener(happens: list[Happens]) -> None:
    async def scenario() -> None:
        loop = asyncio.get_running_loop()
        store = TimedStore()
        async with running(store) as jobs:
            begun_s = loop.time()
            three = await live(jobs, happens, lambda _: None)
            await asyncio.sleep(TEXT_INTERVAL_S + 2 * STORE_INTERVAL_S)
            await check_logs(store, three)
            text_rounds: set[float] = set()
            for job in three:
                events = job.kept_after(0) or []
                for at_s, segment in _writes_of(store, job):
                    stored = events[segment.first_sequence - 1 : segment.last_sequence]
                    assert at_s <= begun_s + _latest_s(stored) + STORE_INTERVAL_S + ROUNDING_S
                    if all(map(_is_text, stored)):
                        text_rounds.add(at_s)
                if job.terminal is not None:
                    assert await jobs.get(job.id) is store.jobs[job.id], "it was let go"
            for one_s, next_s in pairwise(sorted(text_rounds)):
                assert next_s - one_s >= TEXT_INTERVAL_S - ROUNDING_S

    run_in_virtual_time(scenario())


def _writes_of(store: TimedStore, job: LiveJob) -> list[tuple[float, StoredSegment]]:
    return [(at_s, each) for at_s, segments in store.writes for each in segments if each.job_id == job.id]


def _latest_s(events: Sequence[JobEvent]) -> float:
    """When the first of these events has to be on its way to the store."""
    return min(event.elapsed_s + (TEXT_INTERVAL_S if _is_text(event) else 0.0) for event in events)


_troubles = _happens | st.tuples(st.sampled_from(["break", "mend", "store"]), st.just(0))


@settings(max_examples=100, deadline=None)
@given(happens=st.lists(_troubles, max_size=40))
def test_a_store_that_fails_now_and_then_misses_nothing(happens: list[Happens]) -> None:
    async def scenario() -> None:
        store = TimedStore()

        def trouble(what: str) -> None:
            store.failing = what == "break"

        async with running(store) as jobs:
            three = await live(jobs, happens, trouble)
            store.failing = False
            await asyncio.sleep(1.0 + TEXT_INTERVAL_S + 2 * STORE_INTERVAL_S)
            await check_logs(store, three)
            begin(jobs)

    run_in_virtual_time(scenario())
