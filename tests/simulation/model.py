"""A node and its scheduler beside a reference that is too simple to be wrong: who asked, who holds what.

The world is steered from outside, step by step (`World` has one method for each thing that may happen), and
after every step, and every second that passes, the scheduler must agree with the reference.
"""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import dataclass

from controlplane.vram import (
    Demand,
    Granted,
    Infeasible,
    Lease,
    Raised,
    ReclaimGrade,
    SchedulerEvent,
)
from rung.errors import RungError
from rung.types import Priority, Residency, ResidencyClass
from tests.fakes.simulated_pool import GIB, BrokenInvariantError, Fault, SimulatedEngine
from tests.fakes.swapping_pool import SwappingPool
from tests.simulation.schedules import LONGEST_SHRUNK_S, LONGEST_SILENCE_S, OPTIONS, make_scheduler

#: Who has waited for so long is in the highest class, and nobody passes it any more.
AGED_S = 2 * OPTIONS.queue.ageing_s + OPTIONS.queue.overtaking_s
#: The slowest step that the scheduler may be busy with, while somebody's memory is free.
LONGEST_STEP_S = 60.0
#: Once everybody has let go and nothing fails any more, all who wait have their outcome after so long.
LONGEST_END_S = 200.0
_SETTLED = (Residency.AWAKE, Residency.ASLEEP)


@dataclass
class Wish:
    """Somebody who asked, and has been told its outcome if that is not empty."""

    operation_id: str
    #: 0 if a deployment is to be raised.
    vram_bytes: int
    deployment_id: str
    since_s: float
    demand: Demand | None = None
    ttl_s: float = 0.0
    heard_s: float = 0.0
    #: Since when it could have been granted at once; None if it could not.
    fits_since_s: float | None = None
    outcome: str = ""
    lease_id: str = ""
    task: asyncio.Task[None] | None = None


@dataclass
class Held:
    """A lease as the reference has it."""

    wish: Wish
    expires_s: float
    taken_bytes: int = 0

    @property
    def outstanding_bytes(self) -> int:
        return self.wish.vram_bytes - self.taken_bytes


@dataclass(frozen=True)
class Shape:
    """What the node is like.

    Attributes:
        sizes_gib: of the models that sleep; the last of three or more is `on_demand`.
        pinned_gib: of the pinned one.
        shrinkable: whether the pinned one opted in to that.
        slot: whether the first two models take turns.
        fresh: telemetry is of this moment, so that a game may take whatever nobody was promised. Where it
            lags, only as much is taken by surprise as is kept in reserve.
    """

    sizes_gib: tuple[int, ...]
    pinned_gib: int
    shrinkable: bool
    slot: bool
    fresh: bool


