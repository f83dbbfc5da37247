"""Deployments that take turns on one port of a node: never both up, and never none for nothing."""

from __future__ import annotations

import asyncio
import itertools
import random
from collections import Counter
from collections.abc import AsyncIterator, Callable
from contextlib import aclosing, asynccontextmanager

import pytest
from msgspec.structs import replace

from controlplane.vram import (
    Demand,
    Ledger,
    LedgerEntry,
    NodeScheduler,
    SchedulerOptions,
    Step,
    StepState,
    Swap,
    apply,
    plan,
)
from rung.errors import EngineStartFailedError, UnavailableError, VramInfeasibleError
from rung.types import (
    Infeasible,
    Priority,
    ReclaimAction,
    ReclaimGrade,
    ReclaimPlan,
    Residency,
    ResidencyClass,
)
from tests.fakes.scheduled_node import Node, everything, now_s, pinned, sleeper
from tests.fakes.simulated_pool import GIB, Fault, SimulatedEngine
from tests.fakes.swapping_pool import MemoryJournal, SwappingPool
from tests.fakes.virtual_time import in_virtual_time

STOP, SLEEP = ReclaimAction.STOP, ReclaimAction.SLEEP
SLOTS = {"deepseek": "reasoning", "gemma": "reasoning"}


# The plan.


def an_entry(name: str = "deepseek", gib: int = 12, **fields: object) -> LedgerEntry:
    entry = LedgerEntry(
        deployment_id=name,
        residency=Residency.AWAKE,
        residency_class=ResidencyClass.SLEEPABLE,
        resident_bytes=gib * GIB,
        held_asleep_bytes=GIB,
        sleep_levels=(1, 2),
        idle_s=60.0,
    )
    return replace(entry, **fields)


def a_ledger(*entries: LedgerEntry, free_gib: int) -> Ledger:
    return Ledger(
        pool_id="box/0",
        total_bytes=32 * GIB,
        free_bytes=free_gib * GIB,
        host_free_bytes=64 * GIB,
        entries=entries,
    )


def wish(gib: int, **fields: object) -> Demand:
    demand = Demand(vram_bytes=gib * GIB, exclude=("gemma",), displaces=("deepseek",), holder="gemma")
    return replace(demand, **fields)


def planned(ledger: Ledger, demand: Demand) -> list[tuple[str, ReclaimAction]]:
    outcome = plan(ledger, demand)
    assert isinstance(outcome, ReclaimPlan)
    return [(step.deployment_id, step.action) for step in outcome.steps]


def test_the_other_of_a_slot_is_stopped_and_its_bytes_count() -> None:
    ledger = a_ledger(an_entry(), an_entry("coder", 4), free_gib=4)

    outcome = plan(ledger, wish(16))

    assert isinstance(outcome, ReclaimPlan)
    assert [(step.deployment_id, step.action) for step in outcome.steps] == [("deepseek", STOP)]
    assert (outcome.grade, outcome.expected_free_bytes) == (ReclaimGrade.STANDARD, 16 * GIB)


def test_it_is_stopped_although_there_is_room_and_although_it_sleeps() -> None:
    asleep = an_entry(residency=Residency.ASLEEP, resident_bytes=0, asleep_level=1)

    assert planned(a_ledger(an_entry(), free_gib=20), wish(16)) == [("deepseek", STOP)]
    assert planned(a_ledger(asleep, free_gib=20), wish(16)) == [("deepseek", STOP)]


@pytest.mark.parametrize("residency", [Residency.STOPPED, Residency.FAILED])
def test_one_that_is_down_displaces_nobody(residency: Residency) -> None:
    assert planned(a_ledger(an_entry(residency=residency), free_gib=20), wish(16)) == []


def test_it_serves_until_there_is_room_otherwise_and_is_drained() -> None:
    ledger = a_ledger(an_entry(active_requests=2, drain_expected_s=4.0), an_entry("coder", 6), free_gib=4)

    outcome = plan(ledger, wish(20))

    assert isinstance(outcome, ReclaimPlan)
    first, last = outcome.steps
    assert (first.deployment_id, first.action) == ("coder", SLEEP)
    assert (last.deployment_id, last.drain, last.drain_expected_s) == ("deepseek", True, 4.0)


