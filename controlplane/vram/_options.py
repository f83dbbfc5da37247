"""What may be done to a deployment to get memory back, how much that frees, and how much it harms.

The rules of the residency classes stand here, and only here:

| class | STANDARD | FULL, besides |
| --- | --- | --- |
| `pinned` | nothing | shrink, if it opted in |
| `sleepable` | sleep | stop; flush its cache; shrink, if it opted in |
| `on_demand` | stop | flush its cache; shrink, if it opted in |
| `cache` | nothing | flush its cache; shrink, if it opted in |

A sleepable whose engine has no sleep of any use on this pool (none at all, or level 1 alone on unified
memory) is stopped at STANDARD, which is all the sleep that it has. Level 1 is never planned on unified
memory, nor is a shrink, which leads through it: the weights wait in host RAM until the KV cache is gone. One
that is leased, in flux, excluded by the demand or on its way between residencies is left alone.

Harm
----
The harm of an action is the waiting, in seconds, that it is expected to cause others:

    harm_s = likelihood * restore_s                            if the deployment is idle
    harm_s = restore_s + drain_expected_s + BUSY_HARM_S        if it is busy

    likelihood = reuse_chance * RECENCY_S / (RECENCY_S + idle_s)

`restore_s` is how long it takes to undo the action (`Timings`: wake, reload, start, refill, grow); of a
sleeper that is stopped, what a start takes longer than waking. `likelihood` halves in the first RECENCY_S
seconds of idleness and goes on falling as 1/time. A busy deployment is as good as wanted, holds the demand
up until it is drained, and carries a fixed charge, so that an idle one gives way before it unless
that costs more than half a minute of waiting. To shrink a pinned one is charged PINNED_HARM_S besides: it
grows again at once, at the cost of whatever could have given way in its stead. The harm of a plan is the sum
over its steps, counted in whole thousandths of a second, so that equal means equal.
"""

from __future__ import annotations

from typing import NamedTuple

from controlplane.vram._ledger import LedgerEntry
from rung.types import ReclaimAction, ReclaimGrade, Residency, ResidencyClass

RECENCY_S = 300.0
BUSY_HARM_S = 30.0
PINNED_HARM_S = 600.0


#: Grades from the least to the greatest disturbance.
GRADES = (ReclaimGrade.QUICK, ReclaimGrade.STANDARD, ReclaimGrade.FULL)


class Option(NamedTuple):
    """One thing that may be done to one deployment.

    Attributes:
        grade: the least grade that permits it.
        level: of a sleep, 1 or 2; otherwise 0.
        freed_bytes: what the pool gets back; more than 0, except where one has to stop whatever it frees.
        host_bytes: host RAM that it takes; that of a shrink is free again afterwards.
        harm_ms: expected waiting of others, in thousandths of a second.
        duration_ms: how long it takes, the drain included.
        drain_ms: how long the drain before it takes.
    """

    grade: ReclaimGrade
    action: ReclaimAction
    level: int
    freed_bytes: int
    host_bytes: int
    harm_ms: int
    duration_ms: int
    drain_ms: int


#: An option before it is priced: grade, action, level, freed bytes, host bytes, restore and action seconds.
_Way = tuple[ReclaimGrade, ReclaimAction, int, int, int, float, float]

_STANDARD, _FULL = ReclaimGrade.STANDARD, ReclaimGrade.FULL
_SLEEP, _STOP = ReclaimAction.SLEEP, ReclaimAction.STOP


def options_of(entry: LedgerEntry, *, unified: bool) -> list[Option]:
    """Everything that may ever be done to a deployment and frees anything, in a fixed order."""
    if not entry.touchable:
        return []
    if entry.residency is Residency.AWAKE:
        ways = _of_awake(entry, unified=unified)
    elif entry.residency is Residency.ASLEEP:
        ways = _of_asleep(entry)
    else:
        return []
    return [each for each in _priced(entry, ways) if each.freed_bytes > 0]


def stop_of(entry: LedgerEntry) -> Option:
    """The stop of a deployment that is up, whatever it frees, because another takes its turn."""
    timings = entry.timings
    up_s = entry.wake_expected_s if entry.residency is Residency.ASLEEP else 0.0
    restore_s = max(0.0, timings.start_s - up_s)
    [stop] = _priced(entry, [(_STANDARD, _STOP, 0, entry.resident_bytes, 0, restore_s, timings.stop_s)])
    return stop


def _priced(entry: LedgerEntry, ways: list[_Way]) -> list[Option]:
    pinned_harm_s = PINNED_HARM_S if entry.residency_class is ResidencyClass.PINNED else 0.0
    drain_ms = 0
    likelihood = 1.0
    if entry.busy:
        drain_ms = round(1000 * entry.drain_expected_s)
        harm_s = entry.drain_expected_s + BUSY_HARM_S + pinned_harm_s
    else:
        chance = min(1.0, max(0.0, entry.reuse_chance))
        likelihood = chance * RECENCY_S / (RECENCY_S + max(0.0, entry.idle_s))
        harm_s = pinned_harm_s
    return [
        Option(
            grade,
            action,
            level,
            freed_bytes,
            host_bytes,
            round(1000 * (likelihood * restore_s + harm_s)),
            round(1000 * duration_s) + drain_ms,
            drain_ms,
        )
        for grade, action, level, freed_bytes, host_bytes, restore_s, duration_s in ways
    ]


def _of_awake(entry: LedgerEntry, *, unified: bool) -> list[_Way]:
    kind, timings, held_bytes = entry.residency_class, entry.timings, entry.resident_bytes
    ways: list[_Way] = []
    if not entry.external:
        if kind is ResidencyClass.SLEEPABLE:
            freed_bytes = held_bytes - entry.held_asleep_bytes
            level_1 = 1 in entry.sleep_levels and not unified
            level_2 = 2 in entry.sleep_levels
            if level_1:
                host_bytes = entry.host_asleep_bytes
                ways.append((_STANDARD, _SLEEP, 1, freed_bytes, host_bytes, timings.wake_s, timings.sleep_s))
            if level_2:
                ways.append((_STANDARD, _SLEEP, 2, freed_bytes, 0, timings.reload_s, timings.discard_s))
            stop_at = _FULL if level_1 or level_2 else _STANDARD
            ways.append((stop_at, _STOP, 0, held_bytes, 0, timings.start_s, timings.stop_s))
        elif kind is ResidencyClass.ON_DEMAND:
            ways.append((_STANDARD, _STOP, 0, held_bytes, 0, timings.start_s, timings.stop_s))
    if kind is not ResidencyClass.PINNED and entry.cache_bytes:
        ways.append((_FULL, ReclaimAction.FREE, 0, entry.cache_bytes, 0, timings.refill_s, timings.free_s))
    if entry.shrinkable and not (entry.external or unified):
        left_bytes = entry.shrunk_bytes
        freed_bytes = held_bytes - left_bytes
        ways.append(
            (_FULL, ReclaimAction.SHRINK, 0, freed_bytes, left_bytes, timings.grow_s, timings.shrink_s)
        )
    return ways


def _of_asleep(entry: LedgerEntry) -> list[_Way]:
    """A sleeper can only be stopped, for the bytes that it still holds."""
    if entry.external:
        return []
    if entry.residency_class is ResidencyClass.ON_DEMAND:
        grade = _STANDARD
    elif entry.residency_class is ResidencyClass.SLEEPABLE:
        grade = _FULL
    else:
        return []
    timings = entry.timings
    restore_s = max(0.0, timings.start_s - entry.wake_expected_s)
    return [(grade, _STOP, 0, entry.resident_bytes, 0, restore_s, timings.stop_s)]
