"""The reclaim planner: the least grade at which a demand fits, and within it the least harm.

Pure: a ledger and a demand in, a plan or the reasons for having none out. What may be done to whom,
and what it harms, is in `_options`; the search for the best set of actions is in `_search`.
"""

from __future__ import annotations

from collections.abc import Iterable

import msgspec
from msgspec import Struct

from controlplane.vram._displace import displaced, hindrance
from controlplane.vram._ledger import GIB, Ledger, LedgerEntry
from controlplane.vram._options import GRADES, Option, options_of
from controlplane.vram._search import Item, cheapest, most_freed_bytes
from rung.errors import InvalidRequestError, NotAllowedError, PinnedDeploymentError, UnknownDeploymentError
from rung.types import (
    Infeasible,
    Priority,
    ReclaimAction,
    ReclaimGrade,
    ReclaimPlan,
    ReclaimStep,
    Residency,
    ResidencyClass,
)


class Demand(Struct, frozen=True, kw_only=True):
    """A wish for memory of a pool.

    Attributes:
        vram_bytes: how much; beside the pool's reserve and what was promised to others.
        max_grade: the most that others may be disturbed.
        priority: order among demands; it decides who is planned for next, not how.
        exclude: deployments that must not be touched, such as the one that the memory is for.
        displaces: deployments that may not be up beside the one that the memory is for.
        holder: one line for a person about who asks.
    """

    vram_bytes: int
    max_grade: ReclaimGrade = ReclaimGrade.FULL
    priority: Priority = Priority.AGENT
    exclude: tuple[str, ...] = ()
    displaces: tuple[str, ...] = ()
    holder: str = ""


#: Deployments in the order of their ids, and what may be done to each.
_Options = list[tuple[LedgerEntry, list[Option]]]


def disturbs_less(outcome: ReclaimPlan | Infeasible, other: ReclaimPlan | Infeasible) -> bool:
    """Whether both are plans, and the first is of a lesser grade, or shrinks fewer."""
    if isinstance(outcome, Infeasible) or isinstance(other, Infeasible):
        return False
    return _disturbance(outcome) < _disturbance(other)


def _disturbance(outcome: ReclaimPlan) -> tuple[int, int]:
    shrunk = sum(step.action is ReclaimAction.SHRINK for step in outcome.steps)
    return GRADES.index(outcome.grade), shrunk


def plan(ledger: Ledger, demand: Demand) -> ReclaimPlan | Infeasible:
    """The plan of the least grade and, within it, of the least harm; or why there is none.

    Exact: no other set of permitted actions at that grade covers the demand with less harm. Of equally
    harmful ones it is the one with the fewest steps, then the shortest (drains count), then the one that
    leaves alone the deployments that come first by id. Equal ledgers give equal plans.

    Whoever the demand displaces is stopped in any case, as the last steps; among those plans it is exact.

    Raises:
        InvalidRequestError: the demand is for less than nothing.
    """
    if demand.vram_bytes < 0:
        raise InvalidRequestError(f"a demand of {demand.vram_bytes} bytes is not one")
    stops = displaced(ledger, demand.displaces)
    hindered = hindrance(stops, demand.exclude, demand.max_grade)
    if hindered is not None:
        return hindered
    need_bytes = demand.vram_bytes - ledger.available_bytes - sum(stop.freed_bytes for _, stop in stops)
    if need_bytes <= 0 and not stops:
        return ReclaimPlan(grade=ReclaimGrade.QUICK, expected_free_bytes=ledger.free_bytes)
    untouched = {*demand.exclude, *demand.displaces}
    entries = sorted(
        (entry for entry in ledger.entries if entry.deployment_id not in untouched),
        key=lambda entry: entry.deployment_id,
    )
    options = [(entry, options_of(entry, unified=ledger.unified)) for entry in entries]
    for grade in GRADES[1 : GRADES.index(demand.max_grade) + 1]:
        chosen = _choose(_permitted(options, grade), need_bytes, ledger.host_budget_bytes)
        if chosen is not None:
            return _as_plan(ledger, grade, chosen, stops)
    return _infeasible(ledger, demand, options, need_bytes)


def apply(ledger: Ledger, step: ReclaimStep) -> Ledger:
    """The pool as it is expected to look after a step.

    Raises:
        UnknownDeploymentError: the step is for a deployment that the ledger does not have.
        PinnedDeploymentError: the step would do to a pinned deployment what is never done to one.
        NotAllowedError: the deployment is leased or in flux.
    """
    entry = ledger.entry(step.deployment_id)
    if entry is None:
        raise UnknownDeploymentError(f"{ledger.pool_id} has no deployment {step.deployment_id}")
    if entry.residency_class is ResidencyClass.PINNED and not (
        step.action is ReclaimAction.SHRINK and entry.shrinkable
    ):
        raise PinnedDeploymentError(f"{entry.deployment_id} is pinned: it is never told to {step.action}")
    if not entry.touchable:
        raise NotAllowedError(f"{entry.deployment_id} is leased or on its way: it is left alone")
    changed, host_delta_bytes = _changed(entry, step)
    return msgspec.structs.replace(
        ledger,
        free_bytes=min(ledger.total_bytes, ledger.free_bytes + step.expected_bytes),
        host_free_bytes=ledger.host_free_bytes + (0 if ledger.unified else host_delta_bytes),
        entries=tuple(changed if each is entry else each for each in ledger.entries),
    )


