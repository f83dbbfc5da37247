"""What is learnt of the times of steps, what is stated of it, and how far it is off."""

from __future__ import annotations

import asyncio
import math
import random
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from statistics import median

import pytest
from hypothesis import given
from hypothesis import strategies as st

from controlplane.estimates import (
    KEPT_OBSERVATIONS,
    WRITE_EVERY_S,
    EstimateKeeper,
    Estimates,
    Key,
    Observations,
    relative_error,
)
from rung.errors import UnavailableError
from tests.fakes.virtual_time import in_virtual_time


def learnt(*seconds: float, units: float = 1.0) -> Estimates:
    estimates = Estimates()
    for each in seconds:
        estimates.observe("comfy", "load:flux", each, units)
    return estimates


def test_what_was_never_observed_is_not_known() -> None:
    assert learnt(18.0).expected_s("comfy", "load:sdxl") is None
    assert learnt(18.0).expected_s("other", "load:flux") is None
    assert Estimates().estimate("comfy", "load:flux") is None


def test_the_median_is_stated_from_the_first_observation_on_and_an_odd_one_does_not_move_it() -> None:
    assert learnt(18.0).expected_s("comfy", "load:flux") == 18.0
    assert learnt(18.0, 20.0).expected_s("comfy", "load:flux") == 19.0
    assert learnt(18.0, 17.0, 19.0, 18.0, 600.0).expected_s("comfy", "load:flux") == 18.0


def test_times_are_by_unit() -> None:
    estimates = learnt(10.0, units=20)

    assert estimates.expected_s("comfy", "load:flux", 30) == 15.0


def test_after_a_change_five_observations_decide() -> None:
    before = [18.0] * KEPT_OBSERVATIONS

    assert learnt(*before, *[9.0] * 4).expected_s("comfy", "load:flux") == 18.0
    assert learnt(*before, *[9.0] * 5).expected_s("comfy", "load:flux") == 9.0


def test_times_that_differ_more_than_threefold_are_not_stated() -> None:
    cold_or_cached = learnt(18.0, 0.1, 17.0, 0.2, 19.0, 0.1)

    assert cold_or_cached.expected_s("comfy", "load:flux") is None
    found = cold_or_cached.estimate("comfy", "load:flux")
    assert found is not None
    assert found.spread > 3
    assert found.observations == 6
    assert learnt(10.0, 29.0).expected_s("comfy", "load:flux") == 19.5
    assert learnt(10.0, 31.0).expected_s("comfy", "load:flux") is None


@pytest.mark.parametrize(
    ("seconds", "units"),
    [(0, 1), (-1, 1), (math.nan, 1), (math.inf, 1), (1, 0), (1, -1), (1, math.nan), (1, math.inf), (1e6, 1)],
)
def test_nonsense_is_ignored(seconds: float, units: float) -> None:
    estimates = learnt(18.0)
    estimates.take_changed()

    estimates.observe("comfy", "load:flux", seconds, units)
    estimates.observe("comfy", "new", seconds, units)

    assert estimates.expected_s("comfy", "load:flux") == 18.0
    assert estimates.estimate("comfy", "new") is None
    assert estimates.take_changed() == ([], [])


def test_what_was_not_used_for_longest_is_forgotten_first() -> None:
    estimates = Estimates(most_keys=2)
    for step in ("first", "second"):
        estimates.observe("comfy", step, 1.0)
    estimates.take_changed()
    assert estimates.expected_s("comfy", "first") == 1.0

    estimates.observe("comfy", "third", 1.0)

    assert estimates.expected_s("comfy", "second") is None
    assert estimates.expected_s("comfy", "first") == 1.0
    changed, forgotten = estimates.take_changed()
    assert [each.step for each in changed] == ["third"]
    assert forgotten == [("comfy", "second")]


def test_what_changed_is_taken_once_and_again_if_it_was_not_stored() -> None:
    estimates = learnt(1.0, 2.0)
    taken = Observations(deployment_id="comfy", step="load:flux", seconds_per_unit=(1.0, 2.0))

    assert estimates.take_changed() == ([taken], [])
    assert estimates.take_changed() == ([], [])
    estimates.not_stored([("comfy", "load:flux")])
    assert estimates.take_changed() == ([taken], [])


def test_what_is_restored_has_not_changed_but_for_what_there_is_no_room_for() -> None:
    estimates = Estimates(most_keys=2)

    estimates.restore(
        Observations(deployment_id="comfy", step=step, seconds_per_unit=(math.nan, 2.0))
        for step in ("oldest", "older", "newest")
    )

    assert estimates.expected_s("comfy", "newest") == 2.0
    assert estimates.take_changed() == ([], [("comfy", "oldest")])


