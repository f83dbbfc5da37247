"""A runtime and an adapter that do what a test tells them, and an agent of such engines."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

from nodeagent.engines import (
    CommandLine,
    EngineHealth,
    EngineStream,
    LoadProgress,
    Probe,
    RunKind,
)
from nodeagent.runtimes import EngineExit, LaunchPlan, RunningEngine, RuntimeProgress
from nodeagent.supervisor import Command, EngineRecord, Operation, Records, Supervisor
from rung.errors import RungError
from rung.types import (
    DeploymentSpec,
    DockerRuntime,
    ExternalRuntime,
    LifecycleDone,
    LifecycleEvent,
    LifecycleFailed,
    LifecycleProgress,
    NodeStatus,
    ProcessRuntime,
    Residency,
)


def open_gate() -> asyncio.Event:
    """Something that a test may close, and open again."""
    gate = asyncio.Event()
    gate.set()
    return gate


@dataclass(eq=False)
class ScriptedRuntime:
    """Runs engines in name only; `starts` and `stops` are what it was asked.

    Its engines outlive an agent, as real ones do: give the same runtime to the next agent.
    """

    first_pid: int = 100
    #: Raised by the methods of the same names while set.
    check_error: RungError | None = None
    start_error: RungError | None = None
    stop_error: RungError | None = None
    find_error: RungError | None = None
    pids_error: RungError | None = None
    #: In containers: engines have an id and no PID.
    in_containers: bool = False
    #: Somebody else's engines, which have neither.
    external: bool = False
    output: list[str] = field(default_factory=list)
    may_start: asyncio.Event = field(default_factory=open_gate)
    may_stop: asyncio.Event = field(default_factory=open_gate)
    may_find: asyncio.Event = field(default_factory=open_gate)
    starts: list[LaunchPlan] = field(default_factory=list)
    stops: list[int] = field(default_factory=list)
    stopped: list[int] = field(default_factory=list)
    logs_of: list[RunningEngine] = field(default_factory=list)
    _exits: dict[int, asyncio.Future[EngineExit]] = field(default_factory=dict)

    def check(self, plan: LaunchPlan) -> None:
        if self.check_error is not None:
            raise self.check_error

    async def start(self, plan: LaunchPlan, on_progress: Callable[[RuntimeProgress], None]) -> RunningEngine:
        self.starts.append(plan)
        number = len(self.starts)
        on_progress(RuntimeProgress("starting engine"))
        await self.may_start.wait()
        if self.start_error is not None:
            raise self.start_error
        self._exits[number] = asyncio.get_running_loop().create_future()
        pid = self.first_pid + number
        return RunningEngine(
            deployment_id=plan.deployment_id,
            generation=plan.generation,
            spec_hash=plan.spec_hash,
            base_url=f"http://127.0.0.1:{plan.port}",
            pid=0 if self.in_containers or self.external else pid,
            container_id=f"container-{pid}" if self.in_containers else "",
        )

    def ends(self, number: int, detail: str = "ended with exit code 1") -> None:
        """The engine of the start with this number, from 1, ends by itself."""
        self._exits[number].set_result(EngineExit(exit_code=1, detail=detail, log_tail=tuple(self.output)))

    async def find(self, record: RunningEngine) -> bool:
        await self.may_find.wait()
        if self.find_error is not None:
            raise self.find_error
        return self.runs(self._number(record))

    def runs(self, number: int) -> bool:
        return number in self._exits and not self._exits[number].done()

    def _number(self, record: RunningEngine) -> int:
        """Which start made an engine; 0 for one that has not come to a process."""
        if self.external:
            return 1
        pid = record.pid or int(record.container_id.removeprefix("container-") or self.first_pid)
        return pid - self.first_pid

    async def wait(self, record: RunningEngine) -> EngineExit:
        return await asyncio.shield(self._exits[self._number(record)])

    async def stop(self, record: RunningEngine, grace_s: float) -> None:
        number = self._number(record)
        self.stops.append(number)
        await self.may_stop.wait()
        if self.stop_error is not None:
            raise self.stop_error
        if self.runs(number):
            self.ends(number, "was ended by SIGTERM")
        self.stopped.append(number)

    async def log(self, record: RunningEngine, *, tail_lines: int, follow: bool) -> AsyncIterator[str]:
        self.logs_of.append(record)
        for line in self.output[-tail_lines:] if tail_lines else []:
            yield line
        if follow:
            await self.wait(record)

    async def pids(self, record: RunningEngine) -> frozenset[int]:
        if self.pids_error is not None:
            raise self.pids_error
        return frozenset({self.first_pid + self._number(record)})

    async def strays(self, known: frozenset[str]) -> tuple[RunningEngine, ...]:
        return ()

    async def aclose(self) -> None:
        return


@dataclass
class ScriptedReply:
    """An engine's answer in pieces; each waits for `gate`."""

    pieces: tuple[bytes, ...] = (b"data: 1\n\n", b"data: [DONE]\n\n")
    breaks: RungError | None = None
    status: int = 200
    content_type: str = "text/event-stream"
    retry_after: str = ""
    gate: asyncio.Event = field(default_factory=open_gate)
    early: bytes = b""
    intervals_s: list[float] = field(default_factory=list)

    def ready(self) -> bytes:
        return self.early

    async def chunks(self, interval_s: Callable[[], float] | None = None) -> AsyncIterator[bytes]:
        for piece in self.pieces:
            await self.gate.wait()
            yield piece
            if interval_s is not None:
                self.intervals_s.append(interval_s())
        if self.breaks is not None:
            raise self.breaks


