"""A demand that waits, and those who follow it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator

from controlplane.vram._events import Granted, Planned, Raised, SchedulerEvent, Waiting
from controlplane.vram._leases import Lease
from controlplane.vram._options import GRADES
from controlplane.vram._plan import Demand
from controlplane.vram._queue import Queued
from rung.errors import RungError
from rung.types import ReclaimGrade, ReclaimPlan, ReclaimStep


class Pending:
    """A demand from its arrival to its outcome, and the log of what happened to it.

    Attributes:
        deployment_id: the deployment that the memory is for; empty if it is for another program.
        raises: the deployment is to be raised; otherwise a lease is wanted.
        grade: how much others were disturbed for it so far.
        overtakers: leases that were granted to others which it let pass.
        followers: how many listen.
        delivered: somebody has heard of the grant.
    """

    def __init__(
        self,
        *,
        operation_id: str,
        pool_id: str,
        demand: Demand,
        ttl_s: float,
        deployment_id: str,
        raises: bool,
        queued: Queued,
    ) -> None:
        self.operation_id = operation_id
        self.pool_id = pool_id
        self.demand = demand
        self.ttl_s = ttl_s
        self.deployment_id = deployment_id
        self.raises = raises
        self.queued = queued
        self.grade = ReclaimGrade.QUICK
        self.overtakers: set[str] = set()
        self.followers = 0
        self.delivered = False
        self.withdrawn = False
        self.lease: Lease | None = None
        self.error: RungError | None = None
        self.raised = False
        self.position = 1
        self._loop = asyncio.get_running_loop()
        self._detail = "waiting for its turn"
        self._due_s: float | None = None
        self._told_steps: tuple[ReclaimStep, ...] = ()
        self._log: list[SchedulerEvent] = []
        self._bells: list[asyncio.Future[bool]] = []

    @property
    def over(self) -> bool:
        """Whether it has had its outcome, or nobody wants one any more."""
        return self.withdrawn or self.raised or self.lease is not None or self.error is not None

    def wait(self, detail: str, expected_s: float | None = None) -> None:
        """It goes on waiting, for this."""
        self._detail = detail
        self._due_s = None if expected_s is None else self._loop.time() + expected_s

    def planned(self, plan: ReclaimPlan) -> None:
        """Room is made for it; told once unless the steps are other ones than were to be expected."""
        self.grade = max(self.grade, plan.grade, key=GRADES.index)
        if plan.steps != self._told_steps:
            self.tell(Planned(plan=plan))
        self._told_steps = plan.steps[1:]

    def tell(self, event: SchedulerEvent) -> None:
        """Something happened to it."""
        self._log.append(event)
        self._ring()

    def grant(self, lease: Lease) -> None:
        """It ends with a lease."""
        self.lease = lease
        self.tell(Granted(lease=lease))

    def finish_raise(self) -> None:
        """It ends with the deployment awake."""
        self.raised = True
        self.tell(Raised(deployment_id=self.deployment_id))

    def fail(self, error: RungError) -> None:
        """It ends with an error; nothing happens if it was over."""
        if not self.over:
            self.error = error
            self._ring()

    async def events(self, heartbeat_s: float) -> AsyncGenerator[SchedulerEvent, None]:
        """All events from the first one to the outcome, and a `Waiting` whenever nothing else is said.

        Raises:
            RungError: it failed.
        """
        if not self._log:
            yield self._waiting()
        seen = 0
        while True:
            while seen < len(self._log):
                event = self._log[seen]
                seen += 1
                if isinstance(event, Granted):
                    self.delivered = True
                yield event
                if isinstance(event, (Granted, Raised)):
                    return
            if self.error is not None:
                raise type(self.error)(self.error.message, **self.error.metadata) from self.error
            if not await self._ring_within(heartbeat_s):
                yield self._waiting()

    def _waiting(self) -> Waiting:
        left_s = None if self._due_s is None else max(0.0, self._due_s - self._loop.time())
        return Waiting(detail=self._detail, position=self.position, expected_s=left_s)

    async def _ring_within(self, limit_s: float) -> bool:
        """Wait until something happens; False if nothing did. Costs less than a timeout about an event."""
        bell: asyncio.Future[bool] = self._loop.create_future()
        timer = self._loop.call_later(limit_s, _answer, bell, False)
        self._bells.append(bell)
        try:
            return await bell
        finally:
            timer.cancel()
            if bell in self._bells:
                self._bells.remove(bell)

    def _ring(self) -> None:
        for bell in self._bells:
            _answer(bell, True)
        self._bells.clear()


def _answer(bell: asyncio.Future[bool], rung: bool) -> None:
    if not bell.done():
        bell.set_result(rung)
