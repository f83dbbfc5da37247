"""A GPU that really overflows, its engines, and every way in which they may misbehave.

Implements the scheduler's ports. `check` is the truth that no scheduler sees: what is used, and what those to
whom memory was promised may still take.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Sequence
from enum import StrEnum
from typing import NoReturn

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
from rung.errors import EngineFailedError, UnavailableError
from rung.types import Residency, ResidencyClass

GIB = 1 << 30


class Fault(StrEnum):
    """What an engine does instead of what it was told."""

    NONE = "none"
    #: Says that it gave way, and looks like it, but holds most of its memory.
    LIES = "lies"
    #: Says that it gave way, and goes on as it was.
    IGNORES = "ignores"
    FAILS = "fails"
    #: Never answers; what it was told may happen much later.
    HANGS = "hangs"
    #: Is gone, and its memory with it.
    DIES = "dies"


class BrokenInvariantError(AssertionError):
    """An invariant does not hold."""


class SimulatedEngine:
    """A deployment of the simulated pool; `faults` says what the next actions come to, then none."""

    def __init__(
        self,
        name: str,
        kind: ResidencyClass,
        awake_bytes: int,
        *,
        residency: Residency = Residency.AWAKE,
        held_asleep_bytes: int = 0,
        warm: bool = False,
        idle_timeout_s: float | None = None,
        faults: Sequence[Fault] = (),
    ) -> None:
        self.name = name
        self.kind = kind
        self.awake_bytes = awake_bytes
        self.held_asleep_bytes = held_asleep_bytes
        self.residency = residency
        self.resident_bytes = awake_bytes if residency is Residency.AWAKE else 0
        if residency is Residency.ASLEEP:
            self.resident_bytes = held_asleep_bytes
        self.cache_bytes = 0
        self.active = 0
        self.used_s = 0.0
        self.warm = warm
        self.idle_timeout_s = idle_timeout_s
        self.faults = list(faults)
        #: What a raise may still take; kept while it goes on, also when nobody waits for it any more.
        self.coming_bytes = 0

    def next_fault(self) -> Fault:
        """What comes of the next action."""
        return self.faults.pop(0) if self.faults else Fault.NONE


class SimulatedPool:
    """One pool. Telemetry is `latency_s` old when it arrives, and kept for `keep_s` before it is renewed."""

    pool_id = "workstation/0"

    def __init__(
        self,
        engines: Sequence[SimulatedEngine],
        *,
        total_bytes: int = 32 * GIB,
        reserve_bytes: int = GIB,
        unattributed_bytes: int = GIB,
        latency_s: float = 0.0,
        keep_s: float = 0.0,
    ) -> None:
        self.engines = {each.name: each for each in engines}
        self.total_bytes = total_bytes
        self.reserve_bytes = reserve_bytes
        self.unattributed_bytes = unattributed_bytes
        self.latency_s = latency_s
        self.keep_s = keep_s
        #: Telemetry stands still before this time.
        self.late_until_s = 0.0
        self.silent = False
        #: What programs hold, by lease.
        self.held_bytes: dict[str, int] = {}
        self.steps: list[ReclaimStep] = []
        self.raised: list[str] = []
        self.undo: set[asyncio.Task[None]] = set()
        #: Looks at more than the pool can know; called after every change.
        self.check: Callable[[], None] = lambda: None
        #: What went wrong, also where nobody sees the exception.
        self.broken: list[str] = []
        self._kept: Measurement | None = None

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

    def take(self, lease_id: str, more_bytes: int) -> None:
        """The program that holds a lease takes memory."""
        self.held_bytes[lease_id] = self.held_bytes.get(lease_id, 0) + more_bytes
        self.changed()

    def give_back(self, lease_id: str) -> None:
        """The program ends."""
        self.held_bytes.pop(lease_id, None)
        self.changed()

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
        """Telemetry, as late as it is."""
        now_s = asyncio.get_running_loop().time()
        if self.silent:
            raise UnavailableError("the node is away")
        kept = self._kept
        if kept is not None and (now_s < self.late_until_s or now_s - kept.measured_s < self.keep_s):
            return kept
        measurement = self._measured(now_s)
        if self.latency_s:
            await asyncio.sleep(self.latency_s)
        self._kept = measurement
        return measurement

    def _measured(self, now_s: float) -> Measurement:
        entries = tuple(
            LedgerEntry(
                deployment_id=each.name,
                residency=each.residency,
                residency_class=each.kind,
                resident_bytes=each.resident_bytes,
                measured=True,
                held_asleep_bytes=each.held_asleep_bytes,
                host_asleep_bytes=each.awake_bytes,
                sleep_levels=(1, 2) if each.kind is ResidencyClass.SLEEPABLE else (),
                asleep_level=1 if each.residency is Residency.ASLEEP else 0,
                cache_bytes=each.cache_bytes,
                active_requests=each.active,
                drain_expected_s=2.0 if each.active else 0.0,
                idle_s=0.0 if each.active else max(0.0, now_s - each.used_s),
                timings=Timings(wake_s=3.0, start_s=10.0),
            )
            for each in sorted(self.engines.values(), key=lambda each: each.name)
        )
        return Measurement(
            ledger=Ledger(
                pool_id=self.pool_id,
                total_bytes=self.total_bytes,
                free_bytes=self.free_bytes,
                reserve_bytes=self.reserve_bytes,
                unattributed_bytes=self.unattributed_bytes,
                host_free_bytes=64 * GIB,
                entries=entries,
            ),
            measured_s=now_s,
            taken_bytes=dict(self.held_bytes),
        )

    # Executor.

    async def carry_out(self, pool_id: str, step: ReclaimStep) -> Measured:
        """Take a step, or do what the engine's next fault says."""
        engine = self.engines[step.deployment_id]
        if engine.kind is ResidencyClass.PINNED:
            self.break_(f"{engine.name} is pinned and was told to {step.action}")
        self.steps.append(step)
        fault = engine.next_fault()
        before_bytes = self.free_bytes
        if fault is Fault.HANGS:
            self._later(self._give_way_late(engine, step))
            await asyncio.Event().wait()
        await asyncio.sleep(step.expected_s)
        if fault is Fault.FAILS:
            raise EngineFailedError(f"{engine.name} answered 500")
        if fault is Fault.DIES:
            self._died(engine)
            raise EngineFailedError(f"{engine.name} has died")
        if fault is Fault.IGNORES:
            return Measured(freed_bytes=step.expected_bytes, free_bytes=self.free_bytes)
        self._give_way(engine, step, lies=fault is Fault.LIES)
        return Measured(freed_bytes=self.free_bytes - before_bytes, free_bytes=self.free_bytes)

    async def bring_up(self, pool_id: str, deployment_id: str) -> None:
        """Start or wake an engine, which takes its memory bit by bit."""
        engine = self.engines[deployment_id]
        self.raised.append(deployment_id)
        fault = engine.next_fault()
        asleep = engine.residency is Residency.ASLEEP
        engine.residency = Residency.WAKING if asleep else Residency.STARTING
        engine.coming_bytes = engine.awake_bytes - engine.resident_bytes
        if fault is Fault.HANGS:
            self._later(self._come_up(engine, 45.0))
            await asyncio.Event().wait()
        if fault in (Fault.FAILS, Fault.DIES):
            await self._load(engine, 2.0, share=0.5)
            self._died(engine)
            raise EngineFailedError(f"{engine.name} did not come up")
        await self._come_up(engine, 3.0 if asleep else 10.0)

    def _give_way(self, engine: SimulatedEngine, step: ReclaimStep, *, lies: bool) -> None:
        if engine.residency is not Residency.AWAKE and engine.residency is not Residency.ASLEEP:
            return
        engine.active = 0
        if step.action is ReclaimAction.FREE:
            freed_bytes = engine.cache_bytes
            engine.cache_bytes = 0
            left_bytes = engine.resident_bytes - freed_bytes
        elif step.action is ReclaimAction.SLEEP:
            engine.residency, left_bytes = Residency.ASLEEP, engine.held_asleep_bytes
        else:
            engine.residency, left_bytes = Residency.STOPPED, 0
        if lies:
            left_bytes += (engine.resident_bytes - left_bytes) * 7 // 8
        engine.resident_bytes = left_bytes
        self.changed()

    async def _give_way_late(self, engine: SimulatedEngine, step: ReclaimStep) -> None:
        await asyncio.sleep(50.0)
        if engine.residency is Residency.AWAKE and not engine.cache_bytes:
            self._give_way(engine, step, lies=False)

    async def _come_up(self, engine: SimulatedEngine, duration_s: float) -> None:
        await self._load(engine, duration_s, share=1.0)
        engine.residency = Residency.AWAKE
        engine.used_s = asyncio.get_running_loop().time()
        self.changed()

    async def _load(self, engine: SimulatedEngine, duration_s: float, *, share: float) -> None:
        parts = 3
        each_bytes = int(engine.coming_bytes * share) // parts
        for part in range(parts):
            await asyncio.sleep(duration_s / parts)
            more_bytes = engine.coming_bytes if part == parts - 1 and share == 1.0 else each_bytes
            engine.coming_bytes -= more_bytes
            engine.resident_bytes += more_bytes
            self.changed()

    def _died(self, engine: SimulatedEngine) -> None:
        engine.residency = Residency.FAILED
        engine.resident_bytes = engine.cache_bytes = engine.coming_bytes = engine.active = 0
        self.changed()

    def _later(self, coroutine: Coroutine[object, object, None]) -> None:
        task = asyncio.get_running_loop().create_task(coroutine)
        self.undo.add(task)
