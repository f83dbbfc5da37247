"""A scheduler that runs on a simulated pool, for its tests."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing, asynccontextmanager

from controlplane.vram import (
    Demand,
    Granted,
    Lease,
    NodeScheduler,
    Planner,
    Raised,
    ReclaimAction,
    ReclaimGrade,
    SchedulerEvent,
    SchedulerOptions,
    VramAlert,
    plan,
)
from rung.types import Priority, Residency, ResidencyClass
from tests.fakes.simulated_pool import Fault, SimulatedEngine, SimulatedPool

GIB = 1 << 30
POOL = SimulatedPool.pool_id


class Node:
    """A scheduler that runs, its pool, and what it has told."""

    def __init__(
        self, pool: SimulatedPool, options: SchedulerOptions | None = None, planner: Planner = plan
    ) -> None:
        ids = itertools.count(1)
        self.pool = pool
        self.alerts: list[VramAlert] = []
        self.granted: list[str] = []
        self.scheduler = NodeScheduler(
            pools=pool,
            executor=pool,
            new_lease_id=lambda: f"lease-{next(ids)}",
            alert=self.alerts.append,
            options=options or SchedulerOptions(),
            planner=planner,
        )

    def ask(
        self,
        size_gib: float,
        *,
        operation: str = "operation",
        priority: Priority = Priority.USER,
        grade: ReclaimGrade = ReclaimGrade.FULL,
        ttl_s: float = 1000.0,
        deployment_id: str = "",
    ) -> AsyncGenerator[SchedulerEvent, None]:
        demand = Demand(vram_bytes=int(size_gib * GIB), priority=priority, max_grade=grade, holder=operation)
        return self.scheduler.acquire(
            POOL, demand, ttl_s=ttl_s, operation_id=operation, deployment_id=deployment_id
        )

    async def lease(
        self,
        size_gib: float,
        *,
        operation: str = "operation",
        priority: Priority = Priority.USER,
        grade: ReclaimGrade = ReclaimGrade.FULL,
        ttl_s: float = 1000.0,
        deployment_id: str = "",
    ) -> Lease:
        """Wait for a lease."""
        events = self.ask(
            size_gib,
            operation=operation,
            priority=priority,
            grade=grade,
            ttl_s=ttl_s,
            deployment_id=deployment_id,
        )
        granted = (await everything(events))[-1]
        assert isinstance(granted, Granted)
        self.granted.append(granted.lease.operation_id)
        return granted.lease

    async def awake(self, deployment_id: str, *, priority: Priority = Priority.USER) -> None:
        """Wait until a deployment is awake."""
        events = self.scheduler.raise_deployment(deployment_id, priority=priority)
        assert (await everything(events))[-1] == Raised(deployment_id=deployment_id)

    def leases(self) -> list[Lease]:
        """The leases that are held now."""
        return list(self.scheduler.leases)

    def residency(self, deployment_id: str) -> Residency:
        """What has become of a deployment."""
        return self.pool.engines[deployment_id].residency

    def steps(self) -> list[tuple[str, ReclaimAction, int]]:
        """What was done to whom."""
        return [(each.deployment_id, each.action, each.level) for each in self.pool.steps]


@asynccontextmanager
async def node_of(
    *engines: SimulatedEngine,
    options: SchedulerOptions | None = None,
    planner: Planner = plan,
    pool: SimulatedPool | None = None,
) -> AsyncIterator[Node]:
    """A node of 30 GiB to be granted, less what its engines hold."""
    node = Node(pool or SimulatedPool(engines), options, planner)
    running = asyncio.create_task(node.scheduler.run())
    try:
        yield node
        assert not running.done(), running
    finally:
        running.cancel()
        for task in node.pool.ongoing:
            task.cancel()
        await asyncio.gather(running, *node.pool.ongoing, return_exceptions=True)


async def everything(events: AsyncGenerator[SchedulerEvent, None]) -> list[SchedulerEvent]:
    async with aclosing(events):
        return [event async for event in events]


def now_s() -> float:
    return asyncio.get_running_loop().time()


def sleeper(
    name: str = "reasoner",
    size_gib: int = 12,
    *,
    residency: Residency = Residency.AWAKE,
    warm: bool = False,
    faults: tuple[Fault, ...] = (),
) -> SimulatedEngine:
    """A deployment that sleeps on one GiB, wakes in 3 s and starts in 10 s."""
    return SimulatedEngine(
        name,
        ResidencyClass.SLEEPABLE,
        size_gib * GIB,
        residency=residency,
        held_asleep_bytes=GIB,
        warm=warm,
        faults=faults,
    )


def pinned() -> SimulatedEngine:
    """The orchestrator, with 8 GiB."""
    return SimulatedEngine("orchestrator", ResidencyClass.PINNED, 8 * GIB)
