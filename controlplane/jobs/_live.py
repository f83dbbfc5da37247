"""A job while it runs: its events in memory, and those who wait for the next one."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable

from msgspec.structs import replace

from rung.types import (
    ArtifactChunk,
    EventPayload,
    FailureReason,
    Job,
    JobAccepted,
    JobCancelled,
    JobDone,
    JobEvent,
    JobFailed,
    JobKind,
    JobState,
    Phase,
    PhaseProgress,
    Policy,
    Routed,
    Served,
    Terminal,
    TokenDelta,
    ToolCallDelta,
    Usage,
    UsageReported,
)

#: Events that are kept in memory once they are stored; readers further behind read the store.
_KEPT_EVENTS = 4096


class LiveJob:
    """The one writer's view of a running job. Not thread-safe: it lives on the event loop.

    `text` is on the path of every token: it makes one struct and wakes who waits.

    Args:
        job_id: its id.
        kind: what it makes.
        model: what was asked for.
        policy: how it may be treated.
        request_id: its caller's own id of it, or empty.
        on_change: called after each event but those of `on_text`.
        on_text: called after each piece of text or of a tool call: there are many of these, and none is worth
            a write of its own. `on_change` when left out.
        monotonic_s: the clock of its elapsed times.
    """

    __slots__ = (
        "_cancel",
        "_events",
        "_first_kept",
        "_monotonic_s",
        "_on_change",
        "_on_text",
        "_phase",
        "_phase_started",
        "_preview_sequence",
        "_started",
        "_waiters",
        "cancel_requested_by",
        "create_time_s",
        "delivered_characters",
        "id",
        "kind",
        "last_sequence",
        "model",
        "policy",
        "request_id",
        "served",
        "state",
        "stored_sequence",
        "terminal",
        "usage",
    )

    def __init__(
        self,
        *,
        job_id: str,
        kind: JobKind,
        model: str,
        policy: Policy,
        request_id: str,
        on_change: Callable[[LiveJob], None],
        on_text: Callable[[LiveJob], None] | None = None,
        monotonic_s: Callable[[], float] = time.monotonic,
    ) -> None:
        self.id = job_id
        self.kind = kind
        self.model = model
        self.policy = policy
        self.request_id = request_id
        self.create_time_s = time.time()
        self.state = JobState.PENDING
        self.served: Served | None = None
        self.usage: Usage | None = None
        self.terminal: Terminal | None = None
        self.last_sequence = 0
        self.stored_sequence = 0
        self.delivered_characters = 0
        self.cancel_requested_by = ""
        self._monotonic_s = monotonic_s
        self._started = monotonic_s()
        self._events: list[JobEvent] = []
        self._first_kept = 1
        self._waiters: list[asyncio.Future[None]] = []
        self._on_change = on_change
        self._on_text = on_text or on_change
        self._cancel: Callable[[], object] | None = None
        self._preview_sequence = 0
        self._phase: PhaseProgress | None = None
        self._phase_started = self._started
        self.append(JobAccepted(kind=kind, model=model))

    def append(self, payload: EventPayload) -> JobEvent:
        """Add an event to the log and wake who waits for it; text has methods of its own."""
        event = self._add(payload)
        self._on_change(self)
        return event

    def _add(self, payload: EventPayload) -> JobEvent:
        now = self._monotonic_s()
        elapsed_s = now - self._started
        self.last_sequence += 1
        event = JobEvent(self.id, self.last_sequence, self.create_time_s + elapsed_s, elapsed_s, payload)
        self._events.append(event)
        if self._waiters:
            for waiter in self._waiters:
                if not waiter.done():
                    waiter.set_result(None)
            self._waiters.clear()
        return event

    def text(self, delta: TokenDelta) -> None:
        """Add text, and count what was delivered."""
        self.delivered_characters += len(delta.content)
        self._add(delta)
        self._on_text(self)

    def tool_call(self, delta: ToolCallDelta) -> None:
        """Add a part of a tool call."""
        self._add(delta)
        self._on_text(self)

    def artifact(self, chunk: ArtifactChunk) -> None:
        """Add a piece of an artifact, without its data: that is stored already.

        A preview has its data with it, until the next preview or the end: of many previews of many jobs, only
        one each is in memory. A job that has ended takes nothing more.
        """
        if self.terminal is not None:
            return
        if not chunk.preview:
            self.append(replace(chunk, data=b"") if chunk.data else chunk)
            return
        self._forget_preview()
        self._preview_sequence = self.append(chunk).sequence

    def _forget_preview(self) -> None:
        place = self._preview_sequence - self._first_kept
        if self._preview_sequence and place >= 0:
            self._events[place] = without_data(self._events[place])
        self._preview_sequence = 0

    def progress(
        self,
        phase: Phase,
        detail: str = "",
        *,
        step: int | None = None,
        total: int | None = None,
        percent: float | None = None,
        remaining_s: float | None = None,
        job_remaining_s: float | None = None,
    ) -> None:
        """Say that a phase began, moved on, or still goes on."""
        now = self._monotonic_s()
        if self._phase is None or self._phase.phase is not phase:
            self._phase_started = now
        self._phase = PhaseProgress(
            phase=phase,
            detail=detail,
            step=step,
            total=total,
            percent=percent,
            phase_elapsed_s=round(now - self._phase_started, 3),
            remaining_s=remaining_s,
            job_remaining_s=job_remaining_s,
        )
        self.append(self._phase)

    def begin_generating(self, served: Served) -> None:
        """Say who answers; from here on the engine is at work."""
        self._phase = PhaseProgress(phase=Phase.GENERATING, detail=f"{served.target} is answering")
        self._phase_started = self._monotonic_s()
        self.routed(served)

    def routed(self, served: Served) -> None:
        """Say who works on it; what is done there is told by phases of its own."""
        self.state = JobState.RUNNING
        self.served = served
        self.append(Routed(served=served))

    def consumed(self, usage: Usage) -> None:
        """Say what the generation consumed; what it cost before still counts."""
        if self.usage is not None and self.usage.cost_usd:
            usage = replace(usage, cost_usd=self.usage.cost_usd)
        self.usage = usage
        self.append(UsageReported(usage=usage))

    def spent(self, cost_usd: float) -> None:
        """Say what a cloud model took, beside what was spent before."""
        usage = self.usage or Usage()
        self.usage = replace(usage, cost_usd=usage.cost_usd + cost_usd)
        self.append(UsageReported(usage=self.usage))

    def done(self, finish_reason: str) -> None:
        """End with a result."""
        self._end(JobState.DONE, JobDone(finish_reason=finish_reason, served=self.served))

    def failed(self, reason: FailureReason, detail: str) -> None:
        """End without a complete result."""
        self._end(
            JobState.FAILED,
            JobFailed(reason=reason, detail=detail, delivered_characters=self.delivered_characters),
        )

    def cancelled(self, by: str) -> None:
        """End on request."""
        self._end(JobState.CANCELLED, JobCancelled(by=by))

    def _end(self, state: JobState, terminal: Terminal) -> None:
        if self.terminal is not None:
            return
        self.state = state
        self.terminal = terminal
        self._cancel = None
        self._forget_preview()
        self.append(terminal)

    def on_cancel(self, cancel: Callable[[], object]) -> None:
        """Set what a request to cancel calls; at once if one came already."""
        self._cancel = cancel
        if self.cancel_requested_by:
            cancel()

    def request_cancel(self, by: str) -> None:
        """Ask the job to end. Does nothing to one that has ended."""
        if self.terminal is not None or self.cancel_requested_by:
            return
        self.cancel_requested_by = by
        if self._cancel is not None:
            self._cancel()

    @property
    def elapsed_s(self) -> float:
        """Time since the job was accepted, until its terminal event if it has one."""
        return (
            self._events[-1].elapsed_s if self.terminal is not None else self._monotonic_s() - self._started
        )

    def heartbeat(self) -> JobEvent:
        """What is under way now, as an event outside the log."""
        now = self._monotonic_s()
        phase = self._phase or PhaseProgress(phase=Phase.ROUTE)
        since_s = now - self._phase_started
        passed_s = since_s - phase.phase_elapsed_s
        payload = replace(
            phase,
            phase_elapsed_s=round(since_s, 3),
            remaining_s=_less(phase.remaining_s, passed_s),
            job_remaining_s=_less(phase.job_remaining_s, passed_s),
        )
        elapsed_s = now - self._started
        return JobEvent(self.id, 0, self.create_time_s + elapsed_s, elapsed_s, payload)

    def kept_after(self, sequence: int) -> list[JobEvent] | None:
        """Events after `sequence`, or None when some of them are only in the store."""
        if sequence + 1 < self._first_kept:
            return None
        return self._events[sequence + 1 - self._first_kept :]

    def unstored(self) -> list[JobEvent]:
        """Events that the store does not have."""
        return self._events[self.stored_sequence + 1 - self._first_kept :]

    def stored(self, sequence: int) -> None:
        """Note that the store has all up to `sequence`, and let go of old ones."""
        self.stored_sequence = sequence
        surplus = min(len(self._events) - _KEPT_EVENTS, sequence + 1 - self._first_kept)
        if surplus > _KEPT_EVENTS:
            del self._events[:surplus]
            self._first_kept += surplus

    def next_event(self) -> asyncio.Future[None]:
        """A future that is done once something was appended; cancel it when it is not wanted."""
        waiter: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiters.append(waiter)
        return waiter

    def record(self) -> Job:
        """The job as it is now."""
        terminal = self.terminal
        failed = terminal if isinstance(terminal, JobFailed) else None
        if failed is not None:
            detail = failed.detail
        elif isinstance(terminal, JobCancelled):
            detail = f"cancelled by {terminal.by}"
        else:
            detail = ""
        return Job(
            id=self.id,
            request_id=self.request_id,
            kind=self.kind,
            state=self.state,
            model=self.model,
            served=self.served,
            create_time_s=self.create_time_s,
            end_time_s=self._events[-1].time_s if terminal is not None else None,
            last_sequence=self.last_sequence,
            failure_reason=failed.reason if failed else None,
            detail=detail,
            usage=self.usage,
            policy=self.policy,
        )


def without_data(event: JobEvent) -> JobEvent:
    """The event as a log has it: data of artifacts is kept elsewhere, and that of previews nowhere."""
    payload = event.payload
    if isinstance(payload, ArtifactChunk) and payload.data:
        return replace(event, payload=replace(payload, data=b""))
    return event


def _less(remaining_s: float | None, passed_s: float) -> float | None:
    """What remains of a time after some of it passed; None, for not known, once all of it has."""
    if remaining_s is None or remaining_s <= passed_s:
        return None
    return round(remaining_s - passed_s, 3)
