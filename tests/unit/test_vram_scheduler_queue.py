"""Who is served next: classes, ageing, neighbours, and the bounds of overtaking."""

from __future__ import annotations

import random

import msgspec
import pytest

from controlplane.vram import Demand, Ledger, LedgerEntry, QueueRules, Reservation, plan
from controlplane.vram._queue import (
    Queued,
    by_class,
    class_of,
    leaves_room,
    may_be_overtaken,
    order,
    overtake,
    waits_for_leases,
)
from rung.types import Priority, Residency, ResidencyClass

GIB = 1 << 30
RULES = QueueRules(ageing_s=30.0, max_overtakes=2, overtaking_s=20.0)
USER, AGENT, BACKGROUND = Priority.USER, Priority.AGENT, Priority.BACKGROUND


def queued(
    sequence: int, priority: Priority = USER, *, arrived_s: float = 0.0, group: str = "", overtaken: int = 0
) -> Queued:
    return Queued(sequence=sequence, priority=priority, arrived_s=arrived_s, group=group, overtaken=overtaken)


def sequences(ordered: list[Queued]) -> list[int]:
    return [each.sequence for each in ordered]


def test_users_go_before_agents_and_those_before_background_work() -> None:
    waiting = [queued(1, BACKGROUND), queued(2, AGENT), queued(3, USER), queued(4, AGENT)]

    assert sequences(order(waiting, 0.0, RULES, "")) == [3, 2, 4, 1]


@pytest.mark.parametrize(
    ("waited_s", "expected"), [(0.0, 2), (29.9, 2), (30.0, 1), (59.9, 1), (60.0, 0), (900.0, 0)]
)
def test_a_demand_rises_by_one_class_for_each_interval_that_it_waits(waited_s: float, expected: int) -> None:
    assert class_of(queued(1, BACKGROUND, arrived_s=10.0), 10.0 + waited_s, RULES) == expected


def test_background_work_that_has_waited_long_enough_goes_before_every_user_who_comes_later() -> None:
    old = queued(1, BACKGROUND, arrived_s=0.0)
    users = [queued(number, USER, arrived_s=60.0) for number in range(2, 20)]

    assert by_class([*users, old], 60.0, RULES)[0] is old


def test_neighbours_who_need_what_was_served_last_go_first() -> None:
    waiting = [queued(1, group="a"), queued(2, group="b"), queued(3, group="a"), queued(4, group="b")]

    assert sequences(order(waiting, 0.0, RULES, "b")) == [2, 4, 1, 3]


def test_neighbours_do_not_go_before_a_higher_class() -> None:
    waiting = [queued(1, USER, group="a"), queued(2, AGENT, group="b"), queued(3, AGENT, group="a")]

    assert sequences(order(waiting, 0.0, RULES, "b")) == [1, 2, 3]


def test_neighbours_do_not_go_before_who_was_overtaken_often_enough() -> None:
    waiting = [queued(1, group="a", overtaken=2), queued(2, group="b")]

    assert sequences(order(waiting, 0.0, RULES, "b")) == [1, 2]


def test_neighbours_do_not_go_before_anybody_on_the_way_who_was_overtaken_often_enough() -> None:
    waiting = [queued(1, group="a"), queued(2, group="c", overtaken=2), queued(3, group="b")]

    assert sequences(order(waiting, 0.0, RULES, "b")) == [1, 2, 3]


def test_a_demand_may_be_overtaken_so_often_and_for_so_long() -> None:
    once = overtake(queued(1), 100.0)
    twice = overtake(once, 110.0)

    assert may_be_overtaken(queued(1), 1e6, RULES)
    assert may_be_overtaken(once, 119.9, RULES)
    assert not may_be_overtaken(once, 120.0, RULES)
    assert not may_be_overtaken(twice, 110.0, RULES)
    assert twice.overtaken_since_s == 100.0


@pytest.mark.parametrize("seed", range(50))
def test_an_order_has_everybody_once_and_lets_nobody_pass_a_higher_class(seed: int) -> None:
    rng = random.Random(seed)
    waiting = [
        queued(
            number,
            rng.choice(list(Priority)),
            arrived_s=rng.uniform(0.0, 100.0),
            group=rng.choice(["", "a", "b"]),
            overtaken=rng.randint(0, 2),
        )
        for number in range(12)
    ]
    ordered = order(waiting, 100.0, RULES, "a")

    assert sorted(sequences(ordered)) == list(range(12))
    classes = [class_of(each, 100.0, RULES) for each in ordered]
    assert classes == sorted(classes)


# Room for who is overtaken: 32 GiB, 12 free, a lease of 16 held by somebody.


def held(**changes: object) -> Ledger:
    ledger = Ledger(
        pool_id="workstation/0",
        total_bytes=32 * GIB,
        free_bytes=28 * GIB,
        reservations=(Reservation(holder="training", promised_bytes=16 * GIB),),
    )
    return msgspec.structs.replace(ledger, **changes)


def room_for(waiting_bytes: int, *, taken_bytes: int, overtakers: dict[str, int] | None = None) -> bool:
    reservations = {"training": Reservation(holder="training", promised_bytes=16 * GIB)}
    for name, size_bytes in (overtakers or {}).items():
        reservations[name] = Reservation(holder=name, promised_bytes=size_bytes)
    return leaves_room(
        held(reservations=tuple(reservations.values())),
        Demand(vram_bytes=waiting_bytes),
        taken_bytes=taken_bytes,
        reservations=reservations,
        overtakers=set(overtakers or ()),
        planner=plan,
    )


def test_what_leaves_room_once_the_lease_has_ended_takes_nothing_from_who_waits() -> None:
    assert room_for(20 * GIB, taken_bytes=8 * GIB)
    assert not room_for(20 * GIB, taken_bytes=9 * GIB)


def test_what_was_granted_to_overtakers_before_counts_as_gone_for_ever() -> None:
    assert room_for(20 * GIB, taken_bytes=2 * GIB, overtakers={"small": 6 * GIB})
    assert not room_for(20 * GIB, taken_bytes=3 * GIB, overtakers={"small": 6 * GIB})


def test_a_demand_that_only_leases_keep_waiting_does_not_mind_a_raise() -> None:
    assert waits_for_leases(held(), Demand(vram_bytes=20 * GIB), plan)


def test_a_demand_that_waits_for_a_transition_does_mind_one() -> None:
    rising = LedgerEntry(
        deployment_id="model",
        residency=Residency.WAKING,
        residency_class=ResidencyClass.SLEEPABLE,
        resident_bytes=2 * GIB,
        sleep_levels=(2,),
        in_flux=True,
    )
    ledger = held(
        entries=(rising,),
        free_bytes=30 * GIB,
        reservations=(
            Reservation(holder="model", promised_bytes=16 * GIB, taken_bytes=2 * GIB, deployment_id="model"),
        ),
    )

    assert not waits_for_leases(ledger, Demand(vram_bytes=20 * GIB), plan)
