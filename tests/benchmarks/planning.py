"""How long the reclaim planner takes at its worst size: 16 deployments on one pool.

Every ledger is planned once, cold, and its demand needs a search. The families:

- mixed: classes, sizes, idle times and engines as on a busy machine;
- equal: 16 deployments that are alike to the byte;
- equal-sizes: the same size, different harm;
- subset-sum: harm in proportion to size, so that only the sum's last bytes decide;
- full: FULL is needed, with two or three ways to free each deployment;
- tight-host: all can sleep at both levels, and there is host RAM for half of it;
- worst: the same with harm in proportion to size, where neither merging nor the bound helps;
- infeasible: the demand is greater than what can be freed.

    python -m tests.benchmarks.planning [--count N] [--seed N]
"""

from __future__ import annotations

import argparse
import gc
import random
import time
from collections.abc import Callable

from controlplane.vram import (
    Demand,
    Ledger,
    LedgerEntry,
    ReclaimGrade,
    Timings,
    plan,
)
from rung.types import Residency, ResidencyClass

GIB = 1 << 30
COUNT = 16
Case = tuple[Ledger, Demand]


def entry(index: int, kind: ResidencyClass, size: int, **fields: object) -> LedgerEntry:
    """An awake deployment of a size."""
    held = min(size // 2, GIB)
    values: dict[str, object] = {
        "deployment_id": f"model-{index:02}",
        "residency": Residency.AWAKE,
        "residency_class": kind,
        "resident_bytes": size,
        "held_asleep_bytes": held,
        "host_asleep_bytes": size - held,
        "sleep_levels": (1, 2),
        "cache_bytes": size // 2 if kind is ResidencyClass.CACHE else 0,
        **fields,
    }
    return LedgerEntry(**values)  # type: ignore[arg-type]


def pool(
    entries: list[LedgerEntry],
    share: float,
    *,
    host: int = 1 << 50,
    max_grade: ReclaimGrade = ReclaimGrade.FULL,
) -> Case:
    """A pool without anything free, and a demand for a share of what the entries hold."""
    used = sum(each.resident_bytes for each in entries)
    ledger = Ledger(
        pool_id="node/0", total_bytes=used, free_bytes=0, host_free_bytes=host, entries=tuple(entries)
    )
    return ledger, Demand(vram_bytes=round(used * share), max_grade=max_grade)


def timings(rng: random.Random) -> Timings:
    """Times of a model of some size."""
    return Timings(
        sleep_s=rng.uniform(0.5, 4),
        wake_s=rng.uniform(1, 10),
        reload_s=rng.uniform(3, 30),
        start_s=rng.uniform(15, 90),
        refill_s=rng.uniform(2, 20),
    )


def mixed(rng: random.Random, count: int = COUNT) -> Case:
    """A busy machine."""
    kinds = rng.choices(list(ResidencyClass), [2, 6, 5, 3], k=count)
    entries = [
        entry(
            index,
            kind,
            rng.randrange(GIB // 4, 16 * GIB),
            timings=timings(rng),
            idle_s=rng.expovariate(1 / 900),
            reuse_chance=rng.random(),
            active_requests=int(rng.random() < 0.2),
            drain_expected_s=rng.uniform(0, 20),
            shrinkable=rng.random() < 0.2,
            shrunk_bytes=GIB // 8,
        )
        for index, kind in enumerate(kinds)
    ]
    host = sum(each.host_asleep_bytes for each in entries)
    return pool(entries, rng.uniform(0.05, 0.6), host=round(host * rng.uniform(0.3, 2)))


def equal(rng: random.Random, count: int = COUNT) -> Case:
    """All alike."""
    entries = [entry(index, ResidencyClass.SLEEPABLE, 4 * GIB) for index in range(count)]
    return pool(entries, rng.uniform(0.1, 0.9), max_grade=rng.choice(list(ReclaimGrade)[1:]))


def equal_sizes(rng: random.Random, count: int = COUNT) -> Case:
    """The same size, different harm."""
    return pool(
        [
            entry(index, ResidencyClass.ON_DEMAND, 4 * GIB, timings=timings(rng), idle_s=rng.uniform(0, 3600))
            for index in range(count)
        ],
        rng.uniform(0.1, 0.9),
    )


def subset_sum(rng: random.Random, count: int = COUNT) -> Case:
    """Harm in proportion to size."""
    entries = []
    for index in range(count):
        size = rng.randrange(GIB, 16 * GIB)
        times = Timings(start_s=size / (200 << 20), stop_s=1.0)
        entries.append(entry(index, ResidencyClass.ON_DEMAND, size, timings=times, reuse_chance=1.0))
    return pool(entries, rng.uniform(0.2, 0.8))


def full(rng: random.Random, count: int = COUNT) -> Case:
    """Sleeping alone does not reach: sleeps, stops, flushes and shrinks compete."""
    entries = [
        entry(
            index,
            ResidencyClass.SLEEPABLE,
            rng.randrange(GIB, 16 * GIB),
            held_asleep_bytes=4 * GIB // 5,
            timings=timings(rng),
            idle_s=rng.uniform(0, 3600),
            shrinkable=index % 3 == 0,
            shrunk_bytes=GIB // 2,
        )
        for index in range(count)
    ]
    case, _ = pool(entries, 1.0)
    asleep = sum(each.resident_bytes - each.held_asleep_bytes for each in entries)
    return case, Demand(vram_bytes=asleep + rng.randrange(1, 6 * GIB))


def tight_host(rng: random.Random, count: int = COUNT) -> Case:
    """Host RAM decides who keeps the weights."""
    entries = [
        entry(
            index,
            ResidencyClass.SLEEPABLE,
            rng.randrange(2 * GIB, 16 * GIB),
            timings=timings(rng),
            idle_s=rng.uniform(0, 3600),
        )
        for index in range(count)
    ]
    share = rng.uniform(0.2, 0.7)
    host = sum(each.host_asleep_bytes for each in entries)
    return pool(entries, share, host=round(host * share / 2))


def worst(rng: random.Random, count: int = COUNT) -> Case:
    """Little host RAM, and nothing to tell one set of sleepers from another but its last bytes."""
    entries = []
    for index in range(count):
        size = rng.randrange(2 * GIB, 16 * GIB)
        times = Timings(wake_s=size / (2 << 30), reload_s=size / (500 << 20))
        entries.append(entry(index, ResidencyClass.SLEEPABLE, size, timings=times, reuse_chance=1.0))
    share = rng.uniform(0.2, 0.7)
    host = sum(each.host_asleep_bytes for each in entries)
    return pool(entries, share, host=round(host * share / 2))


def infeasible(rng: random.Random, count: int = COUNT) -> Case:
    """More than there is."""
    case, _ = mixed(rng, count)
    return case, Demand(vram_bytes=case.total_bytes, max_grade=rng.choice(list(ReclaimGrade)[1:]))


FAMILIES: tuple[Callable[..., Case], ...] = (
    mixed,
    equal,
    equal_sizes,
    subset_sum,
    full,
    tight_host,
    worst,
    infeasible,
)


def main() -> None:
    """Print the table."""
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--count", type=int, default=500, help="ledgers of each family")
    options.add_argument("--seed", type=int, default=1)
    chosen = options.parse_args()
    rng = random.Random(chosen.seed)
    everything: list[float] = []
    print(f"planning, {COUNT} deployments on a pool, {chosen.count} ledgers a family")
    print(f"{'family':<12} {'p50 µs':>8} {'p99 µs':>8} {'max µs':>8}")
    for family in FAMILIES:
        cases = [family(rng) for _ in range(chosen.count)]
        gc.collect()
        taken: list[float] = []
        for ledger, demand in cases:
            begun = time.thread_time()
            plan(ledger, demand)
            taken.append((time.thread_time() - begun) * 1e6)
        everything += taken
        report(family.__name__.replace("_", "-"), taken)
    report("all", everything)


def report(name: str, taken: list[float]) -> None:
    """One line of the table."""
    taken = sorted(taken)
    at_99 = taken[min(len(taken) - 1, len(taken) * 99 // 100)]
    print(f"{name:<12} {taken[len(taken) // 2]:8.0f} {at_99:8.0f} {taken[-1]:8.0f}")


if __name__ == "__main__":
    main()
