"""The order in which demands for a pool are served, and who may go before whom. Pure.

1. A demand's class is its priority, and rises by one for every `ageing_s` that it has waited: whoever waits
   long enough is in the highest class, where only those who came earlier are before it.
2. Within a class the earliest comes first.
3. Demands that need the deployment which was served last may go before others of their class, so that
   neighbours who need the same model run together.
4. While a demand waits for what only time will bring, those behind it may go first.

Rules 3 and 4 are overtaking, and bounded: see `may_be_overtaken`. What leaves enough room for who is
overtaken (`leaves_room`) takes nothing from it and is not counted by rule 4.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping

import msgspec
from msgspec import Struct

from controlplane.vram._ledger import Ledger, LedgerEntry, Reservation
from controlplane.vram._plan import Demand
from rung.types import Infeasible, Priority, ReclaimPlan, Residency

#: Makes a plan for a demand; `plan` unless another policy is tried out.
Planner = Callable[[Ledger, Demand], ReclaimPlan | Infeasible]

_CLASSES = {Priority.USER: 0, Priority.AGENT: 1, Priority.BACKGROUND: 2}


class QueueRules(Struct, frozen=True, kw_only=True):
    """How patient the queue is.

    Attributes:
        ageing_s: waiting so long lifts a demand by one class.
        max_overtakes: how often a demand may be overtaken.
        overtaking_s: how long after the first time it may be overtaken again.
    """

    ageing_s: float = 30.0
    max_overtakes: int = 4
    overtaking_s: float = 20.0


class Queued(Struct, frozen=True, kw_only=True):
    """A demand's place in the queue.

    Attributes:
        sequence: order of arrival.
        group: the deployment that it needs; empty if none.
        overtaken: how often others went before it.
        overtaken_since_s: when the first of them did.
    """

    sequence: int
    priority: Priority
    arrived_s: float
    group: str = ""
    overtaken: int = 0
    overtaken_since_s: float = 0.0


def class_of(queued: Queued, now_s: float, rules: QueueRules) -> int:
    """Its class now: 0 is served first."""
    risen = int((now_s - queued.arrived_s) / rules.ageing_s)
    return max(0, _CLASSES[queued.priority] - risen)


def may_be_overtaken(queued: Queued, now_s: float, rules: QueueRules) -> bool:
    """Whether it was overtaken neither too often nor for too long."""
    if queued.overtaken >= rules.max_overtakes:
        return False
    return not queued.overtaken or now_s - queued.overtaken_since_s < rules.overtaking_s


def overtake(queued: Queued, now_s: float) -> Queued:
    """It was overtaken once more."""
    since_s = queued.overtaken_since_s if queued.overtaken else now_s
    return msgspec.structs.replace(queued, overtaken=queued.overtaken + 1, overtaken_since_s=since_s)


def by_class(waiting: Iterable[Queued], now_s: float, rules: QueueRules) -> list[Queued]:
    """Rules 1 and 2: by class, and within a class by arrival."""
    return sorted(waiting, key=lambda each: (class_of(each, now_s, rules), each.sequence))


def order(waiting: Iterable[Queued], now_s: float, rules: QueueRules, last_group: str) -> list[Queued]:
    """Rules 1 to 3: the order in which demands are looked at.

    Args:
        waiting: the demands for one pool.
        now_s: the time.
        rules: how patient the queue is.
        last_group: the deployment that was served last; empty if none was.
    """
    ordered = by_class(waiting, now_s, rules)
    if not last_group or not ordered:
        return ordered
    first_class = class_of(ordered[0], now_s, rules)
    grouped: list[Queued] = []
    passed: list[Queued] = []
    for place, each in enumerate(ordered):
        if class_of(each, now_s, rules) != first_class:
            return [*grouped, *passed, *ordered[place:]]
        if each.group == last_group and all(may_be_overtaken(one, now_s, rules) for one in passed):
            grouped.append(each)
        else:
            passed.append(each)
    return [*grouped, *passed]


def leaves_room(
    ledger: Ledger,
    demand: Demand,
    *,
    taken_bytes: int,
    reservations: Mapping[str, Reservation],
    overtakers: Collection[str],
    planner: Planner,
) -> bool:
    """Whether a demand that waits would still fit, now or later, if others kept what they have for ever.

    Args:
        ledger: the pool with all its reservations.
        demand: what waits.
        taken_bytes: what would be granted now.
        reservations: those of the ledger, by lease.
        overtakers: leases that were granted while the demand waited.
        planner: says whether it fits.
    """
    gone_bytes = taken_bytes
    kept: list[Reservation] = []
    excluded = list(demand.exclude)
    for key, each in reservations.items():
        if key in overtakers:
            gone_bytes += each.outstanding_bytes
            if each.deployment_id:
                excluded.append(each.deployment_id)
        else:
            kept.append(each)
    outcome = planner(
        msgspec.structs.replace(ledger, free_bytes=ledger.free_bytes - gone_bytes, reservations=tuple(kept)),
        msgspec.structs.replace(demand, exclude=tuple(excluded)),
    )
    return isinstance(outcome, ReclaimPlan) or bool(outcome.retry_when)


def waits_for_leases(ledger: Ledger, demand: Demand, planner: Planner) -> bool:
    """Whether a demand would not fit even if every transition were over: only leases keep it waiting.

    Raising a deployment then takes nothing from it, since what was raised can give way again.
    """
    coming_bytes: dict[str, int] = {}
    for each in ledger.reservations:
        if each.deployment_id:
            coming_bytes[each.deployment_id] = (
                coming_bytes.get(each.deployment_id, 0) + each.outstanding_bytes
            )
    settled = msgspec.structs.replace(
        ledger,
        free_bytes=ledger.free_bytes - sum(coming_bytes.values()),
        entries=tuple(_settled(each, coming_bytes.get(each.deployment_id, 0)) for each in ledger.entries),
        reservations=tuple(each for each in ledger.reservations if not each.deployment_id),
    )
    return isinstance(planner(settled, demand), Infeasible)


def _settled(entry: LedgerEntry, coming_bytes: int) -> LedgerEntry:
    """The entry once it has all that it was promised and its transition is over."""
    residency = entry.residency
    if coming_bytes or residency in (Residency.STARTING, Residency.WAKING):
        residency = Residency.AWAKE
    return msgspec.structs.replace(
        entry,
        residency=residency,
        in_flux=False,
        resident_bytes=entry.resident_bytes + coming_bytes,
    )
