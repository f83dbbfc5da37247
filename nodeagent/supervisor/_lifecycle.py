"""How an engine is brought up and ended. Whether it may be is decided before."""

from __future__ import annotations

import asyncio
from contextlib import suppress

from msgspec.structs import replace

from nodeagent.engines import EngineAdapter, EngineHealth, Probe, PullControl, ShrinkControl
from nodeagent.runtimes import EngineRuntime, LaunchPlan
from nodeagent.supervisor._loading import until_ready
from nodeagent.supervisor._planning import usual_s
from nodeagent.supervisor._progress import Emit, Progress
from nodeagent.supervisor._pulling import until_pulled
from nodeagent.supervisor._records import KEPT_TIMES
from nodeagent.supervisor._state import DeploymentState, has_process
from nodeagent.supervisor._tending import note_asleep, tend
from nodeagent.supervisor._turns import Start
from rung import reason_of_error
from rung.errors import FailedPreconditionError, RungError, UnavailableError
from rung.types import ExternalRuntime, FailureReason, LifecycleProgress, Residency

#: What an engine prints while it loads is within its last so many lines when it is ready.
_LOADING_LINES = 2000
#: Where an engine runs and nothing is being done to it.
RUNNING = frozenset({Residency.STARTING, Residency.AWAKE, Residency.ASLEEP})


