"""One random schedule: demands, holders and faults drawn from a seed, and invariants looked at throughout.

`python -m tests.simulation.schedules SEED` replays one and tells what happened.
"""

from __future__ import annotations

import asyncio
import itertools
import random
import sys
from collections import Counter
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing

from controlplane.simulation import run_in_virtual_time
from controlplane.vram import (
    Demand,
    Granted,
    Lease,
    NodeScheduler,
    QueueRules,
    Raised,
    ReclaimGrade,
    SchedulerEvent,
    SchedulerOptions,
)
from rung.errors import RungError, UnknownLeaseError
from rung.types import Priority, Residency, ResidencyClass
from tests.fakes.simulated_pool import GIB, BrokenInvariantError, Fault, SimulatedEngine, SimulatedPool
from tests.fakes.swapping_pool import SwappingPool

#: More faults than that are for good.
LASTING = 3
OPTIONS = SchedulerOptions(
    queue=QueueRules(ageing_s=15.0, max_overtakes=3, overtaking_s=15.0),
    heartbeat_s=1.9,
    measurement_wait_s=6.0,
    margin_s=5.0,
    backoff_s=20.0,
    settle_s=1.0,
)
#: Nobody waits longer for an outcome, whatever happens: the slowest faults are over by then.
LONGEST_WAIT_S = 150.0
#: Those who wait hear something at least so often.
LONGEST_SILENCE_S = OPTIONS.heartbeat_s + 0.1
#: No lease of a schedule lasts longer than this without a renewal.
LONGEST_TTL_S = 6.0
#: So long at most a pinned deployment stays shrunk once all leases have ended, whatever failed.
LONGEST_SHRUNK_S = 150.0

#: Makes the scheduler under test; tests of the tests give a spoilt one.
Maker = Callable[[SimulatedPool, Callable[[], str]], NodeScheduler]
#: What is told about a schedule: time, what happened.
Teller = Callable[[float, str], None]


def make_scheduler(pool: SimulatedPool, new_lease_id: Callable[[], str]) -> NodeScheduler:
    """The real one."""
    return NodeScheduler(
        pools=pool,
        executor=pool,
        new_lease_id=new_lease_id,
        alert=lambda alert: None,
        options=OPTIONS,
    )


