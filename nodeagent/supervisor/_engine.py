"""One deployment on this node: its residency, its engine, and what may be done to it."""

from __future__ import annotations

import asyncio
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

import structlog
from msgspec.structs import replace

from nodeagent.engines import EngineAdapter, EngineHealth, LoadProgress
from nodeagent.runtimes import EngineExit, EngineRuntime, LaunchPlan, RunningEngine, RuntimeProgress
from nodeagent.supervisor._operations import Emit
from nodeagent.supervisor._records import KEPT_LOAD_TIMES, EngineRecord, Records, spec_hash
from nodeagent.supervisor._residency import require_edge
from rung.errors import (
    EngineStartFailedError,
    FailedPreconditionError,
    NotAwakeError,
    NotOursError,
    PinnedDeploymentError,
    UnavailableError,
)
from rung.types import (
    Deployment,
    DeploymentSpec,
    DockerRuntime,
    Endpoint,
    EndpointScope,
    ExternalRuntime,
    FailureReason,
    LifecycleDone,
    LifecycleProgress,
    Residency,
    ResidencyClass,
)

_log = structlog.get_logger("rung.agent")

#: How often an engine that loads is asked whether it is ready.
_READY_POLL_S = 0.25
#: While something is under way, a stream says so at least this often.
KEEP_ALIVE_S = 1.0
#: How often an engine that is awake is asked how it is, and how often it may fail to answer.
_HEALTH_INTERVAL_S = 5.0
_HEALTH_TOLERANCE = 3
#: How often an engine of somebody else that is away is looked for.
_RETURN_INTERVAL_S = 2.0
#: An engine of somebody else that is adopted is given this long to answer.
_ADOPT_PATIENCE_S = 3.0
_RUNNING = frozenset({Residency.STARTING, Residency.AWAKE, Residency.ASLEEP})