def _changed(entry: LedgerEntry, step: ReclaimStep) -> tuple[LedgerEntry, int]:
    """The entry after a step, and how much more host RAM is free."""
    left_bytes = max(0, entry.resident_bytes - step.expected_bytes)
    entry = msgspec.structs.replace(
        entry, resident_bytes=left_bytes, cache_bytes=min(entry.cache_bytes, left_bytes), active_requests=0
    )
    if step.action is ReclaimAction.SLEEP:
        asleep = msgspec.structs.replace(entry, residency=Residency.ASLEEP, asleep_level=step.level)
        return asleep, -entry.host_asleep_bytes if step.level == 1 else 0
    if step.action is ReclaimAction.STOP:
        stopped = msgspec.structs.replace(
            entry, residency=Residency.STOPPED, asleep_level=0, shrunk=False, cache_bytes=0
        )
        return stopped, entry.host_asleep_bytes if entry.asleep_level == 1 else 0
    if step.action is ReclaimAction.FREE:
        return msgspec.structs.replace(entry, cache_bytes=0), 0
    return msgspec.structs.replace(entry, residency=Residency.ASLEEP, shrunk=True, cache_bytes=0), 0


def _permitted(options: _Options, grade: ReclaimGrade) -> _Options:
    """The deployments to which something may be done at a grade, and what."""
    if grade is ReclaimGrade.FULL:
        return [(entry, group) for entry, group in options if group]
    permitted = [(entry, [each for each in group if each.grade is grade]) for entry, group in options]
    return [(entry, group) for entry, group in permitted if group]


def _choose(
    options: _Options, need_bytes: int, host_budget_bytes: int
) -> list[tuple[LedgerEntry, Option]] | None:
    """The least harmful options that cover the need, or None."""
    if sum(max(option.freed_bytes for option in group) for _, group in options) < need_bytes:
        return None
    choice = cheapest(
        [
            [Item(each.freed_bytes, each.host_bytes, each.harm_ms, each.duration_ms) for each in group]
            for _, group in options
        ],
        need_bytes,
        host_budget_bytes,
    )
    if choice is None:
        return None
    return [
        (entry, group[index])
        for (entry, group), index in zip(options, choice, strict=True)
        if index is not None
    ]


def _as_plan(
    ledger: Ledger,
    grade: ReclaimGrade,
    chosen: list[tuple[LedgerEntry, Option]],
    stops: list[tuple[LedgerEntry, Option]],
) -> ReclaimPlan:
    chosen.sort(
        key=lambda each: (
            each[0].busy,
            each[1].duration_ms,
            each[0].deployment_id,
        )
    )
    chosen += stops
    steps = tuple(
        ReclaimStep(
            deployment_id=entry.deployment_id,
            action=option.action,
            level=option.level,
            expected_bytes=option.freed_bytes,
            expected_s=option.duration_ms / 1000,
            drain=entry.busy,
            drain_expected_s=option.drain_ms / 1000,
        )
        for entry, option in chosen
    )
    return ReclaimPlan(
        grade=grade,
        steps=steps,
        expected_free_bytes=ledger.free_bytes + sum(step.expected_bytes for step in steps),
        expected_s=sum(option.duration_ms for _, option in chosen) / 1000,
        harm_s=sum(option.harm_ms for _, option in chosen) / 1000,
    )


# What to say when it does not fit.


def _infeasible(ledger: Ledger, demand: Demand, options: _Options, need_bytes: int) -> Infeasible:
    host_budget_bytes = ledger.host_budget_bytes
    freed_bytes = _most_freed(options, demand.max_grade, host_budget_bytes)
    freed_at_full_bytes = freed_bytes
    if demand.max_grade is not ReclaimGrade.FULL:
        freed_at_full_bytes = _most_freed(options, ReclaimGrade.FULL, host_budget_bytes)
    missing_bytes = need_bytes - freed_bytes
    missing_at_full_bytes = max(0, need_bytes - freed_at_full_bytes)
    largest_bytes = max(0, demand.vram_bytes - missing_bytes)
    grantable_bytes = ledger.total_bytes - ledger.reserve_bytes
    if demand.vram_bytes > grantable_bytes:
        detail = (
            f"{_gib(demand.vram_bytes)} can never fit on {ledger.pool_id}: it has {_gib(ledger.total_bytes)}"
            f", of which {_gib(ledger.reserve_bytes)} are kept free"
        )
    else:
        detail = (
            f"{_gib(demand.vram_bytes)} do not fit on {ledger.pool_id}: at grade {demand.max_grade} "
            f"{_gib(missing_bytes)} are missing"
        )
    return Infeasible(
        detail=detail,
        missing_bytes=missing_bytes,
        missing_at_full_bytes=missing_at_full_bytes,
        largest_fit_bytes=largest_bytes,
        remedies=(
            *_changes_of_demand(demand, largest_bytes, missing_at_full_bytes),
            *_holders(ledger, demand),
        ),
        retry_when=_retry_when(ledger, demand, options, need_bytes),
    )


