"""The simulated pool, with every way in which telemetry may be late and engines may misbehave."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from enum import StrEnum

from controlplane.simulation import BrokenInvariantError, VirtualEngine, VirtualPool
from controlplane.vram import Measured, Measurement, ReclaimStep, Timings
from rung.errors import EngineFailedError, UnavailableError
from rung.types import Residency, ResidencyClass

__all__ = ["GIB", "BrokenInvariantError", "Fault", "SimulatedEngine", "SimulatedPool"]

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


class SimulatedEngine(VirtualEngine):
    """Wakes in 3 s and starts in 10 s; `faults` says what the next actions come to, then none.

    Its requests end at once when it is drained, in the time that the step is expected to take.
    """

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
        shrunk_bytes: int | None = None,
    ) -> None:
        super().__init__(
            name,
            kind,
            awake_bytes,
            residency=residency,
            held_asleep_bytes=held_asleep_bytes,
            warm=warm,
            idle_timeout_s=idle_timeout_s,
            timings=Timings(wake_s=3.0, start_s=10.0, grow_s=3.0),
            shrunk_bytes=shrunk_bytes,
            drain_expected_s=2.0,
        )
        self.faults = list(faults)

    def next_fault(self) -> Fault:
        """What comes of the next action."""
        return self.faults.pop(0) if self.faults else Fault.NONE


class SimulatedPool(VirtualPool[SimulatedEngine]):
    """Telemetry is `latency_s` old when it arrives, and kept for `keep_s` before it is renewed."""

    def __init__(
        self, engines: Sequence[SimulatedEngine], *, latency_s: float = 0.0, keep_s: float = 0.0
    ) -> None:
        super().__init__(engines, keep_s=keep_s)
        self.latency_s = latency_s
        #: Telemetry stands still before this time.
        self.late_until_s = 0.0
        self.silent = False
        self._last: Measurement | None = None

    def take(self, lease_id: str, more_bytes: int) -> None:
        """The program that holds a lease takes memory."""
        self.held_bytes[lease_id] = self.held_bytes.get(lease_id, 0) + more_bytes
        self.changed()

    def give_back(self, lease_id: str) -> None:
        """The program ends."""
        self.held_bytes.pop(lease_id, None)
        self.changed()

    async def measure(self, pool_id: str) -> Measurement:
        """Telemetry, as late as it is."""
        now_s = asyncio.get_running_loop().time()
        if self.silent:
            raise UnavailableError("the node is away")
        last = self._last
        if last is not None and (now_s < self.late_until_s or now_s - last.measured_s < self.keep_s):
            return last
        measurement = self.sample(now_s)
        if self.latency_s:
            await asyncio.sleep(self.latency_s)
        self._last = measurement
        return measurement

    async def carry_out(self, pool_id: str, step: ReclaimStep) -> Measured:
        """Take a step, or do what the engine's next fault says."""
        engine = self.told(step)
        fault = engine.next_fault()
        before_bytes = self.free_bytes
        if fault is Fault.HANGS:
            self.later(self._give_way_late(engine, step))
            await asyncio.Event().wait()
        await asyncio.sleep(step.expected_s)
        if fault is Fault.FAILS:
            raise EngineFailedError(f"{engine.name} answered 500")
        if fault is Fault.DIES:
            self._died(engine)
            raise EngineFailedError(f"{engine.name} has died")
        if fault is Fault.IGNORES:
            return Measured(freed_bytes=step.expected_bytes, free_bytes=self.free_bytes)
        engine.active = 0
        self.give_way(engine, step, kept_share=7 / 8 if fault is Fault.LIES else 0.0)
        return Measured(freed_bytes=self.free_bytes - before_bytes, free_bytes=self.free_bytes)

    async def bring_up(self, pool_id: str, deployment_id: str) -> None:
        """Start or wake an engine, or do what its next fault says."""
        engine = self.engines[deployment_id]
        fault = engine.next_fault()
        duration_s = self.rising(engine)
        if fault is Fault.HANGS:
            self.later(self.come_up(engine, 45.0))
            await asyncio.Event().wait()
        if fault in (Fault.FAILS, Fault.DIES):
            await self.load(engine, 2.0, engine.coming_bytes // 2)
            self._died(engine)
            raise EngineFailedError(f"{engine.name} did not come up")
        await self.come_up(engine, duration_s)

    async def _give_way_late(self, engine: SimulatedEngine, step: ReclaimStep) -> None:
        await asyncio.sleep(50.0)
        if engine.residency is Residency.AWAKE and not engine.cache_bytes:
            engine.active = 0
            self.give_way(engine, step)

    def _died(self, engine: SimulatedEngine) -> None:
        engine.residency = Residency.FAILED
        engine.asleep_level, engine.shrunk = 0, False
        engine.flushed()
        engine.resident_bytes = engine.coming_bytes = engine.active = 0
        self.changed()
