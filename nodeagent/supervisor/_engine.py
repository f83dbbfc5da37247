"""One deployment on this node: its residency, its engine, and what may be done to it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AbstractAsyncContextManager, contextmanager

from msgspec.structs import replace

from nodeagent.engines import DEEPEST_LEVEL, EngineAdapter, FreeControl
from nodeagent.runtimes import EngineRuntime, RunningEngine
from nodeagent.supervisor._freeing import DRAIN_TIMEOUT_S, free_cache
from nodeagent.supervisor._gpus import GpuTurns
from nodeagent.supervisor._guardrails import Guardrails
from nodeagent.supervisor._lifecycle import RUNNING, EngineLifecycle
from nodeagent.supervisor._measuring import Look, Meter
from nodeagent.supervisor._planning import intended, launch_plan, require_free_port
from nodeagent.supervisor._progress import Emit, Progress, nobody
from nodeagent.supervisor._records import EngineRecord, Records, spec_hash
from nodeagent.supervisor._resuming import Resumption
from nodeagent.supervisor._sleeping import EngineSleep
from nodeagent.supervisor._state import DeploymentState, has_process
from nodeagent.supervisor._turns import Start, Turns
from rung.errors import (
    EngineStartFailedError,
    EngineUnreachableError,
    FailedPreconditionError,
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
        gpu_turns: GpuTurns,
        look: Look | None,
    ) -> None:
        self._state = DeploymentState(record, records=records, scope=scope, on_change=on_change)
        self._lifecycle = EngineLifecycle(self._state, runtime=runtime, adapter=adapter)
        self._guardrails = Guardrails(self._state, self._lifecycle)
        self._meter = Meter(self._state, look)
        self._sleep = EngineSleep(self._state, self._lifecycle, self._meter)
        self._turns = Turns(lambda: self.residency)
        self._gpu_turns = gpu_turns
        self._resumption = Resumption(
            self._state, self._lifecycle, self._sleep, turns=self._turns, gpu_turn=self._gpu_turn
        )

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
        return self._guardrails.pinned

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
            raise self._guardrails.not_awake()
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
                        # What would be refused is not made to wait for its GPU.
                        runtime.check(launch_plan(spec, adapter, self._state.record.generation + 1))
                        async with self._gpu_turn("start", emit, spec):
                            up = await self._start(start, spec, emit, runtime=runtime, adapter=adapter)
                        while not up:
                            # Others need not wait for a download.
                            await self._lifecycle.pull(start, emit)
                            async with self._gpu_turn("start", emit):
                                up = await self._lifecycle.bring_up(start, emit, None)
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
    ) -> bool:
        """Start it anew; False as `EngineLifecycle.bring_up`."""
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
        return await lifecycle.bring_up(start, emit, plan)

    async def stop(self, emit: Emit, *, force: bool) -> LifecycleDone:
        """Stop the engine after its running requests; at once if none runs.

        Raises:
            PinnedDeploymentError: it is pinned by this agent's own record, and `force` is not set.
            NotOursError: somebody else runs it.
            RungError: it does not end, or its runtime is away; the deployment has FAILED.
        """
        self._guardrails.require_stoppable(force=force)
        # The start of a pinned engine is waited for, and then this stop is refused.
        self._turns.call_off_starts(force=force)
        async with self._turns.turn("stop", emit):
            self._guardrails.require_stoppable(force=force)
            freed_bytes: int | None = None
            if self.running is not None:
                async with self._gpu_turn("stop", emit):
                    freed_bytes = await self._stop(emit)
            if self.residency is Residency.FAILED and self.running is None:
                self._state.stopped("stopped")
            return LifecycleDone(self.deployment, freed_bytes)

    async def _stop(self, emit: Emit) -> int | None:
        """Stop what runs, if it still does; returns the bytes that this freed."""
        if self.running is None:
            return None
        before = await self._meter.read()
        await self._lifecycle.shut_down(emit)
        with Progress(emit, Residency.STOPPED) as progress:
            progress.say("measuring what it gave back")
            held_bytes = before.held_bytes if before is not None else None
            return await self._meter.freed(before, expected_bytes=held_bytes or 0, gone=True)

    async def sleep(self, emit: Emit, *, level: int, force: bool, drain_timeout_s: float) -> LifecycleDone:
        """Put the engine to sleep after its running requests; at once if it sleeps at this level.

        Raises:
            PinnedDeploymentError: it is pinned by this agent's own record, and `force` is not set.
            NotOursError: somebody else runs it.
            FailedPreconditionError: its engine cannot sleep, or sleeps at another level.
            InvalidRequestError: its engine knows no such level.
            NotAwakeError: it does not run.
            DeadlineExceededError: requests did not end in time; it stays awake.
            RungError: it did not fall asleep. Its residency says how it is.
        """
        self._guardrails.require_sleepable(level, force=force)
        async with self._turns.turn("sleep", emit):
            control = self._guardrails.require_sleepable(level, force=force)
            if self.residency is Residency.ASLEEP:
                self._guardrails.require_level(level)
                return LifecycleDone(self.deployment)
            async with self._gpu_turn("sleep", emit):
                self._guardrails.require_awake()
                await self._lifecycle.stop_tending()
                freed_bytes = await self._sleep.fall_asleep(
                    control, level, emit, drain_timeout_s=drain_timeout_s
                )
            return LifecycleDone(self.deployment, freed_bytes)

    async def shrink(self, emit: Emit, *, drain_timeout_s: float) -> LifecycleDone:
        """Have the engine give up its KV cache after its running requests; at once if it has.

        Also a pinned one, if its own record says that it may be shrunk.

        Raises:
            PinnedDeploymentError, FailedPreconditionError: by this agent's own record it may not be shrunk.
            NotOursError: somebody else runs it.
            FailedPreconditionError: its engine cannot shrink, or sleeps.
            NotAwakeError, DeadlineExceededError, RungError: as `sleep`.
        """
        self._guardrails.require_shrinkable()
        async with self._turns.turn("shrinking", emit):
            control = self._guardrails.require_shrinkable()
            if self.residency is Residency.ASLEEP:
                if self.deployment.shrunk:
                    return LifecycleDone(self.deployment)
                raise FailedPreconditionError(
                    f"{self.id} sleeps, from where it cannot be shrunk; wake it first", deployment=self.id
                )
            async with self._gpu_turn("shrinking", emit):
                self._guardrails.require_awake()
                await self._lifecycle.stop_tending()
                freed_bytes = await self._sleep.shrink(control, emit, drain_timeout_s=drain_timeout_s)
            return LifecycleDone(self.deployment, freed_bytes)

    async def wake(self, emit: Emit) -> LifecycleDone:
        """Wake the engine, or give it its KV cache again if it is shrunk; at once if it is awake.

        Raises:
            NotOursError: somebody else runs it.
            FailedPreconditionError: it is neither asleep nor awake.
            RungError: it did not wake. Its residency says how it is.
        """
        # What anybody's engine is asked to give back, it may be asked to take again.
        if not (isinstance(self.adapter, FreeControl) and self.adapter.frees_model):
            self._guardrails.require_ours("wake it where it was started")
        async with self._turns.turn("waking", emit):
            if self.residency is Residency.AWAKE:
                return LifecycleDone(self.deployment)
            async with self._gpu_turn("waking", emit):
                if self.residency is not Residency.ASLEEP:
                    raise FailedPreconditionError(
                        f"{self.id} is {self.residency}; what is asleep can be woken", deployment=self.id
                    )
                await self._lifecycle.stop_tending()
                await self._sleep.wake(self._guardrails.sleep_control(), emit)
            return LifecycleDone(self.deployment)

    async def free(self, emit: Emit) -> LifecycleDone:
        """Have the engine give back what it keeps as a cache, after what it is doing. Also somebody else's.

        It stays awake, but for one whose cache is its model: that one sleeps then, and is woken by `wake`.

        Raises:
            PinnedDeploymentError: it is pinned by this agent's own record.
            FailedPreconditionError: its engine keeps no cache.
            NotAwakeError: it does not run.
            DeadlineExceededError: it was busy for too long; nothing was asked of it.
            RungError: it did not take the call, or it ended.
        """
        self._guardrails.require_freeable()
        async with self._turns.turn("flush", emit):
            control = self._guardrails.require_freeable()
            if control.frees_model and self.residency is Residency.ASLEEP:
                return LifecycleDone(self.deployment)
            async with self._gpu_turn("flush", emit):
                self._guardrails.require_awake()
                if control.frees_model:
                    await self._lifecycle.stop_tending()
                    freed_bytes = await self._sleep.fall_asleep(
                        self._guardrails.sleep_control(), DEEPEST_LEVEL, emit, drain_timeout_s=DRAIN_TIMEOUT_S
                    )
                else:
                    freed_bytes = await free_cache(
                        self._state, control, self._meter, emit, drain_timeout_s=DRAIN_TIMEOUT_S
                    )
            if self.residency not in (Residency.AWAKE, Residency.ASLEEP):
                raise EngineUnreachableError(self.deployment.detail, deployment=self.id)
            return LifecycleDone(self.deployment, freed_bytes)

    def _gpu_turn(
        self, doing: str, emit: Emit, spec: DeploymentSpec | None = None
    ) -> AbstractAsyncContextManager[None]:
        gpus = (spec or self._state.record.spec).engine.gpus
        return self._gpu_turns.turn(gpus, f"{doing} of {self.id}", emit, lambda: self.residency)

    async def forget(self) -> None:
        """Remove the record of a deployment whose engine does not run.

        Raises:
            FailedPreconditionError: it runs, or may, or something else was asked of it meanwhile.
            UnavailableError: its runtime cannot tell whether it runs.
        """
        self._guardrails.require_at_rest()
        async with self._turns.turn("removal", nobody):
            self._guardrails.require_at_rest()
            await self._lifecycle.require_gone(nobody)
            await self._lifecycle.stop_tending()
            if self._turns.awaited:
                raise FailedPreconditionError(
                    f"something else was asked of {self.id} meanwhile; try again", deployment=self.id
                )
            self._state.delete()

    async def resume(self) -> None:
        """After a restart of the agent: take back the engine that still runs, and disturb nothing."""
        await self._resumption.resume()

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
        await self._resumption.aclose()
        await self._lifecycle.stop_tending()
