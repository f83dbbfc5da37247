"""Which target answers, and which would be next: read from values in memory, nothing is asked.

Pure. A choice is lazy: usually the first target of a chain answers, and the others are not looked at.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TypeAlias

from msgspec import Struct

from controlplane.ladder._candidate import Candidate
from rung.types import ConsideredTarget, Priority

#: One entry of a chain: the candidates that it stands for, which are alike to a caller.
Group: TypeAlias = Sequence[Candidate]
#: Active and queued requests of a target.
Load: TypeAlias = Callable[[str], tuple[int, int]]


class Demand(Struct, frozen=True, kw_only=True):
    """What a request needs of the target that answers it.

    Attributes:
        capabilities: what the target must be able to do.
        context_tokens: prompt and answer together, estimated; 0 if nobody looked.
        local_only: never leaves hardware of ours.
        priority: who is in a hurry.
    """

    capabilities: frozenset[str] = frozenset()
    context_tokens: int = 0
    local_only: bool = False
    priority: Priority = Priority.AGENT


class Passing(Struct, frozen=True, kw_only=True):
    """What passing over costs nothing to know: how loaded targets are, and which of them failed lately.

    Attributes:
        load: active and queued requests of a target.
        refusal: why a target is left alone for now, beyond what its candidate says; empty if it is not.
    """

    load: Load
    refusal: Callable[[str], str]


def choose(groups: Sequence[Group], demand: Demand, passing: Passing) -> Iterator[Candidate]:
    """The targets to try, best first.

    1. Entries of the chain in their order; within one, who is nearest to answering, then who is idlest.
    2. A busy target gives way to a later free one: to one of ours always, to one that costs money only
       for a `user`; agents and background work wait for what is theirs.
    3. Whoever was passed over for being busy comes after, then what costs money for those who can wait.
    """
    busy: list[Candidate] = []
    dearer: list[Candidate] = []
    may_spend = demand.priority is Priority.USER
    load = passing.load
    for group in groups:
        for candidate in _ordered(group, load):
            if _unfit(candidate, demand) or passing.refusal(candidate.id):
                continue
            if candidate.slots and _is_busy(candidate, load):
                busy.append(candidate)
            elif busy and not candidate.owned and not may_spend:
                dearer.append(candidate)
            else:
                yield candidate
    yield from busy
    yield from dearer


def explain(groups: Sequence[Group], demand: Demand, passing: Passing) -> tuple[ConsideredTarget, ...]:
    """What was thought of each target: those that would be tried, in that order, then the others."""
    chosen = list(choose(groups, demand, passing))
    places = {candidate.id: place for place, candidate in enumerate(chosen)}
    considered = [
        ConsideredTarget(
            target=candidate.id,
            taken=place == 0,
            reason=_state(candidate, passing.load),
            expected_wait_s=0.0 if candidate.rank == 0 and not _is_busy(candidate, passing.load) else None,
        )
        for place, candidate in enumerate(chosen)
    ]
    passed_over = {
        candidate.id: ConsideredTarget(
            target=candidate.id,
            taken=False,
            reason=_unfit(candidate, demand) or passing.refusal(candidate.id),
        )
        for group in groups
        for candidate in group
        if candidate.id not in places
    }
    return (*considered, *passed_over.values())


def refusals(groups: Sequence[Group], demand: Demand, passing: Passing) -> str:
    """Why none of the targets can answer, target by target, in one line."""
    return "; ".join(
        f"{candidate.id}: {_unfit(candidate, demand) or passing.refusal(candidate.id)}"
        for group in groups
        for candidate in group
    )


def _ordered(group: Group, load: Load) -> Iterator[Candidate]:
    """The candidates of a group, best first; all are compared only when the best one was not enough."""
    if len(group) < 2:
        yield from group
        return

    def key(candidate: Candidate) -> tuple[int, float, str]:
        active, queued = load(candidate.id)
        return candidate.rank, (active + queued) / max(1, candidate.slots), candidate.id

    best = next(
        (each for each in group if not each.refusal and each.rank == 0 and load(each.id) == (0, 0)), None
    )
    if best is not None:
        yield best
    yield from (each for each in sorted(group, key=key) if each is not best)


def _unfit(candidate: Candidate, demand: Demand) -> str:
    """Why a target is not for this request; empty if it is."""
    if candidate.refusal:
        return candidate.refusal
    if demand.local_only and not candidate.owned:
        return "the request is local_only, and this is not hardware of ours"
    if not demand.capabilities <= candidate.capabilities:
        missing = ", ".join(sorted(demand.capabilities - candidate.capabilities))
        return f"it cannot do {missing}"
    if 0 < candidate.context_tokens < demand.context_tokens:
        return (
            f"the request is about {demand.context_tokens:,} tokens long, and its context has "
            f"{candidate.context_tokens:,}"
        )
    return ""


def _is_busy(candidate: Candidate, load: Load) -> bool:
    active, queued = load(candidate.id)
    return bool(candidate.slots) and (active >= candidate.slots or queued > 0)


def _state(candidate: Candidate, load: Load) -> str:
    active, queued = load(candidate.id)
    slots = f", {active} of {candidate.slots} slots taken, {queued} waiting" if candidate.slots else ""
    price = candidate.usd_per_million_tokens
    return candidate.state + slots + (f", ${price:g} per million tokens" if price else "")
