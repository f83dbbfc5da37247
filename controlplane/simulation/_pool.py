"""A GPU that really overflows, and the engines on it: the scheduler's ports without any hardware.

The pool knows the truth that no scheduler sees: what is used, and what those to whom memory was promised may
still take. It looks at it after every change, and an over-commitment ends the simulation.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from contextlib import asynccontextmanager
from typing import Generic, NoReturn, TypeVar

import msgspec

from controlplane.vram import (
    Ledger,
    LedgerEntry,
    Measured,
    Measurement,
    PlacedDeployment,
    ReclaimAction,
    ReclaimStep,
    Timings,
)
from rung.service import Signal
from rung.types import Residency, ResidencyClass

GIB = 1 << 30
#: Weights come in so many pieces: what watches the pool sees them grow.
_PIECES = 3
_DEFAULT_TIMINGS = Timings()
#: An agent takes a sample so long after each operation, whenever the next one would be.
_LOOK_AFTER_S = 0.15


class BrokenInvariantError(AssertionError):
    """The pool was overcommitted, or a pinned deployment was touched."""


class VirtualEngine:
    """A deployment of a simulated pool.

    Args:
        name: its deployment id.
        kind: what may be done to it.
        awake_bytes: what it holds awake.
        residency: how it is at the beginning.
        held_asleep_bytes: what of the pool it still holds asleep.
        host_asleep_bytes: what of host RAM it takes asleep at level 1; None for as much as awake.
        sleep_levels: at which it can sleep; None for both if it is sleepable.
        warm: to be raised again by itself once there is room.
        idle_timeout_s: stopped after so long without requests, if it is `on_demand`.
        timings: how long its actions take.
        expected: how long the scheduler takes them to be; None for the truth.
        drain_expected_s: how long the scheduler takes its requests in flight to need.
        shrunk_bytes: what it holds shrunk; None if it has not opted in to that.
    """

    def __init__(
        self,
        name: str,
        kind: ResidencyClass,
        awake_bytes: int,
        *,
        residency: Residency = Residency.AWAKE,
        held_asleep_bytes: int = 0,
        host_asleep_bytes: int | None = None,
        sleep_levels: tuple[int, ...] | None = None,
        warm: bool = False,
        idle_timeout_s: float | None = None,
        timings: Timings = _DEFAULT_TIMINGS,
        expected: Timings | None = None,
        drain_expected_s: float = 10.0,
        shrunk_bytes: int | None = None,
    ) -> None:
        self.shrunk_bytes = shrunk_bytes
        self.shrunk = False
        self.name = name
        self.kind = kind
        self.awake_bytes = awake_bytes
        self.held_asleep_bytes = held_asleep_bytes
        self.host_asleep_bytes = awake_bytes if host_asleep_bytes is None else host_asleep_bytes
        if sleep_levels is None:
            sleep_levels = (1, 2) if kind is ResidencyClass.SLEEPABLE else ()
        self.sleep_levels = sleep_levels
        self.warm = warm
        self.idle_timeout_s = idle_timeout_s
        self.timings = timings
        self.expected = expected or timings
        self.drain_expected_s = drain_expected_s
        self.residency = residency
        self.asleep_level = 1 if residency is Residency.ASLEEP else 0
        self.resident_bytes = awake_bytes if residency is Residency.AWAKE else 0
        if residency is Residency.ASLEEP:
            self.resident_bytes = held_asleep_bytes
        self.cache_bytes = 0
        self.used_s = 0.0
        #: What a raise or a lease may still take; kept while it goes on, also when nobody waits for it.
        self.coming_bytes = 0
        self.active = 0
        self._holds = 0
        #: Fires when a request has ended, and when a drain has.
        self.eased = Signal()

    @property
    def held(self) -> bool:
        """Whether it is being drained, so that no request may begin."""
        return self._holds > 0

    def begin(self) -> None:
        """A request begins."""
        self.active += 1

    def end(self) -> None:
        """A request ends."""
        self.active -= 1
        self.used_s = asyncio.get_running_loop().time()
        self.eased.fire()

    @asynccontextmanager
    async def drained(self) -> AsyncIterator[None]:
        """Let no request begin, and enter once those that run have ended."""
        self._holds += 1
        try:
            while self.active:
                await self.eased.wait()
            yield
        finally:
            self._holds -= 1
            self.eased.fire()

    def takes(self, size_bytes: int) -> None:
        """It takes memory, or gives some back."""
        self.resident_bytes += size_bytes

    def flushed(self) -> None:
        """Its cache is gone."""
        self.cache_bytes = 0

    def raise_s(self) -> float:
        """How long it takes to come up from how it is."""
        if self.shrunk:
            return self.timings.grow_s
        if self.residency is Residency.ASLEEP:
            return self.timings.reload_s if self.asleep_level == 2 else self.timings.wake_s
        return self.timings.start_s

    def entry(self, now_s: float) -> LedgerEntry:
        """What the ledger has of it."""
        return LedgerEntry(
            deployment_id=self.name,
            residency=self.residency,
            residency_class=self.kind,
            resident_bytes=self.resident_bytes,
            measured=True,
            held_asleep_bytes=self.held_asleep_bytes,
            host_asleep_bytes=self.host_asleep_bytes,
            sleep_levels=self.sleep_levels,
            asleep_level=self.asleep_level,
            shrinkable=self.shrunk_bytes is not None,
            shrunk_bytes=self.shrunk_bytes or 0,
            shrunk=self.shrunk,
            cache_bytes=self.cache_bytes,
            active_requests=self.active,
            drain_expected_s=self.drain_expected_s if self.active else 0.0,
            idle_s=0.0 if self.active else max(0.0, now_s - self.used_s),
            timings=self.expected,
        )


EngineT = TypeVar("EngineT", bound=VirtualEngine)


class VirtualPool(Generic[EngineT]):
    """One pool, as `Pools` and `Executor`.

    Args:
        engines: what runs on it.
        total_bytes: its size.
        reserve_bytes: never granted.
        unattributed_bytes: what a desktop and the like use.
        host_free_bytes: host RAM for sleepers.
        keep_s: a measurement is renewed after so long.
        lag_s: a measurement is taken to be so old when it is heard.
    """

    pool_id = "workstation/0"

    def __init__(
        self,
        engines: Sequence[EngineT],
        *,
        total_bytes: int = 32 * GIB,
        reserve_bytes: int = GIB,
        unattributed_bytes: int = GIB,
        host_free_bytes: int = 64 * GIB,
        keep_s: float = 0.0,
        lag_s: float = 0.0,
    ) -> None:
        self.engines = {each.name: each for each in engines}
        self.total_bytes = total_bytes
        self.reserve_bytes = reserve_bytes
        self.unattributed_bytes = unattributed_bytes
        self.host_free_bytes = host_free_bytes
        self.keep_s = keep_s
        self.lag_s = lag_s
        #: What programs hold, by lease.
        self.held_bytes: dict[str, int] = {}
        self.steps: list[ReclaimStep] = []
        self.raised: list[str] = []
        #: Looks at more than the pool can know; called after every change.
        self.check: Callable[[], None] = lambda: None
        #: What went wrong, also where nobody sees the exception.
        self.broken: list[str] = []
        self.ongoing: set[asyncio.Task[None]] = set()
        self._kept: Measurement | None = None
        self._kept_s = 0.0
        #: When the sample after the newest operation is there.
        self._look_s = -math.inf

    # The truth.

    @property
    def used_bytes(self) -> int:
        """What is in use."""
        engines = sum(each.resident_bytes for each in self.engines.values())
        return self.unattributed_bytes + engines + sum(self.held_bytes.values())

    @property
    def free_bytes(self) -> int:
        """What is not."""
        return self.total_bytes - self.used_bytes

    def changed(self) -> None:
        """Memory has changed hands: look whether all is well.

        Raises:
            BrokenInvariantError: it is not.
        """
        if self.used_bytes > self.total_bytes:
            self.break_(f"overflow: {self.used_bytes / GIB:.2f} of {self.total_bytes / GIB:.2f} GiB")
        self.check()

    def break_(self, what: str) -> NoReturn:
        """An invariant does not hold.

        Raises:
            BrokenInvariantError: always.
        """
        self.broken.append(what)
        raise BrokenInvariantError(what)

    # Pools.

    def deployments(self) -> Sequence[PlacedDeployment]:
        """All engines."""
        return [
            PlacedDeployment(
                deployment_id=each.name,
                pool_id=self.pool_id,
                awake_bytes=each.awake_bytes,
                warm=each.warm,
                idle_timeout_s=each.idle_timeout_s,
            )
            for each in self.engines.values()
        ]

    async def measure(self, pool_id: str) -> Measurement:
        """What telemetry says; who is busy is known at once."""
        now_s = asyncio.get_running_loop().time()
        kept = self._kept
        if kept is None or now_s - self._kept_s >= self.keep_s or self._kept_s < self._look_s <= now_s:
            kept, self._kept_s = self.sample(now_s), now_s
            self._kept = kept
            return kept
        return self._with_load(kept, now_s)

    def _with_load(self, kept: Measurement, now_s: float) -> Measurement:
        entries = tuple(
            msgspec.structs.replace(
                entry,
                active_requests=engine.active,
                drain_expected_s=engine.drain_expected_s if engine.active else 0.0,
                idle_s=0.0 if engine.active else max(0.0, now_s - engine.used_s),
            )
            for entry in kept.ledger.entries
            for engine in (self.engines[entry.deployment_id],)
        )
        return msgspec.structs.replace(kept, ledger=msgspec.structs.replace(kept.ledger, entries=entries))

    def sample(self, now_s: float) -> Measurement:
        """The pool as it is now."""
        engines = sorted(self.engines.values(), key=lambda each: each.name)
        asleep_bytes = sum(each.host_asleep_bytes for each in engines if each.asleep_level == 1)
        return Measurement(
            ledger=Ledger(
                pool_id=self.pool_id,
                total_bytes=self.total_bytes,
                free_bytes=self.free_bytes,
                reserve_bytes=self.reserve_bytes,
                unattributed_bytes=self.unattributed_bytes,
                host_free_bytes=self.host_free_bytes - asleep_bytes,
                entries=tuple(each.entry(now_s) for each in engines),
            ),
            measured_s=now_s - self.lag_s,
            taken_bytes=dict(self.held_bytes),
        )

    # Executor.

    async def carry_out(self, pool_id: str, step: ReclaimStep) -> Measured:
        """Drain the engine, and have it give way."""
        engine = self.told(step)
        before_bytes = self.free_bytes
        async with engine.drained():
            await asyncio.sleep(_action_s(engine, step))
            self.give_way(engine, step)
        self._look_s = asyncio.get_running_loop().time() + _LOOK_AFTER_S
        return Measured(freed_bytes=self.free_bytes - before_bytes, free_bytes=self.free_bytes)

    async def bring_up(self, pool_id: str, deployment_id: str) -> None:
        """Start or wake an engine, which takes its memory bit by bit, also when nobody waits any more."""
        engine = self.engines[deployment_id]
        duration_s = self.rising(engine)
        await asyncio.shield(self.later(self.come_up(engine, duration_s)))

    def later(self, coroutine: Coroutine[object, object, None]) -> asyncio.Task[None]:
        """Something that goes on whoever waits for it."""
        task = asyncio.get_running_loop().create_task(coroutine)
        self.ongoing.add(task)
        task.add_done_callback(self.ongoing.discard)
        return task

    def told(self, step: ReclaimStep) -> EngineT:
        """Note what an engine is told; which one it is.

        Raises:
            BrokenInvariantError: it is pinned, and not told to shrink although it opted in to that.
        """
        engine = self.engines[step.deployment_id]
        shrinks = step.action is ReclaimAction.SHRINK and engine.shrunk_bytes is not None
        if engine.kind is ResidencyClass.PINNED and not shrinks:
            self.break_(f"{engine.name} is pinned and was told to {step.action}")
        self.steps.append(step)
        return engine

    def give_way(self, engine: EngineT, step: ReclaimStep, *, kept_share: float = 0.0) -> None:
        """An engine does as it was told, at once, but keeps a share of what it should have given."""
        if engine.residency is not Residency.AWAKE and engine.residency is not Residency.ASLEEP:
            return
        if step.action is ReclaimAction.FREE:
            left_bytes = engine.resident_bytes - engine.cache_bytes
        elif step.action is ReclaimAction.SLEEP:
            engine.residency, left_bytes = Residency.ASLEEP, engine.held_asleep_bytes
            engine.asleep_level = step.level
        elif step.action is ReclaimAction.SHRINK:
            assert engine.shrunk_bytes is not None, "it has not opted in"
            engine.residency, left_bytes = Residency.ASLEEP, engine.shrunk_bytes
            engine.shrunk = True
        else:
            engine.residency, left_bytes = Residency.STOPPED, 0
            engine.asleep_level, engine.shrunk = 0, False
        engine.flushed()
        engine.resident_bytes = left_bytes + int((engine.resident_bytes - left_bytes) * kept_share)
        self.changed()

    def rising(self, engine: EngineT) -> float:
        """An engine is on its way up; how long that takes, in seconds."""
        self.raised.append(engine.name)
        duration_s = engine.raise_s()
        asleep = engine.residency is Residency.ASLEEP
        engine.residency = Residency.WAKING if asleep else Residency.STARTING
        engine.coming_bytes = engine.awake_bytes - engine.resident_bytes
        return duration_s

    async def come_up(self, engine: EngineT, duration_s: float) -> None:
        """An engine that is on its way up arrives."""
        await self.load(engine, duration_s, engine.coming_bytes)
        engine.residency = Residency.AWAKE
        engine.asleep_level, engine.shrunk = 0, False
        engine.used_s = asyncio.get_running_loop().time()
        self._look_s = engine.used_s + _LOOK_AFTER_S
        self.changed()

    async def load(self, engine: EngineT, duration_s: float, size_bytes: int) -> None:
        """An engine takes so much of what was promised to it, piece by piece."""
        for piece in range(_PIECES):
            await asyncio.sleep(duration_s / _PIECES)
            more_bytes = size_bytes // (_PIECES - piece)
            size_bytes -= more_bytes
            engine.coming_bytes -= more_bytes
            engine.takes(more_bytes)
            self.changed()


def _action_s(engine: VirtualEngine, step: ReclaimStep) -> float:
    timings = engine.timings
    if step.action is ReclaimAction.FREE:
        return timings.free_s
    if step.action is ReclaimAction.SLEEP:
        return timings.discard_s if step.level == 2 else timings.sleep_s
    if step.action is ReclaimAction.SHRINK:
        return timings.shrink_s
    return timings.stop_s
