"""The linear relaxation of the planner's search: how little harm there may be, and what each item adds to it.

With a price on a byte that is needed and one on a byte of host RAM, every group can be judged by itself.
For any prices, and with the least of each group taken over its items and over leaving it alone,

    reduced cost = harm + host_price * host - need_price * freed - the least of these in its group
    bound        = need_price * need - host_price * host_budget + the sum of those least

the harm of a plan that works is at least `bound` and the reduced costs of all that it does. The nearer the
prices are to the relaxation's own, the higher the bound. Floats do: the bound is lowered by their error.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

#: An item as the search sees it: freed bytes, host bytes, harm, cost (which begins with the harm).
Priced = tuple[int, int, int, int]

#: So many prices of host RAM are tried at most, and fewer if the bound can rise by no more than this share.
_PRICES = 5
_ENOUGH = 0.01
#: Rounding, as a share of the figures that are added up; far more than there is.
_ERROR = 1e-12


class Relaxed(NamedTuple):
    """What the relaxation tells.

    Attributes:
        bound: no plan that works harms less.
        reduced: by group, the reduced cost of leaving it alone, and then those of its items.
        host_price: harm a byte of host RAM; 0 if the relaxation is not short of it.
    """

    bound: float
    reduced: list[list[float]]
    host_price: float


class _Corner(NamedTuple):
    """The relaxation at a price of host RAM, and how its value changes with that price."""

    host_price: float
    need_price: float
    value: float
    slope: float


def relax(groups: Sequence[Sequence[Priced]], need_bytes: int, host_budget_bytes: int) -> Relaxed | None:
    """Find prices with a high bound; None if nothing covers the need, host RAM or no.

    Args:
        groups: by group its items, at least one.
        need_bytes: to be freed.
        host_budget_bytes: host RAM that there is.
    """
    left = _at_price(groups, need_bytes, host_budget_bytes, 0.0)
    if left is None:
        return None
    best = left if left.slope <= 0 else _climb(groups, need_bytes, host_budget_bytes, left)
    bound = best.need_price * need_bytes - best.host_price * host_budget_bytes
    error = _ERROR * (best.need_price * need_bytes + best.host_price * host_budget_bytes)
    need_price, host_price = best.need_price, best.host_price
    reduced: list[list[float]] = []
    for group in groups:
        worth = [0.0, *[harm + host_price * h - need_price * f for f, h, harm, _ in group]]
        least = min(worth)
        bound += least
        reduced.append([each - least for each in worth])
    return Relaxed(bound - error, reduced, host_price)


def _climb(
    groups: Sequence[Sequence[Priced]], need_bytes: int, host_budget_bytes: int, left: _Corner
) -> _Corner:
    """Raise the price of host RAM to where the relaxation just keeps within it, or nearly so.

    The value is concave in the price: the optimum is under the roof of the lines from either side.
    """
    best = left
    right: _Corner | None = None
    host_price = _first_price(groups)
    for _ in range(_PRICES):
        found = _at_price(groups, need_bytes, host_budget_bytes, host_price)
        if found is None:
            break
        best = max(best, found, key=lambda corner: corner.value)
        if found.slope <= 0:
            right = found
        else:
            left = found
        if right is None:
            host_price *= 2
            continue
        if left.slope <= right.slope:
            break
        rise = right.value - left.value + left.slope * left.host_price - right.slope * right.host_price
        host_price = rise / (left.slope - right.slope)
        roof = left.value + left.slope * (host_price - left.host_price)
        if roof - best.value <= _ENOUGH * best.value:
            break
    return best


def _first_price(groups: Sequence[Sequence[Priced]]) -> float:
    """A guess: the price at which two in five would take an item that needs less host RAM."""
    prices = sorted(
        [
            (other_harm - harm) / (host - other_host)
            for group in groups
            for _, host, harm, _ in group
            for _, other_host, other_harm, _ in group
            if other_host < host and other_harm > harm
        ]
    )
    if prices:
        return prices[len(prices) * 2 // 5]
    return min([(harm + 1) / host for group in groups for _, host, harm, _ in group if host])


def _at_price(
    groups: Sequence[Sequence[Priced]], need_bytes: int, host_budget_bytes: int, host_price: float
) -> _Corner | None:
    """Cover the need, cheapest bytes first, the last item in part."""
    missing_bytes, host_bytes, harm = need_bytes, 0, 0
    for last in _increments(groups, host_price):
        _, freed_more, host_more, harm_more = last
        if freed_more >= missing_bytes:
            break
        missing_bytes -= freed_more
        host_bytes += host_more
        harm += harm_more
    else:
        return None
    share = missing_bytes / freed_more
    slope = host_bytes + share * host_more - host_budget_bytes
    return _Corner(host_price, last[0], harm + share * harm_more + host_price * slope, slope)


def _increments(groups: Sequence[Sequence[Priced]], host_price: float) -> list[tuple[float, int, int, int]]:
    """What each group offers, cheapest bytes first: (price a byte, bytes more, host RAM more, harm more)."""
    increments: list[tuple[float, int, int, int]] = []
    for group in groups:
        prices = [(harm + host_price * host) / freed for freed, host, harm, _ in group]
        price = min(prices)
        freed, host, harm, _ = group[prices.index(price)]
        increments.append((price, freed, host, harm))
        more = [item for item in group if item[0] > freed]
        while more:
            freed0, host0, harm0 = freed, host, harm
            prices = [
                (harm - harm0 + host_price * (host - host0)) / (freed - freed0)
                for freed, host, harm, _ in more
            ]
            price = min(prices)
            freed, host, harm, _ = more[prices.index(price)]
            increments.append((price, freed - freed0, host - host0, harm - harm0))
            more = [item for item in more if item[0] > freed]
    increments.sort()
    return increments
