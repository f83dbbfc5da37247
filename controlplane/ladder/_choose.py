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
        prefers_awake: one of ours that is awake and free comes before all that would be started for this.
    """

    capabilities: frozenset[str] = frozenset()
    context_tokens: int = 0
    local_only: bool = False
    priority: Priority = Priority.AGENT
    prefers_awake: bool = False


class Chain(Struct, frozen=True, kw_only=True):
    """A chain made ready for demands of the same capabilities and privacy; see `chain_of`.

    Attributes:
        groups: its entries, best first.
        fit: by id, candidates that can answer such a demand, in the order of their entries, and within one
            of who is nearest to answering.
        ids: of those that are fit.
        tiers: the same ids; together are those of one entry that are equally near to answering.
        tier_of: place among `tiers` by id.
        ready: ids of those that answer at once if they are free.
        unknown: ids of those of which nothing is known now.
    """

    groups: tuple[Group, ...]
    fit: Mapping[str, Candidate]
    ids: tuple[str, ...]
    tiers: tuple[tuple[str, ...], ...]
    tier_of: Mapping[str, int]
    ready: tuple[str, ...]
    unknown: frozenset[str]


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
    return Chain(
        groups=tuple(groups),
        fit=fit,
        ids=tuple(fit),
        tiers=tuple(tiers),
        tier_of=tier_of,
        ready=tuple(each.id for each in fit.values() if each.rank == 0),
        unknown=frozenset(each.id for each in fit.values() if not each.known),
    )


def choose(chain: Chain, demand: Demand, passing: Passing) -> Iterator[Candidate]:
    """The targets to try, best first, each of them once.

    1. Entries of the chain in their order; within one, who is nearest to answering, then who is idlest.
    2. A busy target, which is full or of which nothing is known now, gives way to a later free one that is
       ready: to one of ours always, to one that costs money only for a `user`; agents and background work
       wait for what is theirs. It gives way to none that has to be started or woken: that would only have
       another model make room, and a queue is usually shorter.
    3. Whoever was passed over for being busy comes after, and whoever is not ready and comes later in the
       chain; then what costs money for those who can wait.
    4. Before all of this, where the demand prefers what is awake: free ones of ours that are ready.

    Args:
        chain: made ready for a demand of these capabilities and this privacy.
        demand: what is wanted.
        passing: what is read of each target when its turn comes.
    """
    busy = _Busy(chain, demand, passing)
    done: set[str] = set()
    dearer: list[Candidate] = []
    # 4. Those for which nothing has to be started, where that counts more than the order of the chain.
    if demand.prefers_awake:
        for candidate in _in_order(chain, chain.ready, busy.sets, passing):
            free = candidate.owned and candidate.id not in done and candidate.id not in busy
            if free and _is_open(candidate, demand, passing):
                done.add(candidate.id)
                yield candidate
    # 1. Those that are free.
    for candidate in _free_in_order(chain, busy, passing):
        if candidate.id not in done and candidate.id not in busy and _is_open(candidate, demand, passing):
            done.add(candidate.id)
            if _can_wait(candidate, demand) and busy.is_before(candidate):
                dearer.append(candidate)
            else:
                yield candidate
    # 2. Those that are busy, or not ready and after a busy one.
    for candidate in _in_order(chain, chain.ids, (done,), passing):
        if candidate.id not in done and _is_open(candidate, demand, passing):
            done.add(candidate.id)
            if _can_wait(candidate, demand) and candidate.id not in busy:
                dearer.append(candidate)
            else:
                yield candidate
    # 3. What costs money.
    yield from dearer


def explain(chain: Chain, demand: Demand, passing: Passing) -> tuple[ConsideredTarget, ...]:
    """What was thought of each target: those that would be tried, in that order, then the others."""
    chosen = {candidate.id: candidate for candidate in choose(chain, demand, passing)}
    busy = _Busy(chain, demand, passing)
    considered = [
        ConsideredTarget(
            target=candidate.id,
            taken=place == 1,
            reason=_state(candidate, busy, demand, passing),
            expected_wait_s=None if candidate.id in busy else _wait_s(candidate),
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


class _Busy:
    """Targets that are full, and those of which nothing is known now: they may be."""

    __slots__ = ("_chain", "_demand", "_first_tier", "_passing", "sets")

    def __init__(self, chain: Chain, demand: Demand, passing: Passing) -> None:
        self._chain = chain
        self._demand = demand
        self._passing = passing
        self._first_tier: int | None = None
        #: Each of them is in one of these at least.
        self.sets: tuple[Container[str], ...] = (
            (passing.full, chain.unknown) if chain.unknown else (passing.full,)
        )

    def __contains__(self, target_id: object) -> bool:
        return any(target_id in each for each in self.sets)

    def is_before(self, candidate: Candidate) -> bool:
        """Whether one of them that could answer comes before a candidate, as it was when first asked."""
        if self._first_tier is None:
            self._first_tier = self._find()
        return self._first_tier < self._chain.tier_of[candidate.id]

    def _find(self) -> int:
        chain, passing = self._chain, self._passing
        one_kind = len(self.sets) == 1
        contained = passing.full.__contains__ if one_kind else self.__contains__
        for target_id in filter(contained, chain.ids):
            if _is_open(chain.fit[target_id], self._demand, passing):
                return chain.tier_of[target_id]
        return len(chain.tiers)


def _free_in_order(chain: Chain, busy: _Busy, passing: Passing) -> Iterator[Candidate]:
    """Those that may be free, in order; after a busy one those alone that are ready. Some come twice."""
    for candidate in _in_order(chain, chain.ids, busy.sets, passing):
        if candidate.rank and busy.is_before(candidate):
            # Nor is any later one that is not ready: of a thousand that sleep one is looked at.
            yield from _in_order(chain, chain.ready, busy.sets, passing)
            return
        yield candidate


def _in_order(
    chain: Chain, ids: Iterable[str], skipped: Iterable[Container[str]], passing: Passing
) -> Iterator[Candidate]:
    """The candidates of each tier that has one of these ids and is not skipped as a whole, idlest first.

    Those that are skipped take no step of the interpreter each.
    """
    looked_at: set[int] = set()
    for each_set in skipped:
        ids = filterfalse(each_set.__contains__, ids)
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


def _can_wait(candidate: Candidate, demand: Demand) -> bool:
    """Whether a target costs money, and the request is of somebody who waits for what does not."""
    return not candidate.owned and demand.priority is not Priority.USER


def _wait_s(candidate: Candidate) -> float | None:
    return 0.0 if candidate.rank == 0 else candidate.expected_wait_s


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


def _state(candidate: Candidate, busy: _Busy, demand: Demand, passing: Passing) -> str:
    active, queued = passing.load(candidate.id)
    said = candidate.state
    if candidate.slots:
        said += f", {active} of {candidate.slots} slots taken, {queued} waiting"
    if candidate.usd_per_million_tokens:
        said += f", ${candidate.usd_per_million_tokens:g} per million tokens"
    if candidate.id in busy or not busy.is_before(candidate):
        return said
    if _can_wait(candidate, demand):
        said += f"; it costs money, and {demand.priority} requests wait for what is busy before it"
    elif candidate.rank:
        said += "; it is not ready, and requests rather wait for what is busy before it"
    return said
