"""What remains of a picture's time: learnt from pictures before it, and stated only where it is known."""

from __future__ import annotations

import pytest

from controlplane.estimates import Estimates
from controlplane.pipelines.image._outlook import Outlook
from controlplane.pipelines.image._pace import Drawing, Pace
from rung.types import Phase


def a_drawing(*, megapixels: float = 1.0, steps: int = 4, is_loaded: bool = False) -> Drawing:
    return Drawing(
        deployment_id="comfyui", model="flux", megapixels=megapixels, steps=steps, is_loaded=is_loaded
    )


def drawn(estimates: Estimates, drawing: Drawing, *, load_s: float, step_s: float, encode_s: float) -> None:
    """Draw by that clock."""
    pace = Pace(drawing, estimates)
    pace.submitted(100.0)
    for step in range(drawing.steps + 1):
        pace.sampled(step, drawing.steps, 100 * step / drawing.steps, 100.0 + load_s + step * step_s)
    pace.ended(100.0 + load_s + drawing.steps * step_s + encode_s)


def test_nothing_is_expected_of_what_was_never_drawn() -> None:
    pace = Pace(a_drawing(), Estimates())

    assert (pace.start_s(), pace.sampling_s(), pace.encoding_s()) == (None, None, None)


def test_the_next_picture_is_expected_to_take_as_long_for_each_step_and_megapixel() -> None:
    estimates = Estimates()
    drawn(estimates, a_drawing(), load_s=18.0, step_s=0.5, encode_s=1.0)

    pace = Pace(a_drawing(megapixels=2.0, steps=10), estimates)

    assert pace.start_s() == pytest.approx(18.0)
    assert pace.sampling_s() == pytest.approx(10.0)
    assert pace.encoding_s() == pytest.approx(2.0)


def test_a_model_that_is_loaded_is_not_expected_to_be_loaded() -> None:
    estimates = Estimates()
    drawn(estimates, a_drawing(), load_s=18.0, step_s=0.5, encode_s=1.0)
    drawn(estimates, a_drawing(is_loaded=True), load_s=0.2, step_s=0.5, encode_s=1.0)

    assert Pace(a_drawing(is_loaded=True), estimates).start_s() == pytest.approx(0.2)
    assert Pace(a_drawing(), estimates).start_s() == pytest.approx(18.0)


def test_the_rest_is_told_by_the_pace_of_the_picture_itself_once_it_has_one() -> None:
    estimates = Estimates()
    drawn(estimates, a_drawing(), load_s=18.0, step_s=0.5, encode_s=1.0)
    pace = Pace(a_drawing(steps=10), estimates)
    pace.submitted(0.0)

    assert pace.sampled(0, 10, 0.0, 1.0) == pytest.approx(5.0)
    assert pace.sampled(1, 10, 10.0, 3.0) == pytest.approx(4.5)
    assert pace.sampled(3, 10, 30.0, 7.0) == pytest.approx(7 * 2.0)


def test_two_samplers_say_nothing_of_the_whole_and_teach_nothing() -> None:
    estimates = Estimates()
    pace = Pace(a_drawing(), estimates)
    pace.submitted(0.0)

    for step, percent in ((1, 12.5), (4, 50.0), (1, 62.5), (4, 100.0)):
        assert pace.sampled(step, 4, percent, float(step)) is None
    pace.ended(9.0)

    assert Pace(a_drawing(), estimates).sampling_s() is None


def test_a_picture_from_a_cache_teaches_nothing() -> None:
    estimates = Estimates()
    pace = Pace(a_drawing(), estimates)
    pace.submitted(0.0)
    pace.ended(0.1)

    assert Pace(a_drawing(), estimates).start_s() is None


def an_outlook(**expected_s: float | None) -> Outlook:
    outlook = Outlook()
    for name, seconds in expected_s.items():
        outlook.expect(Phase(name), seconds)
    return outlook


def test_what_remains_of_a_job_is_the_rest_of_its_phase_and_all_that_come() -> None:
    outlook = an_outlook(vram_acquire=0.0, prompt_enhance=0.0, queued=18.0, sampling=4.0, encoding=1.0)

    assert outlook.left_s(Phase.HEALTH_CHECK, 0.0) == (None, 23.0)
    assert outlook.left_s(Phase.QUEUED, 3.0) == (15.0, 20.0)
    assert outlook.left_s(Phase.SAMPLING, 1.0, 2.5) == (2.5, 3.5)


def test_an_enhancement_goes_on_beside_what_comes_before_it() -> None:
    outlook = an_outlook(vram_acquire=6.0, prompt_enhance=4.0, queued=2.0, sampling=5.0, encoding=1.0)

    # It is over before the memory is there; or half of it is left once that is.
    assert outlook.left_s(Phase.VRAM_ACQUIRE, 0.0, attempt_s=0.0) == (6.0, 14.0)
    outlook.expect(Phase.PROMPT_ENHANCE, 8.0)
    assert outlook.left_s(Phase.VRAM_ACQUIRE, 2.0, attempt_s=2.0) == (4.0, 14.0)
    assert outlook.left_s(Phase.PROMPT_ENHANCE, 0.5, attempt_s=6.5) == (1.5, 9.5)


def test_what_remains_of_a_job_is_not_known_if_it_is_not_of_one_phase_to_come() -> None:
    outlook = an_outlook(queued=18.0, sampling=None, encoding=1.0)

    assert outlook.left_s(Phase.QUEUED, 3.0) == (15.0, None)
    assert outlook.left_s(Phase.ENCODING, 0.5) == (0.5, 0.5)


def test_nothing_is_known_of_an_attempt_before_anything_was_learnt() -> None:
    assert Outlook().left_s(Phase.HEALTH_CHECK, 0.0) == (None, None)


def test_a_phase_that_takes_longer_than_ever_has_no_known_rest() -> None:
    outlook = an_outlook(queued=18.0, sampling=4.0, encoding=1.0)

    assert outlook.left_s(Phase.QUEUED, 18.0) == (None, None)