def _most_freed(options: _Options, grade: ReclaimGrade, host_budget_bytes: int) -> int:
    if grade is ReclaimGrade.QUICK:
        return 0
    groups = [
        [Item(each.freed_bytes, each.host_bytes, 0, 0) for each in group]
        for _, group in _permitted(options, grade)
    ]
    return most_freed_bytes(groups, host_budget_bytes)


def _changes_of_demand(demand: Demand, largest_bytes: int, missing_at_full_bytes: int) -> Iterable[str]:
    if largest_bytes > 0:
        yield f"a demand of up to {_gib(largest_bytes)} would fit"
    if demand.max_grade is not ReclaimGrade.FULL and not missing_at_full_bytes:
        yield f"it would fit at grade {ReclaimGrade.FULL}, which also flushes caches and shrinks"


def _holders(ledger: Ledger, demand: Demand) -> Iterable[str]:
    """Who holds memory that no plan may take, the greatest first, and what the pool itself keeps."""
    held: list[tuple[int, str]] = []
    for entry in ledger.entries:
        why = _why_kept(entry, demand)
        if why and entry.resident_bytes:
            text = f"{entry.deployment_id} holds {_gib(entry.resident_bytes)}: {why}"
            held.append((entry.resident_bytes, text))
    if ledger.unattributed_bytes:
        text = f"{_gib(ledger.unattributed_bytes)} are in use by nobody that Rung runs, such as a desktop"
        held.append((ledger.unattributed_bytes, text))
    for each in ledger.reservations:
        text = f"{each.holder} was promised {_gib(each.promised_bytes)}"
        held.append((each.promised_bytes, text))
    return [text for _, text in sorted(held, key=lambda each: (-each[0], each[1]))]


def _why_kept(entry: LedgerEntry, demand: Demand) -> str:
    if entry.deployment_id in demand.exclude:
        return "the demand keeps it"
    if entry.leased:
        return "a lease is held on it"
    if not entry.touchable:
        return f"it is {entry.residency}" if entry.residency is not Residency.AWAKE else "it is in transition"
    if entry.residency_class is ResidencyClass.PINNED:
        return "it is pinned"
    return "somebody else runs it" if entry.external else ""


def _retry_when(ledger: Ledger, demand: Demand, options: _Options, need_bytes: int) -> tuple[str, ...]:
    """What has to happen by itself until the demand fits; nothing if that would not be enough."""
    events: list[str] = []
    gained_bytes = 0
    settled: _Options = []
    for entry, group in options:
        if entry.touchable or entry.residency is Residency.UNKNOWN:
            settled.append((entry, group))
            continue
        arrived = _arrived(entry)
        group = options_of(arrived, unified=ledger.unified)
        settled.append((arrived, group))
        given_bytes = entry.resident_bytes - arrived.resident_bytes
        gained_bytes += given_bytes
        if given_bytes or _permitted([(arrived, group)], demand.max_grade):
            lease = f"the lease on {entry.deployment_id} ends"
            events.append(lease if entry.leased else f"{entry.deployment_id} has settled")
    for each in ledger.reservations:
        gained_bytes += each.returned_bytes
        events.append(f"the lease of {each.holder} ends")
    if not events:
        return ()
    gained_bytes += _most_freed(settled, demand.max_grade, ledger.host_budget_bytes)
    return tuple(events) if gained_bytes >= need_bytes else ()


def _arrived(entry: LedgerEntry) -> LedgerEntry:
    """The entry once its lease has ended and its transition is over."""
    residency, resident_bytes = entry.residency, entry.resident_bytes
    if residency in (Residency.STARTING, Residency.WAKING):
        residency = Residency.AWAKE
    elif residency is Residency.FALLING_ASLEEP:
        held_bytes = entry.shrunk_bytes if entry.shrunk else entry.held_asleep_bytes
        residency, resident_bytes = Residency.ASLEEP, min(resident_bytes, held_bytes)
    elif residency is Residency.STOPPING:
        residency, resident_bytes = Residency.STOPPED, 0
    return msgspec.structs.replace(
        entry, residency=residency, resident_bytes=resident_bytes, leased=False, in_flux=False
    )


def _gib(size_bytes: int) -> str:
    return f"{size_bytes / GIB:.1f} GiB"
