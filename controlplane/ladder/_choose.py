"""Which target answers, and which would be next: read from values in memory, nothing is asked.

Pure. A choice is lazy: usually the first target of a chain answers, and the others are not looked at. What
does not change from one request to the next is worked out once for a snapshot, in a `Chain`; of a thousand
targets a choice then looks at those alone that could be the first.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Container, Iterable, Iterator, Mapping, Sequence
from itertools import filterfalse
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


class Chain(Struct, frozen=True, kw_only=True):
    """A chain made ready for demands of the same capabilities and privacy; see `chain_of`.

    Attributes:
        groups: its entries, best first.
        fit: by id, candidates that can answer such a demand, in the order of their entries, and within one
            of who is nearest to answering.
        ids: of those that are fit.
        tiers: the same ids; together are those of one entry that are equally near to answering.
        tier_of: place among `tiers` by id.
    """

    groups: tuple[Group, ...]
    fit: Mapping[str, Candidate]
    ids: tuple[str, ...]
    tiers: tuple[tuple[str, ...], ...]
    tier_of: Mapping[str, int]


class Passing(Struct, frozen=True, kw_only=True):
    """What passes, read as it is at this moment: how loaded targets are, and which of them failed lately.

    Attributes:
        load: active and queued requests of a target.
        pressure: requests for each slot of a target; idle ones may be missing.
        full: targets without a free slot.
        left_alone: targets that are not tried now because they failed, all of them at once.
        allows: whether a target is to be tried now, beyond what its candidate says.
        refusal: why it is not; empty if it is.
    """

    load: Load
    pressure: Mapping[str, float]
    full: Container[str]
    left_alone: Callable[[], Collection[str]]
    allows: Callable[[str], bool]
    refusal: Callable[[str], str]


def chain_of(groups: Sequence[Group], demand: Demand) -> Chain:
    """A chain made ready for all demands with these capabilities and this privacy.

    A candidate that two entries stand for has the place of the first.
    """
    fit: dict[str, Candidate] = {}
    tiers: list[tuple[str, ...]] = []
    for group in groups:
        by_rank: dict[int, dict[str, Candidate]] = {}
        for candidate in group:
            if candidate.id not in fit and not _unfit(candidate, demand):
                by_rank.setdefault(candidate.rank, {})[candidate.id] = candidate
        for _, alike in sorted(by_rank.items()):
            fit |= alike
            tiers.append(tuple(alike))
    tier_of = {target_id: place for place, tier in enumerate(tiers) for target_id in tier}
    return Chain(groups=tuple(groups), fit=fit, ids=tuple(fit), tiers=tuple(tiers), tier_of=tier_of)


def choose(chain: Chain, demand: Demand, passing: Passing) -> Iterator[Candidate]:
    """The targets to try, best first, each of them once.

    1. Entries of the chain in their order; within one, who is nearest to answering, then who is idlest.
    2. A full target gives way to a later free one: to one of ours always, to one that costs money only
       for a `user`; agents and background work wait for what is theirs.
    3. Whoever was passed over for being full comes after, then what costs money for those who can wait.

    Args:
        chain: made ready for a demand of these capabilities and this privacy.
        demand: what is wanted.
        passing: what is read of each target when its turn comes.
    """
    done: set[str] = set()
    dearer: list[Candidate] = []
    # 1. Those with a free slot.
    for candidate in _in_order(chain, passing.full, passing):
        if candidate.id not in passing.full and _is_open(candidate, demand, passing):
            done.add(candidate.id)
            if _waits_for_ours(candidate, chain, demand, passing):
                dearer.append(candidate)
            else:
                yield candidate
    # 2. Those without.
    for candidate in _in_order(chain, done, passing):
        if candidate.id not in done and _is_open(candidate, demand, passing):
            done.add(candidate.id)
            yield candidate
    # 3. What costs money.
    yield from dearer


def explain(chain: Chain, demand: Demand, passing: Passing) -> tuple[ConsideredTarget, ...]:
    """What was thought of each target: those that would be tried, in that order, then the others."""
    chosen = {candidate.id: candidate for candidate in choose(chain, demand, passing)}
    considered = [
        ConsideredTarget(
            target=candidate.id,
            taken=place == 1,
            reason=_state(candidate, chain, demand, passing),
            expected_wait_s=0.0 if candidate.rank == 0 and candidate.id not in passing.full else None,
            place=place,
        )
        for place, candidate in enumerate(chosen.values(), 1)
    ]
    passed_over = {
        candidate.id: ConsideredTarget(
            target=candidate.id, taken=False, reason=_refusal(candidate, demand, passing)
        )
        for group in chain.groups
        for candidate in group
        if candidate.id not in chosen
    }
    return (*considered, *passed_over.values())


def refusals(chain: Chain, demand: Demand, passing: Passing) -> str:
    """Why none of the targets can answer, target by target, in one line."""
    found = {
        candidate.id: f"{candidate.id}: {_refusal(candidate, demand, passing)}"
        for group in chain.groups
        for candidate in group
    }
    return "; ".join(found.values())


def _in_order(chain: Chain, skipped: Container[str], passing: Passing) -> Iterator[Candidate]:
    """The candidates of each tier that is not skipped as a whole, idlest first.

    Those that are skipped take no step of the interpreter each.
    """
    looked_at: set[int] = set()
    ids: Iterable[str] = filterfalse(skipped.__contains__, chain.ids)
    if left_alone := passing.left_alone():
        ids = filterfalse(left_alone.__contains__, ids)
    for target_id in ids:
        place = chain.tier_of[target_id]
        if place not in looked_at:
            looked_at.add(place)
            for each in _idlest_first(chain.tiers[place], passing.pressure):
                yield chain.fit[each]


def _idlest_first(tier: Sequence[str], pressure: Mapping[str, float]) -> Iterator[str]:
    """The ids of a tier, idlest first; all are ordered only if the first was not enough."""
    try:
        best = min(tier, key=pressure.__getitem__)
    except KeyError:
        # One of them is idle.
        best = next(filterfalse(pressure.__contains__, tier))
    yield best
    if len(tier) > 1:
        yield from (each for each in sorted(tier, key=lambda each: pressure.get(each, 0.0)) if each != best)


def _is_open(candidate: Candidate, demand: Demand, passing: Passing) -> bool:
    return not _is_too_short(candidate, demand) and passing.allows(candidate.id)


def _waits_for_ours(candidate: Candidate, chain: Chain, demand: Demand, passing: Passing) -> bool:
    """Whether a free target costs money, and one before it is full for somebody who can wait."""
    if candidate.owned or demand.priority is Priority.USER:
        return False
    before = chain.ids[: chain.ids.index(candidate.id)]
    return any(
        _is_open(chain.fit[each], demand, passing) for each in filter(passing.full.__contains__, before)
    )


def _refusal(candidate: Candidate, demand: Demand, passing: Passing) -> str:
    """Why a target is not tried; empty if it is."""
    if unfit := _unfit(candidate, demand):
        return unfit
    if _is_too_short(candidate, demand):
        return (
            f"the request is about {demand.context_tokens:,} tokens long, and its context has "
            f"{candidate.context_tokens:,}"
        )
    return passing.refusal(candidate.id)


def _unfit(candidate: Candidate, demand: Demand) -> str:
    """Why a target is not for demands of these capabilities and this privacy; empty if it is."""
    if candidate.refusal:
        return candidate.refusal
    if demand.local_only and not candidate.owned:
        return "the request is local_only, and this is not hardware of ours"
    if not demand.capabilities <= candidate.capabilities:
        missing = ", ".join(sorted(demand.capabilities - candidate.capabilities))
        return f"it cannot do {missing}"
    return ""


def _is_too_short(candidate: Candidate, demand: Demand) -> bool:
    return 0 < candidate.context_tokens < demand.context_tokens


def _state(candidate: Candidate, chain: Chain, demand: Demand, passing: Passing) -> str:
    active, queued = passing.load(candidate.id)
    said = candidate.state
    if candidate.slots:
        said += f", {active} of {candidate.slots} slots taken, {queued} waiting"
    if candidate.usd_per_million_tokens:
        said += f", ${candidate.usd_per_million_tokens:g} per million tokens"
    if candidate.id not in passing.full and _waits_for_ours(candidate, chain, demand, passing):
        said += f"; it costs money, and {demand.priority} requests wait for what is full before it"
    return said
