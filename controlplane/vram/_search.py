"""The exact search behind the planner: the cheapest way to get so much memory back.

The problem: of each group (a deployment) take at most one item (an action), so that the freed bytes cover
`need_bytes`, the host RAM taken stays within `host_budget_bytes`, and the cost is least. A knapsack
with multiple choice; with 16 groups it has up to 4^16 plans, and has to be solved in less than a
millisecond of Python.

How: the groups are split into two halves. Each half is enumerated group by group, keeping only the
states that no other state beats (Pareto: no more still needed, no more host RAM and no more cost), and the
two halves are joined by one walk along both. A half of 8 groups with one action each has at most 256
states, whatever the figures: equal sizes collapse, and sums that nearly hit the mark, on which
branch-and-bound drowns, cost no more than others.

Most often host RAM is plentiful, so the search first ignores it; a plan that then fits is the optimum. If
it does not, host RAM becomes part of the states, and they are kept few by a bound: with a price on
a missing byte and one on a byte of host RAM (both found on the linear relaxation), every item has a
reduced cost, and whatever has gathered more of it than lies between the relaxation's optimum and a plan that
is known to work cannot lead to a better plan. That leaves one kind of pool which takes tens of milliseconds:
16 sleepers, host RAM for a part of them, and harm in exact proportion to size, so that no set of them
is clearly better than another.

In the inner loops a state is one integer with its fields side by side,

    still needed | reduced cost | host RAM | cost

so that taking an item is one addition, and sorting is sorting integers. A cost is an integer too,

    harm | steps | duration | choices

so that the order among plans is exact: least harm, then fewest steps, then the shortest, then the one
that leaves the first groups alone. The choices that made a cost are read from its last field.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from operator import itemgetter
from typing import NamedTuple

from controlplane.vram._bound import relax

#: Steps of reduced cost in one of harm.
_SCALE = 64


class Item(NamedTuple):
    """One thing that may be done to a group. Integers of at least 0; `freed_bytes` more than 0."""

    freed_bytes: int
    host_bytes: int
    harm: int
    duration: int


#: An item as the search sees it: freed bytes, host bytes, cost.
_Priced = tuple[int, int, int]
_COST = itemgetter(2)


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
    best = _cover([_undominated_in_pool(group) for group in costs.priced], need_bytes, costs)
    if best is None:
        return None
    choice = costs.choice(best)
    if _host_bytes(groups, choice) <= host_budget_bytes:
        return choice
    priced = [_undominated(group) for group in costs.priced]
    best = _cover_within(priced, need_bytes, host_budget_bytes, costs)
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
        self._choice_bits = max((len(group) for group in groups), default=0).bit_length()
        longest = sum(max([item.duration for item in group], default=0) for group in groups)
        steps_at = self._count * self._choice_bits + longest.bit_length()
        #: What lies above this bit of a cost is the harm.
        self.harm_at = steps_at + self._count.bit_length()
        duration_at = self._count * self._choice_bits
        self.priced: list[list[_Priced]] = []
        most = 0
        one_step = 1 << steps_at
        for place, group in enumerate(groups):
            choice_at = (self._count - 1 - place) * self._choice_bits
            row = [
                (
                    freed_bytes,
                    host_bytes,
                    (harm << self.harm_at) + one_step + (duration << duration_at) + (index << choice_at),
                )
                for index, (freed_bytes, host_bytes, harm, duration) in enumerate(group, 1)
            ]
            most += max([cost for _, _, cost in row], default=0)
            self.priced.append(row)
        #: Bits that hold any sum of costs.
        self.bits = most.bit_length() + 1

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


def _undominated_in_pool(group: list[_Priced]) -> list[_Priced]:
    """Without items that free no more than a cheaper one; host RAM is ignored."""
    if len(group) < 2:
        return group
    kept: list[_Priced] = []
    most_bytes = 0
    for item in sorted(group, key=_COST):
        if item[0] > most_bytes:
            most_bytes = item[0]
            kept.append(item)
    return kept


def _undominated(group: Sequence[_Priced]) -> list[_Priced]:
    """Without items that another item of the group beats in every respect."""
    kept: list[_Priced] = []
    for freed_bytes, host_bytes, cost in sorted(group, key=_COST):
        if not any(f >= freed_bytes and h <= host_bytes for f, h, _ in kept):
            kept.append((freed_bytes, host_bytes, cost))
    return kept


# Without host RAM. A state is `still needed | cost`.


def _cover(groups: Sequence[Sequence[_Priced]], need_bytes: int, costs: _Costs) -> int | None:
    """The least cost that covers the need, host RAM ignored; None if nothing does."""
    bits = costs.bits
    moves = [[cost - (freed << bits) for freed, _, cost in group] for group in groups if group]
    middle = len(moves) // 2
    near, far = _states(moves[:middle], need_bytes, bits), _states(moves[middle:], need_bytes, bits)
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


def _states(moves: Sequence[Sequence[int]], need_bytes: int, bits: int) -> list[int]:
    """The Pareto states of a half: the more is still needed, the less they cost."""
    mask, one = (1 << bits) - 1, 1 << bits
    states = [need_bytes << bits]
    for group in moves:
        reached = states + [state + move for move in group for state in states]
        reached.sort()
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


# With host RAM. A state is `still needed | reduced cost | host RAM | cost`.


class _Layout(NamedTuple):
    """Where the fields of a state are, and how far two of them may go."""

    host_at: int
    reduced_at: int
    need_at: int
    gap: int
    host_budget_bytes: int


def _cover_within(
    groups: Sequence[Sequence[_Priced]], need_bytes: int, host_budget_bytes: int, costs: _Costs
) -> int | None:
    """The least cost that covers the need within the host RAM; None if nothing does."""
    harms = [[(f, h, cost >> costs.harm_at) for f, h, cost in group] for group in groups]
    relaxed = relax(harms, need_bytes, host_budget_bytes)
    if relaxed is None:
        return None
    known = relaxed.known_harm is not None
    # Rounded up by more than floats can be wrong; a plan of the same harm may be better in the rest.
    gap = 0 if relaxed.known_harm is None else int((relaxed.known_harm - relaxed.bound) * _SCALE) + _SCALE
    host_bits = sum(max((h for _, h, _ in group), default=0) for group in groups).bit_length()
    layout = _Layout(
        host_at=costs.bits,
        reduced_at=costs.bits + host_bits,
        need_at=costs.bits + host_bits + gap.bit_length() + 1,
        gap=gap,
        host_budget_bytes=host_budget_bytes,
    )
    moves: list[list[tuple[int, int]]] = []
    for group, row in zip(groups, harms, strict=True):
        reduced = [0.0, *(harm + relaxed.host_price * h - relaxed.need_price * f for f, h, harm in row)]
        least = min(reduced)
        added = [int((each - least) * _SCALE) if known else 0 for each in reduced]
        moves.append(
            [
                ((more << layout.reduced_at) + (h << layout.host_at) + cost - (f << layout.need_at), more)
                for (f, h, cost), more in zip([(0, 0, 0), *group], added, strict=True)
                if more <= gap
            ]
        )
    moves.sort(key=len)  # dealt out in turn, so that both halves have as many ways to go
    return _join(
        _states_within(moves[::2], need_bytes, layout),
        _states_within(moves[1::2], need_bytes, layout),
        need_bytes,
        layout,
    )


def _states_within(moves: Sequence[Sequence[tuple[int, int]]], need_bytes: int, layout: _Layout) -> list[int]:
    """The Pareto states of a half in the order of what is still needed."""
    one = 1 << layout.need_at
    below_need = one - 1
    reduced_mask = ((1 << (layout.need_at - layout.reduced_at)) - 1) << layout.reduced_at
    host_mask = (1 << layout.reduced_at) - 1
    states = [need_bytes << layout.need_at]
    for group in moves:
        reached: list[int] = []
        for move, added in group:
            limit = ((layout.gap - added + 1) << layout.reduced_at) - 1
            reached += [state + move for state in states if state & reduced_mask <= limit]
        # Whatever needs nothing more needs exactly nothing more.
        reached = [state if state >= one else state & below_need for state in reached]
        reached.sort()
        stairs = _Stairs(layout)
        states = [state for state in reached if stairs.add(state & host_mask)]
    return states


class _Stairs:
    """States seen so far by host RAM: the more of it, the less the cost."""

    def __init__(self, layout: _Layout) -> None:
        self._host_at = layout.host_at
        self._mask = (1 << layout.host_at) - 1
        self._host_budget_bytes = layout.host_budget_bytes
        self._hosts: list[int] = []
        self._costs: list[int] = []

    def add(self, state: int) -> bool:
        """Take in a state's host RAM and cost; False if it does not fit or one seen before beats it."""
        host, cost = state >> self._host_at, state & self._mask
        if host > self._host_budget_bytes:
            return False
        hosts, costs = self._hosts, self._costs
        place = bisect_right(hosts, host)
        if place and costs[place - 1] <= cost:
            return False
        end = place
        while end < len(costs) and costs[end] >= cost:
            end += 1
        hosts[place:end] = [host]
        costs[place:end] = [cost]
        return True

    def least_cost(self, host: int) -> int | None:
        """The least cost of those that take no more host RAM."""
        place = bisect_right(self._hosts, host)
        return self._costs[place - 1] if place else None


def _join(near: Sequence[int], far: Sequence[int], need_bytes: int, layout: _Layout) -> int | None:
    host_mask, cost_mask = (1 << layout.reduced_at) - 1, (1 << layout.host_at) - 1
    stairs = _Stairs(layout)
    best: int | None = None
    taken = 0
    for state in reversed(near):
        limit = (need_bytes - (state >> layout.need_at) + 1) << layout.need_at
        while taken < len(far) and far[taken] < limit:
            stairs.add(far[taken] & host_mask)
            taken += 1
        host = (state & host_mask) >> layout.host_at
        rest = stairs.least_cost(layout.host_budget_bytes - host)
        if rest is not None and (best is None or (state & cost_mask) + rest < best):
            best = (state & cost_mask) + rest
    return best