@pytest.mark.parametrize("seed", range(60))
def test_beside_the_stop_the_plan_is_the_best_for_what_is_then_left(seed: int) -> None:
    rng = random.Random(seed)
    others = [
        an_entry(
            f"model-{number}",
            rng.randrange(1, 8),
            residency_class=rng.choice([ResidencyClass.SLEEPABLE, ResidencyClass.ON_DEMAND]),
            idle_s=rng.uniform(0.0, 900.0),
            active_requests=rng.choice([0, 0, 1]),
        )
        for number in range(5)
    ]
    ledger = a_ledger(an_entry(gib=rng.randrange(1, 9)), *others, free_gib=rng.randrange(0, 4))
    demand = wish(rng.randrange(4, 30))

    outcome = plan(ledger, demand)

    if isinstance(outcome, Infeasible):
        assert isinstance(plan(_stopped(ledger), replace(demand, displaces=())), Infeasible)
        return
    *rest, stop = outcome.steps
    assert (stop.deployment_id, stop.action) == ("deepseek", STOP)
    alone = plan(_stopped(ledger), replace(demand, displaces=()))
    assert isinstance(alone, ReclaimPlan)
    assert tuple(rest) == alone.steps


def _stopped(ledger: Ledger) -> Ledger:
    outcome = plan(ledger, wish(0))
    assert isinstance(outcome, ReclaimPlan)
    return apply(ledger, outcome.steps[-1])


@pytest.mark.parametrize(
    ("entry", "demand", "why", "waits_for"),
    [
        (an_entry(leased=True), wish(1), "a lease is held", "the lease on deepseek ends"),
        (an_entry(in_flux=True), wish(1), "just come up", "deepseek has settled"),
        (an_entry(residency=Residency.STARTING), wish(1), "it is starting", "deepseek has settled"),
        (an_entry(residency=Residency.UNKNOWN), wish(1), "left alone", ""),
        (an_entry(external=True), wish(1), "left alone", ""),
        (an_entry(), wish(1, exclude=("gemma", "deepseek")), "left alone", ""),
        (an_entry(residency_class=ResidencyClass.PINNED), wish(1), "it is pinned", ""),
        (an_entry(residency_class=ResidencyClass.CACHE), wish(1), "it is cache", ""),
        (an_entry(), wish(1, max_grade=ReclaimGrade.QUICK), "at grade quick", ""),
    ],
)
def test_who_cannot_be_stopped_keeps_the_slot(
    entry: LedgerEntry, demand: Demand, why: str, waits_for: str
) -> None:
    outcome = plan(a_ledger(entry, free_gib=20), demand)

    assert isinstance(outcome, Infeasible)
    assert why in outcome.detail
    assert outcome.retry_when == ((waits_for,) if waits_for else ())


# The scheduler.


def deepseek(*faults: Fault, residency: Residency = Residency.AWAKE) -> SimulatedEngine:
    return sleeper("deepseek", 14, residency=residency, faults=faults)


def gemma(*faults: Fault, residency: Residency = Residency.STOPPED) -> SimulatedEngine:
    return sleeper("gemma", 16, residency=residency, faults=faults)


class SwapNode(Node):
    """A node whose scheduler keeps a journal, and may be killed and started again."""

    def __init__(self, pool: SwappingPool, journal: MemoryJournal) -> None:
        super().__init__(pool)
        ids = itertools.count(1)
        self.journal = journal
        self.scheduler = NodeScheduler(
            pools=pool,
            executor=pool,
            new_lease_id=lambda: f"lease-{next(ids)}",
            alert=self.alerts.append,
            options=SchedulerOptions(),
            journal=journal,
        )

    async def until(self, holds: Callable[[], bool], limit_s: float = 200.0) -> None:
        """Wait, in virtual time, until something holds."""
        ends_s = now_s() + limit_s
        while not holds():
            assert now_s() < ends_s, self.residencies()
            await asyncio.sleep(0.1)

    def residencies(self) -> tuple[Residency, Residency]:
        """Of deepseek and gemma."""
        return self.residency("deepseek"), self.residency("gemma")


@asynccontextmanager
async def swapping(
    *engines: SimulatedEngine, journal: MemoryJournal | None = None
) -> AsyncIterator[SwapNode]:
    async with scheduled(SwappingPool([pinned(), *engines], SLOTS), journal or MemoryJournal()) as node:
        yield node


@asynccontextmanager
async def scheduled(pool: SwappingPool, journal: MemoryJournal) -> AsyncIterator[SwapNode]:
    node = SwapNode(pool, journal)
    running = asyncio.create_task(node.scheduler.run())
    try:
        yield node
        assert not running.done(), running
    finally:
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)
    assert not pool.broken, pool.broken


UP, DOWN = Residency.AWAKE, Residency.STOPPED


