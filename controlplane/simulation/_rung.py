"""Rung's policy: the scheduler of a node itself, asked as the control plane asks it."""

from __future__ import annotations

import itertools
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing, asynccontextmanager

from controlplane.simulation._node import TraceEngine, TraceNode
from controlplane.simulation._policy import Visit
from controlplane.simulation._requests import Request
from controlplane.simulation._trace import TraceCheckpoint
from controlplane.vram import (
    Demand,
    Granted,
    Lease,
    NodeScheduler,
    Planned,
    Raised,
    ReclaimGrade,
    SchedulerEvent,
    Step,
)
from rung.errors import EngineStartFailedError
from rung.types import Residency

#: Longer than any image takes: nobody has to renew in a simulation.
_TTL_S = 7 * 24 * 3600.0
#: How often a request has its deployment raised that others make give way again.
_AWAKE_ROUNDS = 4


class RungPolicy:
    """The least grade that fits, the least harm within it, and a queue that lets neighbours run together.

    A request for a deployment that is awake takes a slot; one for a deployment that is not has it raised
    first. An image waits for its engine's turn, and then for a lease of what the engine does not hold yet.
    """

    def __init__(self, node: TraceNode) -> None:
        ids = itertools.count(1)
        self._node = node
        self._scheduler = NodeScheduler(
            pools=node,
            executor=node,
            new_lease_id=lambda: f"lease-{next(ids)}",
            alert=lambda alert: None,
        )

    async def run(self) -> None:
        """Own the node until cancelled."""
        await self._scheduler.run()

    @asynccontextmanager
    async def admit(self, request: Request, visit: Visit) -> AsyncIterator[None]:
        """Wait until the request may run."""
        engine = self._node.engines[request.deployment]
        if not request.checkpoint:
            await self._enter(engine, request, visit)
            try:
                yield
            finally:
                engine.end()
            return
        async with engine.queue:
            if engine.residency is not Residency.AWAKE:
                await self._raise(engine, request, visit)
            async with self._leased(engine, engine.checkpoint(request.checkpoint), request, visit):
                yield

    async def _enter(self, engine: TraceEngine, request: Request, visit: Visit) -> None:
        for _ in range(_AWAKE_ROUNDS):
            if engine.residency is not Residency.AWAKE:
                await self._raise(engine, request, visit)
            await engine.enter()
            if engine.residency is Residency.AWAKE:
                return
            # It was told to give way while this request waited.
            engine.end()
        raise EngineStartFailedError(f"{engine.name} had to give way {_AWAKE_ROUNDS} times")

    async def _raise(self, engine: TraceEngine, request: Request, visit: Visit) -> None:
        visit.swapped = True
        await _outcome(self._scheduler.raise_deployment(engine.name, priority=request.priority), visit)

    @asynccontextmanager
    async def _leased(
        self, engine: TraceEngine, checkpoint: TraceCheckpoint, request: Request, visit: Visit
    ) -> AsyncIterator[None]:
        for attempt in itertools.count(1):
            size_bytes = engine.missing_bytes(checkpoint)
            lease = await self._lease(engine, size_bytes, request, visit, attempt) if size_bytes else None
            if engine.missing_bytes(checkpoint) == size_bytes:
                break
            # Its cache was flushed for somebody else while it waited.
            self._release(lease)
        engine.begin()
        try:
            with self._node.promised(engine, size_bytes):
                yield
        finally:
            engine.end()
            self._release(lease)

    async def _lease(
        self, engine: TraceEngine, size_bytes: int, request: Request, visit: Visit, attempt: int
    ) -> Lease:
        demand = Demand(vram_bytes=size_bytes, priority=request.priority, holder=request.kind)
        granted = await _outcome(
            self._scheduler.acquire(
                self._node.pool_id,
                demand,
                ttl_s=_TTL_S,
                operation_id=f"{request.number}/{attempt}",
                deployment_id=engine.name,
            ),
            visit,
        )
        assert isinstance(granted, Granted)
        return granted.lease

    def _release(self, lease: Lease | None) -> None:
        if lease is not None:
            self._scheduler.release(lease.id)


async def _outcome(events: AsyncGenerator[SchedulerEvent, None], visit: Visit) -> Granted | Raised:
    """Wait for the last event, and note what was done to others until then."""
    grade = ReclaimGrade.QUICK
    async with aclosing(events):
        async for event in events:
            if isinstance(event, Planned):
                grade = event.plan.grade
            elif isinstance(event, Step):
                visit.disturbed(grade)
            elif isinstance(event, (Granted, Raised)):
                return event
    raise AssertionError("the last event is the outcome")