class World:
    """The node, those who use it, and what the reference knows of them."""

    def __init__(self, shape: Shape) -> None:
        self.fresh = shape.fresh
        self.pinned = SimulatedEngine(
            "pinned",
            ResidencyClass.PINNED,
            shape.pinned_gib * GIB,
            shrunk_bytes=shape.pinned_gib * GIB // 3 if shape.shrinkable else None,
        )
        self.cache = SimulatedEngine("cache", ResidencyClass.CACHE, GIB)
        self.models = _models(shape)
        names = [each.name for each in self.models[:2]]
        self.pool = SwappingPool(
            [self.pinned, self.cache, *self.models],
            dict.fromkeys(names, "slot") if shape.slot else {},
            latency_s=0.0 if shape.fresh else 0.3,
            keep_s=0.0 if shape.fresh else 0.7,
        )
        self._desktop_bytes = self.pool.unattributed_bytes
        ids = itertools.count(1)
        self.scheduler = make_scheduler(self.pool, lambda: f"lease-{next(ids)}")
        self.pool.check = self._check_promises
        self.wishes: list[Wish] = []
        self.held: dict[str, Held] = {}
        #: How the pinned deployment may be beside awake and shrunk, through no fault of the scheduler's.
        self._pinned_may_be: set[Residency] = set()
        self._runner = asyncio.create_task(self.scheduler.run())

    # What may happen.

    async def asks(
        self, vram_bytes: int, priority: Priority, max_grade: ReclaimGrade, ttl_s: float, deployment_id: str
    ) -> None:
        """Somebody asks for memory."""
        wish = Wish(
            f"operation-{len(self.wishes)}",
            vram_bytes,
            deployment_id,
            _now_s(),
            Demand(vram_bytes=vram_bytes, priority=priority, max_grade=max_grade),
            ttl_s,
        )
        self._listens(wish, self._acquire(wish))

    async def needs(self, deployment_id: str, priority: Priority) -> None:
        """Somebody waits for a deployment."""
        wish = Wish(f"chat-{len(self.wishes)}", 0, deployment_id, _now_s())
        self._listens(wish, self.scheduler.raise_deployment(deployment_id, priority=priority))

    async def leaves(self, wish: Wish) -> None:
        """It loses patience."""
        assert wish.task is not None
        wish.task.cancel()
        await asyncio.wait([wish.task])
        wish.outcome = wish.outcome or "left"

    async def asks_again(self, lease_id: str) -> None:
        """The answer was lost: who repeats its question is told the same lease."""
        wish = self.held[lease_id].wish
        async with aclosing(self._acquire(wish)) as events:
            async for event in events:
                if not (isinstance(event, Granted) and event.lease.id == lease_id):
                    self.pool.break_(f"{wish.operation_id} has {lease_id}, and was told {event}")

    async def takes(self, lease_id: str, share: float) -> None:
        """A holder takes some of what it was promised."""
        held = self.held[lease_id]
        more_bytes = int(held.outstanding_bytes * share)
        held.taken_bytes += more_bytes
        if held.wish.deployment_id:
            self.cache.resident_bytes += more_bytes
            self.cache.cache_bytes += more_bytes
            self.pool.changed()
        else:
            self.pool.take(lease_id, more_bytes)

    async def renews(self, lease_id: str) -> None:
        """A holder says that it is still there."""
        self.scheduler.renew(lease_id)
        held = self.held[lease_id]
        held.expires_s = _now_s() + held.wish.ttl_s

    async def stays(self, lease_id: str, times: int) -> None:
        """A holder renews its lease again and again, just before it ends."""
        ttl_s = self.held[lease_id].wish.ttl_s
        for _ in range(times):
            await self.renews(lease_id)
            await self.passes(0.9 * ttl_s)

    async def releases(self, lease_id: str, *, prompt: bool = True) -> None:
        """A holder ends; its program gives its memory back, unless that takes it a while."""
        self.scheduler.release(lease_id)
        del self.held[lease_id]
        if prompt:
            self.pool.give_back(lease_id)

    async def programs_end(self) -> None:
        """Programs whose leases have ended give back what they still have."""
        for lease_id in set(self.pool.held_bytes) - set(self.held):
            self.pool.give_back(lease_id)

    async def passes(self, seconds: float) -> None:
        """Time passes."""
        ends_s = _now_s() + seconds
        while _now_s() < ends_s:
            await asyncio.sleep(min(1.0, ends_s - _now_s()))
            await self.check()

    async def goes_wrong(self, name: str, fault: Fault) -> None:
        """The next thing that an engine is told goes wrong."""
        self.pool.engines[name].faults.append(fault)
        if name == "pinned":
            self._pinned_may_be |= {Residency.FAILED, Residency.STARTING}

    async def dies(self, name: str) -> None:
        """An engine dies by itself."""
        self._falls(name, Residency.FAILED)

    async def is_forced_down(self, name: str) -> None:
        """An operator stops an engine by force, whoever uses it and whatever its class."""
        self._falls(name, Residency.STOPPED)

    async def is_used(self, name: str, requests: int) -> None:
        """An engine that is awake has so many requests."""
        engine = self.pool.engines[name]
        if engine.residency is Residency.AWAKE:
            engine.active, engine.used_s = requests, _now_s()
            self.scheduler.changed()

    async def telemetry_stops(self, seconds: float, *, stale: bool) -> None:
        """Telemetry stands still, or there is none for a while."""
        if stale:
            self.pool.late_until_s = _now_s() + seconds
        else:
            self.pool.silent = True
            await self.passes(seconds)
            self.pool.silent = False

    async def plays(self, share: float) -> None:
        """A game, or nobody any more, takes a share of what it may."""
        self.pool.unattributed_bytes = self._desktop_bytes
        room_bytes = self.pool.reserve_bytes
        if self.fresh:
            room_bytes = max(0, self.pool.free_bytes - self._promised_bytes())
        self.pool.unattributed_bytes += int(min(room_bytes, 24 * GIB) * share)
        self.pool.changed()
        self.scheduler.changed()

    async def ends(self) -> None:
        """Everybody lets go and nothing fails any more: all who wait have their outcome, all is as it was."""
        self.pool.late_until_s, self.pool.silent = 0.0, False
        self.pool.unattributed_bytes = self._desktop_bytes
        for engine in self.pool.engines.values():
            engine.faults.clear()
            engine.active = 0
        for lease_id in tuple(self.held):
            await self.releases(lease_id)
        await self.programs_end()
        limit_s = _now_s() + LONGEST_END_S
        while waiting := [each for each in self.wishes if not each.outcome]:
            if _now_s() > limit_s:
                self.pool.break_(f"nothing stands in their way, and they wait: {waiting}")
            await self.passes(1.0)
            for lease_id in tuple(self.held):
                await self.releases(lease_id)
        limit_s = _now_s() + LONGEST_SHRUNK_S
        while self.pinned.shrunk:
            if _now_s() > limit_s:
                self.pool.break_("the pinned deployment was left shrunk")
            await self.passes(1.0)

    async def close(self) -> None:
        """Let the scheduler go, and everything with it."""
        tasks = [self._runner, *self.pool.ongoing, *[each.task for each in self.wishes if each.task]]
        for task in tasks:
            task.cancel()
        for ended in await asyncio.gather(*tasks, return_exceptions=True):
            if isinstance(ended, Exception):
                raise ended
        if self.pool.broken:
            raise BrokenInvariantError(self.pool.broken[0])

    # What can be done now.

    def waiting(self) -> list[Wish]:
        """Those who wait."""
        return [each for each in self.wishes if not each.outcome]

    def settled(self) -> list[str]:
        """Engines that something may happen to from outside."""
        return [each.name for each in (self.pinned, *self.models) if each.residency in _SETTLED]

    # What must hold.

    async def check(self) -> None:
        """The scheduler agrees with the reference.

        Raises:
            BrokenInvariantError: it does not.
        """
        for _ in range(20):  # whatever is due at this moment happens
            await asyncio.sleep(0)
        if self._runner.done():
            await self._runner
        if self.pool.broken:
            raise BrokenInvariantError(self.pool.broken[0])
        self._check_leases()
        self._check_promises()
        self._check_wishes()
        if self.fresh and _now_s() >= self.pool.late_until_s:
            await self._check_what_is_available()

    def _check_leases(self) -> None:
        """Every lease lasts exactly until it is released, or was not renewed for its TTL."""
        self.held = {key: each for key, each in self.held.items() if each.expires_s > _now_s()}
        there = {lease.id for lease in self.scheduler.leases}
        if there != set(self.held):
            self.pool.break_(f"leases are {sorted(there)}, and should be {sorted(self.held)}")

    def _check_promises(self) -> None:
        """No byte is promised twice, and the pinned deployment is as it was, or shrunk if it opted in."""
        pinned = self.pinned
        if (pinned.residency, pinned.resident_bytes) == (Residency.AWAKE, pinned.awake_bytes):
            if not pinned.faults:
                self._pinned_may_be.clear()
        elif not pinned.shrunk and pinned.residency not in self._pinned_may_be:
            self.pool.break_(f"the pinned deployment was disturbed: it is {pinned.residency}")
        promised_bytes = self._promised_bytes()
        if promised_bytes > self.pool.free_bytes:
            self.pool.break_(
                f"over-commitment: {self.pool.free_bytes / GIB:.2f} GiB are free, and "
                f"{promised_bytes / GIB:.2f} GiB of promises may still be taken"
            )

    def _check_wishes(self) -> None:
        """Nobody is forgotten, and the one who has waited longest is served once its memory is there."""
        now_s, waiting = _now_s(), self.waiting()
        for wish in waiting:
            if now_s - wish.heard_s > LONGEST_SILENCE_S:
                self.pool.break_(f"{wish.operation_id} has heard nothing for {now_s - wish.heard_s:.1f} s")
            seen = self.fresh and now_s >= self.pool.late_until_s and not self.pool.silent
            if seen and wish.vram_bytes and wish.vram_bytes <= self._available_bytes():
                wish.fits_since_s = now_s if wish.fits_since_s is None else wish.fits_since_s
            else:
                wish.fits_since_s = None
        oldest = min(waiting, key=lambda each: each.since_s, default=None)
        if oldest is None or oldest.fits_since_s is None or now_s - oldest.since_s < AGED_S:
            return
        if now_s - oldest.fits_since_s > LONGEST_STEP_S:
            self.pool.break_(f"{oldest.operation_id} has waited longest, fits, and is not served")

    async def _check_what_is_available(self) -> None:
        """To the byte: what is free and in nobody's hands can be had, and no more."""
        available_bytes = self._available_bytes()
        if await self._can_have(max(0, available_bytes) + 1):
            self.pool.break_(f"more than the {available_bytes} bytes that are available can be had")
        # What a lease's deployment has grown by, and when it gives that back, cannot be told from its total.
        certain_bytes = available_bytes - sum(
            each.wish.vram_bytes for each in self.held.values() if each.wish.deployment_id
        )
        if certain_bytes > 0 and not await self._can_have(certain_bytes):
            self.pool.break_(f"{certain_bytes} bytes are available, and cannot be had")

    async def _can_have(self, vram_bytes: int) -> bool:
        demand = Demand(vram_bytes=vram_bytes, max_grade=ReclaimGrade.QUICK)
        return not isinstance(await self.scheduler.preview(self.pool.pool_id, demand), Infeasible)

    def _available_bytes(self) -> int:
        return self.pool.free_bytes - self.pool.reserve_bytes - self._promised_bytes()

    def _promised_bytes(self) -> int:
        """What may still be taken by those to whom it was promised."""
        promised_bytes = sum(each.coming_bytes for each in self.pool.engines.values())
        for lease in self.scheduler.leases:
            held = self.held.get(lease.id)
            promised_bytes += lease.demand.vram_bytes if held is None else held.outstanding_bytes
        return promised_bytes

    # Who listens.

    def _acquire(self, wish: Wish) -> AsyncGenerator[SchedulerEvent, None]:
        assert wish.demand is not None
        return self.scheduler.acquire(
            self.pool.pool_id,
            wish.demand,
            ttl_s=wish.ttl_s,
            operation_id=wish.operation_id,
            deployment_id=wish.deployment_id,
        )

    def _listens(self, wish: Wish, events: AsyncGenerator[SchedulerEvent, None]) -> None:
        wish.heard_s = _now_s()
        self.wishes.append(wish)
        wish.task = asyncio.create_task(self._hears(wish, events))

    async def _hears(self, wish: Wish, events: AsyncGenerator[SchedulerEvent, None]) -> None:
        try:
            async with aclosing(events):
                async for event in events:
                    wish.heard_s = _now_s()
                    if isinstance(event, Granted):
                        self._is_granted(wish, event.lease)
                    elif isinstance(event, Raised):
                        wish.outcome = "raised"
                        awake = self.pool.engines[wish.deployment_id].residency is Residency.AWAKE
                        if self.fresh and not awake:
                            self.pool.break_(f"{wish.deployment_id} is said to be awake, and is not")
        except RungError as error:
            wish.outcome = error.reason
        if not wish.outcome:
            self.pool.break_(f"{wish.operation_id} got no outcome")

    def _is_granted(self, wish: Wish, lease: Lease) -> None:
        wish.outcome, wish.lease_id = "granted", lease.id
        if lease.id in self.held:
            self.pool.break_(f"{lease.id} was granted twice")
        self.held[lease.id] = Held(wish, lease.granted_s + wish.ttl_s)

    def _falls(self, name: str, residency: Residency) -> None:
        engine = self.pool.engines[name]
        if name == "pinned":
            self._pinned_may_be |= {residency, Residency.STARTING}
        engine.residency = residency
        engine.resident_bytes = engine.cache_bytes = engine.active = engine.asleep_level = 0
        engine.shrunk = False
        self.pool.changed()
        self.scheduler.changed()


def _models(shape: Shape) -> Sequence[SimulatedEngine]:
    """The models; as many are awake as fit."""
    left_bytes = 28 * GIB - shape.pinned_gib * GIB - GIB
    models: list[SimulatedEngine] = []
    for number, size_gib in enumerate(shape.sizes_gib):
        on_demand = number >= 2 and number == len(shape.sizes_gib) - 1
        awake = size_gib * GIB <= left_bytes and not (shape.slot and number == 1)
        left_bytes -= size_gib * GIB if awake else 0
        models.append(
            SimulatedEngine(
                f"model-{number}",
                ResidencyClass.ON_DEMAND if on_demand else ResidencyClass.SLEEPABLE,
                size_gib * GIB,
                residency=Residency.AWAKE if awake else Residency.STOPPED,
                held_asleep_bytes=0 if on_demand else GIB // 2,
                warm=number == 0,
                idle_timeout_s=20.0 if on_demand else None,
            )
        )
    return models


def _now_s() -> float:
    return asyncio.get_running_loop().time()