@in_virtual_time
async def test_a_demand_for_one_stops_the_other_and_starts_it() -> None:
    async with swapping(deepseek(), gemma()) as node:
        await node.awake("gemma")
        assert node.residencies() == (DOWN, UP)
        assert node.steps() == [("deepseek", STOP, 0)]
        await node.until(lambda: not node.journal.kept)

        await node.awake("deepseek")
        assert node.residencies() == (UP, DOWN)


@in_virtual_time
async def test_one_that_sleeps_keeps_the_port_and_is_stopped_too() -> None:
    async with swapping(deepseek(residency=Residency.ASLEEP), gemma()) as node:
        await node.awake("gemma")

        assert node.residencies() == (DOWN, UP)
        assert not node.journal.kept, "nobody was awake before"


@in_virtual_time
async def test_if_the_new_one_does_not_come_up_the_old_one_does_again() -> None:
    async with swapping(deepseek(), gemma(Fault.FAILS)) as node:
        with pytest.raises(EngineStartFailedError, match="gemma did not come up; deepseek, which gave way"):
            await node.awake("gemma")
        await node.until(lambda: node.residency("deepseek") is UP)

        assert node.residencies() == (UP, Residency.FAILED)
        await node.until(lambda: not node.journal.kept)
        # It is not tried again at once, and nobody gives way for it meanwhile.
        with pytest.raises(EngineStartFailedError, match="left alone"):
            await node.awake("gemma")
        assert node.residency("deepseek") is UP


@in_virtual_time
async def test_the_old_one_comes_back_before_others_take_its_memory() -> None:
    async with swapping(deepseek(), gemma(Fault.FAILS)) as node:
        failing = asyncio.create_task(node.awake("gemma"))
        await node.until(lambda: node.residency("gemma") is Residency.STARTING)
        waiting = asyncio.create_task(node.lease(20, priority=Priority.AGENT, operation="train"))
        with pytest.raises(EngineStartFailedError):
            await failing
        await node.until(lambda: node.residency("deepseek") is UP)

        await waiting
        assert node.steps()[-1] == ("deepseek", SLEEP, 1), "it had come up, and then gave way to the lease"


@in_virtual_time
async def test_an_old_one_that_does_not_come_back_at_once_is_tried_again() -> None:
    async with swapping(deepseek(Fault.NONE, Fault.FAILS), gemma(Fault.FAILS)) as node:
        with pytest.raises(EngineStartFailedError):
            await node.awake("gemma")

        await node.until(lambda: node.residency("deepseek") is UP)
        assert node.pool.raised == ["gemma", "deepseek", "deepseek"]


@in_virtual_time
async def test_whoever_leaves_in_the_middle_of_a_swap_undoes_it() -> None:
    async with swapping(deepseek(), gemma()) as node:
        async with aclosing(node.scheduler.raise_deployment("gemma")) as events:
            async for event in events:
                if isinstance(event, Step) and event.state is StepState.BEGUN:
                    break
        await node.until(lambda: node.residency("deepseek") is UP and bool(node.pool.raised))

        assert node.pool.raised == ["deepseek"]
        assert node.residencies() == (UP, DOWN)


@in_virtual_time
async def test_an_old_one_that_does_not_stop_keeps_its_turn() -> None:
    async with swapping(deepseek(Fault.FAILS), gemma()) as node:
        with pytest.raises(VramInfeasibleError, match="deepseek has the swap slot") as refused:
            await node.awake("gemma")

        assert "answered 500" in refused.value.message
        assert node.residencies() == (UP, DOWN)
        assert node.pool.raised == []


@in_virtual_time
async def test_an_old_one_that_stops_late_comes_back() -> None:
    async with swapping(deepseek(Fault.HANGS), gemma()) as node:
        with pytest.raises(VramInfeasibleError):
            await node.awake("gemma")
        assert node.residencies() == (UP, DOWN)
        await node.until(lambda: node.residency("deepseek") is DOWN)

        await node.until(lambda: node.residency("deepseek") is UP)


@in_virtual_time
async def test_nothing_is_stopped_that_could_not_be_written_down() -> None:
    async with swapping(deepseek(), gemma()) as node:
        node.journal.full = True
        with pytest.raises(UnavailableError, match="disk is full"):
            await node.awake("gemma")

        assert node.steps() == []
        assert node.residencies() == (UP, DOWN)