class EngineLifecycle:
    """Starts, tends and stops the engine of one deployment. Whoever calls it has the turn."""

    def __init__(self, state: DeploymentState, *, runtime: EngineRuntime, adapter: EngineAdapter) -> None:
        self.runtime = runtime
        self.adapter = adapter
        #: The agent ends: from then on nothing is stopped any more.
        self.closing = False
        #: What goes on beside the operations: tending, or looking for a runtime that is away.
        self.tending: asyncio.Task[None] | None = None
        self._state = state

    @property
    def external(self) -> bool:
        """Whether somebody else runs the engine."""
        return isinstance(self._state.record.spec.engine.runtime, ExternalRuntime)

    async def bring_up(self, start: Start, emit: Emit, plan: LaunchPlan | None) -> bool:
        """Start what a plan says, or without one go on with what loads already; return once it is awake.

        What somebody else runs may be asleep. False if its engine has to fetch its model first (`pull`),
        and then this is asked again, without a plan.

        Raises:
            NotAllowedError, InvalidRequestError, EngineStartFailedError: as `EngineRuntime.start`.
            EngineStartFailedError: it did not become ready; nothing is left running.
            UnavailableError: its runtime is away, or it does not end.
        """
        state = self._state
        try:
            with Progress(
                self.telling(emit), Residency.STARTING, usual_s=usual_s(state.record.load_times_s)
            ) as progress:
                if plan is not None:
                    progress.say("starting")
                    running = await self.runtime.start(
                        plan, lambda found: progress.say(found.detail, percent=found.percent)
                    )
                    state.record = replace(state.record, running=running)
                    state.save(Residency.STARTING)
                found = await self._until_ready(progress)
                if found.health is EngineHealth.NO_MODEL:
                    return False
                await self._learn_of_cache()
        except BaseException as error:
            await self._failed(start, error, emit)
            raise
        if plan is not None and not self.external:
            times_s = (*state.record.load_times_s, progress.elapsed_s)[-KEPT_TIMES:]
            state.record = replace(state.record, load_times_s=times_s)
        if found.health is EngineHealth.ASLEEP:
            note_asleep(state, found, self.adapter)
            self.tend()
        else:
            self.awake()
        return True

    async def pull(self, start: Start, emit: Emit) -> None:
        """Have an engine that is up fetch its model, which no GPU has a part in.

        Raises:
            EngineStartFailedError: it ended, or cannot get the model; nothing is left running.
        """
        running, control = self._state.record.running, self.adapter
        assert running is not None
        assert isinstance(control, PullControl)
        try:
            with Progress(self.telling(emit), Residency.STARTING) as progress:
                await until_pulled(
                    running, self._state.record.spec, runtime=self.runtime, control=control, progress=progress
                )
        except BaseException as error:
            await self._failed(start, error, emit)
            raise

    async def _failed(self, start: Start, error: BaseException, emit: Emit) -> None:
        """A start has come to nothing. An agent that ends leaves an engine that loads to the next one."""
        if not self.closing:
            start.failed()
            await self._give_up(error, emit)

    async def _until_ready(self, progress: Progress) -> Probe:
        record = self._state.record
        assert record.running is not None
        return await until_ready(
            record.running, record.spec, runtime=self.runtime, adapter=self.adapter, progress=progress
        )

    async def _learn_of_cache(self) -> None:
        """Note the size of the KV cache, if the engine told it while it loaded."""
        state, adapter = self._state, self.adapter
        running = state.record.running
        if running is None or self.external or not isinstance(adapter, ShrinkControl):
            return
        with suppress(UnavailableError):
            async for line in self.runtime.log(running, tail_lines=_LOADING_LINES, follow=False):
                found = adapter.kv_cache_bytes(line)
                if found is not None:
                    state.record = replace(state.record, kv_cache_bytes=found)

    async def _give_up(self, error: BaseException, emit: Emit) -> None:
        """A start has failed or was called off: leave nothing running."""
        state = self._state
        if self.external:
            state.failed(FailureReason.ENGINE_START_FAILED, str(error) or "it does not answer")
            self.tend()
            return
        state.save(Residency.STOPPING)
        with Progress(self.telling(emit), Residency.STOPPING) as progress:
            progress.say("the start did not succeed; stopping what there is")
            await self._end()
        if isinstance(error, asyncio.CancelledError):
            state.stopped("the start was called off")
        else:
            state.failed(FailureReason.ENGINE_START_FAILED, str(error))

    async def shut_down(self, emit: Emit) -> None:
        """Stop the engine after its running requests.

        Raises:
            RungError: it does not end, or its runtime is away; the deployment has FAILED.
        """
        await self.stop_tending()
        # From here on an agent that dies leaves the rest of the stop to the next one.
        self._state.save(Residency.STOPPING)
        with Progress(self.telling(emit), Residency.STOPPING) as progress:
            await self._finish_requests(progress)
            progress.say("stopping the engine")
            await self._end()
        self._state.stopped("stopped")

    async def _finish_requests(self, progress: Progress) -> None:
        """Wait for the running requests, for as long as the spec permits; saying so lets none begin."""
        state = self._state
        grace_s = state.record.spec.engine.stop_grace_s

        def left() -> str:
            count = state.deployment.active_requests
            requests = "request" if count == 1 else "requests"
            return f"letting {count} running {requests} finish, for {grace_s:g} s at most"

        if not state.idle.is_set():
            progress.say(left)
            with suppress(TimeoutError):
                async with asyncio.timeout(grace_s):
                    await state.idle.wait()

    async def _end(self) -> None:
        """End what runs, or may run. Raises as `EngineRuntime.stop`, and then the deployment has FAILED."""
        state = self._state
        running = state.record.running
        assert running is not None
        try:
            await self.runtime.stop(running, state.record.spec.engine.stop_grace_s)
        except RungError as error:
            # Not stored: what is on disk still says what is to be done.
            state.show(
                Residency.FAILED,
                f"it could not be stopped: {error.message}",
                failure_reason=reason_of_error(error),
            )
            raise
        state.ended()

    async def require_gone(self, emit: Emit) -> None:
        """Refuse to go on beside an engine that a failed stop, or a runtime that was away, may have left.

        Raises:
            UnavailableError: its runtime cannot tell.
            FailedPreconditionError: it still runs.
        """
        state = self._state
        running = state.record.running
        if state.residency in RUNNING or self.external or running is None or not has_process(running):
            return
        with Progress(emit, state.residency) as progress:
            progress.say("looking whether its engine is gone")
            found = await self.runtime.find(running)
        if found:
            raise FailedPreconditionError(
                f"{state.id} is {state.residency}, and its engine still runs; stop it first",
                deployment=state.id,
            )
        await self.stop_tending()
        state.ended()

    def awake(self) -> None:
        """It answers requests, and from now on it is tended."""
        self._state.awake()
        self.tend()

    def tend(self) -> None:
        """Look after the engine from now on."""
        work = tend(self._state, runtime=self.runtime, adapter=self.adapter)
        self.tending = asyncio.create_task(work, name=f"tend-{self._state.id}")

    async def stop_tending(self) -> None:
        """Leave the engine alone."""
        task, self.tending = self.tending, None
        if task is not None:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)

    def telling(self, emit: Emit) -> Emit:
        """Tell progress to the operation, and to everybody who watches the deployment."""

        def tell(progress: LifecycleProgress) -> None:
            self._state.show(
                progress.residency,
                progress.detail,
                load_percent=progress.percent,
                remaining_s=progress.remaining_s,
            )
            emit(progress)

        return tell
