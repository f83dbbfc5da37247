"""All jobs: those that run, and, through the store, those that ran."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import AsyncIterator, Callable, Collection, Sequence
from typing import Protocol

import msgspec
import structlog

from controlplane.jobs._live import LiveJob, without_data
from controlplane.jobs._segments import pack, unpack
from controlplane.store import StoredSegment
from rung.errors import (
    DrainingError,
    OutOfRangeError,
    RungError,
    UnavailableError,
    UnknownArtifactError,
    UnknownJobError,
)
from rung.types import (
    TERMINAL_EVENTS,
    ArtifactChunk,
    FailureReason,
    Job,
    JobEvent,
    JobFailed,
    JobKind,
    JobState,
    Policy,
    TokenDelta,
)

_log = structlog.get_logger("rung.jobs")

#: Whoever watches a job hears something at least so often: below a second, so that none is silent.
HEARTBEAT_S = 0.9
#: What happens to jobs is stored in one transaction this often, with the text before it: a crash costs the
#: events of so long at most, and those of a write under way.
STORE_INTERVAL_S = 0.05
#: Of jobs that only say something (text, and pieces of tool calls) a crash may cost this much more: they are
#: stored this often, all together, because small writes are a good part of what many streams cost.
TEXT_INTERVAL_S = 0.5
#: After a crash a job's sequence jumps by this much, so that no number that a subscriber may have seen, but
#: the store had not, is used twice. It is far more than a job says in the intervals above, and than one says
#: in hours in which the store takes nothing.
SEQUENCE_JUMP_AFTER_CRASH = 1_000_000
#: What these make is text, of which it is said how much was delivered.
_TEXT_KINDS = frozenset({JobKind.CHAT, JobKind.TRANSCRIPTION})
#: New jobs are refused when the store has not taken any for this long.
_STORE_PATIENCE_S = 5.0
#: Ended jobs older than the retention are deleted this often.
_RETENTION_INTERVAL_S = 3600.0


#: Not secrets: an id tells apart, and guards nothing.
_random = random.Random()  # noqa: S311


class Store(Protocol):
    """What jobs need of the store."""

    async def write(self, jobs: Sequence[Job], segments: Sequence[StoredSegment]) -> None:
        """Upsert jobs and add segments in one transaction."""
        ...

    async def get(self, job_id: str) -> Job | None:
        """One job."""
        ...

    async def by_request_id(self, request_id: str) -> Job | None:
        """The newest job with that request id."""
        ...

    async def list(
        self, *, page_size: int, before: str | None, states: Collection[JobState]
    ) -> Sequence[Job]:
        """Jobs, newest first."""
        ...

    async def segments(self, job_id: str, after_sequence: int, limit: int = 100) -> Sequence[StoredSegment]:
        """Segments that hold events after a sequence, in order."""
        ...

    async def unfinished(self) -> Sequence[Job]:
        """Jobs without a terminal event."""
        ...

    async def delete_ended_before(self, time_s: float) -> int:
        """Delete old jobs; returns how many."""
        ...


class KeptArtifacts(Protocol):
    """The artifacts of jobs, kept elsewhere."""

    async def read(self, artifact_id: str, offset_bytes: int, length_bytes: int) -> bytes:
        """Some bytes of one, also while it is made. Raises UnknownArtifactError, UnavailableError."""
        ...

    async def expire(self) -> None:
        """Delete what is too old, too much, or whose job was deleted. Raises UnavailableError."""
        ...


class Jobs:
    """The life of jobs and the fan-out of their events.

    A job's events are appended in memory and stored in batches, text less often than the rest.
    Subscribers pull from memory (or from the store when they are far behind), so that a slow one
    holds up nobody.

    Args:
        store: keeps them.
        retention_s: ended ones are deleted at this age.
        artifacts: what they made.
        monotonic_s: the clock of their elapsed times, and of when text is stored.
    """

    def __init__(
        self,
        store: Store,
        *,
        retention_s: float = 7 * 24 * 3600.0,
        artifacts: KeptArtifacts | None = None,
        monotonic_s: Callable[[], float] = time.monotonic,
    ) -> None:
        self._store = store
        self._monotonic_s = monotonic_s
        self._artifacts = artifacts
        self._retention_s = retention_s
        self._live: dict[str, LiveJob] = {}
        self._by_request_id: dict[str, LiveJob] = {}
        #: Those with events to be stored soon, and those that only said something since they were stored;
        #: `store_now` takes a job out of both.
        self._changed: dict[str, LiveJob] = {}
        self._talking: dict[str, LiveJob] = {}
        self._text_due_s = 0.0
        self._wake = asyncio.Event()
        self._draining = False
        self._store_failing_since: float | None = None
        self._store_lock = asyncio.Lock()
        self._tasks: list[asyncio.Task[None]] = []

    async def start(self) -> None:
        """End honestly what an earlier process left running, then begin to store."""
        for job in await self._store.unfinished():
            sequence = job.last_sequence + SEQUENCE_JUMP_AFTER_CRASH
            now = time.time()
            failed = await self._ended_by_crash(job)
            event = JobEvent(job.id, sequence, now, max(0.0, now - job.create_time_s), failed)
            ended = msgspec.structs.replace(
                job,
                state=JobState.FAILED,
                end_time_s=now,
                last_sequence=sequence,
                failure_reason=failed.reason,
                detail=failed.detail,
            )
            await self._store.write([ended], [pack(job.id, job.create_time_s, [event])])
            _log.warning("job_ended_by_restart", job=job.id)
        self._tasks = [
            asyncio.create_task(self._keep_storing(), name="jobs-store"),
            asyncio.create_task(self._keep_retention(), name="jobs-retention"),
        ]

    async def _ended_by_crash(self, job: Job) -> JobFailed:
        """The end of a job that an earlier process left running; of its text it knows what was stored."""
        delivered = ""
        stored_characters = 0
        if job.kind in _TEXT_KINDS:
            stored_characters = await self._stored_characters(job.id)
            # What was said last was told at once, and stored a moment later.
            delivered = (
                f", after at least {stored_characters} characters of its text"
                if stored_characters
                else "; how much of its text had been delivered is not known"
            )
        return JobFailed(
            FailureReason.CONTROL_PLANE_RESTARTED,
            f"the control plane was restarted while this job ran{delivered}; send the request again",
            delivered_characters=stored_characters,
        )

    async def _stored_characters(self, job_id: str) -> int:
        """Characters of text in the stored part of a log."""
        characters = sequence = 0
        while events := await self._stored_after(job_id, sequence):
            characters += sum(
                len(event.payload.content) for event in events if isinstance(event.payload, TokenDelta)
            )
            sequence = events[-1].sequence
        return characters

    def open(self, *, kind: JobKind, model: str, policy: Policy, request_id: str = "") -> LiveJob:
        """Begin a job.

        Raises:
            DrainingError: the server is shutting down.
            UnavailableError: jobs cannot be stored, for instance because the disk is full.
        """
        if self._draining:
            raise DrainingError("the control plane is shutting down; try again in a moment")
        failing = self._store_failing_since
        if failing is not None and self._monotonic_s() - failing > _STORE_PATIENCE_S:
            raise UnavailableError("jobs cannot be stored; see the server's log and its disk")
        job = LiveJob(
            job_id=_new_id(),
            kind=kind,
            model=model,
            policy=policy,
            request_id=request_id,
            on_change=self._on_change,
            on_text=self._on_text,
            monotonic_s=self._monotonic_s,
        )
        self._live[job.id] = job
        if request_id:
            self._by_request_id[request_id] = job
        return job

    def _on_change(self, job: LiveJob) -> None:
        changed = self._changed
        if not changed:
            self._wake.set()
        changed[job.id] = job

    def _on_text(self, job: LiveJob) -> None:
        talking = self._talking
        if not talking:
            self._text_due_s = self._monotonic_s() + TEXT_INTERVAL_S
            self._wake.set()
        talking[job.id] = job

    @property
    def running(self) -> int:
        """Jobs that have not ended."""
        return sum(1 for job in self._live.values() if job.terminal is None)

    async def find_by_request_id(self, request_id: str) -> Job | None:
        """The newest job that a caller made under this id of its own."""
        live = self._by_request_id.get(request_id)
        return live.record() if live is not None else await self._store.by_request_id(request_id)

    async def get(self, job_id: str) -> Job:
        """One job. Raises UnknownJobError."""
        live = self._live.get(job_id)
        job = live.record() if live is not None else await self._store.get(job_id)
        if job is None:
            raise UnknownJobError(
                f"there is no job {job_id}; ended jobs are kept for a while only", job=job_id
            )
        return job

    async def list(
        self, *, page_size: int, before: str | None = None, states: Collection[JobState] = ()
    ) -> Sequence[Job]:
        """Jobs, newest first, before the id of one."""
        await self.store_now()
        return await self._store.list(page_size=page_size, before=before, states=states)

    async def cancel(self, job_id: str, by: str) -> Job:
        """Ask a job to end; one that has ended is left as it is. Raises UnknownJobError."""
        live = self._live.get(job_id)
        if live is not None:
            live.request_cancel(by)
        return await self.get(job_id)

    async def watch(
        self,
        job_id: str,
        after_sequence: int = 0,
        heartbeat_s: float = HEARTBEAT_S,
        *,
        with_data: bool = False,
        with_previews: bool = False,
        has_told: Callable[[], bool] | None = None,
    ) -> AsyncIterator[JobEvent]:
        """Events after a sequence, then new ones as they come, to the terminal one.

        When nothing is told for `heartbeat_s`, a heartbeat (sequence 0) says what is under way.

        Args:
            job_id: which.
            after_sequence: the last event that is known already.
            heartbeat_s: the longest silence.
            with_data: pieces of artifacts come with their data, as long as the artifact is kept.
            with_previews: previews come with their data, as with `with_data`; only the newest has any.
            has_told: whether the reader passed on the event that it was given last, asked when it wants the
                next; for readers that have nothing to say of some. Without it each event counts as told.

        Raises:
            UnknownJobError: no such job.
            OutOfRangeError: the job has ended before `after_sequence`.
            UnavailableError: the store or an artifact cannot be read.
        """
        sequence = after_sequence
        now_s = asyncio.get_running_loop().time
        told_s = now_s()
        while True:
            live = self._live.get(job_id)
            events: Sequence[JobEvent] | None = live.kept_after(sequence) if live is not None else None
            if events is None:
                events = await self._stored_after(job_id, sequence)
                if not events and live is None:
                    # It may have ended, been stored and let go between the two looks.
                    await self._refuse_beyond_end(job_id, after_sequence)
                    return
            for event in events:
                payload = event.payload
                if type(payload) is not ArtifactChunk or (with_previews and payload.preview):
                    yield event
                else:
                    yield await self._filled(event, payload) if with_data else without_data(event)
                if has_told is not None and has_told():
                    told_s = now_s()
                sequence = event.sequence
                if isinstance(event.payload, TERMINAL_EVENTS):
                    return
            if events or live is None:
                continue
            if sequence > live.last_sequence:
                raise OutOfRangeError(f"job {job_id} has no event {sequence} yet", job=job_id)
            if live.terminal is not None and sequence == live.last_sequence:
                return
            left_s = heartbeat_s if has_told is None else told_s + heartbeat_s - now_s()
            # One that is due is not put off by what comes: events that nobody passes on may have no end.
            if left_s <= 0.0 or not await _arrives(live, left_s):
                yield live.heartbeat()
                told_s = now_s()

    async def _filled(self, event: JobEvent, chunk: ArtifactChunk) -> JobEvent:
        """A piece with its data, read for this one reader, so that nothing is held for slow ones."""
        if chunk.preview or not chunk.length_bytes or self._artifacts is None:
            return event
        try:
            data = await self._artifacts.read(chunk.artifact_id, chunk.offset_bytes, chunk.length_bytes)
        except UnknownArtifactError:
            return event
        return msgspec.structs.replace(event, payload=msgspec.structs.replace(chunk, data=data))

    async def _stored_after(self, job_id: str, sequence: int) -> Sequence[JobEvent]:
        events: list[JobEvent] = []
        for segment in await self._store.segments(job_id, sequence):
            events.extend(unpack(segment, sequence))
        return events

    async def _refuse_beyond_end(self, job_id: str, after_sequence: int) -> None:
        job = await self.get(job_id)
        if after_sequence > job.last_sequence:
            raise OutOfRangeError(
                f"job {job_id} ended with event {job.last_sequence}; there is nothing after {after_sequence}",
                job=job_id,
                last_sequence=str(job.last_sequence),
            )

    async def store_now(self) -> None:
        """Store what was appended so far; returns when it is safe. Raises what the store raises."""
        await self._store_due(with_text=True)

    async def _store_due(self, *, with_text: bool = False) -> None:
        """Store the jobs whose time has come, each with all that it has. Raises what the store raises."""
        async with self._store_lock:
            due, self._changed = self._changed, {}
            if with_text or self._monotonic_s() >= self._text_due_s:
                due |= self._talking
                self._talking = {}
            else:
                for job_id in due:
                    self._talking.pop(job_id, None)
            if not due:
                return
            records: list[Job] = []
            segments: list[StoredSegment] = []
            reached: list[tuple[LiveJob, int]] = []
            for job in due.values():
                events = job.unstored()
                records.append(job.record())
                if events:
                    segments.append(pack(job.id, job.create_time_s, events))
                reached.append((job, job.last_sequence))
            try:
                await self._store.write(records, segments)
            except BaseException:
                # Whatever was not stored is still to be stored.
                self._changed = due | self._changed
                raise
            for job, sequence in reached:
                job.stored(sequence)
                if job.terminal is not None and sequence == job.last_sequence:
                    self._live.pop(job.id, None)
                    if self._by_request_id.get(job.request_id) is job:
                        del self._by_request_id[job.request_id]

    async def _keep_storing(self) -> None:
        while True:
            await self._wake.wait()
            await asyncio.sleep(STORE_INTERVAL_S)
            self._wake.clear()
            try:
                await self._store_due()
                self._store_failing_since = None
            except RungError as error:
                if self._store_failing_since is None:
                    self._store_failing_since = self._monotonic_s()
                _log.error("jobs_not_stored", error=error.message, jobs=len(self._changed))
                await asyncio.sleep(1.0)
            if self._changed or self._talking:
                self._wake.set()

    async def _keep_retention(self) -> None:
        while True:
            try:
                deleted = await self._store.delete_ended_before(time.time() - self._retention_s)
                if deleted:
                    _log.info("old_jobs_deleted", jobs=deleted)
                if self._artifacts is not None:
                    await self._artifacts.expire()
            except RungError as error:
                _log.error("old_jobs_not_deleted", error=error.message)
            await asyncio.sleep(_RETENTION_INTERVAL_S)

    async def drain(self, grace_s: float) -> None:
        """Take no new jobs, let running ones end for `grace_s`, cancel the rest, and store all."""
        self._draining = True
        loop = asyncio.get_running_loop()
        deadline = loop.time() + grace_s
        while (running := self._unfinished()) and loop.time() < deadline:
            await _any_ends(running, deadline - loop.time())
        for job in self._unfinished():
            job.request_cancel("drain")
        if running := self._unfinished():
            await _any_ends(running, 2.0, all_of_them=True)
        for job in self._unfinished():
            job.cancelled("drain")
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self.store_now()

    def _unfinished(self) -> Sequence[LiveJob]:
        return [job for job in self._live.values() if job.terminal is None]


def _new_id() -> str:
    """An id that sorts by time, so that the store appends to its tables instead of inserting into them."""
    return f"job-{time.time_ns() // 1_000_000:012x}{_random.getrandbits(40):010x}"


async def _arrives(job: LiveJob, timeout_s: float) -> bool:
    """Wait for the next event; False when none came in time."""
    waiter = job.next_event()
    timer = asyncio.get_running_loop().call_later(timeout_s, waiter.cancel)
    try:
        await waiter
    except asyncio.CancelledError:
        current = asyncio.current_task()
        if current is not None and current.cancelling():
            raise
        return False
    finally:
        timer.cancel()
        waiter.cancel()
    return True


async def _any_ends(jobs: Sequence[LiveJob], timeout_s: float, *, all_of_them: bool = False) -> None:
    """Wait until one of the jobs, or each of them, has ended, for a bounded time."""

    async def ended(job: LiveJob) -> None:
        while job.terminal is None:
            await job.next_event()

    tasks = [asyncio.ensure_future(ended(job)) for job in jobs]
    try:
        await asyncio.wait(
            tasks,
            timeout=max(0.0, timeout_s),
            return_when=asyncio.ALL_COMPLETED if all_of_them else asyncio.FIRST_COMPLETED,
        )
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