@dataclass
class ScriptedAdapter:
    """Says of every engine what `health` says."""

    health: EngineHealth = EngineHealth.READY
    detail: str = ""
    probe_takes_s: float = 0.0
    command_error: RungError | None = None
    reply: ScriptedReply = field(default_factory=ScriptedReply)
    bodies: list[bytes] = field(default_factory=list)
    entered: asyncio.Event = field(default_factory=asyncio.Event)
    left: asyncio.Event = field(default_factory=asyncio.Event)

    def command_line(self, spec: DeploymentSpec, *, listen_host: str, listen_port: int) -> CommandLine:
        if self.command_error is not None:
            raise self.command_error
        return CommandLine(arguments=("--port", str(listen_port)))

    async def probe(self, base_url: str, spec: DeploymentSpec) -> Probe:
        await asyncio.sleep(self.probe_takes_s)
        return Probe(health=self.health, detail=self.detail)

    def load_progress(self, line: str) -> LoadProgress | None:
        return None

    @asynccontextmanager
    async def run(
        self, base_url: str, spec: DeploymentSpec, kind: RunKind, body: bytes, *, idle_timeout_s: float
    ) -> AsyncIterator[EngineStream]:
        self.bodies.append(body)
        self.entered.set()
        try:
            yield self.reply
        finally:
            self.left.set()


@dataclass
class AnAgent:
    """A supervisor over scripted engines."""

    supervisor: Supervisor
    records: Records
    runtime: ScriptedRuntime
    docker: ScriptedRuntime
    adapter: ScriptedAdapter
    _operations: int = 0

    def start(self, spec: DeploymentSpec, operation_id: str = "") -> Operation:
        return self.supervisor.start(self.command(operation_id), spec)

    def stop(self, deployment_id: str, operation_id: str = "", *, force: bool = False) -> Operation:
        return self.supervisor.stop(self.command(operation_id), deployment_id, force=force)

    def sleep(
        self,
        deployment_id: str = "chat-1",
        operation_id: str = "",
        *,
        level: int = 1,
        force: bool = False,
        drain_timeout_s: float = 30.0,
    ) -> Operation:
        return self.supervisor.sleep(
            self.command(operation_id),
            deployment_id,
            level=level,
            force=force,
            drain_timeout_s=drain_timeout_s,
        )

    def shrink(
        self, deployment_id: str = "chat-1", operation_id: str = "", *, drain_timeout_s: float = 30.0
    ) -> Operation:
        return self.supervisor.shrink(
            self.command(operation_id), deployment_id, drain_timeout_s=drain_timeout_s
        )

    def wake(self, deployment_id: str = "chat-1", operation_id: str = "") -> Operation:
        return self.supervisor.wake(self.command(operation_id), deployment_id)

    def free(self, deployment_id: str = "chat-1", operation_id: str = "") -> Operation:
        return self.supervisor.free(self.command(operation_id), deployment_id)

    def residency(self, deployment_id: str = "chat-1") -> Residency:
        return self.supervisor.engine(deployment_id).residency

    async def forget(self, deployment_id: str) -> None:
        await self.supervisor.forget(self.command(), deployment_id)

    def command(self, operation_id: str = "") -> Command:
        self._operations += 1
        return Command(operation_id or f"own-{self._operations}", 1)

    def record(self, deployment_id: str) -> EngineRecord | None:
        """What is on disk."""
        return next((each for each in self.records.load() if each.spec.id == deployment_id), None)


@asynccontextmanager
async def an_agent(
    folder: Path,
    *,
    runtime: ScriptedRuntime | None = None,
    docker: ScriptedRuntime | None = None,
    adapter: ScriptedAdapter | None = None,
    look: Callable[[], Awaitable[NodeStatus]] | None = None,
    look_soon: Callable[[], None] = lambda: None,
) -> AsyncIterator[AnAgent]:
    """An agent on the state in `folder`; the next one may follow it there."""
    records = Records(folder)
    runtime = runtime or ScriptedRuntime()
    docker = docker or ScriptedRuntime(first_pid=500, in_containers=True)
    adapter = adapter or ScriptedAdapter()
    supervisor = Supervisor(
        node_id="box",
        records=records,
        runtimes={
            ProcessRuntime: runtime,
            DockerRuntime: docker,
            ExternalRuntime: ScriptedRuntime(external=True),
        },
        adapter_for=lambda _: adapter,
        look=look,
        look_soon=look_soon,
    )
    try:
        if look is not None:
            supervisor.measured(await look())
        await supervisor.resume()
        yield AnAgent(supervisor, records, runtime, docker, adapter)
    finally:
        await supervisor.aclose()
        records.close()


async def events_of(operation: Operation) -> list[LifecycleEvent]:
    """All events, once the operation has ended."""
    return [event async for event in operation.events()]


async def done(operation: Operation) -> LifecycleDone:
    """The outcome of an operation that ends well."""
    payload = (await events_of(operation))[-1].payload
    assert isinstance(payload, LifecycleDone), payload
    return payload


async def failed(operation: Operation) -> LifecycleFailed:
    """The outcome of an operation that fails."""
    payload = (await events_of(operation))[-1].payload
    assert isinstance(payload, LifecycleFailed), payload
    return payload


async def told(operation: Operation, text: str) -> LifecycleProgress:
    """The first progress with this text in it, once it is told."""
    async for event in operation.events():
        if isinstance(event.payload, LifecycleProgress) and text in event.payload.detail:
            return event.payload
    raise AssertionError(f"{operation.what} ended without telling {text!r}")