@given(st.lists(st.floats(allow_nan=True, allow_infinity=True), max_size=30), st.floats(0.5, 100))
def test_whatever_is_observed_a_statement_lies_between_the_observations(
    seconds: list[float], units: float
) -> None:
    estimates = learnt(*seconds, units=units)

    sane = [each / units for each in seconds if 0 < each <= 86_400 and each / units > 0][-KEPT_OBSERVATIONS:]
    stated = estimates.expected_s("comfy", "load:flux")

    if stated is not None:
        assert min(sane) <= stated <= max(sane) + 1e-9
    elif sane:
        assert max(sane) > 3 * min(sane)


def _steady(noise: random.Random) -> float:
    return 18.0 * noise.lognormvariate(0, 0.1)


def _noisy(noise: random.Random) -> float:
    return 18.0 * noise.lognormvariate(0, 0.25)


def _with_outliers(noise: random.Random) -> float:
    return 18.0 * noise.lognormvariate(0, 0.1) * (10.0 if noise.random() < 0.1 else 1.0)


@pytest.mark.parametrize(
    ("history", "most"),
    [(_steady, 0.08), (_noisy, 0.2), (_with_outliers, 0.095)],
    ids=["noise of 10 %", "noise of 25 %", "one in ten takes tenfold"],
)
def test_the_median_error_over_noisy_histories_is_about_that_of_the_noise(
    history: Callable[[random.Random], float], most: float
) -> None:
    errors = []
    for seed in range(200):
        noise = random.Random(seed)
        estimates = Estimates()
        for _ in range(30):
            actual = history(noise)
            predicted = estimates.expected_s("comfy", "load:flux")
            if predicted is not None:
                errors.append(relative_error(predicted, actual))
            estimates.observe("comfy", "load:flux", actual)

    # Of 5,800 that could be stated.
    assert len(errors) > 5200
    assert median(errors) < most


def test_what_is_loaded_cold_or_from_a_cache_by_chance_is_seldom_stated() -> None:
    noise = random.Random(5)
    estimates = Estimates()
    stated = 0
    for _ in range(1000):
        stated += estimates.expected_s("comfy", "load:flux") is not None
        estimates.observe("comfy", "load:flux", noise.choice([0.2, 18.0]))

    assert stated < 250


def test_the_error_is_a_share_of_what_came() -> None:
    assert relative_error(9.0, 10.0) == pytest.approx(0.1)
    assert relative_error(30.0, 10.0) == pytest.approx(2.0)


@dataclass
class Rows:
    """A store in memory, which may be away."""

    kept: dict[Key, Observations] = field(default_factory=dict)
    away: bool = False
    writes: int = 0
    forgot_before_s: float = 0.0

    async def read(self) -> Sequence[Observations]:
        return list(self.kept.values())

    async def write(
        self, changed: Sequence[Observations], forgotten: Sequence[Key], *, time_s: float
    ) -> None:
        if self.away:
            raise UnavailableError("the disk is full")
        self.writes += 1
        self.kept |= {(each.deployment_id, each.step): each for each in changed}
        for key in forgotten:
            del self.kept[key]

    async def delete_gone(self, deployments: Collection[str], *, before_s: float) -> int:
        self.forgot_before_s = before_s
        return 0


@in_virtual_time
async def test_what_is_learnt_is_written_soon_in_one_go_and_not_without_need() -> None:
    rows = Rows()
    keeper = EstimateKeeper(rows, unix_s=lambda: 1e9)
    await keeper.start({"comfy"})
    assert rows.forgot_before_s == 1e9 - 30 * 86_400
    for step in ("load:flux", "sampling:quality"):
        keeper.estimates.observe("comfy", step, 18.0)

    await asyncio.sleep(WRITE_EVERY_S + 0.1)
    assert len(rows.kept) == 2
    await asyncio.sleep(60)
    assert rows.writes == 1
    await keeper.aclose()


@in_virtual_time
async def test_what_could_not_be_written_is_written_later_and_the_end_writes_the_rest() -> None:
    rows = Rows(away=True)
    keeper = EstimateKeeper(rows)
    await keeper.start(())
    keeper.estimates.observe("comfy", "load:flux", 18.0)
    await asyncio.sleep(10)
    assert rows.kept == {}

    rows.away = False
    await asyncio.sleep(WRITE_EVERY_S + 0.1)
    assert rows.kept["comfy", "load:flux"].seconds_per_unit == (18.0,)
    keeper.estimates.observe("comfy", "load:flux", 20.0)
    await keeper.aclose()

    later = EstimateKeeper(rows)
    await later.start(())
    assert later.estimates.expected_s("comfy", "load:flux") == 19.0
    await later.aclose()