class EngineSupervisor:
    """Owns one deployment. All changes go through its lock, so that there is one writer."""

    def __init__(
        self,
        record: EngineRecord,
        *,
        runtime: EngineRuntime,
        adapter: EngineAdapter,
        records: Records,
        scope: EndpointScope,
        on_change: Callable[[], None],
    ) -> None:
        self.adapter = adapter
        self.runtime = runtime
        self._record = record
        self._records = records
        self._scope = scope
        self._on_change = on_change
        self._lock = asyncio.Lock()
        self._starting: asyncio.Task[object] | None = None
        self._tending: asyncio.Task[None] | None = None
        self._idle = asyncio.Event()
        self._idle.set()
        self._closing = False
        self.deployment = Deployment(
            spec=record.spec,
            residency=Residency.STOPPED,
            generation=record.generation,
            adopted=record.adopted,
            residency_time_s=time.time(),
        )

    @property
    def id(self) -> str:
        """The deployment's id."""
        return self._record.spec.id

    @property
    def residency(self) -> Residency:
        """Where the weights are."""
        return self.deployment.residency

    @property
    def pinned(self) -> bool:
        """Whether the engine that runs, or the one that is configured, is pinned."""
        return self._record.residency_class is ResidencyClass.PINNED

    @property
    def external(self) -> bool:
        """Whether somebody else runs the engine."""
        return isinstance(self._record.spec.engine.runtime, ExternalRuntime)

    @property
    def running(self) -> RunningEngine | None:
        """The engine that runs, or is about to."""
        return self._record.running

    @contextmanager
    def serving(self) -> Iterator[str]:
        """Count a request while it is served; gives the engine's base URL.

        Raises:
            NotAwakeError: it cannot be served now.
        """
        running = self._record.running
        if self.residency is not Residency.AWAKE or running is None:
            raise NotAwakeError(
                f"{self.id} is {self.residency}: {self.deployment.detail}", deployment=self.id
            )
        self._count(1)
        try:
            yield running.base_url
        finally:
            self._count(-1)

    def _count(self, change: int) -> None:
        # Not published: the control plane keeps its own count, and this is the path of every request.
        active = self.deployment.active_requests + change
        self.deployment = replace(self.deployment, active_requests=active)
        if active:
            self._idle.clear()
        else:
            self._idle.set()

    def measured(self, vram_bytes: int | None) -> None:
        """Note the memory that telemetry found for this engine."""
        if vram_bytes != self.deployment.vram_bytes:
            self.deployment = replace(self.deployment, vram_bytes=vram_bytes)
            self._on_change()

    async def start(self, spec: DeploymentSpec, emit: Emit) -> LifecycleDone:
        """Start the engine and return once it is ready; at once if it runs with this spec.

        Raises:
            FailedPreconditionError: it runs with another spec.
            NotAllowedError, InvalidRequestError: the spec; nothing was started.
            EngineStartFailedError: it did not become ready; nothing is left running.
        """
        async with self._lock:
            await self._require_gone()
            if self.residency in _RUNNING and not await self._renew(spec):
                raise FailedPreconditionError(
                    f"{self.id} runs with another configuration; stop it first", deployment=self.id
                )
            if self.residency is not Residency.AWAKE:
                self._starting = asyncio.current_task()
                try:
                    await self._start(spec, emit)
                finally:
                    self._starting = None
            return LifecycleDone(self.deployment)

    async def _require_gone(self) -> None:
        """Refuse to start beside an engine that a failed stop, or a runtime that was away, may have left.

        Raises:
            UnavailableError: its runtime cannot tell.
            FailedPreconditionError: it still runs.
        """
        running = self._record.running
        if self.residency in _RUNNING or self.external or running is None:
            return
        if not (running.pid or running.container_id):
            return
        if await self.runtime.find(running):
            raise FailedPreconditionError(
                f"{self.id} is {self.residency}, and its engine still runs; stop it first",
                deployment=self.id,
            )
        await self._stop_tending()
        self._record = replace(self._record, running=None)
        if self.residency is Residency.STOPPING:
            self._set(Residency.STOPPED, "it ended by itself")

    async def _renew(self, spec: DeploymentSpec) -> bool:
        """Take over what may change of a spec while the engine runs; False if it would have to restart.

        A pinned engine stays pinned while it runs, whatever a later spec says.
        """
        if spec_hash(spec) != spec_hash(self._record.spec):
            return False
        self._record = replace(self._record, spec=spec, adopted=self._record.adopted and self.external)
        self._records.save(self._record)
        self._set(self.residency, self.deployment.detail)
        return True

    async def _start(self, spec: DeploymentSpec, emit: Emit) -> None:
        await self._stop_tending()
        generation = self._record.generation + 1
        plan = self._plan(spec, generation)
        self._record = replace(
            self._record,
            spec=spec,
            residency=Residency.STARTING,
            residency_class=spec.residency_class,
            generation=generation,
            running=_intended(plan, spec),
        )
        # Before anything runs: an agent that dies now knows what to look for.
        self._records.save(self._record)
        self._set(Residency.STARTING, "starting")
        emit(LifecycleProgress(Residency.STARTING, "starting"))

        def on_progress(progress: RuntimeProgress) -> None:
            self._set(Residency.STARTING, progress.detail, load_percent=progress.percent)
            emit(LifecycleProgress(Residency.STARTING, progress.detail, progress.percent))

        began_s = time.monotonic()
        try:
            running = await self.runtime.start(plan, on_progress)
            self._record = replace(self._record, running=running)
            self._records.save(self._record)
            await self._until_ready(emit, began_s)
        except BaseException as error:
            # An agent that ends leaves an engine that loads to the next one.
            if not self._closing:
                await asyncio.shield(self._give_up(error))
            raise
        if not self.external:
            times = (*self._record.load_times_s, time.monotonic() - began_s)[-KEPT_LOAD_TIMES:]
            self._record = replace(self._record, load_times_s=times)
        self._awake()

    def _plan(self, spec: DeploymentSpec, generation: int) -> LaunchPlan:
        runtime = spec.engine.runtime
        arguments: tuple[str, ...] = ()
        environment: dict[str, str] = {}
        port = listen_port = 0
        if not isinstance(runtime, ExternalRuntime):
            port = spec.engine.port or _free_port()
            listen_port = port
            listen_host = "127.0.0.1"
            if isinstance(runtime, DockerRuntime):
                # Published on the node's loopback interface by the runtime.
                listen_port = runtime.container_port or port
                listen_host = "0.0.0.0"  # noqa: S104 - inside the container
            line = self.adapter.command_line(spec, listen_host=listen_host, listen_port=listen_port)
            arguments, environment = line.arguments, line.environment
        return LaunchPlan(
            deployment_id=self.id,
            generation=generation,
            spec_hash=spec_hash(spec),
            runtime=runtime,
            arguments=arguments,
            environment=environment,
            port=port,
            listen_port=listen_port,
            gpus=spec.engine.gpus,
        )

    async def _until_ready(self, emit: Emit, began_s: float) -> None:
        """Return once the engine answers; say every second how far it is."""
        running = self._record.running
        assert running is not None
        spec = self._record.spec
        patience_s = _ADOPT_PATIENCE_S if self.external else spec.engine.start_timeout_s
        usual_s = _usual(self._record.load_times_s)
        loading = _Loading()
        exit_task = asyncio.ensure_future(self._exit(running))
        log_task = asyncio.ensure_future(self._follow_loading(running, loading))
        said_s = 0.0
        said = ""
        try:
            while True:
                probe = await self.adapter.probe(running.base_url, spec)
                # First: another server on the same port would answer for an engine that has ended.
                if probe.health is EngineHealth.READY and not exit_task.done():
                    return
                if exit_task.done():
                    ended = exit_task.result()
                    raise EngineStartFailedError(
                        f"{self.id} {ended.detail} while it was loading{_last_line(ended.log_tail)}",
                        deployment=self.id,
                    )
                elapsed_s = time.monotonic() - began_s
                if elapsed_s > patience_s:
                    raise EngineStartFailedError(
                        f"{self.id} was not ready within {patience_s:g} s"
                        + (f": {probe.detail}" if probe.detail else ""),
                        deployment=self.id,
                    )
                detail = loading.progress.detail or probe.detail or "waiting for the engine"
                if detail != said or time.monotonic() - said_s >= KEEP_ALIVE_S * 0.8:
                    said, said_s = detail, time.monotonic()
                    shown = f"{detail} ({elapsed_s:.0f} s)"
                    percent = loading.progress.percent
                    remaining_s = max(0.0, usual_s - elapsed_s) if usual_s is not None else None
                    self._set(Residency.STARTING, shown, load_percent=percent)
                    emit(LifecycleProgress(Residency.STARTING, shown, percent, remaining_s))
                await asyncio.wait([exit_task], timeout=_READY_POLL_S)
        finally:
            for task in (exit_task, log_task):
                task.cancel()
            await asyncio.gather(exit_task, log_task, return_exceptions=True)

    async def _exit(self, running: RunningEngine) -> EngineExit:
        """How the engine ended, once it has; a runtime that is away meanwhile says nothing about it."""
        while True:
            try:
                return await self.runtime.wait(running)
            except UnavailableError as error:
                _log.warning("runtime_away", deployment=self.id, error=error.message)
                await asyncio.sleep(_RETURN_INTERVAL_S)

    async def _follow_loading(self, running: RunningEngine, loading: _Loading) -> None:
        async for line in self.runtime.log(running, tail_lines=0, follow=True):
            found = self.adapter.load_progress(line)
            if found is not None:
                loading.progress = found

    async def _give_up(self, error: BaseException) -> None:
        """A start has failed or was called off: leave nothing running."""
        running = self._record.running
        if self.external:
            self._fail(FailureReason.ENGINE_START_FAILED, str(error) or "it does not answer")
            self._tend()
            return
        self._set(Residency.STOPPING, "the start did not succeed; stopping what there is")
        if running is not None:
            await self.runtime.stop(running, self._record.spec.engine.stop_grace_s)
        self._record = replace(self._record, running=None)
        if isinstance(error, asyncio.CancelledError):
            self._set(Residency.STOPPED, "the start was called off")
            self._save(Residency.STOPPED)
        else:
            self._fail(FailureReason.ENGINE_START_FAILED, str(error))

    async def stop(self, emit: Emit, *, force: bool) -> LifecycleDone:
        """Stop the engine after its running requests; at once if none runs.

        Raises:
            PinnedDeploymentError: it is pinned by this agent's own record, and `force` is not set.
            NotOursError: somebody else runs it.
        """
        if self.external:
            raise NotOursError(
                f"{self.id} is run by somebody else; stop it where it was started", deployment=self.id
            )
        if self.pinned and not force and self._record.running is not None:
            raise PinnedDeploymentError(
                f"{self.id} is pinned; nothing is done to it without force", deployment=self.id
            )
        if self._starting is not None:
            self._starting.cancel()
        async with self._lock:
            running = self._record.running
            if running is not None:
                await self._stop_tending()
                self._set(Residency.STOPPING, "letting running requests finish")
                self._save(Residency.STOPPING)
                await self._finish_requests(emit)
                stopping = asyncio.ensure_future(
                    self.runtime.stop(running, self._record.spec.engine.stop_grace_s)
                )
                while not stopping.done():
                    emit(LifecycleProgress(Residency.STOPPING, "stopping the engine"))
                    await asyncio.wait([stopping], timeout=KEEP_ALIVE_S)
                stopping.result()
                self._record = replace(self._record, running=None)
                self._set(Residency.STOPPED, "stopped")
                self._save(Residency.STOPPED)
            elif self.residency is Residency.FAILED:
                self._set(Residency.STOPPED, "stopped")
                self._save(Residency.STOPPED)
            return LifecycleDone(self.deployment)

    async def _finish_requests(self, emit: Emit) -> None:
        deadline_s = time.monotonic() + self._record.spec.engine.stop_grace_s
        while self.deployment.active_requests and time.monotonic() < deadline_s:
            left = self.deployment.active_requests
            emit(LifecycleProgress(Residency.STOPPING, f"letting {left} running requests finish"))
            with suppress(TimeoutError):
                async with asyncio.timeout(KEEP_ALIVE_S):
                    await self._idle.wait()

    async def resume(self) -> None:
        """After a restart of the agent: take back the engine that still runs, and disturb nothing."""
        running = self._record.running
        try:
            found = running is not None and (self.external or await self.runtime.find(running))
        except UnavailableError as error:
            self._set(Residency.FAILED, f"it may still run: {error.message}")
            self._tending = asyncio.create_task(self._resume_later(), name=f"resume-later-{self.id}")
            return
        self._resume(found=found)

    async def _resume_later(self) -> None:
        """Look again for an engine whose runtime is away; its record stays as it was."""
        running = self._record.running
        assert running is not None
        while True:
            await asyncio.sleep(_RETURN_INTERVAL_S)
            with suppress(UnavailableError):
                self._resume(found=await self.runtime.find(running))
                return

    def _resume(self, *, found: bool) -> None:
        record = self._record
        running = record.running
        if not found:
            if record.residency in (Residency.STARTING, Residency.AWAKE):
                self._record = replace(record, running=None)
                self._fail(FailureReason.ENGINE_LOST, "it was no longer running when the agent came back")
            elif running is not None:
                self._record = replace(record, running=None)
                self._save(Residency.STOPPED)
            return
        self.deployment = replace(self.deployment, residency=Residency.STARTING)
        if record.residency is Residency.STOPPING and running is not None:
            self._set(Residency.STOPPING, "finishing a stop that a restart of the agent broke off")
            self._tending = asyncio.create_task(self._finish_stop(running), name=f"stop-{self.id}")
            return
        if record.residency is Residency.STARTING or self.external:
            self._set(Residency.STARTING, "taking it back after a restart of the agent")
            self._starting = asyncio.create_task(self._resume_loading(), name=f"resume-{self.id}")
        else:
            self._awake()

    async def _finish_stop(self, running: RunningEngine) -> None:
        async with self._lock:
            await self.runtime.stop(running, self._record.spec.engine.stop_grace_s)
            self._record = replace(self._record, running=None)
            self._set(Residency.STOPPED, "stopped")
            self._save(Residency.STOPPED)

    async def _resume_loading(self) -> None:
        async with self._lock:
            try:
                await self._until_ready(lambda _: None, time.monotonic())
            except EngineStartFailedError as error:
                await self._give_up(error)
            except asyncio.CancelledError as error:
                if not self._closing:
                    await asyncio.shield(self._give_up(error))
                raise
            else:
                self._awake()
            finally:
                self._starting = None

    def adopt_stray(self, stray: RunningEngine) -> None:
        """Complete a record whose agent died between starting the engine and noting it."""
        intended = self._record.running
        if intended is not None and intended.pid == 0 and not intended.container_id:
            running = replace(stray, base_url=intended.base_url, spec_hash=intended.spec_hash)
            self._record = replace(self._record, running=running)
            self._records.save(self._record)

    def _awake(self) -> None:
        self._set(Residency.AWAKE, "ready")
        self._save(Residency.AWAKE)
        self._tend()

    def _tend(self) -> None:
        self._tending = asyncio.create_task(self._keep_looking(), name=f"tend-{self.id}")

    async def _stop_tending(self) -> None:
        task, self._tending = self._tending, None
        if task is not None and task is not asyncio.current_task():
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)

    async def _keep_looking(self) -> None:
        """Notice when the engine ends or is not well; an engine of somebody else may also return."""
        running = self._record.running
        if running is None:
            return
        while True:
            if self.residency is Residency.AWAKE:
                await self._until_gone(running)
                if not self.external:
                    return
            await asyncio.sleep(_RETURN_INTERVAL_S)
            probe = await self.adapter.probe(running.base_url, self._record.spec)
            if probe.health is EngineHealth.READY:
                self._set(Residency.AWAKE, "ready")
                self._save(Residency.AWAKE)

    async def _until_gone(self, running: RunningEngine) -> None:
        exit_task = asyncio.ensure_future(self._exit(running))
        missed = 0
        try:
            while not exit_task.done():
                await asyncio.wait([exit_task], timeout=_HEALTH_INTERVAL_S)
                if exit_task.done():
                    break
                probe = await self.adapter.probe(running.base_url, self._record.spec)
                missed = 0 if probe.health is EngineHealth.READY else missed + 1
                if missed == 0 and self.deployment.detail != "ready":
                    self._set(Residency.AWAKE, "ready")
                elif missed >= _HEALTH_TOLERANCE:
                    self._set(Residency.AWAKE, f"not well: {probe.detail or probe.health}")
        finally:
            exit_task.cancel()
            await asyncio.gather(exit_task, return_exceptions=True)
        ended = exit_task.result()
        detail = f"{self.id} {ended.detail}{_last_line(ended.log_tail)}"
        _log.warning("engine_lost", deployment=self.id, detail=detail)
        if not self.external:
            # What it started goes with it, if its runtime is there to see to it.
            with suppress(UnavailableError):
                await self.runtime.stop(running, 0.0)
            self._record = replace(self._record, running=None)
        self._fail(FailureReason.ENGINE_LOST, detail)

    def closing(self) -> None:
        """The agent ends: from here on nothing is stopped any more."""
        self._closing = True

    async def aclose(self) -> None:
        """Let go of the engine; it goes on."""
        if self._starting is not None and self._starting.get_name().startswith("resume-"):
            self._starting.cancel()
            await asyncio.gather(self._starting, return_exceptions=True)
        await self._stop_tending()

    def _fail(self, reason: FailureReason, detail: str) -> None:
        self._set(Residency.FAILED, detail, failure_reason=reason)
        self._save(Residency.FAILED)

    def _save(self, residency: Residency) -> None:
        self._record = replace(self._record, residency=residency)
        self._records.save(self._record)

    def _set(
        self,
        residency: Residency,
        detail: str,
        *,
        load_percent: float | None = None,
        failure_reason: FailureReason | None = None,
    ) -> None:
        current = self.deployment
        require_edge(current.residency, residency)
        running = self._record.running
        has_endpoint = running is not None and residency is not Residency.STOPPED
        self.deployment = replace(
            current,
            spec=replace(self._record.spec, residency_class=self._record.residency_class),
            residency=residency,
            detail=detail,
            endpoint=Endpoint(running.base_url, self._scope) if running and has_endpoint else None,
            load_percent=load_percent,
            failure_reason=failure_reason,
            generation=self._record.generation,
            adopted=self._record.adopted,
            pid=running.pid if running else 0,
            container_id=running.container_id if running else "",
            residency_time_s=current.residency_time_s if residency is current.residency else time.time(),
        )
        self._on_change()


class _Loading:
    """The newest that the engine's output said about loading."""

    def __init__(self) -> None:
        self.progress = LoadProgress("")


def _intended(plan: LaunchPlan, spec: DeploymentSpec) -> RunningEngine:
    runtime = spec.engine.runtime
    base_url = runtime.base_url if isinstance(runtime, ExternalRuntime) else f"http://127.0.0.1:{plan.port}"
    return RunningEngine(
        deployment_id=plan.deployment_id,
        generation=plan.generation,
        spec_hash=plan.spec_hash,
        base_url=base_url,
    )


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
        return port


def _usual(times_s: tuple[float, ...]) -> float | None:
    """The median of earlier load times; None before the first."""
    return sorted(times_s)[len(times_s) // 2] if times_s else None


def _last_line(lines: tuple[str, ...]) -> str:
    found = next((line.strip() for line in reversed(lines) if line.strip()), "")
    return f"; its last words: {found[:300]}" if found else ""
