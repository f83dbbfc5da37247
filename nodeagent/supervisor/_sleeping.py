"""How an engine falls asleep and wakes, and how it is found out which of both it did."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from contextlib import asynccontextmanager
from typing import Any, NamedTuple, TypeVar

from msgspec.structs import replace

from nodeagent.engines import DEEPEST_LEVEL, EngineHealth, ShrinkControl, SleepControl
from nodeagent.runtimes import EngineExit
from nodeagent.supervisor._answering import require_answer
from nodeagent.supervisor._draining import drained
from nodeagent.supervisor._lifecycle import EngineLifecycle
from nodeagent.supervisor._loading import exit_of, tail_of
from nodeagent.supervisor._measuring import ENOUGH, Memory, Meter
from nodeagent.supervisor._planning import last_words
from nodeagent.supervisor._progress import Emit, Progress
from nodeagent.supervisor._state import DeploymentState
from nodeagent.supervisor._tending import note_lost
from rung.errors import DeadlineExceededError, EngineUnreachableError, RungError
from rung.types import DeploymentSpec, FailureReason, Residency

T = TypeVar("T")

_GIB = 1 << 30
#: What a sleeper is taken to go on holding: CUDA context, graphs, and what is in no pool.
_HELD_ASLEEP_BYTES = 3 * _GIB // 2
_POLL_S = 0.25
#: An engine that dies of a transition does so soon after it.
_DYING_S = 1.0
#: A transition that failed leaves it asleep or awake; so long is it asked which.
_SETTLE_PATIENCE_S = 60.0


class _Way(NamedTuple):
    """A way to sleep: its name, what it is called while it goes on and afterwards, and its calls."""

    name: str
    doing: str
    done: str
    take: Callable[[str, DeploymentSpec], Awaitable[None]]


class _GoneError(Exception):
    """The engine ended."""

    def __init__(self, ended: EngineExit) -> None:
        super().__init__(ended.detail)
        self.ended = ended


class _Watch:
    """An engine that may end at any moment."""

    def __init__(self, exit_task: asyncio.Future[EngineExit]) -> None:
        self._exit_task = exit_task

    async def unless_gone(self, work: Coroutine[Any, Any, T]) -> T:
        """Do the work; raises _GoneError, at once, if the engine ends meanwhile."""
        task = asyncio.ensure_future(work)
        try:
            both: set[asyncio.Future[Any]] = {task, self._exit_task}
            await asyncio.wait(both, return_when=asyncio.FIRST_COMPLETED)
            if self._exit_task.done():
                raise _GoneError(self._exit_task.result())
            return task.result()
        finally:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)


class EngineSleep:
    """Puts the engine of one deployment to sleep and wakes it. Whoever calls it has all turns."""

    def __init__(self, state: DeploymentState, lifecycle: EngineLifecycle, meter: Meter) -> None:
        self._state = state
        self._lifecycle = lifecycle
        self._meter = meter

    async def fall_asleep(
        self, control: SleepControl, level: int, emit: Emit, *, drain_timeout_s: float
    ) -> int | None:
        """Put an engine that is awake to sleep after its requests; returns the bytes that this freed.

        Raises:
            DeadlineExceededError: it was busy for too long; it is awake.
            EngineUnreachableError: it ended, or neither answers nor ends; it has FAILED.
            RungError: it did not fall asleep; it is awake.
        """
        self._state.record = replace(self._state.record, sleep_level=level, shrunk=False)

        async def take(base_url: str, spec: DeploymentSpec) -> None:
            await control.sleep(base_url, spec, level)

        way = _Way(
            f"sleep {level}", f"putting it to sleep at level {level}", f"asleep at level {level}", take
        )
        return await self._leave(control, way, emit, drain_timeout_s)

    async def shrink(self, control: ShrinkControl, emit: Emit, *, drain_timeout_s: float) -> int | None:
        """Have an engine that is awake give up its KV cache; as `fall_asleep`."""
        self._state.record = replace(self._state.record, sleep_level=0, shrunk=True)
        way = _Way("shrink", "shrinking it to its weights", "shrunk to its weights", control.shrink)
        return await self._leave(control, way, emit, drain_timeout_s)

    async def _leave(
        self, control: SleepControl, way: _Way, emit: Emit, drain_timeout_s: float
    ) -> int | None:
        state = self._state
        # From here on no request is taken, and an agent that dies leaves it to the next to find out.
        state.show(Residency.FALLING_ASLEEP, way.doing)
        state.save(Residency.FALLING_ASLEEP)
        async with self._watched() as watch:
            with Progress(self._lifecycle.telling(emit), Residency.FALLING_ASLEEP) as progress:
                before, began_s = await watch.unless_gone(
                    self._put_to_sleep(watch, control, way, progress, drain_timeout_s)
                )
                progress.say("measuring what it gave back")
                expected_bytes = self._expected_bytes(before)
                freed_bytes = await watch.unless_gone(
                    self._meter.freed(before, expected_bytes=expected_bytes)
                )
                state.took(way.name, progress.elapsed_s - began_s)
        state.asleep(_how_asleep(way.done, freed_bytes, expected_bytes))
        self._lifecycle.tend()
        return freed_bytes

    async def _put_to_sleep(
        self, watch: _Watch, control: SleepControl, way: _Way, progress: Progress, drain_timeout_s: float
    ) -> tuple[Memory | None, float]:
        """Drain it and have it sleep; returns what it held before, and when it was idle."""
        state = self._state
        running, spec = state.record.running, state.record.spec
        assert running is not None
        before: Memory | None = None
        idle_s = progress.elapsed_s
        try:
            async with asyncio.timeout(drain_timeout_s):
                await drained(state, control, progress)
            idle_s = progress.elapsed_s
            progress.expect(state.usual_s(way.name))
            before = await self._meter.read()
            progress.say(way.doing)
            await way.take(running.base_url, spec)
        except TimeoutError:
            self._lifecycle.awake()
            raise DeadlineExceededError(
                f"{state.id} stays awake: its requests did not end within {drain_timeout_s:g} s, and sleep "
                "would break them off",
                deployment=state.id,
            ) from None
        except RungError as error:
            if await self._settled(watch, progress, after_failure=True) is EngineHealth.READY:
                self._lifecycle.awake()
                raise
            progress.say(f"it sleeps, although the call failed: {error.message}")
        return before, idle_s

    def _expected_bytes(self, before: Memory | None) -> int | None:
        """What a sleep should free, if that can be said."""
        if self._state.record.shrunk:
            return self._state.record.kv_cache_bytes
        held_bytes = before.held_bytes if before is not None else None
        held_bytes = held_bytes or self._state.record.spec.vram_bytes or None
        return None if held_bytes is None else max(held_bytes - _HELD_ASLEEP_BYTES, 0)

    async def wake(self, control: SleepControl, emit: Emit) -> None:
        """Wake an engine that sleeps; return when it answers requests.

        Raises:
            EngineUnreachableError: it ended, or neither answers nor ends; it has FAILED.
            RungError: it did not wake; it is asleep.
        """
        state = self._state
        state.show(Residency.WAKING, "waking")
        state.save(Residency.WAKING)
        async with self._watched() as watch:
            name = state.way_back
            with Progress(
                self._lifecycle.telling(emit), Residency.WAKING, usual_s=state.usual_s(name)
            ) as progress:
                try:
                    await watch.unless_gone(self._come_back(control, progress))
                except RungError as error:
                    if await self._settled(watch, progress, after_failure=True) is EngineHealth.ASLEEP:
                        state.asleep(f"it did not wake: {error.message}")
                        self._lifecycle.tend()
                        raise
                await watch.unless_gone(self._meter.read())
                await watch.unless_gone(self._require_answer(progress))
                state.took(name, progress.elapsed_s)
        self._lifecycle.awake()

    async def _require_answer(self, progress: Progress) -> None:
        """Ask an engine that says that it is awake for one token.

        Raises:
            EngineUnreachableError: it gives none; it has FAILED, and may still run.
        """
        state, runtime = self._state, self._lifecycle.runtime
        running = state.record.running
        assert running is not None
        progress.say("asking it for one token")
        try:
            await require_answer(self._lifecycle.adapter, running.base_url, state.record.spec)
        except RungError as error:
            detail = f"{error.message}; stop it{last_words(await tail_of(running, runtime))}"
            # Not stored: what is on disk still says what is to be found out.
            state.show(Residency.FAILED, detail, failure_reason=FailureReason.ENGINE_LOST)
            raise EngineUnreachableError(detail, deployment=state.id) from error

    async def _come_back(self, control: SleepControl, progress: Progress) -> None:
        record = self._state.record
        assert record.running is not None
        if record.shrunk and isinstance(control, ShrinkControl):
            progress.say("giving it its KV cache again")
            await control.grow(record.running.base_url, record.spec)
            return
        level = record.sleep_level or DEEPEST_LEVEL
        progress.say(f"waking it from level {level}")
        await control.wake(record.running.base_url, record.spec, level)

    async def find_out(self) -> None:
        """After a restart of the agent: whether an engine that slept, or was about to, is asleep or awake.

        Raises:
            EngineUnreachableError: it ended, or neither answers nor ends; it has FAILED.
        """
        state = self._state
        async with self._watched() as watch:
            with Progress(self._lifecycle.telling(lambda _: None), state.residency) as progress:
                health = await self._settled(watch, progress, after_failure=False)
        if health is EngineHealth.ASLEEP:
            how = "shrunk" if state.record.shrunk else f"asleep at level {state.record.sleep_level}"
            state.asleep(f"{how}; taken back after a restart of the agent")
            self._lifecycle.tend()
            return
        if state.residency is Residency.ASLEEP:
            state.show(Residency.WAKING, "somebody woke it while there was no agent")
        self._lifecycle.awake()

    async def _settled(self, watch: _Watch, progress: Progress, *, after_failure: bool) -> EngineHealth:
        """ASLEEP or READY, whichever the engine says that it is.

        Raises:
            EngineUnreachableError: it says neither.
        """
        state, adapter = self._state, self._lifecycle.adapter
        running, spec = state.record.running, state.record.spec
        assert running is not None
        loop = asyncio.get_running_loop()
        deadline_s = loop.time() + _SETTLE_PATIENCE_S
        progress.say("finding out whether it sleeps")
        if after_failure:
            await watch.unless_gone(asyncio.sleep(_DYING_S))
        while True:
            probe = await watch.unless_gone(adapter.probe(running.base_url, spec))
            if probe.health in (EngineHealth.ASLEEP, EngineHealth.READY):
                return probe.health
            if loop.time() >= deadline_s:
                detail = f"it neither answers nor ends ({probe.detail or probe.health}); stop it"
                # Not stored: what is on disk still says what is to be found out.
                state.show(Residency.FAILED, detail, failure_reason=FailureReason.ENGINE_LOST)
                raise EngineUnreachableError(f"{state.id}: {detail}", deployment=state.id)
            await watch.unless_gone(asyncio.sleep(_POLL_S))

    @asynccontextmanager
    async def _watched(self) -> AsyncIterator[_Watch]:
        """Notice that the engine ends. Then it has FAILED, and EngineUnreachableError is raised."""
        running, runtime = self._state.record.running, self._lifecycle.runtime
        assert running is not None
        exit_task = asyncio.ensure_future(exit_of(running, runtime))
        try:
            yield _Watch(exit_task)
        except _GoneError as gone:
            detail = await note_lost(running, gone.ended, self._state, runtime=runtime)
            raise EngineUnreachableError(detail, deployment=self._state.id) from None
        finally:
            exit_task.cancel()
            await asyncio.gather(exit_task, return_exceptions=True)


def _how_asleep(done: str, freed_bytes: int | None, expected_bytes: int | None) -> str:
    """What a person should know of a sleep; one that freed too little says so."""
    if freed_bytes is None:
        return f"{done}; what it gave back could not be measured"
    detail = f"{done}; gave back {freed_bytes / _GIB:.1f} GiB"
    if expected_bytes is not None and freed_bytes < ENOUGH * expected_bytes:
        detail += f" where {expected_bytes / _GIB:.1f} GiB were expected"
    return detail
