"""The models of the simulated worker of predictions: right where the numbers make it plain."""

from __future__ import annotations

import pytest

from nodeagent.simulators._little_models import classify, forecast, regress

CONTEXT = [[0.0, 0.0], [0.0, 1.0], [1.0, 0.0], [9.0, 900.0], [9.0, 901.0], [8.0, 900.0]]


def test_a_row_has_the_class_of_its_neighbours() -> None:
    assert classify(CONTEXT, ["a", "a", "a", "b", "b", "b"], [[1.0, 1.0], [8.0, 905.0]]) == ["a", "b"]


def test_a_wide_feature_weighs_no_more_than_a_narrow_one() -> None:
    context = [[0.0, 0.0], [0.0, 1000.0], [1.0, 0.0], [1.0, 1000.0]] * 2
    labels = ["left", "left", "right", "right"] * 2
    assert classify(context, labels, [[0.05, 400.0], [0.95, 600.0]]) == ["left", "right"]


def test_a_known_row_has_its_own_number_and_others_are_between_their_neighbours() -> None:
    context, targets = [[float(at)] for at in range(10)], [2.0 * at for at in range(10)]
    known, between = regress(context, targets, [[3.0], [4.5]])
    assert known == 6.0
    assert between == pytest.approx(9.0, abs=1.0)


@pytest.mark.parametrize(
    ("series", "wanted"),
    [
        pytest.param([float(at) for at in range(10)], [10.0, 11.0, 12.0], id="line"),
        pytest.param([4.0], [4.0, 4.0, 4.0], id="one value"),
        pytest.param([1.0, 5.0, 2.0, 0.0] * 4, [1.0, 5.0, 2.0], id="season"),
    ],
)
def test_a_series_goes_on_as_it_went(series: list[float], wanted: list[float]) -> None:
    assert forecast(series, 3).values == pytest.approx(wanted, abs=0.5)


def test_a_season_rides_on_a_trend() -> None:
    series = [at + 10.0 * (at % 7 == 0) for at in range(70)]
    values = forecast(series, 8).values
    assert values[0] - values[1] > 7.0
    assert values[7] - values[0] == pytest.approx(7.0, abs=0.5)


def test_quantiles_lie_around_the_forecast_and_widen() -> None:
    noisy = [1.0, 7.0, 2.0, 9.0, 3.0, 1.0]
    found = forecast(noisy, 4)
    low, middle, high = (found.quantile(level) for level in (0.1, 0.5, 0.9))
    assert middle == pytest.approx(found.values)
    widths = [above - below for below, above in zip(low, high, strict=True)]
    assert 0.0 < widths[0] < widths[1] < widths[2] < widths[3]