class Schedule:
    """What happens, drawn from a seed."""

    def __init__(self, seed: int, make: Maker = make_scheduler, tell: Teller | None = None) -> None:
        self._rng = random.Random(seed)
        self._tell = tell
        self.pool = self._some_pool()
        ids = itertools.count(1)
        self.scheduler = make(self.pool, lambda: f"lease-{next(ids)}")
        self.pool.check = self._check
        self._pinned = self.pool.engines["pinned"]
        self._may_die = bool(self._pinned.faults)
        #: What deployments have taken of leases.
        self._taken_bytes: dict[str, int] = {}
        self.outcomes: Counter[str] = Counter()
        self.longest_wait_s = 0.0

    async def run(self) -> None:
        """Live through it.

        Raises:
            BrokenInvariantError: an invariant does not hold.
        """
        rng = self._rng
        runner = asyncio.create_task(self.scheduler.run())
        around = [asyncio.create_task(self._outsider())]
        if rng.random() < 0.25:
            around.append(asyncio.create_task(self._late_telemetry()))
        demands = rng.randint(3, 6)
        async with asyncio.TaskGroup() as clients:
            for number in range(demands):
                clients.create_task(self._client(number))
        await asyncio.sleep(LONGEST_TTL_S)
        if runner.done():
            await runner
        if self.scheduler.leases:
            self.pool.break_(f"leases that never end: {self.scheduler.leases}")
        await self._grown()
        told = sum(self.outcomes.values())
        if told != demands:
            self.pool.break_(f"{demands} demands, {told} outcomes")
        tasks = [runner, *around, *self.pool.ongoing]
        for task in tasks:
            task.cancel()
        for ended in await asyncio.gather(*tasks, return_exceptions=True):
            if isinstance(ended, Exception):
                raise ended
        if self.pool.broken:
            raise BrokenInvariantError(self.pool.broken[0])

    async def _grown(self) -> None:
        """Wait until the pinned deployment is as it should be, which it must be some time."""
        if any(len(each.faults) > LASTING for each in self.pool.engines.values()):
            # Nobody can make room for it where others never give way again.
            return
        until_s = asyncio.get_running_loop().time() + LONGEST_SHRUNK_S
        while self._pinned.shrunk:
            if asyncio.get_running_loop().time() > until_s:
                self.pool.break_("the pinned deployment was left shrunk")
            await asyncio.sleep(1.0)

    # The world.

    def _some_pool(self) -> SimulatedPool:
        rng = self._rng
        kinds = [ResidencyClass.SLEEPABLE] * rng.randint(1, 3) + [ResidencyClass.ON_DEMAND] * rng.randint(
            0, 1
        )
        engines = [self._some_pinned()]
        engines.append(SimulatedEngine("cache", ResidencyClass.CACHE, GIB))
        left_bytes = 28 * GIB - engines[0].awake_bytes - GIB
        for number, kind in enumerate(kinds):
            size_bytes = rng.randrange(3 * GIB, 14 * GIB)
            residency = rng.choice([Residency.AWAKE, Residency.AWAKE, Residency.ASLEEP, Residency.STOPPED])
            if kind is ResidencyClass.ON_DEMAND and residency is Residency.ASLEEP:
                residency = Residency.STOPPED
            if residency is Residency.AWAKE and size_bytes > left_bytes:
                residency = Residency.STOPPED
            faults: tuple[Fault, ...] = ()
            if rng.random() < 0.4:
                faults = tuple(rng.choice(list(Fault)) for _ in range(rng.randint(1, 3)))
                if rng.random() < 0.2:  # and never gets better
                    faults = faults[:1] * 100
            engine = SimulatedEngine(
                f"model-{number}",
                kind,
                size_bytes,
                residency=residency,
                held_asleep_bytes=GIB // 2 if kind is ResidencyClass.SLEEPABLE else 0,
                warm=kind is ResidencyClass.SLEEPABLE and rng.random() < 0.3,
                idle_timeout_s=rng.choice([None, 5.0, 20.0]),
                faults=faults,
            )
            left_bytes -= engine.resident_bytes
            engines.append(engine)
        if left_bytes > GIB and rng.random() < 0.5:
            cached_bytes = rng.randrange(GIB // 2, left_bytes)
            engines[1].cache_bytes = cached_bytes
            engines[1].resident_bytes += cached_bytes
        latency_s, keep_s = rng.choice([0.0, 0.05, 0.3]), rng.choice([0.0, 0.0, 0.7, 1.7])
        return SwappingPool(engines, self._some_slots(engines[2:]), latency_s=latency_s, keep_s=keep_s)

    def _some_slots(self, models: list[SimulatedEngine]) -> dict[str, str]:
        """Now and then two models take turns; then at most one of them is up at the beginning."""
        if len(models) < 2 or self._rng.random() < 0.6:
            return {}
        first, second = models[:2]
        if first.residency is not Residency.STOPPED and second.residency is not Residency.STOPPED:
            second.residency, second.resident_bytes = Residency.STOPPED, 0
        return {first.name: "slot", second.name: "slot"}

    def _some_pinned(self) -> SimulatedEngine:
        """It opted in to being shrunk, or did not; the first things that are done to it may go wrong."""
        rng = self._rng
        size_bytes = rng.randint(4, 8) * GIB
        if rng.random() < 0.5:
            return SimulatedEngine("pinned", ResidencyClass.PINNED, size_bytes)
        faults = [rng.choice(list(Fault)) for _ in range(rng.randint(1, 3))] if rng.random() < 0.4 else []
        return SimulatedEngine(
            "pinned", ResidencyClass.PINNED, size_bytes, shrunk_bytes=size_bytes // 3, faults=faults
        )

    async def _outsider(self) -> None:
        """A desktop, whose use stays within the reserve."""
        base_bytes = self.pool.unattributed_bytes
        while True:
            await asyncio.sleep(self._rng.uniform(2.0, 10.0))
            self.pool.unattributed_bytes = base_bytes + self._rng.randrange(self.pool.reserve_bytes)
            self.pool.changed()

    async def _late_telemetry(self) -> None:
        now_s = asyncio.get_running_loop().time()
        await asyncio.sleep(self._rng.uniform(0.0, 15.0))
        length_s = self._rng.uniform(1.0, 12.0)
        if self._rng.random() < 0.5:
            self.pool.late_until_s = now_s + length_s
        else:
            self.pool.silent = True
            await asyncio.sleep(length_s)
            self.pool.silent = False

    # The clients.

    async def _client(self, number: int) -> None:
        rng = self._rng
        await asyncio.sleep(rng.uniform(0.0, 15.0))
        priority = rng.choice(list(Priority))
        if rng.random() < 0.35:
            models = [name for name in self.pool.engines if name != "cache"]
            await self._chat(rng.choice(models), priority)
            return
        deployment_id = "cache" if rng.random() < 0.35 else ""
        demand = Demand(
            vram_bytes=rng.randrange(GIB // 2, 34 * GIB if rng.random() < 0.05 else 20 * GIB),
            priority=priority,
            max_grade=rng.choice(
                [ReclaimGrade.QUICK, *[ReclaimGrade.STANDARD] * 2, *[ReclaimGrade.FULL] * 5]
            ),
            holder=f"client {number}",
        )
        events = self.scheduler.acquire(
            self.pool.pool_id,
            demand,
            ttl_s=rng.uniform(2.0, LONGEST_TTL_S),
            operation_id=f"operation-{number}",
            deployment_id=deployment_id,
        )
        granted = await self._outcome(f"client {number}", events)
        if isinstance(granted, Granted):
            await self._hold(granted.lease)

    async def _outcome(
        self, who: str, events: AsyncGenerator[SchedulerEvent, None]
    ) -> Granted | Raised | None:
        """Wait for the outcome, or lose patience; what was got, if anything."""
        loop, rng = asyncio.get_running_loop(), self._rng
        began_s = heard_s = loop.time()
        patience_s = rng.uniform(0.0, 10.0) if rng.random() < 0.15 else float("inf")
        try:
            async with aclosing(events):
                async for event in events:
                    now_s = loop.time()
                    if now_s - heard_s > LONGEST_SILENCE_S:
                        self.pool.break_(f"{who} heard nothing for {now_s - heard_s:.1f} s")
                    heard_s = now_s
                    self._say(f"{who}: {event}")
                    if isinstance(event, (Granted, Raised)):
                        self._check()
                        self.outcomes[type(event).__name__] += 1
                        return event
                    if now_s - began_s > LONGEST_WAIT_S:
                        self.pool.break_(f"{who} has waited for {now_s - began_s:.0f} s: {event}")
                    if now_s - began_s > patience_s:
                        self.outcomes["left"] += 1
                        return None
        except RungError as error:
            self._say(f"{who}: {error.reason} {error.message}")
            self.outcomes[error.reason] += 1
            return None
        finally:
            self.longest_wait_s = max(self.longest_wait_s, loop.time() - began_s)
        return self.pool.break_(f"{who} got no outcome")

    async def _chat(self, deployment_id: str, priority: Priority) -> None:
        """Have a deployment raised, and use it."""
        events = self.scheduler.raise_deployment(deployment_id, priority=priority)
        raised = await self._outcome(f"chat with {deployment_id}", events)
        engine = self.pool.engines[deployment_id]
        if raised is None or engine.residency is not Residency.AWAKE:
            return
        engine.active += 1
        await asyncio.sleep(self._rng.uniform(0.5, 8.0))
        engine.active = max(0, engine.active - 1)
        engine.used_s = asyncio.get_running_loop().time()

    async def _hold(self, lease: Lease) -> None:
        """Take the memory of a lease bit by bit, renew it, and end as holders do."""
        rng, loop = self._rng, asyncio.get_running_loop()
        vanishes = rng.random() < 0.25
        ends_s = loop.time() + rng.uniform(0.0, 10.0)
        parts = rng.randint(1, 4)
        part_bytes = lease.demand.vram_bytes // parts
        while loop.time() < ends_s:
            if parts:
                parts -= 1
                self._take(lease, part_bytes)
            await asyncio.sleep(rng.uniform(lease.ttl_s / 8, lease.ttl_s / 2))
            try:
                lease = self.scheduler.renew(lease.id)
            except UnknownLeaseError:
                self.pool.break_(f"{lease.id} ended under its holder")
        if vanishes:
            self._say(f"{lease.id}: its holder is gone")
            await asyncio.sleep(rng.choice([0.0, 3.0, 15.0]))
            self.pool.give_back(lease.id)
            return
        if rng.random() < 0.5:
            self.pool.give_back(lease.id)
        self.scheduler.release(lease.id)
        self._say(f"{lease.id}: released")
        await asyncio.sleep(rng.uniform(0.0, 2.0))
        self.pool.give_back(lease.id)

    def _take(self, lease: Lease, more_bytes: int) -> None:
        if not lease.deployment_id:
            self.pool.take(lease.id, more_bytes)
            return
        engine = self.pool.engines[lease.deployment_id]
        engine.resident_bytes += more_bytes
        engine.cache_bytes += more_bytes
        self._taken_bytes[lease.id] = self._taken_bytes.get(lease.id, 0) + more_bytes
        self.pool.changed()

    # The invariants.

    def _check(self) -> None:
        """No byte is promised twice, and the pinned deployment is as it was, or shrunk if it opted in."""
        pool, pinned = self.pool, self._pinned
        as_it_was = (pinned.residency, pinned.resident_bytes) == (Residency.AWAKE, pinned.awake_bytes)
        # That it dies of being shrunk, or of growing, is its own doing; who needs it then starts it again.
        fell = self._may_die and pinned.residency in (Residency.FAILED, Residency.STARTING)
        if not (as_it_was or pinned.shrunk or fell):
            pool.break_(f"the pinned deployment was disturbed: it is {pinned.residency}")
        promised_bytes = sum(each.coming_bytes for each in pool.engines.values())
        for lease in self.scheduler.leases:
            taken = self._taken_bytes if lease.deployment_id else pool.held_bytes
            promised_bytes += lease.demand.vram_bytes - taken.get(lease.id, 0)
        if promised_bytes > pool.free_bytes:
            pool.break_(
                f"over-commitment: {pool.free_bytes / GIB:.2f} GiB are free, and {promised_bytes / GIB:.2f} "
                "GiB of promises may still be taken"
            )

    def _say(self, what: str) -> None:
        if self._tell is not None:
            self._tell(asyncio.get_running_loop().time(), what)


def play(seed: int, make: Maker = make_scheduler, tell: Teller | None = None) -> Schedule:
    """Live through the schedule of a seed.

    Raises:
        Exception: an invariant does not hold, or the scheduler broke.
    """

    async def run() -> Schedule:
        schedule = Schedule(seed, make, tell)
        await schedule.run()
        return schedule

    return run_in_virtual_time(run())


if __name__ == "__main__":
    print(play(int(sys.argv[1]), tell=lambda now_s, what: print(f"{now_s - 1000:8.3f} {what}")).outcomes)
