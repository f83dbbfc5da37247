"""The node of a trace: engines with slots and queues, image engines with checkpoints, and how it was used."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager

from controlplane.simulation._pool import VirtualEngine, VirtualPool
from controlplane.simulation._trace import Trace, TraceCheckpoint, TraceDeployment
from controlplane.vram import Timings
from rung.types import Residency

#: What the scheduler takes a deployment's actions to need, whatever the trace says: none was learnt yet.
_EXPECTED = Timings()


class TraceEngine(VirtualEngine):
    """A deployment of a trace, with its slots.

    An image engine has checkpoints; it generates one image at a time, and keeps what it has loaded.
    """

    def __init__(self, spec: TraceDeployment) -> None:
        super().__init__(
            spec.id,
            spec.residency_class,
            spec.vram_bytes,
            residency=spec.begins,
            held_asleep_bytes=spec.held_asleep_bytes,
            host_asleep_bytes=spec.host_asleep_bytes,
            sleep_levels=spec.sleep_levels,
            warm=spec.warm,
            idle_timeout_s=spec.idle_timeout_s,
            timings=spec.timings,
            expected=_EXPECTED,
        )
        #: Images wait here for their turn, before they ask for memory.
        self.queue = asyncio.Lock()
        self._slots = spec.slots
        self._checkpoints = {each.id: each for each in spec.checkpoints}
        self._loaded: set[str] = set()

    async def enter(self) -> None:
        """Wait for a slot, while no drain is under way, and begin a request."""
        while self.held or self.active >= self._slots:
            await self.eased.wait()
        self.begin()

    def checkpoint(self, checkpoint_id: str) -> TraceCheckpoint:
        """A checkpoint by its id. Raises KeyError."""
        return self._checkpoints[checkpoint_id]

    def has(self, checkpoint: TraceCheckpoint) -> bool:
        """Whether it has kept a checkpoint."""
        return checkpoint.id in self._loaded

    def missing_bytes(self, checkpoint: TraceCheckpoint) -> int:
        """What generating with a checkpoint takes, beyond what it has kept of it."""
        return checkpoint.vram_bytes - (checkpoint.kept_bytes if self.has(checkpoint) else 0)

    def keep(self, checkpoint: TraceCheckpoint) -> None:
        """A checkpoint is loaded."""
        self._loaded.add(checkpoint.id)

    def flushed(self) -> None:
        """No checkpoint is loaded any more."""
        super().flushed()
        self._loaded.clear()

    def takes(self, size_bytes: int) -> None:
        """It takes memory, or gives some back."""
        self.resident_bytes += size_bytes
        if self._checkpoints and self.residency is Residency.AWAKE:
            # All that it holds beyond itself is what a flush gives back, once it is idle.
            self.cache_bytes = self.resident_bytes - self.awake_bytes


class TraceNode(VirtualPool[TraceEngine]):
    """The GPU of a trace; knows how much of the time it was busy, and how full it was."""

    def __init__(self, trace: Trace) -> None:
        node = trace.node
        super().__init__(
            [TraceEngine(each) for each in trace.deployments],
            total_bytes=node.vram_bytes,
            reserve_bytes=node.reserve_bytes,
            unattributed_bytes=node.unattributed_bytes,
            host_free_bytes=node.host_memory_bytes,
            keep_s=node.telemetry_s,
            lag_s=node.telemetry_lag_s,
        )
        self.begun_s = asyncio.get_running_loop().time()
        #: How often weights were brought into the GPU: wakes, starts and loads of a checkpoint.
        self.swaps = 0
        self.peak_bytes = self.used_bytes
        self.busy_s = 0.0
        self._serving = 0
        self._byte_seconds = 0.0
        self._used_bytes = self.used_bytes
        self._changed_s = self.begun_s

    @property
    def room_bytes(self) -> int:
        """What can still be promised."""
        promised_bytes = sum(each.coming_bytes for each in self.engines.values())
        return self.free_bytes - self.reserve_bytes - promised_bytes

    def vram_share(self) -> float:
        """How full it was on average, 0 to 1."""
        self._account()
        return self._byte_seconds / self.total_bytes / max(self._changed_s - self.begun_s, 1e-9)

    def changed(self) -> None:
        """Look whether all is well, and how full it is.

        Raises:
            BrokenInvariantError: more is used than there is, or more was promised than is free.
        """
        self._account()
        super().changed()
        if self.room_bytes + self.reserve_bytes < 0:
            self.break_(f"over-commitment: {-self.room_bytes - self.reserve_bytes} bytes were promised twice")

    def _account(self) -> None:
        now_s = asyncio.get_running_loop().time()
        passed_s = now_s - self._changed_s
        self._byte_seconds += self._used_bytes * passed_s
        if self._serving:
            self.busy_s += passed_s
        self._changed_s, self._used_bytes = now_s, self.used_bytes
        self.peak_bytes = max(self.peak_bytes, self._used_bytes)

    def rising(self, engine: TraceEngine) -> float:
        """An engine is on its way up; how long that takes, in seconds."""
        self.swaps += 1
        return super().rising(engine)

    @contextmanager
    def promised(self, engine: TraceEngine, size_bytes: int) -> Iterator[None]:
        """An image engine may take so much; what it has not taken at the end is nobody's again."""
        engine.coming_bytes += size_bytes
        self.changed()
        try:
            yield
        finally:
            engine.coming_bytes = 0
            self.changed()

    async def prepare(self, engine: TraceEngine, checkpoint_id: str) -> bool:
        """Load a checkpoint if it is not; whether it was necessary."""
        checkpoint = engine.checkpoint(checkpoint_id)
        if engine.has(checkpoint):
            return False
        self.swaps += 1
        await self.load(engine, checkpoint.load_s, checkpoint.kept_bytes)
        engine.keep(checkpoint)
        return True

    async def serve(self, engine: TraceEngine, checkpoint_id: str, service_s: float) -> None:
        """Generate."""
        working_bytes = 0
        if checkpoint_id:
            checkpoint = engine.checkpoint(checkpoint_id)
            working_bytes = checkpoint.vram_bytes - checkpoint.kept_bytes
        self._account()
        self._serving += 1
        engine.coming_bytes -= working_bytes
        engine.takes(working_bytes)
        self.changed()
        await asyncio.sleep(service_s)
        engine.takes(-working_bytes)
        self._account()
        self._serving -= 1
        self.changed()
