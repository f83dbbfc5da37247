"""A client of the SDK that answers from what a test gave it, and remembers what it was asked."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Collection, Sequence
from contextlib import asynccontextmanager
from typing import Any

from msgspec.structs import replace

from rung import AsyncClient, GenerationStream, HeldLease, JobStream, Policy, v1
from rung._client_calls import Connection
from rung._client_generation import Messages, OpenAiBody
from rung.errors import RungError
from rung.transport import ChannelOptions
from rung.types import (
    TERMINAL_EVENTS,
    ArtifactChunk,
    ChatMessage,
    Deployment,
    FleetSnapshot,
    GenerationInput,
    Infeasible,
    Job,
    JobEvent,
    JobState,
    Lease,
    LifecycleEvent,
    Model,
    Node,
    PhaseProgress,
    Predictions,
    PredictionTask,
    Priority,
    ProfileEvent,
    ProfileList,
    ReclaimGrade,
    ReclaimPlan,
    RouteExplanation,
    Tool,
)


class FakeStream(JobStream):
    """Events of a job, then an error if there is one. Built on no connection."""

    def __init__(self, events: Sequence[JobEvent], error: RungError | None) -> None:
        self._left = list(events)
        self._error = error
        self.closed = False

    async def __anext__(self) -> JobEvent:
        if self._left:
            return self._left.pop(0)
        if self._error is not None:
            raise self._error
        raise StopAsyncIteration

    async def aclose(self) -> None:
        self.closed = True


class FakeGeneration(GenerationStream):
    """Events of a generation, then an error if there is one. Built on no connection.

    Without a last one among them nothing more comes; `interrupt` is called then.
    """

    def __init__(
        self, events: Sequence[JobEvent], error: RungError | None, interrupt: Callable[[], None]
    ) -> None:
        super().__init__(
            Connection(ChannelOptions(address=""), timeout_s=1, reconnect_s=1), v1.GenerateRequest()
        )
        self._events = self._script(list(events), error, interrupt)

    async def _script(
        self, events: list[JobEvent], error: RungError | None, interrupt: Callable[[], None]
    ) -> AsyncGenerator[JobEvent, None]:
        for event in events:
            self._job_id = event.job_id
            yield event
            if isinstance(event.payload, TERMINAL_EVENTS):
                return
        if error is not None:
            raise error
        interrupt()
        await asyncio.get_running_loop().create_future()


class FakeClient(AsyncClient):
    """The surface that the CLI uses. `error` is raised by every call instead of an answer."""

    def __init__(self) -> None:
        super().__init__("127.0.0.1:1")
        self.asked: list[tuple[str, Any]] = []
        self.error: RungError | None = None
        self.events: list[JobEvent] = []
        self.operation: list[LifecycleEvent] = []
        self.profiles = ProfileList(profiles=())
        self.switch: list[ProfileEvent] = []
        self.snapshots: list[FleetSnapshot] = []
        self.jobs: list[Job] = []
        self.models: tuple[Model, ...] = ()
        self.predictions = Predictions()
        self.route = RouteExplanation(considered=())
        self.stream: FakeStream | None = None
        self.interrupt: Callable[[], None] = lambda: None
        self.plan: ReclaimPlan | Infeasible | None = None
        self.waits: list[PhaseProgress | ReclaimPlan] = []
        self.leases: tuple[Lease, ...] = ()
        self.closed = 0

    async def aclose(self) -> None:
        self.closed += 1
        await super().aclose()

    def _ask(self, what: str, about: Any = None) -> None:
        self.asked.append((what, about))
        if self.error is not None:
            raise self.error

    @asynccontextmanager
    async def lease(
        self,
        gpu: str,
        vram_bytes: int,
        *,
        max_grade: ReclaimGrade = ReclaimGrade.FULL,
        priority: Priority = Priority.AGENT,
        holder: str = "",
        deployment_id: str = "",
        ttl_s: float = 60.0,
        on_wait: Callable[[PhaseProgress | ReclaimPlan], None] | None = None,
    ) -> AsyncIterator[HeldLease]:
        self._ask("lease", (gpu, vram_bytes, max_grade, priority, holder, ttl_s))
        for step in self.waits:
            assert on_wait is not None
            on_wait(step)
        try:
            yield HeldLease(self.leases[0])
        finally:
            self.asked.append(("given back", None))

    async def list_leases(self) -> tuple[Lease, ...]:
        self._ask("list_leases")
        return self.leases

    async def release_lease(self, lease_id: str) -> None:
        self._ask("release_lease", lease_id)

    async def plan_reclaim(
        self, gpu: str, vram_bytes: int, *, max_grade: ReclaimGrade = ReclaimGrade.FULL
    ) -> ReclaimPlan | Infeasible:
        self._ask("plan_reclaim", (gpu, vram_bytes, max_grade))
        assert self.plan is not None
        return self.plan

    def chat(
        self,
        messages: str | Sequence[ChatMessage],
        *,
        model: str = "",
        effort: int | None = None,
        tools: Sequence[Tool] = (),
        max_tokens: int | None = None,
        temperature: float | None = None,
        policy: Policy = Policy(),  # noqa: B008 - frozen
        request_id: str = "",
    ) -> JobStream:
        self.asked.append(
            ("chat", {"messages": messages, "model": model, "effort": effort, "policy": policy})
        )
        self.stream = FakeStream(self.events, self.error)
        return self.stream

    def generate(
        self,
        wanted: GenerationInput,
        *,
        model: str = "",
        effort: int | None = None,
        policy: Policy = Policy(),  # noqa: B008 - frozen
        request_id: str = "",
    ) -> GenerationStream:
        self.asked.append(("generate", (wanted, model, effort, policy)))
        return FakeGeneration(self.events, self.error, self.interrupt)

    async def create_job(
        self,
        messages: Messages | None = None,
        *,
        body: OpenAiBody | None = None,
        wanted: GenerationInput | None = None,
        model: str = "",
        effort: int | None = None,
        tools: Sequence[Tool] = (),
        max_tokens: int | None = None,
        temperature: float | None = None,
        policy: Policy = Policy(),  # noqa: B008 - frozen
        request_id: str = "",
    ) -> Job:
        self._ask("create_job", (wanted, model, effort, policy))
        return self.jobs[0]

    async def list_jobs(
        self, states: Collection[JobState] = (), page_size: int = 0
    ) -> AsyncGenerator[Job, None]:
        self._ask("list_jobs", tuple(states))
        for job in self.jobs:
            yield job

    async def watch_job(
        self,
        job_id: str,
        after_sequence: int = 0,
        *,
        heartbeats: bool = False,
        artifact_data: bool = True,
    ) -> AsyncGenerator[JobEvent, None]:
        self._ask("watch_job", (job_id, after_sequence))
        for event in self.events:
            if not artifact_data and isinstance(event.payload, ArtifactChunk):
                event = replace(event, payload=replace(event.payload, data=b""))
            if event.sequence > after_sequence or (heartbeats and event.sequence == 0):
                yield event

    async def cancel_job(self, job_id: str) -> Job:
        self._ask("cancel_job", job_id)
        return next(job for job in self.jobs if job.id == job_id)

    async def predict(
        self,
        task: PredictionTask,
        *,
        model: str = "",
        policy: Policy = Policy(),  # noqa: B008 - frozen
        request_id: str = "",
        timeout_s: float = 1.0,
    ) -> Predictions:
        self._ask("predict", (task, model, policy))
        return self.predictions

    async def list_models(self) -> tuple[Model, ...]:
        self._ask("list_models")
        return self.models

    async def explain_route(
        self,
        messages: Messages = "",
        *,
        model: str = "",
        effort: int | None = None,
        policy: Policy = Policy(),  # noqa: B008 - frozen
    ) -> RouteExplanation:
        self._ask("explain_route", (messages, model, effort, policy))
        return self.route

    async def list_nodes(self) -> tuple[Node, ...]:
        self._ask("list_nodes")
        return self.snapshots[-1].nodes if self.snapshots else ()

    async def list_deployments(self) -> tuple[Deployment, ...]:
        self._ask("list_deployments")
        return self.snapshots[-1].deployments

    async def watch_fleet(self) -> AsyncGenerator[FleetSnapshot, None]:
        self._ask("watch_fleet")
        for snapshot in self.snapshots:
            yield snapshot

    async def list_profiles(self) -> ProfileList:
        self._ask("list_profiles")
        return self.profiles

    async def switch_profile(
        self, name: str, *, dry_run: bool = False, operation_id: str = ""
    ) -> AsyncGenerator[ProfileEvent, None]:
        self._ask("switch_profile", (name, dry_run))
        for event in self.switch:
            yield event

    async def _operate(self, what: str, about: Any) -> AsyncGenerator[LifecycleEvent, None]:
        self._ask(what, about)
        for event in self.operation:
            yield event

    def start_deployment(
        self, deployment_id: str, *, operation_id: str = ""
    ) -> AsyncGenerator[LifecycleEvent, None]:
        return self._operate("start", deployment_id)

    def stop_deployment(
        self, deployment_id: str, *, force: bool = False, operation_id: str = ""
    ) -> AsyncGenerator[LifecycleEvent, None]:
        return self._operate("stop", (deployment_id, force))

    def sleep_deployment(
        self, deployment_id: str, *, force: bool = False, level: int = 0, operation_id: str = ""
    ) -> AsyncGenerator[LifecycleEvent, None]:
        return self._operate("sleep", (deployment_id, force, level))

    def wake_deployment(
        self, deployment_id: str, *, operation_id: str = ""
    ) -> AsyncGenerator[LifecycleEvent, None]:
        return self._operate("wake", deployment_id)
