"""The linear relaxation of the planner's search: prices, a bound, and plans that work.

With a price on a byte that is still needed and one on a byte of host RAM, every group can be judged by
itself, by its reduced cost, and for any prices

    reduced = harm + host_price * host - need_price * freed
    bound = need_price * need - host_price * host_budget + the sum over groups of min(0, least reduced)

is no more than the harm of every plan that works. The nearer the prices are to the relaxation's own, the
nearer the bound. Floats do: the search allows for their error.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

#: At most so many prices of host RAM are searched, by bisection: more cost more than they prune.
_PRICES = 15

#: An item: freed bytes, host bytes, harm.
_Judged = tuple[int, int, int]
_NOTHING: _Judged = (0, 0, 0)


class Relaxed(NamedTuple):
    """Prices in harm a byte, the bound that they give, and the least harm of a plan known to work."""

    need_price: float
    host_price: float
    bound: float
    known_harm: int | None


def relax(groups: Sequence[Sequence[_Judged]], need_bytes: int, host_budget_bytes: int) -> Relaxed | None:
    """Find prices with a high bound, and a good plan on the way; None if nothing covers the need.

    The price of host RAM is found by bisection over those at which some group changes its mind.
    """
    best: Relaxed | None = None
    known: int | None = None
    prices = _turning_prices(groups)
    low, high = 0, len(prices)
    while low < high:
        middle = (low + high) // 2
        found = _at_price(groups, need_bytes, host_budget_bytes, prices[middle])
        if found is None:
            return None
        need_price, bound, under, over = found
        for start in (under, over):
            harm = _polish(groups, start, need_bytes, host_budget_bytes)
            if harm is not None and (known is None or harm < known):
                known = harm
        if best is None or bound > best.bound:
            best = Relaxed(need_price, prices[middle], bound, None)
        if sum(item[1] for item in under) > host_budget_bytes:
            low = middle + 1
        else:
            high = middle
    return None if best is None else best._replace(known_harm=known)


def _turning_prices(groups: Sequence[Sequence[_Judged]]) -> list[float]:
    """Prices of host RAM at which two items of a group are worth the same, a hair above, thinned out."""
    prices = {0.0}
    for group in groups:
        for _, host, harm in group:
            if host:
                for _, other_host, other_harm in group:
                    if other_host < host and other_harm > harm:
                        prices.add((other_harm - harm) / (host - other_host) * (1 + 1e-9))
    ordered = sorted(prices)
    return ordered[:: len(ordered) // _PRICES + 1]


def _at_price(
    groups: Sequence[Sequence[_Judged]], need_bytes: int, host_budget_bytes: int, host_price: float
) -> tuple[float, float, list[_Judged], list[_Judged]] | None:
    """At a price of host RAM: the price of need, the bound, and the plans just under the need and over it."""
    under = [_NOTHING] * len(groups)
    missing = need_bytes
    need_price = 0.0
    for price, freed, place, index in _increments(groups, host_price):
        missing -= freed
        need_price = price
        if missing <= 0:
            break
        under[place] = groups[place][index]
    else:
        return None
    over = under.copy()
    over[place] = groups[place][index]
    bound = need_price * need_bytes - host_price * host_budget_bytes
    for group in groups:
        bound += min([0.0, *[harm + host_price * h - need_price * f for f, h, harm in group]])
    return need_price, bound, under, over


def _increments(groups: Sequence[Sequence[_Judged]], host_price: float) -> list[tuple[float, int, int, int]]:
    """What each group offers, byte by byte cheapest first: (harm a byte, bytes more, group, item)."""
    increments = []
    for place, group in enumerate(groups):
        hull = [(0, 0.0, -1)]
        for freed, price, index in sorted(
            [(f, harm + host_price * h, index) for index, (f, h, harm) in enumerate(group)]
        ):
            while len(hull) > 1 and (
                hull[-1][1] >= price
                or (hull[-1][1] - hull[-2][1]) * (freed - hull[-1][0])
                >= (price - hull[-1][1]) * (hull[-1][0] - hull[-2][0])
            ):
                hull.pop()
            if freed > hull[-1][0]:
                hull.append((freed, price, index))
        for (freed0, price0, _), (freed1, price1, index) in pairwise(hull):
            increments.append(((price1 - price0) / (freed1 - freed0), freed1 - freed0, place, index))
    increments.sort()
    return increments


def _polish(
    groups: Sequence[Sequence[_Judged]], start: Sequence[_Judged], need_bytes: int, host_budget_bytes: int
) -> int | None:
    """Change one group at a time, to the best effect, until that improves nothing.

    From a plan that does not work, the cheapest change that makes it work comes first.

    Returns:
        the harm of the plan that was reached; None if no single change led to one that works.
    """
    choice = list(start)
    missing = need_bytes - sum([item[0] for item in choice])
    room = host_budget_bytes - sum([item[1] for item in choice])
    harm = sum([item[2] for item in choice])
    works = missing <= 0 and room >= 0
    while True:
        least = 0 if works else 1 << 62
        best: tuple[int, _Judged] | None = None
        for place, (freed, host, old_harm) in enumerate(choice):
            missing_without, room_without, limit = missing + freed, room + host, least + old_harm
            if missing_without <= 0 <= room_without and -old_harm < least:
                least, limit, best = -old_harm, 0, (place, _NOTHING)
            for other in groups[place]:
                if other[2] < limit and other[0] >= missing_without and other[1] <= room_without:
                    limit = other[2]
                    least, best = limit - old_harm, (place, other)
        if best is None:
            return harm if works else None
        place, other = best
        freed, host, _ = choice[place]
        choice[place] = other
        missing += freed - other[0]
        room += host - other[1]
        harm += least
        works = True
