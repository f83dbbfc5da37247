"""One deployment on this node: its residency, its engine, and what may be done to it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import contextmanager, suppress

import structlog
from msgspec.structs import replace

from nodeagent.engines import EngineAdapter
from nodeagent.runtimes import EngineRuntime, RunningEngine
from nodeagent.supervisor._lifecycle import RUNNING, EngineLifecycle
from nodeagent.supervisor._loading import RETURN_INTERVAL_S
from nodeagent.supervisor._planning import intended, launch_plan, require_free_port
from nodeagent.supervisor._progress import Emit, nobody
from nodeagent.supervisor._records import EngineRecord, Records, spec_hash
from nodeagent.supervisor._state import DeploymentState, has_process
from nodeagent.supervisor._turns import Start, Turns
from rung.errors import (
    EngineStartFailedError,
    FailedPreconditionError,
    NotAwakeError,
    NotOursError,
    PinnedDeploymentError,
    RungError,
    UnavailableError,
)
from rung.types import (
    Deployment,
    DeploymentSpec,
    EndpointScope,
    FailureReason,
    LifecycleDone,
    Residency,
    ResidencyClass,
)

_log = structlog.get_logger("rung.agent")

_AT_REST = frozenset({Residency.STOPPED, Residency.FAILED})


class EngineSupervisor:
    """Owns one deployment. What is asked of it is done in turn, so that there is one writer.

    Operations take effect in the order in which they were asked. A stop calls off every start that
    was asked before it, and none that was asked after.
    """

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
        self._state = DeploymentState(record, records=records, scope=scope, on_change=on_change)
        self._lifecycle = EngineLifecycle(self._state, runtime=runtime, adapter=adapter)
        self._turns = Turns(lambda: self.residency)
        self._resuming: asyncio.Task[None] | None = None

    @property
    def id(self) -> str:
        """The deployment's id."""
        return self._state.id

    @property
    def deployment(self) -> Deployment:
        """The deployment as it is."""
        return self._state.deployment

    @property
    def residency(self) -> Residency:
        """Where the weights are."""
        return self._state.residency

    @property
    def pinned(self) -> bool:
        """Whether the engine that runs, or the one that is configured, is pinned."""
        return self._state.record.residency_class is ResidencyClass.PINNED

    @property
    def external(self) -> bool:
        """Whether somebody else runs the engine."""
        return self._lifecycle.external

    @property
    def running(self) -> RunningEngine | None:
        """The engine that runs, or is about to."""
        return self._state.record.running

    @property
    def runtime(self) -> EngineRuntime:
        """What runs the engine."""
        return self._lifecycle.runtime

    @property
    def adapter(self) -> EngineAdapter:
        """What speaks the engine's dialect."""
        return self._lifecycle.adapter

    @property
    def untouched(self) -> bool:
        """Whether nothing was ever started here, nor is about to be: it may go as if it had never been."""
        started = self._state.record.generation > 0 or self.residency is not Residency.STOPPED
        return not started and not self._turns.awaited

    @contextmanager
    def serving(self) -> Iterator[str]:
        """Count a request while it is served; gives the engine's base URL.

        Raises:
            NotAwakeError: it cannot be served now.
        """
        running = self.running
        if self.residency is not Residency.AWAKE or running is None:
            raise NotAwakeError(
                f"{self.id} is {self.residency}: {self.deployment.detail}", deployment=self.id
            )
        self._state.count(1)
        try:
            yield running.base_url
        finally:
            self._state.count(-1)

    def measured(self, vram_bytes: int | None) -> None:
        """Note the memory that telemetry found for this engine."""
        self._state.measured(vram_bytes)

    async def log(self, *, tail_lines: int, follow: bool) -> AsyncIterator[str]:
        """The newest lines of the engine that runs, or else of the one that ran last.

        Nothing if there was none, or if its output went with it.
        """
        record = self._state.record
        engine = record.running if has_process(record.running) else record.last_run
        if engine is not None:
            async for line in self.runtime.log(engine, tail_lines=tail_lines, follow=follow):
                yield line

    async def start(
        self, spec: DeploymentSpec, emit: Emit, *, runtime: EngineRuntime, adapter: EngineAdapter
    ) -> LifecycleDone:
        """Start the engine and return once it is ready; at once if it runs with this spec.

        Raises:
            FailedPreconditionError: it runs with another spec.
            NotAllowedError, InvalidRequestError: the spec; nothing was started, and nothing is changed.
            EngineStartFailedError: it did not become ready, or a stop called it off; nothing is left
                running.
            UnavailableError: its runtime is away.
        """
        with self._turns.asked_to_start(pinned=spec.residency_class is ResidencyClass.PINNED) as start:
            try:
                async with self._turns.turn("start", emit):
                    await self._lifecycle.require_gone(emit)
                    if self.residency in RUNNING:
                        self._renew(spec)
                    else:
                        await self._start(start, spec, emit, runtime=runtime, adapter=adapter)
                    return LifecycleDone(self.deployment)
            except asyncio.CancelledError:
                if not start.called_off or self._lifecycle.closing:
                    raise
                start.task.uncancel()
                raise EngineStartFailedError(
                    f"the start of {self.id} was called off by a stop", deployment=self.id
                ) from None

    def _renew(self, spec: DeploymentSpec) -> None:
        """Take over what may change of a spec while the engine runs.

        A pinned engine stays pinned while it runs, whatever a later spec says.

        Raises:
            FailedPreconditionError: the engine would have to be started anew.
        """
        state = self._state
        if spec_hash(spec) != spec_hash(state.record.spec):
            raise FailedPreconditionError(
                f"{self.id} runs with another configuration; stop it first", deployment=self.id
            )
        state.record = replace(
            state.record,
            spec=spec,
            residency_class=ResidencyClass.PINNED if self.pinned else spec.residency_class,
            adopted=state.record.adopted and self.external,
        )
        state.save(state.record.residency)
        state.show(self.residency, self.deployment.detail)

    async def _start(
        self,
        start: Start,
        spec: DeploymentSpec,
        emit: Emit,
        *,
        runtime: EngineRuntime,
        adapter: EngineAdapter,
    ) -> None:
        state, lifecycle = self._state, self._lifecycle
        plan = launch_plan(spec, adapter, state.record.generation + 1)
        runtime.check(plan)
        # What is refused has changed nothing. From here on it is this spec that counts.
        await lifecycle.stop_tending()
        if runtime is not lifecycle.runtime:
            # Another runtime cannot read the output of the engine before.
            state.record = replace(state.record, last_run=None)
        lifecycle.runtime, lifecycle.adapter = runtime, adapter
        state.record = replace(state.record, spec=spec, residency_class=spec.residency_class)
        try:
            require_free_port(spec)
        except EngineStartFailedError as error:
            state.failed(FailureReason.ENGINE_START_FAILED, error.message)
            raise
        state.record = replace(state.record, generation=plan.generation, running=intended(plan))
        # Before anything runs: an agent that dies now knows what to look for.
        state.save(Residency.STARTING)
        await lifecycle.bring_up(start, emit, plan)

    async def stop(self, emit: Emit, *, force: bool) -> LifecycleDone:
        """Stop the engine after its running requests; at once if none runs.

        Raises:
            PinnedDeploymentError: it is pinned by this agent's own record, and `force` is not set.
            NotOursError: somebody else runs it.
            RungError: it does not end, or its runtime is away; the deployment has FAILED.
        """
        self._require_stoppable(force=force)
        # The start of a pinned engine is waited for, and then this stop is refused.
        self._turns.call_off_starts(force=force)
        async with self._turns.turn("stop", emit):
            self._require_stoppable(force=force)
            if self.running is not None:
                await self._lifecycle.shut_down(emit)
            elif self.residency is Residency.FAILED:
                self._state.stopped("stopped")
            return LifecycleDone(self.deployment)

    def _require_stoppable(self, *, force: bool) -> None:
        if self.external:
            raise NotOursError(
                f"{self.id} is run by somebody else; stop it where it was started", deployment=self.id
            )
        if self.pinned and not force and self.running is not None:
            raise PinnedDeploymentError(
                f"{self.id} is pinned; nothing is done to it without force", deployment=self.id
            )

    async def forget(self) -> None:
        """Remove the record of a deployment whose engine does not run.

        Raises:
            FailedPreconditionError: it runs, or may, or something else was asked of it meanwhile.
            UnavailableError: its runtime cannot tell whether it runs.
        """
        self._require_at_rest()
        async with self._turns.turn("removal", nobody):
            self._require_at_rest()
            await self._lifecycle.require_gone(nobody)
            await self._lifecycle.stop_tending()
            if self._turns.awaited:
                raise FailedPreconditionError(
                    f"something else was asked of {self.id} meanwhile; try again", deployment=self.id
                )
            self._state.delete()

    def _require_at_rest(self) -> None:
        if not self.external and self.residency not in _AT_REST:
            raise FailedPreconditionError(f"{self.id} is {self.residency}; stop it first", deployment=self.id)

    async def resume(self) -> None:
        """After a restart of the agent: take back the engine that still runs, and disturb nothing."""
        running = self.running
        try:
            found = running is not None and (self.external or await self.runtime.find(running))
        except UnavailableError as error:
            self._state.show(Residency.FAILED, f"it may still run: {error.message}")
            self._lifecycle.tending = asyncio.create_task(
                self._resume_later(), name=f"resume-later-{self.id}"
            )
            return
        self._resume(found=found)

    async def _resume_later(self) -> None:
        """Look again for an engine whose runtime is away; its record stays as it was."""
        running = self.running
        assert running is not None
        while True:
            await asyncio.sleep(RETURN_INTERVAL_S)
            with suppress(UnavailableError):
                async with self._turns.turn("search for its engine", nobody):
                    self._resume(found=await self.runtime.find(running))
                return

    def _resume(self, *, found: bool) -> None:
        state = self._state
        record = state.record
        if not found:
            state.ended()
            if record.residency in (Residency.STARTING, Residency.AWAKE):
                state.failed(FailureReason.ENGINE_LOST, "it was no longer running when the agent came back")
            elif record.running is not None:
                state.stopped("it was no longer running when the agent came back")
            return
        state.deployment = replace(state.deployment, residency=Residency.STARTING)
        if record.residency is Residency.STOPPING:
            state.show(Residency.STOPPING, "finishing a stop that a restart of the agent broke off")
            self._resuming = asyncio.create_task(self._finish_stop(), name=f"stop-{self.id}")
        elif record.residency is Residency.STARTING or self.external:
            state.show(Residency.STARTING, "taking it back after a restart of the agent")
            self._resuming = asyncio.create_task(self._resume_loading(), name=f"resume-{self.id}")
        else:
            self._lifecycle.awake()

    async def _finish_stop(self) -> None:
        async with self._turns.turn("stop", nobody):
            try:
                await self._lifecycle.shut_down(nobody)
            except RungError as error:
                _log.warning("engine_not_stopped", deployment=self.id, error=error.message)

    async def _resume_loading(self) -> None:
        with self._turns.asked_to_start(pinned=self.pinned) as start:
            async with self._turns.turn("start", nobody):
                try:
                    await self._lifecycle.bring_up(start, nobody, None)
                except RungError as error:
                    _log.warning("engine_not_resumed", deployment=self.id, error=error.message)

    def adopt_stray(self, stray: RunningEngine) -> None:
        """Complete a record whose agent died between starting the engine and noting it."""
        state = self._state
        planned = state.record.running
        if planned is not None and not has_process(planned):
            running = replace(stray, base_url=planned.base_url, spec_hash=planned.spec_hash)
            state.record = replace(state.record, running=running)
            state.save(state.record.residency)

    def closing(self) -> None:
        """The agent ends: from here on nothing is stopped any more."""
        self._lifecycle.closing = True

    async def aclose(self) -> None:
        """Let go of the engine; it goes on."""
        task, self._resuming = self._resuming, None
        if task is not None:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
        await self._lifecycle.stop_tending()
