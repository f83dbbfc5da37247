"""What people use today, on the same node: same timings, same requests, same rule about what is pinned.

None of them measures: each believes what its engines say, and so never waits for telemetry as Rung does. All
of them let a request whose deployment is up go straight in, drain what they take away, keep the same reserve
free, and stop what is `on_demand` after its idle timeout. The node is changed by one request at a time, in
the order of arrival.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from controlplane.simulation._node import TraceEngine, TraceNode
from controlplane.simulation._policy import Visit, grade_of
from controlplane.simulation._requests import Request
from controlplane.simulation._trace import TraceCheckpoint
from controlplane.vram import ReclaimAction, ReclaimStep
from rung.errors import VramInfeasibleError
from rung.types import Residency, ResidencyClass

_REAPER_S = 5.0
_UP = frozenset({Residency.AWAKE, Residency.ASLEEP})


class _Baseline:
    """What they have in common; `_make_room` says who has to go, `_way_out` how."""

    def __init__(self, node: TraceNode) -> None:
        self._node = node
        #: Whoever changes what is in the GPU has it; first come, first served.
        self._turn = asyncio.Lock()

    async def run(self) -> None:
        """Stop what has been idle for too long."""
        while True:
            await asyncio.sleep(_REAPER_S)
            async with self._turn:
                for engine in self._node.engines.values():
                    if _is_overdue(engine):
                        await self._tell(engine, ReclaimAction.STOP)

    @asynccontextmanager
    async def admit(self, request: Request, visit: Visit) -> AsyncIterator[None]:
        """Wait until the request may run."""
        engine = self._node.engines[request.deployment]
        if not request.checkpoint:
            await self._enter(engine, visit)
            try:
                yield
            finally:
                engine.end()
            return
        checkpoint = engine.checkpoint(request.checkpoint)
        async with engine.queue:
            async with self._turn:
                await self._bring_up(engine, visit)
                size_bytes = await self._image_room(engine, checkpoint, visit)
                engine.begin()
                engine.coming_bytes = size_bytes
            with self._node.promised(engine, 0):
                try:
                    yield
                finally:
                    engine.end()

    async def _enter(self, engine: TraceEngine, visit: Visit) -> None:
        """Wait for a slot of an engine that is awake."""
        while True:
            if engine.residency is not Residency.AWAKE:
                visit.swapped = True
                async with self._turn:
                    await self._bring_up(engine, visit)
            await engine.enter()
            if engine.residency is Residency.AWAKE:
                return
            # It was taken away while this request waited for a slot.
            engine.end()

    async def _bring_up(self, engine: TraceEngine, visit: Visit) -> None:
        if engine.residency is Residency.AWAKE:
            return
        visit.swapped = True
        await self._make_room(engine, engine.awake_bytes - engine.resident_bytes, visit)
        await self._stop_sleepers(engine, engine.awake_bytes - engine.resident_bytes, visit)
        self._check_room(engine, engine.awake_bytes - engine.resident_bytes)
        await self._node.bring_up(self._node.pool_id, engine.name)

    async def _image_room(self, engine: TraceEngine, checkpoint: TraceCheckpoint, visit: Visit) -> int:
        """Make room for an image; the bytes that it may take."""
        await self._make_room(engine, engine.missing_bytes(checkpoint), visit)
        if self._node.room_bytes < engine.missing_bytes(checkpoint) and not engine.has(checkpoint):
            # It would do so by itself: what it keeps makes place for what it needs.
            await self._evict(engine, ReclaimAction.FREE, visit)
        await self._stop_sleepers(engine, engine.missing_bytes(checkpoint), visit)
        self._check_room(engine, engine.missing_bytes(checkpoint))
        return engine.missing_bytes(checkpoint)

    async def _make_room(self, engine: TraceEngine, need_bytes: int, visit: Visit) -> None:
        """Have others give way, as far as that is the policy."""
        raise NotImplementedError

    async def _stop_sleepers(self, engine: TraceEngine, need_bytes: int, visit: Visit) -> None:
        """The last resort: what sleepers still hold."""
        for each in self._others(engine):
            if self._node.room_bytes < need_bytes and each.residency is Residency.ASLEEP:
                await self._evict(each, ReclaimAction.STOP, visit)

    def _check_room(self, engine: TraceEngine, need_bytes: int) -> None:
        missing_bytes = need_bytes - self._node.room_bytes
        if missing_bytes > 0:
            raise VramInfeasibleError(f"{missing_bytes} bytes are missing for {engine.name}")

    def _others(self, engine: TraceEngine) -> list[TraceEngine]:
        """Everybody else who is up and not pinned."""
        return [
            each
            for each in self._node.engines.values()
            if each is not engine and each.kind is not ResidencyClass.PINNED and each.residency in _UP
        ]

    async def _evict(self, engine: TraceEngine, action: ReclaimAction, visit: Visit) -> None:
        if action is ReclaimAction.FREE and not engine.cache_bytes:
            return
        visit.disturbed(grade_of(engine, action))
        await self._tell(engine, action)

    async def _tell(self, engine: TraceEngine, action: ReclaimAction) -> None:
        step = ReclaimStep(
            deployment_id=engine.name,
            action=action,
            level=1 if action is ReclaimAction.SLEEP else 0,
            expected_bytes=0,
            expected_s=0.0,
        )
        await self._node.carry_out(self._node.pool_id, step)


class AllOrNothing(_Baseline):
    """Everything is loaded, or one heavy thing is; afterwards everything is restored.

    Every image, and every request for what is only started on demand, first has all that is not pinned
    stopped, whether there would have been room or not, and started again afterwards. It is the first thing
    that works for language models and ComfyUI on one card, and so what most homes begin with: a script that
    stops the containers before, and one that starts them after. Who already waits for the heavy mode is
    served before anything is restored, which is kinder than most such scripts.
    """

    sleeps = False

    def __init__(self, node: TraceNode) -> None:
        super().__init__(node)
        self._waiting = 0
        self._evicted: list[TraceEngine] = []

    @asynccontextmanager
    async def admit(self, request: Request, visit: Visit) -> AsyncIterator[None]:
        """Wait until the request may run, alone if it is heavy."""
        engine = self._node.engines[request.deployment]
        if engine.kind not in (ResidencyClass.CACHE, ResidencyClass.ON_DEMAND):
            async with super().admit(request, visit):
                yield
            return
        if not request.checkpoint and await self._joins(engine):
            try:
                yield
            finally:
                engine.end()
            return
        self._waiting += 1
        async with self._turn:
            self._waiting -= 1
            try:
                await self._bring_up(engine, visit)
                size_bytes = 0
                if request.checkpoint:
                    size_bytes = await self._image_room(engine, engine.checkpoint(request.checkpoint), visit)
                await engine.enter()
                try:
                    with self._node.promised(engine, size_bytes):
                        yield
                finally:
                    engine.end()
            finally:
                if not self._waiting:
                    await self._restore(engine)

    async def _joins(self, engine: TraceEngine) -> bool:
        """Take a slot of what is up because of somebody else."""
        if engine.residency is not Residency.AWAKE:
            return False
        await engine.enter()
        joined = engine.residency is Residency.AWAKE
        if not joined:
            # It was taken away while this request waited for a slot.
            engine.end()
        return joined

    async def _make_room(self, engine: TraceEngine, need_bytes: int, visit: Visit) -> None:
        is_heavy = engine.kind is not ResidencyClass.SLEEPABLE
        if not is_heavy and self._node.room_bytes >= need_bytes:
            return
        for each in self._others(engine):
            if each.kind is ResidencyClass.CACHE:
                await self._evict(each, ReclaimAction.FREE, visit)
            elif each.kind is ResidencyClass.ON_DEMAND:
                await self._evict(each, ReclaimAction.STOP, visit)
            elif each.residency is Residency.AWAKE:
                await self._evict(each, _put_away(each) if self.sleeps else ReclaimAction.STOP, visit)
                if is_heavy:
                    self._evicted.append(each)

    async def _restore(self, engine: TraceEngine) -> None:
        if engine.kind is ResidencyClass.ON_DEMAND:
            await self._tell(engine, ReclaimAction.STOP)
        elif engine.cache_bytes:
            await self._tell(engine, ReclaimAction.FREE)
        while self._evicted:
            each = self._evicted.pop(0)
            fits = self._node.room_bytes >= each.awake_bytes - each.resident_bytes
            if fits and each.residency is not Residency.AWAKE:
                await self._node.bring_up(self._node.pool_id, each.name)


class AllOrNothingAsleep(AllOrNothing):
    """All or nothing, but what can sleep is put to sleep and not stopped.

    Few do so: it needs vLLM's development endpoints. It shows how much of the difference is sleep, and how
    much is that nothing gives way without need.
    """

    sleeps = True


class LeastRecentlyUsed(_Baseline):
    """What fits stays; for what does not, the least recently used goes until it does.

    It is how Ollama shares a card: a model that does not fit has idle ones unloaded, the longest unused
    first, and waits for busy ones only if it must. What is unloaded is started again when it is wanted. An
    image engine is flushed, since that is what it has to give.
    """

    async def _make_room(self, engine: TraceEngine, need_bytes: int, visit: Visit) -> None:
        while self._node.room_bytes < need_bytes:
            victims = [each for each in self._others(engine) if self._way_out(each) is not None]
            if not victims and not await self._somebody_ends(engine):
                return
            if not victims:
                continue
            victim = min(victims, key=_reluctance)
            way_out = self._way_out(victim)
            assert way_out is not None
            await self._evict(victim, way_out, visit)

    async def _somebody_ends(self, engine: TraceEngine) -> bool:
        """Wait until a request of those ends who have nothing to give before; whether there is one."""
        busy = [each for each in self._others(engine) if each.active]
        if not busy:
            return False
        await busy[0].eased.wait()
        return True

    def _way_out(self, engine: TraceEngine) -> ReclaimAction | None:
        if engine.kind is ResidencyClass.CACHE:
            return ReclaimAction.FREE if engine.cache_bytes else None
        return ReclaimAction.STOP if engine.residency is Residency.AWAKE else None


class LeastRecentlyUsedAsleep(LeastRecentlyUsed):
    """Least recently used, but what can sleep is put to sleep and not unloaded.

    Nobody ships it: it shows how much of the difference is sleep, and how much is the choice of who goes.
    """

    def _way_out(self, engine: TraceEngine) -> ReclaimAction | None:
        if engine.kind is not ResidencyClass.SLEEPABLE:
            return super()._way_out(engine)
        return _put_away(engine) if engine.residency is Residency.AWAKE else None


class OneAtATime(_Baseline):
    """One group, of which exactly one member is loaded; the pinned ones are in a group of their own.

    It is llama-swap's group with `swap: true` beside one that is `persistent`, the usual configuration where
    two models do not fit together: a request for another member stops the one that is there, once its
    requests have ended, and starts the other.
    """

    async def _make_room(self, engine: TraceEngine, need_bytes: int, visit: Visit) -> None:
        for each in self._others(engine):
            await self._evict(each, ReclaimAction.STOP, visit)


def _put_away(engine: TraceEngine) -> ReclaimAction:
    return ReclaimAction.SLEEP if 1 in engine.sleep_levels else ReclaimAction.STOP


def _reluctance(engine: TraceEngine) -> tuple[bool, float, str]:
    """Who goes last has the most: the busy, and of those and the others who was used last."""
    return engine.active > 0, engine.used_s, engine.name


def _is_overdue(engine: TraceEngine) -> bool:
    if engine.kind is not ResidencyClass.ON_DEMAND or engine.residency is not Residency.AWAKE:
        return False
    idle_s = asyncio.get_running_loop().time() - engine.used_s
    return engine.idle_timeout_s is not None and not engine.active and idle_s >= engine.idle_timeout_s
