"""Jobs and pipelines that do what a test tells them, behind the ports of the API."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Collection, Sequence
from dataclasses import dataclass, field

from controlplane.pipelines._wish import Wish
from rung.errors import OutOfRangeError, RungError, UnknownJobError, UnknownModelError
from rung.types import (
    TERMINAL_EVENTS,
    ConsideredTarget,
    Embeddings,
    EventPayload,
    Job,
    JobAccepted,
    JobCancelled,
    JobDone,
    JobEvent,
    JobKind,
    JobState,
    Model,
    Phase,
    PhaseProgress,
    Policy,
    Predictions,
    PredictionTask,
    RouteExplanation,
    Served,
    TokenDelta,
    Usage,
)


@dataclass
class FakeJob:
    """A log that a test writes."""

    id: str
    events: list[JobEvent] = field(default_factory=list)
    cancelled_by: list[str] = field(default_factory=list)
    changed: asyncio.Event = field(default_factory=asyncio.Event)

    def append(self, payload: EventPayload) -> None:
        sequence = len(self.events) + 1
        self.events.append(JobEvent(self.id, sequence, 1000.0 + sequence, float(sequence), payload))
        self.changed.set()
        self.changed = asyncio.Event()

    @property
    def ended(self) -> bool:
        return bool(self.events) and isinstance(self.events[-1].payload, TERMINAL_EVENTS)

    def request_cancel(self, by: str) -> None:
        if not self.ended:
            self.cancelled_by.append(by)
            self.append(JobCancelled(by))

    def record(self) -> Job:
        state = JobState.DONE if self.ended else JobState.RUNNING
        return Job(id=self.id, kind=JobKind.CHAT, state=state, model="tiny", create_time_s=1000.0)


@dataclass
class FakeJobs:
    live: dict[str, FakeJob] = field(default_factory=dict)
    records: list[Job] = field(default_factory=list)
    asked_states: list[frozenset[JobState]] = field(default_factory=list)
    asked_data: list[bool] = field(default_factory=list)

    def _job(self, job_id: str) -> FakeJob:
        if job_id not in self.live:
            raise UnknownJobError(f"there is no job {job_id}", job=job_id)
        return self.live[job_id]

    async def get(self, job_id: str) -> Job:
        return self._job(job_id).record()

    async def list(
        self, *, page_size: int, before: str | None = None, states: Collection[JobState] = ()
    ) -> Sequence[Job]:
        self.asked_states.append(frozenset(states))
        ordered = sorted(self.records, key=lambda job: job.id, reverse=True)
        return [job for job in ordered if before is None or job.id < before][:page_size]

    async def cancel(self, job_id: str, by: str) -> Job:
        job = self._job(job_id)
        job.request_cancel(by)
        return job.record()

    async def watch(
        self, job_id: str, after_sequence: int = 0, heartbeat_s: float = 1.0, *, with_data: bool = False
    ) -> AsyncIterator[JobEvent]:
        self.asked_data.append(with_data)
        job = self._job(job_id)
        if after_sequence > len(job.events):
            raise OutOfRangeError(f"job {job_id} has no event {after_sequence}")
        sequence = after_sequence
        while True:
            for event in job.events[sequence:]:
                yield event
                sequence = event.sequence
            if job.ended:
                return
            try:
                async with asyncio.timeout(heartbeat_s):
                    await job.changed.wait()
            except TimeoutError:
                yield JobEvent(job_id, 0, 1.0, 1.0, PhaseProgress(Phase.GENERATING))


@dataclass
class FakePipelines:
    jobs: FakeJobs
    wishes: list[Wish] = field(default_factory=list)
    #: What a started job says at once.
    script: tuple[EventPayload, ...] = (TokenDelta("Hi"), JobDone("stop"))
    error: RungError | None = None
    predicted: list[tuple[PredictionTask, str, Policy, str]] = field(default_factory=list)
    predictions: Predictions = field(default_factory=Predictions)
    found_models: tuple[Model, ...] = ()
    started: asyncio.Event = field(default_factory=asyncio.Event)

    def models(self) -> tuple[Model, ...]:
        return self.found_models

    async def prepare(self, wish: Wish) -> Wish:
        return wish

    def start(self, wish: Wish) -> FakeJob:
        if self.error is not None:
            raise self.error
        if wish.model == "nope":
            raise UnknownModelError("no deployment serves nope", model="nope")
        self.wishes.append(wish)
        job = FakeJob(f"job-{len(self.wishes)}")
        self.jobs.live[job.id] = job
        job.append(JobAccepted(wish.kind, wish.model))
        for payload in self.script:
            job.append(payload)
        self.started.set()
        return job

    async def create_detached(self, wish: Wish) -> Job:
        return self.start(wish).record()

    async def embed(self, wish: Wish) -> Embeddings:
        self.wishes.append(wish)
        return Embeddings(
            vectors=((0.5, 1.0), (0.25, 0.0)),
            usage=Usage(prompt_tokens=4),
            served=Served("embed", "embed-1", "box", "embed"),
            job_id="job-9",
        )

    async def predict(
        self, task: PredictionTask, *, model: str, policy: Policy, request_id: str
    ) -> Predictions:
        self.predicted.append((task, model, policy, request_id))
        if self.error is not None:
            raise self.error
        return self.predictions

    def explain(self, wish: Wish) -> RouteExplanation:
        self.wishes.append(wish)
        considered = ConsideredTarget(
            target="chat-1", taken=True, reason="it is awake", expected_wait_s=0.5, place=1
        )
        return RouteExplanation(
            considered=(considered,),
            target="chat-1",
            effort=8,
            rung="hard",
            why="it asks for a proof",
            reason=(considered,),
        )
