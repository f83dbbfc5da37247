"""The reclaim planner: beside a brute-force oracle, and its promises one by one."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable

import msgspec
import pytest

from controlplane.vram import (
    GRADES,
    Demand,
    Infeasible,
    Ledger,
    LedgerEntry,
    ReclaimAction,
    ReclaimGrade,
    ReclaimPlan,
    ReclaimStep,
    Reservation,
    Timings,
    apply,
    plan,
)
from controlplane.vram._search import Item, cheapest, most_freed_bytes
from rung.errors import (
    InvalidRequestError,
    NotAllowedError,
    PinnedDeploymentError,
    UnknownDeploymentError,
)
from rung.types import Residency, ResidencyClass
from tests.benchmarks import planning as benchmark

GIB = 1 << 30

# The oracle. It shares nothing with the planner but the values: the rules and the harm are written out again.

#: (harm ms, steps, duration ms, choice by id)
Cost = tuple[int, int, int, tuple[int, ...]]
#: (order, action, level, freed bytes, host bytes, harm ms, duration ms)
Way = tuple[int, ReclaimAction, int, int, int, int, int]


def ways_of(entry: LedgerEntry, ledger: Ledger, grade: ReclaimGrade, demand: Demand) -> list[Way]:
    """Everything that may be done to a deployment, by the rules as a person would say them."""
    settled = entry.residency in (Residency.AWAKE, Residency.ASLEEP)
    if entry.deployment_id in demand.exclude or entry.leased or entry.in_flux or not settled:
        return []
    full, kind, times = grade is ReclaimGrade.FULL, entry.residency_class, entry.timings
    awake = entry.residency is Residency.AWAKE
    sleepable = kind is ResidencyClass.SLEEPABLE and not entry.external
    can_sleep = 2 in entry.sleep_levels or (1 in entry.sleep_levels and not ledger.unified)
    asleep_bytes = entry.resident_bytes - entry.held_asleep_bytes
    found: list[tuple[int, ReclaimAction, int, int, int, float, float]] = []
    if awake and sleepable and 1 in entry.sleep_levels and not ledger.unified:
        found.append(
            (1, ReclaimAction.SLEEP, 1, asleep_bytes, entry.host_asleep_bytes, times.wake_s, times.sleep_s)
        )
    if awake and sleepable and 2 in entry.sleep_levels:
        found.append((2, ReclaimAction.SLEEP, 2, asleep_bytes, 0, times.reload_s, times.discard_s))
    stoppable = kind is ResidencyClass.ON_DEMAND or (
        kind is ResidencyClass.SLEEPABLE and (full or (awake and not can_sleep))
    )
    if stoppable and not entry.external:
        wake_s = 0.0
        if not awake:
            wake_s = times.reload_s if entry.asleep_level == 2 else times.wake_s
            wake_s = times.grow_s if entry.shrunk else wake_s
        restore_s = max(0.0, times.start_s - wake_s)
        found.append((3, ReclaimAction.STOP, 0, entry.resident_bytes, 0, restore_s, times.stop_s))
    if awake and full and kind is not ResidencyClass.PINNED:
        found.append((4, ReclaimAction.FREE, 0, entry.cache_bytes, 0, times.refill_s, times.free_s))
    if awake and full and entry.shrinkable and not (entry.external or ledger.unified):
        freed = entry.resident_bytes - entry.shrunk_bytes
        found.append((5, ReclaimAction.SHRINK, 0, freed, entry.shrunk_bytes, times.grow_s, times.shrink_s))
    ways: list[Way] = []
    for order, action, level, freed, host, restore_s, duration_s in found:
        if entry.active_requests:
            harm = round(1000 * (restore_s + entry.drain_expected_s + 30.0))
            duration_ms = round(1000 * duration_s) + round(1000 * entry.drain_expected_s)
        else:
            harm = round(1000 * (entry.reuse_chance * 300.0 / (300.0 + entry.idle_s) * restore_s))
            duration_ms = round(1000 * duration_s)
        if kind is ResidencyClass.PINNED:
            harm += 600_000
        if freed > 0:
            ways.append((order, action, level, freed, host, harm, duration_ms))
    return ways


def best_by_force(
    ledger: Ledger, demand: Demand
) -> tuple[ReclaimGrade, int, int, int, set[tuple[str, str, int]]] | None:
    """The best plan among all there are: grade, harm, steps, duration, what is done to whom."""
    available = ledger.free_bytes - ledger.reserve_bytes - ledger.promised_bytes
    if available >= demand.vram_bytes:
        return ReclaimGrade.QUICK, 0, 0, 0, set()
    need = demand.vram_bytes - available
    host_budget = max(0, ledger.host_free_bytes - ledger.host_reserve_bytes)
    entries = sorted(ledger.entries, key=lambda entry: entry.deployment_id)
    for grade in GRADES[1 : GRADES.index(demand.max_grade) + 1]:
        ways = [[None, *ways_of(entry, ledger, grade, demand)] for entry in entries]
        best: tuple[Cost, set[tuple[str, str, int]]] | None = None
        for chosen in itertools.product(*ways):
            taken = [(entry, way) for entry, way in zip(entries, chosen, strict=True) if way]
            if sum(way[3] for _, way in taken) < need or sum(way[4] for _, way in taken) > host_budget:
                continue
            order = tuple(way[0] if way else 0 for way in chosen)
            cost = sum(way[5] for _, way in taken), len(taken), sum(way[6] for _, way in taken), order
            if best is None or cost < best[0]:
                best = cost, {(entry.deployment_id, way[1].value, way[2]) for entry, way in taken}
        if best is not None:
            (harm, steps, duration, _), done = best
            return grade, harm, steps, duration, done
    return None


# Random small ledgers. Few distinct sizes and times make ties; odd bytes make near misses.


def some_entry(rng: random.Random, name: str, *, coarse: bool) -> LedgerEntry:
    size = rng.choice([2, 4, 4, 6, 8]) * GIB if coarse else rng.randrange(GIB // 4, 12 * GIB)
    held = rng.choice([0, GIB // 2, GIB]) if coarse else rng.randrange(0, size // 2)
    residency = rng.choices(
        [Residency.AWAKE, Residency.ASLEEP, Residency.STOPPED, Residency.WAKING, Residency.UNKNOWN],
        [16, 3, 1, 1, 1],
    )[0]
    asleep = residency is Residency.ASLEEP
    resident = held if asleep else 0 if residency is Residency.STOPPED else size
    timings = Timings()
    if not coarse:
        timings = Timings(
            sleep_s=rng.uniform(0.5, 4),
            wake_s=rng.uniform(1, 10),
            reload_s=rng.uniform(3, 30),
            start_s=rng.uniform(5, 90),
            refill_s=rng.uniform(2, 20),
        )
    busy = rng.random() < 0.2
    return LedgerEntry(
        deployment_id=name,
        residency=residency,
        residency_class=rng.choices(list(ResidencyClass), [2, 6, 4, 3])[0],
        resident_bytes=resident,
        held_asleep_bytes=held,
        host_asleep_bytes=max(0, size - held),
        sleep_levels=rng.choice([(), (1,), (2,), (1, 2), (1, 2)]),
        asleep_level=rng.choice([0, 1, 2]) if asleep else 0,
        shrinkable=rng.random() < 0.3,
        shrunk_bytes=size // 2,
        shrunk=asleep and rng.random() < 0.2,
        cache_bytes=rng.choice([0, resident // 2, resident]),
        active_requests=rng.choice([1, 3]) if busy else 0,
        drain_expected_s=rng.choice([0.0, 5.0, 20.0]) if busy else 0.0,
        idle_s=0.0 if busy else rng.choice([0.0, 60.0, 600.0, 86400.0]),
        reuse_chance=rng.choice([0.0, 0.5, 1.0]) if coarse else rng.random(),
        timings=timings,
        leased=rng.random() < 0.1,
        in_flux=rng.random() < 0.05,
        external=rng.random() < 0.05,
    )


def some_case(rng: random.Random) -> tuple[Ledger, Demand]:
    coarse = rng.random() < 0.5
    count = rng.randrange(1, 6)
    names = [f"model-{index}" for index in range(count)]
    entries = [some_entry(rng, name, coarse=coarse) for name in names]
    rng.shuffle(entries)
    used = sum(entry.resident_bytes for entry in entries) + rng.choice([0, 2 * GIB])
    free = rng.choice([0, GIB, 3 * GIB + 17])
    promised = rng.choice([0, 0, GIB])
    ledger = Ledger(
        pool_id="workstation/0",
        total_bytes=used + free,
        free_bytes=free,
        reserve_bytes=rng.choice([0, GIB]),
        unified=rng.random() < 0.2,
        host_free_bytes=rng.choice([0, 4, 8, 16, 64]) * GIB,
        host_reserve_bytes=rng.choice([0, 2 * GIB]),
        entries=tuple(entries),
        reservations=(Reservation(holder="train.py", promised_bytes=promised),) if promised else (),
    )
    demand = Demand(
        vram_bytes=max(0, round((used + free) * rng.uniform(0.0, 0.9))),
        max_grade=rng.choices(GRADES, [1, 4, 8])[0],
        exclude=(rng.choice(names),) if rng.random() < 0.2 else (),
    )
    return ledger, demand


@pytest.mark.parametrize("seed", range(25))
def test_the_planner_agrees_with_brute_force_on_random_ledgers(seed: int) -> None:
    rng = random.Random(seed)
    for _ in range(120):
        ledger, demand = some_case(rng)
        found = plan(ledger, demand)
        best = best_by_force(ledger, demand)
        if isinstance(found, Infeasible):
            assert best is None, (ledger, demand)
        else:
            assert as_found(found) == best, (ledger, demand)
            check_promises(ledger, demand, found)


def as_found(found: ReclaimPlan) -> tuple[ReclaimGrade, int, int, int, set[tuple[str, str, int]]]:
    """A plan as `best_by_force` tells it."""
    done = {(step.deployment_id, step.action.value, step.level) for step in found.steps}
    return found.grade, round(1000 * found.harm_s), len(found.steps), round(1000 * found.expected_s), done


def check_promises(ledger: Ledger, demand: Demand, found: ReclaimPlan) -> None:
    """What holds for every plan, whatever the ledger."""
    after = ledger
    for step in found.steps:
        entry = after.entry(step.deployment_id)
        assert entry is not None
        assert not entry.leased
        assert not entry.in_flux
        assert entry.residency in (Residency.AWAKE, Residency.ASLEEP)
        assert step.deployment_id not in demand.exclude
        if entry.residency_class is ResidencyClass.PINNED:
            assert step.action is ReclaimAction.SHRINK
            assert entry.shrinkable
            assert found.grade is ReclaimGrade.FULL
        assert step.drain is (entry.active_requests > 0)
        if ledger.unified:
            assert step.level != 1
        after = apply(after, step)
        slept = sum(
            entry.host_asleep_bytes
            for step in found.steps
            if step.level == 1 and (entry := ledger.entry(step.deployment_id))
        )
        # While one is shrunk, its weights are in host RAM too.
        shrunk = [
            entry.shrunk_bytes
            for step in found.steps
            if step.action is ReclaimAction.SHRINK and (entry := ledger.entry(step.deployment_id))
        ]
        assert slept + max(shrunk, default=0) <= ledger.host_budget_bytes
    assert len({step.deployment_id for step in found.steps}) == len(found.steps)
    assert after.free_bytes == found.expected_free_bytes
    assert after.available_bytes >= demand.vram_bytes
    drains = [step.drain for step in found.steps]
    assert drains == sorted(drains)


@pytest.mark.parametrize("seed", range(10))
def test_what_is_said_to_fit_fits_and_nothing_more(seed: int) -> None:
    rng = random.Random(1000 + seed)
    checked = 0
    for _ in range(120):
        ledger, demand = some_case(rng)
        demand = msgspec.structs.replace(demand, vram_bytes=ledger.total_bytes * 2 + 1)
        found = plan(ledger, demand)
        assert isinstance(found, Infeasible)
        assert demand.vram_bytes - found.missing_bytes <= found.largest_fit_bytes
        if found.largest_fit_bytes:
            checked += 1
            fitting = msgspec.structs.replace(demand, vram_bytes=found.largest_fit_bytes)
            assert isinstance(plan(ledger, fitting), ReclaimPlan)
            beyond = msgspec.structs.replace(demand, vram_bytes=found.largest_fit_bytes + 1)
            assert isinstance(plan(ledger, beyond), Infeasible)
        full = msgspec.structs.replace(
            demand,
            vram_bytes=max(0, demand.vram_bytes - found.missing_at_full_bytes),
            max_grade=ReclaimGrade.FULL,
        )
        if demand.vram_bytes > found.missing_at_full_bytes:
            assert isinstance(plan(ledger, full), ReclaimPlan)
    assert checked > 50


def test_the_order_of_the_entries_does_not_matter() -> None:
    rng = random.Random(7)
    for _ in range(200):
        ledger, demand = some_case(rng)
        turned = msgspec.structs.replace(ledger, entries=tuple(reversed(ledger.entries)))
        found, again = plan(ledger, demand), plan(turned, demand)
        if isinstance(found, ReclaimPlan):
            assert found == again
        else:
            assert isinstance(again, Infeasible)


# The search by itself, where host RAM is short and there are many groups.


def cheapest_by_force(
    groups: list[list[Item]], need: int, host_budget: int
) -> tuple[int, int, int, tuple[int, ...]] | None:
    """The least (harm, steps, duration, choices) of all plans; states that are alike are kept once."""
    states: dict[tuple[int, int], tuple[int, int, int, tuple[int, ...]]] = {(0, 0): (0, 0, 0, ())}
    for group in groups:
        reached: dict[tuple[int, int], tuple[int, int, int, tuple[int, ...]]] = {}
        for (freed, host), (harm, steps, duration, choice) in states.items():
            for index, item in enumerate([None, *group]):
                if item is None:
                    key, cost = (freed, host), (harm, steps, duration, (*choice, 0))
                else:
                    key = min(need, freed + item.freed_bytes), host + item.host_bytes
                    cost = harm + item.harm, steps + 1, duration + item.duration, (*choice, index)
                if key[1] <= host_budget and (key not in reached or cost < reached[key]):
                    reached[key] = cost
        states = reached
    return min((cost for (freed, _), cost in states.items() if freed >= need), default=None)


@pytest.mark.parametrize("seed", range(6))
def test_the_search_is_exact_with_sixteen_groups_and_little_host_ram(seed: int) -> None:
    rng = random.Random(seed)
    solved = 0
    for _ in range(10):
        groups = []
        for _ in range(16):
            freed, harm = rng.randrange(1, 20), rng.randrange(0, 12)
            groups.append([Item(freed, rng.randrange(1, 20), harm, rng.randrange(3))])
            if rng.random() < 0.7:
                groups[-1].append(Item(freed, 0, harm + rng.randrange(0, 12), rng.randrange(3)))
            if rng.random() < 0.4:
                groups[-1].append(Item(freed + rng.randrange(3), 0, harm + rng.randrange(5, 30), 4))
        need, host_budget = rng.randrange(20, 150), rng.randrange(0, 60)
        best = cheapest_by_force(groups, need, host_budget)
        found = cheapest(groups, need, host_budget)
        assert (found is None) == (best is None)
        if found is not None and best is not None:
            solved += 1
            assert tuple(0 if index is None else index + 1 for index in found) == best[3]
    assert solved > 5


def sleepers_in_proportion(rng: random.Random, size: int) -> list[Item]:
    """Harm in exact proportion to size: no set of them is clearly better than another."""
    return [Item(size, size, 5 * size, 1000), Item(size, 0, 20 * size, 500)]


def sleepers_that_are_alike(rng: random.Random, size: int) -> list[Item]:
    return [Item(4, 4, 2000, 1000), Item(4, 0, 8000, 500)]


def sleepers_of_few_sizes(rng: random.Random, size: int) -> list[Item]:
    size = rng.choice([2, 4, 4, 8])
    return [Item(size, size, 500 * size, 7), Item(size, 0, 1700 * size, 5), Item(size + 1, 0, 30_000, 5)]


def sleepers_with_four_ways(rng: random.Random, size: int) -> list[Item]:
    return [
        Item(size, size, rng.randrange(10_000), 4),
        Item(size, 0, rng.randrange(30_000), 3),
        Item(size + 1, 0, rng.randrange(90_000), 2),
        Item(max(1, size // 2), size // 3, rng.randrange(20_000), 1),
    ]


def sleepers_that_need_host_ram(rng: random.Random, size: int) -> list[Item]:
    return [Item(size, size, rng.randrange(9000), rng.randrange(3))]


def a_few_bytes_at_a_high_price(rng: random.Random, size: int) -> list[Item]:
    return [
        Item(rng.choice([1, size]), rng.choice([0, 1, size]), rng.randrange(10 ** rng.randrange(1, 16)), 3)
        for _ in range(3)
    ]


@pytest.mark.parametrize(
    "family",
    [
        sleepers_in_proportion,
        sleepers_that_are_alike,
        sleepers_of_few_sizes,
        sleepers_with_four_ways,
        sleepers_that_need_host_ram,
        a_few_bytes_at_a_high_price,
    ],
    ids=lambda family: family.__name__,
)
def test_the_search_is_exact_where_the_bound_tells_little(
    family: Callable[[random.Random, int], list[Item]],
) -> None:
    rng = random.Random(11)
    solved = short = 0
    for _ in range(150):
        groups = [family(rng, rng.randrange(1, 25)) for _ in range(rng.randrange(4, 8))]
        most = sum(max(item.freed_bytes for item in group) for group in groups)
        most_host = sum(max(item.host_bytes for item in group) for group in groups)
        need, host_budget = rng.randrange(1, most), round(most_host * rng.uniform(0.0, 0.8))
        best = cheapest_by_force(groups, need, host_budget)
        found = cheapest(groups, need, host_budget)
        assert (found is None) == (best is None), (groups, need, host_budget)
        if found is not None and best is not None:
            solved += 1
            short += cheapest(groups, need, most_host) != found
            choice = tuple(0 if index is None else index + 1 for index in found)
            assert choice == best[3], (groups, need, host_budget)
    assert solved > 30
    assert short > 5  # host RAM decided


@pytest.mark.parametrize("family", benchmark.FAMILIES, ids=lambda family: family.__name__)
def test_the_planner_agrees_with_brute_force_on_the_ledgers_of_its_benchmark(
    family: Callable[[random.Random, int], tuple[Ledger, Demand]],
) -> None:
    rng = random.Random(5)
    for _ in range(40):
        ledger, demand = family(rng, 5)
        found = plan(ledger, demand)
        best = best_by_force(ledger, demand)
        if isinstance(found, Infeasible):
            assert best is None, (ledger, demand)
        else:
            assert as_found(found) == best, (ledger, demand)
            check_promises(ledger, demand, found)


@pytest.mark.parametrize("seed", range(4))
def test_the_most_that_can_be_freed_is_exact_when_host_ram_is_short(seed: int) -> None:
    rng = random.Random(seed)
    for _ in range(50):
        groups = [
            [
                Item(rng.randrange(1, 20), rng.choice([0, rng.randrange(1, 20)]), 0, 0)
                for _ in range(rng.randrange(1, 4))
            ]
            for _ in range(5)
        ]
        host_budget = rng.randrange(0, 40)
        most = max(
            sum(item.freed_bytes for item in chosen if item)
            for chosen in itertools.product(*[[None, *group] for group in groups])
            if sum(item.host_bytes for item in chosen if item) <= host_budget
        )
        assert most_freed_bytes(groups, host_budget) == most


# The reference workstation.


def workstation(**reasoner: object) -> Ledger:
    """32 GiB: a pinned orchestrator that may be shrunk, a sleepable reasoner, ComfyUI with a full cache."""
    entries = (
        LedgerEntry(
            deployment_id="comfyui",
            residency=Residency.AWAKE,
            residency_class=ResidencyClass.CACHE,
            resident_bytes=5 * GIB,
            cache_bytes=4 * GIB,
            idle_s=60.0,
        ),
        LedgerEntry(
            deployment_id="deepseek-r1-14b",
            residency=Residency.AWAKE,
            residency_class=ResidencyClass.SLEEPABLE,
            resident_bytes=9 * GIB,
            held_asleep_bytes=GIB,
            host_asleep_bytes=8 * GIB,
            sleep_levels=(1, 2),
            idle_s=120.0,
        ),
        LedgerEntry(
            deployment_id="nemotron-8b",
            residency=Residency.AWAKE,
            residency_class=ResidencyClass.PINNED,
            resident_bytes=9 * GIB,
            shrinkable=True,
            shrunk_bytes=5 * GIB,
        ),
    )
    changed = tuple(
        msgspec.structs.replace(entry, **reasoner) if entry.deployment_id == "deepseek-r1-14b" else entry
        for entry in entries
    )
    return Ledger(
        pool_id="workstation/0",
        total_bytes=32 * GIB,
        free_bytes=8 * GIB,
        reserve_bytes=2 * GIB,
        unattributed_bytes=GIB,
        host_free_bytes=64 * GIB,
        host_reserve_bytes=8 * GIB,
        entries=changed,
    )


def planned(ledger: Ledger, gibibytes: float, **fields: object) -> ReclaimPlan:
    found = plan(ledger, demand_of(gibibytes, **fields))
    assert isinstance(found, ReclaimPlan)
    return found


def refused(ledger: Ledger, gibibytes: float, **fields: object) -> Infeasible:
    found = plan(ledger, demand_of(gibibytes, **fields))
    assert isinstance(found, Infeasible)
    return found


def demand_of(gibibytes: float, **fields: object) -> Demand:
    return msgspec.structs.replace(Demand(vram_bytes=round(gibibytes * GIB)), **fields)


def test_six_gigabytes_disturb_nobody() -> None:
    found = planned(workstation(), 6)

    assert (found.grade, found.steps, found.expected_s) == (ReclaimGrade.QUICK, (), 0.0)
    assert found.expected_free_bytes == 8 * GIB


def test_twelve_gigabytes_put_the_reasoner_to_sleep() -> None:
    found = planned(workstation(), 12)

    assert found.grade is ReclaimGrade.STANDARD
    assert [(step.deployment_id, step.action, step.level) for step in found.steps] == [
        ("deepseek-r1-14b", ReclaimAction.SLEEP, 1)
    ]
    assert found.expected_free_bytes == 16 * GIB
    assert found.expected_s == 2.0


def test_twenty_gigabytes_take_the_sleep_the_flush_and_the_shrink_that_was_opted_into() -> None:
    found = planned(workstation(), 20)

    assert found.grade is ReclaimGrade.FULL
    assert {(step.deployment_id, step.action) for step in found.steps} == {
        ("deepseek-r1-14b", ReclaimAction.SLEEP),
        ("comfyui", ReclaimAction.FREE),
        ("nemotron-8b", ReclaimAction.SHRINK),
    }
    assert found.expected_s == sum(step.expected_s for step in found.steps) == 7.0


def test_the_pinned_one_is_shrunk_last_though_it_would_cost_the_least_time() -> None:
    ledger = workstation(residency=Residency.ASLEEP, resident_bytes=GIB, asleep_level=1)
    comfyui = msgspec.structs.replace(ledger.entries[0], timings=Timings(refill_s=60.0))
    ledger = msgspec.structs.replace(ledger, entries=(comfyui, *ledger.entries[1:]))

    found = planned(ledger, 9)

    assert [(step.deployment_id, step.action) for step in found.steps] == [("comfyui", ReclaimAction.FREE)]


def test_full_plans_only_what_is_needed() -> None:
    found = planned(workstation(), 18)

    assert [step.deployment_id for step in found.steps] == ["comfyui", "deepseek-r1-14b"]


def test_a_busy_engine_is_drained_first_and_comes_last() -> None:
    found = planned(workstation(active_requests=2, drain_expected_s=9.0), 18)

    last = found.steps[-1]
    assert (last.deployment_id, last.drain, last.drain_expected_s, last.expected_s) == (
        "deepseek-r1-14b",
        True,
        9.0,
        11.0,
    )
    assert found.expected_s == 13.0


def test_without_host_ram_a_sleeper_drops_its_weights() -> None:
    ledger = msgspec.structs.replace(workstation(), host_free_bytes=15 * GIB)

    assert [step.level for step in planned(ledger, 12).steps] == [2]
    just_enough = msgspec.structs.replace(ledger, host_free_bytes=16 * GIB)
    assert [step.level for step in planned(just_enough, 12).steps] == [1]


def test_on_unified_memory_weights_are_dropped_and_never_moved_to_host_ram() -> None:
    unified = msgspec.structs.replace(workstation(), unified=True)
    one_level = msgspec.structs.replace(workstation(sleep_levels=(1,)), unified=True)

    assert [step.level for step in planned(unified, 12).steps] == [2]
    stopped = planned(one_level, 12)
    assert stopped.grade is ReclaimGrade.STANDARD
    assert [step.action for step in stopped.steps] == [ReclaimAction.STOP]


def test_a_sleepable_that_can_sleep_is_stopped_only_at_full() -> None:
    ledger = workstation(held_asleep_bytes=8 * GIB)

    refused(ledger, 14, max_grade=ReclaimGrade.STANDARD)
    found = planned(ledger, 15, exclude=("comfyui", "nemotron-8b"))
    assert found.grade is ReclaimGrade.FULL
    assert [step.action for step in found.steps] == [ReclaimAction.STOP]


def test_a_long_idle_deployment_gives_way_before_one_just_used() -> None:
    fresh, stale = (
        LedgerEntry(
            deployment_id=name,
            residency=Residency.AWAKE,
            residency_class=ResidencyClass.ON_DEMAND,
            resident_bytes=4 * GIB,
            idle_s=idle_s,
        )
        for name, idle_s in (("a-fresh", 5.0), ("b-stale", 3600.0))
    )
    ledger = Ledger(pool_id="n/0", total_bytes=8 * GIB, free_bytes=0, entries=(fresh, stale))

    assert [step.deployment_id for step in planned(ledger, 4).steps] == ["b-stale"]


def test_a_pinned_deployment_is_named_as_what_holds_memory_and_never_touched() -> None:
    ledger = workstation()
    pinned = msgspec.structs.replace(ledger.entries[2], shrinkable=False)
    ledger = msgspec.structs.replace(ledger, entries=(*ledger.entries[:2], pinned))

    found = refused(ledger, 20)
    assert found.missing_bytes == found.missing_at_full_bytes
    assert found.remedies[0].startswith("a demand of up to ")
    assert "nemotron-8b holds 9.0 GiB: it is pinned" in found.remedies
    assert any(line.startswith("1.0 GiB are in use by nobody") for line in found.remedies)
    assert found.retry_when == ()


def test_a_refusal_at_standard_says_that_full_would_do() -> None:
    found = refused(workstation(), 18, max_grade=ReclaimGrade.STANDARD)

    assert (found.missing_bytes, found.missing_at_full_bytes) == (4 * GIB, 0)
    assert found.largest_fit_bytes == 14 * GIB
    assert any("would fit at grade full" in line for line in found.remedies)


def test_more_than_the_card_has_can_never_fit() -> None:
    found = refused(workstation(), 31)

    assert "can never fit" in found.detail
    assert found.retry_when == ()


@pytest.mark.parametrize(
    ("changes", "event"),
    [
        ({"leased": True}, "the lease on deepseek-r1-14b ends"),
        ({"in_flux": True}, "deepseek-r1-14b has settled"),
        ({"residency": Residency.WAKING}, "deepseek-r1-14b has settled"),
        ({"residency": Residency.STOPPING}, "deepseek-r1-14b has settled"),
        ({"residency": Residency.FALLING_ASLEEP}, "deepseek-r1-14b has settled"),
    ],
)
def test_waiting_helps_when_what_is_untouchable_now_would_be_enough(
    changes: dict[str, object], event: str
) -> None:
    ledger = workstation(**changes)

    found = refused(ledger, 14, max_grade=ReclaimGrade.STANDARD)
    assert found.retry_when == (event,)
    hopeless = refused(ledger, 25, max_grade=ReclaimGrade.STANDARD)
    assert hopeless.retry_when == ()


def test_waiting_for_a_node_that_nobody_can_see_is_not_advised() -> None:
    found = refused(workstation(residency=Residency.UNKNOWN), 14, max_grade=ReclaimGrade.STANDARD)

    assert found.retry_when == ()


@pytest.mark.parametrize("action", list(ReclaimAction))
def test_a_step_against_a_pinned_deployment_cannot_even_be_applied(action: ReclaimAction) -> None:
    ledger = workstation()
    step = ReclaimStep(deployment_id="nemotron-8b", action=action, expected_bytes=GIB, expected_s=1.0)

    if action is ReclaimAction.SHRINK:
        assert apply(ledger, step).free_bytes == ledger.free_bytes + GIB
        pinned = msgspec.structs.replace(ledger.entries[2], shrinkable=False)
        ledger = msgspec.structs.replace(ledger, entries=(pinned,))
    with pytest.raises(PinnedDeploymentError):
        apply(ledger, step)


def test_steps_against_the_leased_and_the_unknown_cannot_be_applied() -> None:
    step = ReclaimStep(
        deployment_id="deepseek-r1-14b", action=ReclaimAction.STOP, expected_bytes=GIB, expected_s=1.0
    )

    with pytest.raises(NotAllowedError):
        apply(workstation(leased=True), step)
    with pytest.raises(UnknownDeploymentError):
        apply(workstation(), msgspec.structs.replace(step, deployment_id="nobody"))


def test_a_sleeper_takes_host_ram_and_gives_it_back_when_it_is_stopped() -> None:
    asleep = workstation()
    for step in planned(asleep, 12).steps:
        asleep = apply(asleep, step)
    entry = asleep.entry("deepseek-r1-14b")
    assert entry is not None
    assert (entry.residency, entry.asleep_level, entry.resident_bytes) == (Residency.ASLEEP, 1, GIB)
    assert asleep.host_free_bytes == 56 * GIB

    (step,) = planned(asleep, 15, exclude=("comfyui", "nemotron-8b")).steps
    stopped = apply(asleep, step)
    assert (step.action, step.expected_bytes) == (ReclaimAction.STOP, GIB)
    assert stopped.host_free_bytes == 64 * GIB
    assert stopped.entry("deepseek-r1-14b") != entry


def test_a_shrunk_deployment_is_asleep_and_holds_its_weights() -> None:
    ledger = workstation()
    (step,) = (each for each in planned(ledger, 20).steps if each.action is ReclaimAction.SHRINK)

    shrunk = apply(ledger, step).entry("nemotron-8b")

    assert shrunk is not None
    assert (shrunk.residency, shrunk.shrunk, shrunk.resident_bytes) == (Residency.ASLEEP, True, 5 * GIB)
    assert shrunk.wake_expected_s == shrunk.timings.grow_s
    # There is nothing more that could be done to it, and the host RAM is free again.
    assert all(each.deployment_id != "nemotron-8b" for each in planned(apply(ledger, step), 20).steps)
    assert apply(ledger, step).host_free_bytes == ledger.host_free_bytes


def test_nothing_is_shrunk_without_host_ram_for_its_weights_or_on_unified_memory() -> None:
    ledger = workstation(residency=Residency.ASLEEP, resident_bytes=GIB, asleep_level=1)
    ledger = msgspec.structs.replace(ledger, free_bytes=16 * GIB)
    assert ReclaimAction.SHRINK in {step.action for step in planned(ledger, 20).steps}

    for changed in (
        msgspec.structs.replace(ledger, host_free_bytes=ledger.host_reserve_bytes + 5 * GIB - 1),
        msgspec.structs.replace(ledger, unified=True),
    ):
        assert refused(changed, 20).missing_at_full_bytes > 0


def test_a_demand_for_less_than_nothing_is_refused() -> None:
    with pytest.raises(InvalidRequestError):
        plan(workstation(), Demand(vram_bytes=-1))
