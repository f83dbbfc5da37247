"""What a caller asks for, from the fields of its request."""

from __future__ import annotations

import pytest

from controlplane.ladder import Asked, Asking, read_asking
from rung.errors import InvalidRequestError

CHAINS = {"reasoning": ("a",), "coding": ("b",)}


def asking(model: str = "", effort: int | None = None, reasoning_effort: str | None = None) -> Asking:
    return read_asking(model, effort, reasoning_effort, CHAINS)


@pytest.mark.parametrize("model", ["", "rung/auto"])
def test_no_name_leaves_the_choice_to_us(model: str) -> None:
    assert asking(model) == Asking(Asked.EFFORT)
    assert asking(model, 8) == Asking(Asked.EFFORT, effort=8)


@pytest.mark.parametrize("effort", range(1, 11))
def test_the_name_of_a_model_may_be_an_effort(effort: int) -> None:
    assert asking(f"rung/{effort}") == Asking(Asked.EFFORT, effort=effort)
    assert asking(f"rung/{effort}", effort) == Asking(Asked.EFFORT, effort=effort)


def test_it_may_be_a_chain() -> None:
    assert asking("rung/reasoning") == Asking(Asked.CHAIN, "reasoning")
    assert asking("rung/reasoning", 3) == Asking(Asked.CHAIN, "reasoning", 3)


@pytest.mark.parametrize("model", ["qwen3-32b", "spark/qwen3-32b", "reasoning", "7", "rung"])
def test_any_other_name_is_a_model_whatever_the_effort(model: str) -> None:
    assert asking(model, 9, "nonsense") == Asking(Asked.MODEL, model, 9)


@pytest.mark.parametrize(
    ("said", "effort"), [("none", 1), ("minimal", 2), ("low", 4), ("medium", 6), ("high", 8), ("xhigh", 10)]
)
def test_openais_words_are_efforts_and_high_is_the_first_that_may_reason(said: str, effort: int) -> None:
    assert asking("", None, said).effort == effort
    assert asking("rung/auto", None, said).effort == effort


def test_an_effort_of_ours_wins_over_openais_word() -> None:
    assert asking("", 2, "high").effort == 2
    assert asking("rung/3", None, "high").effort == 3


def test_openais_word_is_not_looked_at_beside_an_effort_of_ours() -> None:
    assert asking("", 5, "very").effort == 5


@pytest.mark.parametrize("effort", [0, 11, -3])
@pytest.mark.parametrize("model", ["", "qwen", "rung/auto", "rung/reasoning"])
def test_an_effort_out_of_range_is_refused_with_every_name(model: str, effort: int) -> None:
    with pytest.raises(InvalidRequestError, match="it must be 1 to 10"):
        asking(model, effort)


@pytest.mark.parametrize(
    ("model", "effort", "said", "message"),
    [
        ("rung/0", None, None, "effort is 0; it must be 1 to 10"),
        ("rung/11", None, None, "effort is 11; it must be 1 to 10"),
        ("rung/7", 8, None, "the model rung/7 and effort 8 contradict each other"),
        (
            "rung/vision",
            None,
            None,
            "there is no model 'rung/vision'; of ours are rung/auto, rung/1 to rung/10",
        ),
        ("rung/" + "7" * 5000, None, None, "there is no model 'rung/777"),
        ("", None, "very", "reasoning_effort is 'very'; it must be one of none, minimal, low, medium, high"),
    ],
)
def test_what_cannot_be_meant(model: str, effort: int | None, said: str | None, message: str) -> None:
    with pytest.raises(InvalidRequestError) as refused:
        asking(model, effort, said)
    assert message in refused.value.message
