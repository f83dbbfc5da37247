"""The scheduler of a node: one task that owns the node's VRAM.

`NodeScheduler.run` is that task. Whatever changes the node's memory is decided by it, one step at a time:
after each step the queue is looked at again from its head, with a new measurement. Only a deployment on its
way up is left to itself, since that may take a minute; its pool then grants what is free, and takes no
other step.

A grant is made of bytes that were measured free and promised to nobody. Nothing is awaited between the look
at the measurement and the grant.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing

import msgspec

from controlplane.vram._events import SchedulerEvent
from controlplane.vram._gauge import Gauge
from controlplane.vram._leases import Lease, LeaseBook, check_ttl
from controlplane.vram._ledger import LedgerEntry
from controlplane.vram._obedience import Obedience
from controlplane.vram._passing import Passing
from controlplane.vram._patrol import Patrol
from controlplane.vram._pending import Pending
from controlplane.vram._plan import Demand, disturbs_less, plan
from controlplane.vram._ports import (
    Executor,
    Measurement,
    NoJournal,
    PlacedDeployment,
    Pools,
    SchedulerOptions,
    SwapJournal,
    VramAlert,
    placed_deployment,
)
from controlplane.vram._queue import Planner
from controlplane.vram._raises import Raises
from controlplane.vram._room import WaitingRoom
from controlplane.vram._steps import Steps
from controlplane.vram._swaps import Swaps
from controlplane.vram._upkeep import missing_bytes
from controlplane.vram._view import View
from rung.errors import (
    DrainingError,
    EngineStartFailedError,
    InvalidRequestError,
    RungError,
    UnknownDeploymentError,
    VramInfeasibleError,
)
from rung.types import Infeasible, Priority, ReclaimPlan, Residency

_DEFAULTS = SchedulerOptions()
_NO_JOURNAL = NoJournal()


class NodeScheduler:
    """Leases of a node's memory, and the deployments that take turns in it.

    Args:
        pools: measures.
        executor: carries out.
        new_lease_id: makes ids that no other lease has had.
        alert: told when a pool runs low, and when it has recovered.
        options: how to behave.
        planner: how to make room; another one only for comparison.
        journal: keeps the swaps that are under way.
    """

    def __init__(
        self,
        *,
        pools: Pools,
        executor: Executor,
        new_lease_id: Callable[[], str],
        alert: Callable[[VramAlert], None],
        options: SchedulerOptions = _DEFAULTS,
        planner: Planner = plan,
        journal: SwapJournal = _NO_JOURNAL,
    ) -> None:
        self._world = pools
        self._new_lease_id = new_lease_id
        self._options = options
        self._plan = planner
        self._book = LeaseBook()
        self._obedience = Obedience(options.backoff_s)
        self._gauge = Gauge(pools, alert, options)
        self._room = WaitingRoom(self._book, options.queue)
        self._swaps = Swaps(pools, journal, backoff_s=options.backoff_s)
        self._steps = Steps(
            executor=executor,
            gauge=self._gauge,
            obedience=self._obedience,
            swaps=self._swaps,
            options=options,
        )
        self._raises = Raises(
            book=self._book, gauge=self._gauge, executor=executor, options=options, ended=self._raise_ended
        )
        self._passing = Passing(
            room=self._room, pools=pools, obedience=self._obedience, planner=planner, rules=options.queue
        )
        self._patrol = Patrol(
            pools=pools,
            gauge=self._gauge,
            room=self._room,
            raises=self._raises,
            obedience=self._obedience,
            swaps=self._swaps,
            steps=self._steps,
            planner=planner,
            view=self._view,
            restore=self._restore,
        )
        #: By pool, the deployment that was served last.
        self._last_groups: dict[str, str] = {}
        self._wake = asyncio.Event()
        self._next_patrol_s = float("-inf")
        self._tasks: asyncio.TaskGroup | None = None

    # What anybody may call.

    @property
    def leases(self) -> tuple[Lease, ...]:
        """Leases that are held, by the time of their grant."""
        self._expire()
        return self._book.leases

    async def acquire(
        self, pool_id: str, demand: Demand, *, ttl_s: float, operation_id: str, deployment_id: str = ""
    ) -> AsyncGenerator[SchedulerEvent, None]:
        """Wait for a lease; the last event is `Granted`.

        Whoever stops listening before that withdraws the demand, unless others joined it; close the iterator
        (`contextlib.aclosing`) to stop at once. The same operation id joins the same demand, or is told the
        lease that it got.

        Args:
            pool_id: the pool.
            demand: the wish.
            ttl_s: how long the lease lasts without a renewal.
            operation_id: chosen by the caller.
            deployment_id: the deployment that will take the memory; empty if another program will.

        Raises:
            InvalidRequestError: the demand is for nothing, or the TTL is not one.
            AlreadyExistsError: the operation id stands for another demand.
            VramInfeasibleError: it does not fit, and waiting does not help.
            UnavailableError: the pool is not measured, or the scheduler is shutting down.
            NotFoundError: there is no such pool.
        """
        check_ttl(ttl_s)
        if demand.vram_bytes <= 0:
            raise InvalidRequestError(f"a demand of {demand.vram_bytes} bytes is not one")
        self._expire()
        pending = self._room.join_lease(
            operation_id, pool_id, demand, ttl_s=ttl_s, deployment_id=deployment_id
        )
        self._wake.set()
        async with aclosing(self._follow(pending)) as events:
            async for event in events:
                yield event

    async def raise_deployment(
        self, deployment_id: str, *, priority: Priority = Priority.USER
    ) -> AsyncGenerator[SchedulerEvent, None]:
        """Wait until a deployment is awake, and make it so; the last event is `Raised`.

        All who wait for the same deployment share one raise. Close the iterator to stop waiting.

        Raises:
            UnknownDeploymentError: it is not a deployment of this node.
            VramInfeasibleError: there is no room for it, and waiting does not help.
            EngineStartFailedError: it did not come up, now or a moment ago.
            UnavailableError: its pool is not measured, or the scheduler is shutting down.
        """
        placed = placed_deployment(self._world, deployment_id)
        if placed is None:
            raise UnknownDeploymentError(f"no deployment {deployment_id} here", deployment=deployment_id)
        demand = self._swaps.demand_of(placed, priority)
        pending = self._room.join_raise(placed.pool_id, demand, deployment_id)
        if self._is_rising(pending):
            self._wait_for_raise(pending)
        self._wake.set()
        async with aclosing(self._follow(pending)) as events:
            async for event in events:
                yield event

    def renew(self, lease_id: str) -> Lease:
        """Let a lease last its TTL again from now.

        Raises:
            UnknownLeaseError: it has ended, or never was.
        """
        self._expire()
        return self._book.renew(lease_id, self._now_s())

    def release(self, lease_id: str) -> None:
        """End a lease. Ending one that has ended changes nothing."""
        self._expire()
        if self._book.end(lease_id, self._now_s()) is not None:
            self.changed()

    async def preview(self, pool_id: str, demand: Demand) -> ReclaimPlan | Infeasible:
        """How a demand would be met now; nothing is changed.

        Raises:
            UnavailableError: the pool is not measured.
        """
        measurement = await self._gauge.measured(pool_id)
        return self._plan(self._view(measurement).ledger, self._obedience.keep_away(demand, self._now_s()))

    def changed(self) -> None:
        """Something changed in the world: look again at what waits."""
        self._next_patrol_s = float("-inf")
        self._wake.set()

    async def run(self) -> None:
        """Own the node until cancelled. What then still waits fails with `DrainingError`."""
        try:
            async with asyncio.TaskGroup() as self._tasks:
                while True:
                    self._wake.clear()
                    if not await self._work():
                        await self._rest()
        finally:
            self._room.close(DrainingError("the scheduler of the node is shutting down"))

    # Joining and leaving.

    async def _follow(self, pending: Pending) -> AsyncGenerator[SchedulerEvent, None]:
        pending.followers += 1
        try:
            async with aclosing(pending.events(self._options.heartbeat_s)) as events:
                async for event in events:
                    yield event
        finally:
            pending.followers -= 1
            if not pending.followers:
                self._left(pending)

    def _left(self, pending: Pending) -> None:
        """The last one who listened is gone."""
        if pending.lease is not None:
            if not pending.delivered:
                self.release(pending.lease.id)
        elif not pending.over and not self._is_rising(pending):
            pending.withdrawn = True
            self._room.leave(pending)
            self._give_back_turn(pending)
            self.changed()

    # The task.

    async def _work(self) -> bool:
        """Do one thing; False if there is nothing to be done now."""
        self._expire()
        waiting = [each for each in self._room if not self._is_rising(each)]
        queues = self._room.queues(waiting, self._last_groups)
        for queue in queues:
            if await self._serve(queue):
                return True
        return await self._upkeep({queue[0].pool_id for queue in queues})

    async def _rest(self) -> None:
        """Wait until something changes or is due."""
        now_s = self._now_s()
        due_s = [self._next_patrol_s]
        for each_s in (self._raises.next_settled_s(), self._book.next_expiry_s()):
            if each_s is not None:
                due_s.append(each_s)
        if self._room and self._book.awaits_measurement:
            due_s.append(now_s + self._options.measurement_retry_s)
        try:
            async with asyncio.timeout(max(0.0, min(due_s) - now_s)):
                await self._wake.wait()
        except TimeoutError:
            return

    async def _serve(self, queue: list[Pending]) -> bool:
        """Do one thing for the first demand of a pool for which anything can be done."""
        pool_id = queue[0].pool_id
        try:
            measurement = await self._gauge.newest(pool_id)
            if measurement is None:
                for pending in queue:
                    pending.wait(f"{pool_id} was not measured lately")
                measurement = await self._gauge.measured(pool_id)
        except RungError as error:
            for pending in queue:
                self._fail(pending, error)
            return True
        view = self._view(measurement)
        blocked: list[Pending] = []
        for pending in queue:
            if pending.over:
                return True
            advance = self._advance_raise if pending.raises else self._advance_lease
            if await advance(pending, view, blocked):
                return True
            blocked.append(pending)
        return False

    async def _advance_lease(self, pending: Pending, view: View, blocked: list[Pending]) -> bool:
        return await self._make_room(
            pending, view, pending.demand, blocked, lambda: self._grant(pending, view)
        )

    async def _advance_raise(self, pending: Pending, view: View, blocked: list[Pending]) -> bool:
        placed = placed_deployment(self._world, pending.deployment_id)
        entry = view.ledger.entry(pending.deployment_id)
        if placed is None or entry is None:
            self._fail(pending, UnknownDeploymentError(f"{pending.deployment_id} is gone"))
            return True
        if entry.residency is Residency.AWAKE:
            self._finish_raise(pending)
            return True
        failure = self._obedience.failure(pending.deployment_id, self._now_s())
        if failure is not None:
            left_s, reason = failure
            self._fail(pending, EngineStartFailedError(f"{reason}; it is left alone for {left_s:.0f} s"))
            return True
        if not entry.touchable or self._book.raise_is_open(pending.deployment_id):
            pending.wait(f"{pending.deployment_id} is {entry.residency}")
            return False
        demand = msgspec.structs.replace(pending.demand, vram_bytes=missing_bytes(placed, entry))
        if self._raises.of(pending.pool_id):
            self._wait_for_raise(pending)
            return False
        return await self._make_room(
            pending, view, demand, blocked, lambda: self._begin_raise(entry, placed, view, pending)
        )

    async def _make_room(
        self,
        pending: Pending,
        view: View,
        demand: Demand,
        blocked: list[Pending],
        finish: Callable[[], None],
    ) -> bool:
        """Take the next step towards room for a demand, or finish if there is room."""
        kept_away = self._obedience.keep_away(demand, self._now_s())
        outcome = self._plan(view.ledger, kept_away)
        if view.soon is not None and disturbs_less(self._plan(view.soon, kept_away), outcome):
            pending.wait("what has just come up may give way in a moment, which disturbs others less")
            return False
        if isinstance(outcome, Infeasible):
            if not outcome.retry_when:
                self._fail(pending, self._infeasible(outcome))
                return True
            pending.wait(f"{outcome.detail}; waiting until {' and '.join(outcome.retry_when)}")
            return False
        for each in blocked:
            if not self._passing.may_pass(pending, demand, each, view):
                pending.wait(f"it is the turn of {each.demand.holder or each.operation_id}")
                return False
        if outcome.steps:
            if self._raises.of(pending.pool_id):
                self._wait_for_raise(pending)
                return False
            if self._book.has_just_ended(pending.pool_id):
                # Counted as promised until then, it would have others give way for nothing.
                pending.wait(f"{pending.pool_id} is measured again, since a lease has just ended")
                return False
            pending.planned(outcome)
            await self._take(pending, view, outcome)
            return True
        self._passing.passes(pending, demand, blocked, view)
        finish()
        return True

    def _wait_for_raise(self, pending: Pending) -> None:
        pool_id = pending.pool_id
        pending.wait(f"{self._raises.of(pool_id)} is coming up", self._raises.left_s(pool_id))

    async def _take(self, pending: Pending, view: View, outcome: ReclaimPlan) -> None:
        """Take the first step of a plan."""
        try:
            await self._steps.take(pending, view.ledger, outcome)
        except RungError as error:
            self._fail(pending, error)
        self._next_patrol_s = float("-inf")

    def _grant(self, pending: Pending, view: View) -> None:
        now_s = self._now_s()
        lease = Lease(
            id=self._new_lease_id(),
            operation_id=pending.operation_id,
            pool_id=pending.pool_id,
            demand=pending.demand,
            deployment_id=pending.deployment_id,
            grade=pending.grade,
            granted_s=now_s,
            ttl_s=pending.ttl_s,
            expires_s=now_s + pending.ttl_s,
        )
        self._book.grant(lease, view.ledger)
        self._obedience.forgive(pending.deployment_id)
        self._last_groups[pending.pool_id] = pending.deployment_id
        self._room.leave(pending)
        pending.grant(lease)
        for each in self._room.before(pending):
            each.overtakers.add(lease.id)

    def _fail(self, pending: Pending, error: RungError) -> None:
        self._room.leave(pending)
        back = self._give_back_turn(pending)
        if back:
            words = f"{error.message}; {back}, which gave way for it, is started again"
            error = type(error)(words, **error.metadata)
        pending.fail(error)

    def _give_back_turn(self, pending: Pending) -> str:
        """Whoever gave way for a deployment that nobody waits for any more takes its place in the queue.

        Returns:
            its id; empty if nobody did.
        """
        displaced = self._swaps.gave_way_to(pending.deployment_id) if pending.raises else ""
        placed = placed_deployment(self._world, displaced)
        if placed is None:
            return ""
        again = self._room.join_raise(
            placed.pool_id, self._swaps.demand_of(placed, pending.queued.priority), displaced
        )
        again.queued = msgspec.structs.replace(pending.queued, group=displaced)
        return displaced

    def _infeasible(self, outcome: Infeasible) -> VramInfeasibleError:
        reasons = (*self._obedience.disappointments(self._now_s()), *outcome.remedies)
        return VramInfeasibleError(
            "; ".join((outcome.detail, *reasons)),
            missing_bytes=str(outcome.missing_bytes),
            largest_fit_bytes=str(outcome.largest_fit_bytes),
        )

    # Raising.

    def _is_rising(self, pending: Pending) -> bool:
        return pending.raises and self._raises.of(pending.pool_id) == pending.deployment_id

    def _begin_raise(
        self, entry: LedgerEntry, placed: PlacedDeployment, view: View, pending: Pending | None
    ) -> None:
        assert self._tasks is not None
        self._obedience.forgive(placed.deployment_id)
        self._raises.begin(entry, placed, view.ledger, self._tasks)
        if pending is not None:
            self._last_groups[placed.pool_id] = placed.deployment_id
            self._wait_for_raise(pending)

    def _raise_ended(self, deployment_id: str, failure: str) -> None:
        pending = self._room.raise_of(deployment_id)
        if failure:
            self._obedience.failed(deployment_id, failure, self._now_s())
            if pending is not None:
                self._fail(pending, EngineStartFailedError(failure, deployment=deployment_id))
        elif pending is not None:
            self._finish_raise(pending)
        self.changed()

    def _finish_raise(self, pending: Pending) -> None:
        self._room.leave(pending)
        pending.finish_raise()

    # Upkeep.

    async def _upkeep(self, wanted: set[str]) -> bool:
        """Look after the pools now and then: swaps, idle timeouts, warm deployments."""
        if self._now_s() < self._next_patrol_s:
            return False
        self._next_patrol_s = self._now_s() + self._options.patrol_s
        found = await self._patrol.look(wanted)
        if found:
            self._next_patrol_s = float("-inf")
        return found

    def _restore(self, placed: PlacedDeployment, view: View) -> bool:
        entry = view.ledger.entry(placed.deployment_id)
        if entry is None or self._book.raise_is_open(placed.deployment_id):
            return False
        self._begin_raise(entry, placed, view, None)
        return True

    # What is known.

    def _view(self, measurement: Measurement) -> View:
        return View(
            measurement,
            book=self._book,
            raises=self._raises,
            obedience=self._obedience,
            now_s=self._now_s(),
        )

    def _expire(self) -> None:
        if self._book.expire(self._now_s()):
            self.changed()

    def _now_s(self) -> float:
        return asyncio.get_running_loop().time()
