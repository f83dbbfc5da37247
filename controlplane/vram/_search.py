"""The exact search behind the planner: the cheapest way to get so much memory back.

The problem: of each group (a deployment) take at most one item (an action), so that the freed bytes cover
`need_bytes`, the host RAM taken stays within `host_budget_bytes`, and the cost is least. A knapsack
with multiple choice; with 16 groups it has up to 4^16 plans, and has to be solved in less than a
millisecond of Python.

How: the groups are split into two halves, each half is enumerated group by group, and the two lists of
states are joined by one walk along both. A half of 8 groups with one action each has at most 256
states, whatever the figures: sums that nearly hit the mark, on which branch-and-bound drowns, cost no more
than others.

Most often host RAM is plentiful, or nearly so; then the search ignores it, and a plan that fits all the
same is the optimum. A half keeps only the states that no other state beats: no more still needed and no more
cost.

Where host RAM is short it is part of the states, and hardly a state beats another. They are kept few by
the linear relaxation (`_bound`): a plan that is better than another must have gathered less reduced
cost than that one lies above the relaxation's bound. So the search looks at the plans within a small gap over
the bound first, and widens the gap until the best plan found lies within it: nothing outside can be better.
That leaves one kind of pool which takes some milliseconds: 16 sleepers, host RAM for a part of them, and
harm in exact proportion to size, so that no set of them is clearly better than another.

In the inner loops a state is one integer with its fields side by side, so that taking an item is one
addition, and sorting is sorting integers. A cost is an integer too,

    harm | steps | duration | choices

so that the order among plans is exact: least harm, then fewest steps, then the shortest, then the one
that leaves the first groups alone. The choices that made a cost are read from its last field.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Callable, Sequence
from itertools import count
from math import nextafter
from operator import itemgetter
from typing import NamedTuple

from controlplane.vram._bound import Priced, Relaxed, relax

#: Steps of reduced cost in one of harm.
_SCALE = 16
#: The first gap is the reduced cost of so many-th an alternative: few enough plans, often with the best one.
_FIRST_ALTERNATIVE = 13
#: What the gap is multiplied by while no plan lies within it, and how far beyond that a known one may lie.
_WIDER = 2.5
_LITTLE = 2.0
#: Where all alternatives together cost less than so many first gaps, there is nothing to tell them by.
_ALIKE = 10.0
#: A longer list of states is looked through for equals.
_MANY = 256

_COST = itemgetter(3)
_NOTHING: Priced = (0, 0, 0, 0)


class Item(NamedTuple):
    """One thing that may be done to a group. Integers of at least 0; `freed_bytes` more than 0."""

    freed_bytes: int
    host_bytes: int
    harm: int
    duration: int


def cheapest(
    groups: Sequence[Sequence[Item]], need_bytes: int, host_budget_bytes: int
) -> tuple[int | None, ...] | None:
    """The best choice: for each group the index of its item, or None to leave it alone.

    Best is the least (harm, steps, duration), and of equals the one that leaves the first groups alone.
    None if nothing covers the need within the host RAM.
    """
    if need_bytes <= 0:
        return (None,) * len(groups)
    costs = _Costs(groups)
    scarce: _Scarce | None = None
    if sum([host for group in groups for _, host, _, _ in group]) > host_budget_bytes:
        scarce = _Scarce.find(costs, need_bytes, host_budget_bytes)
        if scarce is None:
            return None
    if scarce is None or not scarce.relaxed.host_price:
        best = _cover([_undominated_in_pool(group) for group in costs.priced], need_bytes, costs)
        if best is None:
            return None
        choice = costs.choice(best)
        if scarce is None or _host_bytes(groups, choice) <= host_budget_bytes:
            return choice
    best = scarce.cheapest(lambda: most_freed_bytes(groups, host_budget_bytes) >= need_bytes)
    return None if best is None else costs.choice(best)


def most_freed_bytes(groups: Sequence[Sequence[Item]], host_budget_bytes: int) -> int:
    """The most that can be freed within the host RAM.

    What needs no host RAM is free to take. The rest are gains over that; leaving some of them out, to the
    least loss, until the others fit, is the search's own problem with host RAM as the need.
    """
    freed_bytes = 0
    gains: list[list[Item]] = []
    for group in groups:
        base_bytes = max((item.freed_bytes for item in group if item.host_bytes == 0), default=0)
        freed_bytes += base_bytes
        gains.append([item for item in group if item.host_bytes and item.freed_bytes > base_bytes])
        gains[-1] = [item._replace(freed_bytes=item.freed_bytes - base_bytes) for item in gains[-1]]
    gains = [group for group in gains if group]
    best_gains = [max(group, key=lambda item: item.freed_bytes) for group in gains]
    freed_bytes += sum(item.freed_bytes for item in best_gains)
    excess_bytes = sum(item.host_bytes for item in best_gains) - host_budget_bytes
    if excess_bytes <= 0:
        return freed_bytes
    losses = []
    for group, best in zip(gains, best_gains, strict=True):
        fallbacks = [(item.freed_bytes, item.host_bytes) for item in group] + [(0, 0)]
        losses.append(
            [
                Item(best.host_bytes - host_bytes, 0, best.freed_bytes - gain_bytes, 0)
                for gain_bytes, host_bytes in fallbacks
                if host_bytes < best.host_bytes
            ]
        )
    left_out = cheapest(losses, excess_bytes, 0)
    if left_out is None:  # the host budget is below 0: nothing that needs host RAM fits
        return freed_bytes - sum(item.freed_bytes for item in best_gains)
    return freed_bytes - sum(
        group[index].harm for group, index in zip(losses, left_out, strict=True) if index is not None
    )


class _Costs:
    """Costs as integers: harm, steps, duration and choices in one, which add up field by field."""

    def __init__(self, groups: Sequence[Sequence[Item]]) -> None:
        self._count = len(groups)
        self._choice_bits = max([len(group) for group in groups], default=0).bit_length()
        duration_at = self._count * self._choice_bits
        longest = sum([duration for group in groups for _, _, _, duration in group])
        steps_at = duration_at + longest.bit_length()
        #: What lies above this bit of a cost is the harm.
        self.harm_at = harm_at = steps_at + self._count.bit_length()
        most = sum([harm for group in groups for _, _, harm, _ in group])
        #: Bits that hold any sum of costs.
        self.bits = harm_at + most.bit_length() + 1
        self.priced: list[list[Priced]] = []
        for place, group in enumerate(groups, 1):
            one_choice = 1 << (self._count - place) * self._choice_bits
            marks = count((1 << steps_at) + one_choice, one_choice)
            self.priced.append(
                [
                    (freed, host, harm, (harm << harm_at) + (duration << duration_at) + mark)
                    for (freed, host, harm, duration), mark in zip(group, marks, strict=False)
                ]
            )

    def choice(self, cost: int) -> tuple[int | None, ...]:
        """The choices that add up to a cost."""
        mask = (1 << self._choice_bits) - 1
        return tuple(
            index - 1 if (index := (cost >> place * self._choice_bits) & mask) else None
            for place in range(self._count - 1, -1, -1)
        )


def _host_bytes(groups: Sequence[Sequence[Item]], choice: Sequence[int | None]) -> int:
    return sum(
        group[index].host_bytes for group, index in zip(groups, choice, strict=True) if index is not None
    )


def _undominated_in_pool(group: list[Priced]) -> list[Priced]:
    """Without items that free no more than a cheaper one; host RAM is ignored."""
    if len(group) < 2:
        return group
    kept: list[Priced] = []
    most_bytes = 0
    for item in sorted(group, key=_COST):
        if item[0] > most_bytes:
            most_bytes = item[0]
            kept.append(item)
    return kept


def _undominated(group: Sequence[Priced]) -> list[Priced]:
    """Without items that another item of the group beats in every respect."""
    kept: list[Priced] = []
    for item in sorted(group, key=_COST):
        for other in kept:
            if other[0] >= item[0] and other[1] <= item[1]:
                break
        else:
            kept.append(item)
    return kept


# Without host RAM. A state is `still needed | cost`.


def _cover(groups: Sequence[Sequence[Priced]], need_bytes: int, costs: _Costs) -> int | None:
    """The least cost that covers the need, host RAM ignored; None if nothing does."""
    bits = costs.bits
    groups = [group for group in groups if group]
    most_bytes = [max([item[0] for item in group]) for group in groups]
    spare_bytes = sum(most_bytes) - need_bytes
    if spare_bytes < 0:
        return None
    moves = [
        (most, [cost - (freed << bits) for freed, _, _, cost in group])
        for most, group in zip(most_bytes, groups, strict=True)
    ]
    middle = len(moves) // 2
    near = _states(moves[:middle], need_bytes, spare_bytes, bits)
    far = _states(moves[middle:], need_bytes, spare_bytes, bits)
    mask = (1 << bits) - 1
    best: int | None = None
    # What both halves still need may add up to the need once: each began with all of it.
    last = len(far) - 1
    for state in near:
        limit = ((need_bytes - (state >> bits)) << bits) | mask
        while last >= 0 and far[last] > limit:
            last -= 1
        if last < 0:
            break
        cost = (state & mask) + (far[last] & mask)
        if best is None or cost < best:
            best = cost
    return best


def _states(
    moves: Sequence[tuple[int, Sequence[int]]], need_bytes: int, spare_bytes: int, bits: int
) -> list[int]:
    """The Pareto states of a half: the more is still needed, the less they cost.

    Args:
        moves: by group, the most that it frees, and what its items change.
        need_bytes: what is needed.
        spare_bytes: what all groups together can free beyond that; no more may be forgone.
        bits: of a cost.
    """
    mask, one = (1 << bits) - 1, 1 << bits
    states = [need_bytes << bits]
    most_needed_bytes = need_bytes + spare_bytes
    for most_bytes, group in moves:
        most_needed_bytes -= most_bytes
        reached = states + [state + move for move in group for state in states]
        reached.sort()
        del reached[bisect_left(reached, (max(0, most_needed_bytes) + 1) << bits) :]
        kept: list[int] = []
        best = one
        covered = bisect_left(reached, one)
        if covered:  # all that need nothing more are one state: the cheapest
            best = min([state & mask for state in reached[:covered]])
            kept.append(best)
        for state in reached[covered:]:
            cost = state & mask
            if cost < best:
                best = cost
                kept.append(state)
        states = kept
    return states


# With host RAM. A state is `reduced cost | freed | host RAM | cost`.


class _Scarce:
    """The search where host RAM is short."""

    def __init__(
        self,
        groups: Sequence[Sequence[Priced]],
        relaxed: Relaxed,
        need_bytes: int,
        host_budget_bytes: int,
        costs: _Costs,
    ) -> None:
        self.relaxed = relaxed
        self._groups = [[_NOTHING, *group] for group in groups]
        self._need_bytes = need_bytes
        self._host_budget_bytes = host_budget_bytes
        self._harm_at = costs.harm_at
        self._host_at = costs.bits
        most_host_bytes = sum([host for group in groups for _, host, _, _ in group])
        self._freed_at = self._host_at + most_host_bytes.bit_length()
        most_bytes = sum([freed for group in groups for freed, _, _, _ in group])
        self._reduced_at = self._freed_at + most_bytes.bit_length()

    @classmethod
    def find(cls, costs: _Costs, need_bytes: int, host_budget_bytes: int) -> _Scarce | None:
        """The search, with its relaxation; None if nothing covers the need, host RAM or no."""
        groups = [_undominated(group) for group in costs.priced if group]
        relaxed = relax(groups, need_bytes, host_budget_bytes)
        if relaxed is None:
            return None
        return cls(groups, relaxed, need_bytes, host_budget_bytes, costs)

    def cheapest(self, works: Callable[[], bool]) -> int | None:
        """The least cost that covers the need within the host RAM; None if nothing does.

        Args:
            works: whether anything does; asked at most once, if that is not clear by itself.
        """
        alternatives = sorted([each for row in self.relaxed.reduced for each in row])
        alternatives = alternatives[len(self._groups) :]  # each group's best has none
        most = sum([max(row) for row in self.relaxed.reduced])
        gap = max(1.0, alternatives[min(_FIRST_ALTERNATIVE, len(alternatives)) - 1])
        if most < _ALIKE * gap:
            gap = most
        asked = False
        while True:
            place = bisect_right(alternatives, gap)
            following = alternatives[place] if place < len(alternatives) else most
            if sum(alternatives[:place]) <= gap < following:  # it may be wider, and no plan more is in it
                gap = following if following == most else nextafter(following, 0.0)
            best = self._best_within(gap)
            if best is not None:
                known = (best >> self._harm_at) - self.relaxed.bound
                if known <= gap or gap >= most:
                    return best
                most = min(known, most)
            elif gap >= most or not (asked or works()):
                return None
            asked = True
            gap = max(gap * _WIDER, following)
            if most < _LITTLE * gap:
                gap = most

    def _best_within(self, gap: float) -> int | None:
        """The least cost of a plan with no more reduced cost than the gap; None if there is none."""
        reduced_at, freed_at, host_at = self._reduced_at, self._freed_at, self._host_at
        limit = ((int(gap * _SCALE) + 2) << reduced_at) - 1
        start = 0
        open_groups = []
        for group, reduced in zip(self._groups, self.relaxed.reduced, strict=True):
            moves = [
                (int(more * _SCALE) << reduced_at) + (freed << freed_at) + (host << host_at) + cost
                for more, (freed, host, _, cost) in zip(reduced, group, strict=True)
                if more <= gap
            ]
            if len(moves) == 1:
                start += moves[0]
            else:
                open_groups.append(moves)
        open_groups.sort(key=len)
        near, far = [start], [0]
        for moves in open_groups:
            if len(near) < len(far):
                near = self._extend(near, moves, limit)
            else:
                far = self._extend(far, moves, limit)
        return self._join(near, far) if len(near) > len(far) else self._join(far, near)

    def _extend(self, states: Sequence[int], moves: Sequence[int], limit: int) -> list[int]:
        """The states that are reached with one group more; of equals only the cheapest, if there are many."""
        reached: list[int] = []
        for move in moves:
            most = limit - move
            reached += [state + move for state in states if state <= most]
        if len(reached) > _MANY:
            mask = (1 << self._reduced_at) - 1
            reached.sort(key=mask.__and__, reverse=True)
            reached = list({(state & mask) >> self._host_at: state for state in reached}.values())
        return reached

    def _join(self, near: Sequence[int], far: Sequence[int]) -> int | None:
        """The least cost of two states that cover the need together, within the host RAM.

        The nearer to the need the one comes by itself, the more there are to go with it. Those are kept as
        stairs: the more host RAM, the less cost.
        """
        mask = (1 << self._reduced_at) - 1
        near, far = sorted([state & mask for state in near]), sorted([state & mask for state in far])
        freed_at, host_at, budget_bytes = self._freed_at, self._host_at, self._host_budget_bytes
        rest_mask, cost_mask = (1 << freed_at) - 1, (1 << host_at) - 1
        hosts: list[int] = []
        costs: list[int] = []
        best = nothing = 1 << host_at
        for state in near:
            least = (self._need_bytes - (state >> freed_at)) << freed_at
            while far and far[-1] >= least:
                rest = far.pop() & rest_mask
                host, cost = rest >> host_at, rest & cost_mask
                place = bisect_right(hosts, host)
                if place and costs[place - 1] <= cost:
                    continue
                end = place
                while end < len(costs) and costs[end] >= cost:
                    end += 1
                hosts[place:end] = (host,)
                costs[place:end] = (cost,)
            cost = state & cost_mask
            if cost < best:
                place = bisect_right(hosts, budget_bytes - ((state & rest_mask) >> host_at))
                if place and cost + costs[place - 1] < best:
                    best = cost + costs[place - 1]
        return None if best == nothing else best
