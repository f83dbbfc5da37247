"""Predictions that are honest and small: nearest neighbours, and a trend with a season.

They stand for TabFM and TimesFM in simulators: always the same for the same numbers, and right where the
numbers make it plain.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from statistics import NormalDist, fmean, pstdev
from typing import TypeAlias

from msgspec import Struct

Row: TypeAlias = Sequence[float]

_NEIGHBOURS = 5
#: Season lengths that are looked for: a week, a year of months, a day of hours, quarters.
_PERIODS = (7, 12, 24, 4)
#: How much of what the trend leaves over a season must explain to be one.
_SEASONAL_SHARE = 0.5


class Forecast(Struct, frozen=True):
    """One series, continued; `spread` is the standard deviation of what the model missed in its past."""

    values: list[float]
    spread: float

    def quantile(self, level: float) -> list[float]:
        """What it stays below with the probability `level`, less and less surely with each step."""
        away = NormalDist().inv_cdf(level) * self.spread
        return [value + away * math.sqrt(step) for step, value in enumerate(self.values, start=1)]


def classify(context: Sequence[Row], labels: Sequence[str], rows: Sequence[Row]) -> list[str]:
    """The label that most of a row's neighbours have; of several, that of the nearest one."""
    return [
        Counter(labels[index] for index, _ in near).most_common(1)[0][0]
        for near in _neighbours(context, rows)
    ]


def regress(context: Sequence[Row], targets: Row, rows: Sequence[Row]) -> list[float]:
    """The mean of a row's neighbours, the near ones weighing more; a row that is known has its own number."""
    values = []
    for near in _neighbours(context, rows):
        same = [targets[index] for index, distance in near if distance == 0.0]
        if same:
            values.append(fmean(same))
        else:
            weights = [1.0 / distance for _, distance in near]
            values.append(fmean([targets[index] for index, _ in near], weights))
    return values


def forecast(series: Row, horizon: int) -> Forecast:
    """The straight line through a series, with the season that it shows twice or more, if it shows one."""
    best = _fit(series, _slope(series), 1)
    least = (1.0 - _SEASONAL_SHARE) * best.spread**2
    for period in _PERIODS:
        if len(series) < 2 * period:
            continue
        # From one season to the next nothing moves but the trend.
        moves = [later - sooner for sooner, later in zip(series, series[period:], strict=False)]
        found = _fit(series, fmean(moves) / period, period)
        if found.spread**2 < least:
            best, least = found, found.spread**2
    ahead = range(len(series), len(series) + horizon)
    return Forecast(values=[best.value(at) for at in ahead], spread=best.spread)


def _neighbours(context: Sequence[Row], rows: Sequence[Row]) -> list[list[tuple[int, float]]]:
    """For each row the nearest known ones, by number and distance; each feature weighs the same."""
    scales = [pstdev(column) or 1.0 for column in zip(*context, strict=True)]

    def scaled(row: Row) -> list[float]:
        return [value / scale for value, scale in zip(row, scales, strict=True)]

    places = [scaled(row) for row in context]
    found = []
    for row in rows:
        place = scaled(row)
        distances = sorted((math.dist(place, known), index) for index, known in enumerate(places))
        found.append([(index, distance) for distance, index in distances[:_NEIGHBOURS]])
    return found


class _Fit(Struct, frozen=True):
    """A trend, what is added to it at each place of a season, and how far that is off."""

    slope: float
    season: list[float]
    spread: float

    def value(self, at: int) -> float:
        return self.slope * at + self.season[at % len(self.season)]


def _fit(series: Row, slope: float, period: int) -> _Fit:
    left = [value - slope * at for at, value in enumerate(series)]
    season = [fmean(left[place::period]) for place in range(period)]
    return _Fit(slope, season, pstdev([value - season[at % period] for at, value in enumerate(left)]))


def _slope(series: Row) -> float:
    """That of the line that fits best."""
    middle, mean = (len(series) - 1) / 2, fmean(series)
    width = sum((at - middle) ** 2 for at in range(len(series)))
    return sum((at - middle) * (value - mean) for at, value in enumerate(series)) / width if width else 0.0