@in_virtual_time
async def test_a_warm_one_waits_for_its_turn() -> None:
    warm = SimulatedEngine(
        "gemma", ResidencyClass.SLEEPABLE, 4 * GIB, residency=DOWN, held_asleep_bytes=GIB, warm=True
    )
    async with swapping(deepseek(), warm) as node:
        await asyncio.sleep(30.0)

        assert node.residencies() == (UP, DOWN)


# Death in the middle of a swap.


@in_virtual_time
async def test_after_a_death_between_stop_and_start_the_old_one_is_raised() -> None:
    journal = MemoryJournal()
    pool = SwappingPool([pinned(), deepseek(), gemma()], SLOTS)
    async with scheduled(pool, journal) as node:
        asking = asyncio.create_task(node.awake("gemma"))
        await node.until(lambda: node.residency("deepseek") is DOWN)
    await asyncio.gather(asking, return_exceptions=True)
    assert journal.kept == {"reasoning": Swap(slot="reasoning", displaced="deepseek", taker="gemma")}
    pool.engines["gemma"].residency = DOWN

    async with scheduled(pool, journal) as node:
        await node.until(lambda: node.residencies() == (UP, DOWN))
        await node.until(lambda: not journal.kept)


@in_virtual_time
async def test_after_a_death_while_the_new_one_starts_that_is_the_one() -> None:
    journal = MemoryJournal()
    journal.kept["reasoning"] = Swap(slot="reasoning", displaced="deepseek", taker="gemma")
    pool = SwappingPool([pinned(), deepseek(residency=DOWN), gemma(residency=Residency.STARTING)], SLOTS)
    async with scheduled(pool, journal) as node:
        await asyncio.sleep(30.0)
        assert node.residencies() == (DOWN, Residency.STARTING), "it is left to come up"
        pool.engines["gemma"].residency = UP
        pool.engines["gemma"].resident_bytes = 16 * GIB

        await node.until(lambda: not journal.kept)
        assert node.residencies() == (DOWN, UP)
        assert pool.raised == []


@in_virtual_time
async def test_after_a_death_a_new_one_that_then_fails_is_followed_by_the_old_one() -> None:
    journal = MemoryJournal()
    journal.kept["reasoning"] = Swap(slot="reasoning", displaced="deepseek", taker="gemma")
    pool = SwappingPool([pinned(), deepseek(residency=DOWN), gemma(residency=Residency.STARTING)], SLOTS)
    async with scheduled(pool, journal) as node:
        await asyncio.sleep(10.0)
        pool.engines["gemma"].residency = Residency.FAILED

        await node.until(lambda: node.residency("deepseek") is UP)


@in_virtual_time
async def test_after_a_death_before_the_stop_nothing_has_happened() -> None:
    journal = MemoryJournal()
    journal.kept["reasoning"] = Swap(slot="reasoning", displaced="deepseek", taker="gemma")
    async with swapping(deepseek(), gemma(), journal=journal) as node:
        await node.until(lambda: not journal.kept)

        assert node.residencies() == (UP, DOWN)
        assert node.pool.raised == []


# Fairness.


@in_virtual_time
async def test_under_alternating_load_both_get_their_turn_and_neighbours_share_it() -> None:
    """Six who ask one after the other, for one and the other in turn, for ten minutes."""
    waits_s: dict[str, list[float]] = {"deepseek": [], "gemma": []}
    async with swapping(deepseek(), gemma()) as node:
        ends_s = now_s() + 600.0

        async def ask(turn: int) -> None:
            names = itertools.cycle(["deepseek", "gemma"] if turn % 2 else ["gemma", "deepseek"])
            while now_s() < ends_s:
                name = next(names)
                began_s = now_s()
                await everything(node.scheduler.raise_deployment(name))
                engine = node.pool.engines[name]
                if engine.residency is not UP:
                    continue
                waits_s[name].append(now_s() - began_s)
                engine.active += 1
                await asyncio.sleep(1.0)
                engine.active = max(0, engine.active - 1)
                engine.used_s = now_s()

        await asyncio.gather(*[ask(turn) for turn in range(6)])
        swaps = Counter(node.pool.raised)

    served = {name: len(waits) for name, waits in waits_s.items()}
    # A turn takes about 20 s: stop, start, settle, drain. Nobody waits for more than two of them.
    assert max(waits_s["deepseek"] + waits_s["gemma"]) < 45.0
    assert min(served.values()) > 0.8 * max(served.values())
    assert abs(swaps["deepseek"] - swaps["gemma"]) <= 1
    assert sum(served.values()) > 2 * sum(swaps.values()), "several are served in a turn"
