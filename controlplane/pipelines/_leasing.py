"""Memory for a job: a lease that is waited for in words, renewed while it is held, and always given back."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import AsyncIterator, Callable
from contextlib import aclosing, asynccontextmanager
from typing import Protocol

import structlog

from controlplane.fleet import (
    DeploymentView,
    Fleet,
    LifecycleAction,
    NodeSchedulers,
    freed_by,
    pool_of,
    progress_of_event,
)
from controlplane.vram import (
    Demand,
    Granted,
    Lease,
    NodeScheduler,
    Planned,
    ReclaimAction,
    ReclaimGrade,
    ReclaimStep,
    SchedulerEvent,
    Step,
    StepState,
    Waiting,
)
from rung.errors import UnknownLeaseError
from rung.types import Phase, TransitionTimes

_log = structlog.get_logger("rung.pipelines")

#: A holder that vanishes without a word costs others so long.
LEASE_TTL_S = 60.0
#: How long to wait for a measurement of after something.
_FRESH_S = 4.0


class LeasingJob(Protocol):
    """What is told of each step."""

    id: str

    def progress(self, phase: Phase, detail: str = "", *, remaining_s: float | None = None) -> None:
        """A phase began, or moved on."""
        ...


def _unknown(_: object) -> float | None:
    """Nothing was learnt."""
    return None


@asynccontextmanager
async def leased(
    schedulers: NodeSchedulers,
    view: DeploymentView,
    demand: Demand,
    job: LeasingJob,
    *,
    ttl_s: float = LEASE_TTL_S,
    usual_s: Callable[[ReclaimStep], float | None] = _unknown,
    expected_s: Callable[[ReclaimGrade], float | None] = _unknown,
) -> AsyncIterator[Lease | None]:
    """Hold memory for a deployment as long as the context lasts; None where its node has no GPU.

    Others leave the deployment alone meanwhile. Who holds a slot of it parks it (`Slots.parked`) until the
    lease is there.

    Args:
        schedulers: grant leases.
        view: the deployment that is to take the memory.
        demand: how much, and how much others may be disturbed for it.
        job: told of each step, as `vram_acquire`.
        ttl_s: how long the lease outlives whoever holds it.
        usual_s: how long a step usually takes, where that was learnt.
        expected_s: how long it takes here to make room at a grade, where that was learnt.

    Raises:
        VramInfeasibleError: it does not fit, and waiting does not help.
        UnavailableError: the GPU is not measured, or the scheduler is shutting down.
        InvalidRequestError: the demand is for nothing.
    """
    pool_id = pool_of(view)
    if pool_id is None:
        yield None
        return
    scheduler = schedulers.of_node(view.node.id)
    words = _Words(job, usual_s, expected_s)
    lease: Lease | None = None
    events = scheduler.acquire(
        pool_id,
        demand,
        ttl_s=ttl_s,
        operation_id=f"{job.id}-{uuid.uuid4().hex[:8]}",
        deployment_id=view.deployment.spec.id,
    )
    async with aclosing(events):
        async for event in events:
            if isinstance(event, Granted):
                lease = event.lease
            else:
                words.tell(event)
    assert lease is not None  # it is the last event
    renewing = asyncio.create_task(_renew(scheduler, lease), name=f"renew-{lease.id}")
    try:
        yield lease
    finally:
        scheduler.release(lease.id)
        renewing.cancel()


async def _renew(scheduler: NodeScheduler, lease: Lease) -> None:
    while True:
        await asyncio.sleep(lease.ttl_s / 3)
        try:
            scheduler.renew(lease.id)
        except UnknownLeaseError:
            # This process stood still for longer than the lease lasts.
            _log.warning("lease_lost", lease=lease.id, holder=lease.demand.holder)
            return


class _Words:
    """Tells a job what its lease waits for, with times where they were learnt."""

    def __init__(
        self,
        job: LeasingJob,
        usual_s: Callable[[ReclaimStep], float | None],
        expected_s: Callable[[ReclaimGrade], float | None],
    ) -> None:
        self._job = job
        self._usual_s = usual_s
        self._expected_s = expected_s
        self._now_s = asyncio.get_running_loop().time
        self._began_s = self._now_s()
        self._whole_s: float | None = None
        self._step: Step | None = None
        self._step_began_s = 0.0

    def tell(self, event: SchedulerEvent) -> None:
        """Put an event in words."""
        now_s = self._now_s()
        if isinstance(event, Planned):
            self._whole_s = self._expected_s(event.plan.grade)
        if isinstance(event, Step):
            self._step = event if event.state is StepState.BEGUN else None
            self._step_began_s = now_s
        if isinstance(event, Waiting) and self._step is not None:
            # What it waits for is the step.
            event = self._step
        progress = progress_of_event(event)
        if progress is None:
            return
        detail = progress.detail
        if self._step is not None:
            left_s = _left_s(self._usual_s(self._step.step), now_s - self._step_began_s)
            if left_s is not None:
                detail = f"{detail}, {left_s:.0f} s left"
        self._job.progress(
            Phase.VRAM_ACQUIRE, detail, remaining_s=_left_s(self._whole_s, now_s - self._began_s)
        )


def _left_s(expected_s: float | None, passed_s: float) -> float | None:
    return None if expected_s is None or expected_s <= passed_s else expected_s - passed_s


def usual_step_s(fleet: Fleet, step: ReclaimStep) -> float | None:
    """How long the agent has learnt that a step takes, without the drain before it; None if it has not."""
    found = fleet.view.deployments.get(step.deployment_id)
    if found is None or step.drain:
        return None
    times: TransitionTimes = found.deployment.usual_times
    if step.action is ReclaimAction.SLEEP:
        return times.discard_s if step.level == 2 else times.sleep_s
    return times.shrink_s if step.action is ReclaimAction.SHRINK else None


async def flush(fleet: Fleet, deployment_id: str) -> int | None:
    """Have an engine give back what it caches; returns the bytes that this freed, if they were measured.

    Nothing of it may be running: who holds a slot of it parks that first. What is granted afterwards is
    granted of a measurement that shows it.

    Raises:
        RungError: it did not work.
    """
    operation_id = f"flush-{deployment_id}-{uuid.uuid4().hex[:12]}"
    freed_bytes = await freed_by(
        fleet.lifecycle(LifecycleAction.FREE, deployment_id, operation_id, makes_room=True)
    )
    await measured_since(fleet, deployment_id, asyncio.get_running_loop().time())
    return freed_bytes


async def measured_since(fleet: Fleet, deployment_id: str, since_s: float) -> None:
    """Return once the node of a deployment was measured after a time, or has not been for a while."""
    loop = asyncio.get_running_loop()
    deadline_s = loop.time() + _FRESH_S
    while (left_s := deadline_s - loop.time()) > 0:
        found = fleet.view.deployments.get(deployment_id)
        if found is None or fleet.session(found.node.id).measured_s > since_s:
            return
        await fleet.wait_changed(left_s)
