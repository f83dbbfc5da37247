"""The effort of a request when its caller left it open: how well it is guessed, and how it is explained."""

from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from controlplane.ladder import ClassifiedRequest, classify
from controlplane.ladder import _classifier as classifier
from tests.data.effort_prompts import Accuracy, development, held_out, measure, pasted, report


def effort(text: str, **fields: object) -> int:
    """What a text deserves."""
    return classify(ClassifiedRequest(text=text, **fields)).effort  # type: ignore[arg-type]


def features(text: str, **fields: object) -> dict[str, float]:
    """What decided, and its weights."""
    found = classify(ClassifiedRequest(text=text, **fields)).features  # type: ignore[arg-type]
    return {feature.name: feature.weight for feature in found}


def check(name: str, got: Accuracy, *, exact: float, within_one: float, boundary: float) -> None:
    """The floors, with the whole report where one is not reached."""
    told = report(name, got)
    print(told)
    assert got.exact >= exact, told
    assert got.within_one >= within_one, told
    assert got.boundary >= boundary, told


def test_the_part_that_it_was_tuned_on_is_classified_well() -> None:
    # 76.2 %, 98.1 % and 99.5 % when it was tuned.
    check("development", measure(development()), exact=0.7, within_one=0.95, boundary=0.97)


def test_the_part_that_it_never_saw_is_classified_as_well_as_its_floors_say() -> None:
    # 38.3 %, 72.0 % and 87.9 % on the first look; the floors leave room for words that change.
    check("held out", measure(held_out()), exact=0.33, within_one=0.67, boundary=0.83)


def test_the_labelled_set_covers_every_effort_and_no_prompt_is_in_both_parts() -> None:
    seen, unseen = development(), held_out()
    assert len(seen) + len(unseen) >= 240
    for part in (seen, unseen):
        assert {prompt.effort for prompt in part} == set(range(1, 11))
    assert not {prompt.text for prompt in seen} & {prompt.text for prompt in unseen}


def test_a_request_at_the_boundary_is_told_from_one_above_it_by_a_kind_of_hard_work() -> None:
    made = "Write a Flask app with a table, tests, a plan, a budget, a checklist, a readme and an export."
    assert effort(made, tools=True, images=True) == 6
    assert features(made, tools=True, images=True)["is known how to do"] < 0
    assert effort(made + " Then find the root cause of the race condition.", tools=True) >= 7


@pytest.mark.parametrize("text", ["", "   \n\n ", "👍", "\ud800", "\x00", "```", "'", "```\n```\n```"])
def test_a_message_without_words_is_a_nod(text: str) -> None:
    assert effort(text) == 1


def test_a_picture_without_words_is_more_than_a_nod() -> None:
    assert effort("", images=True) >= 4


@pytest.mark.parametrize(
    "text",
    [
        "Fasse den folgenden Text zusammen:\n\n{}",
        "Translate into French:\n{}",
        "{}\n\nSummarise this, please.",
        "Proofread this: {}",
    ],
)
def test_hard_words_in_a_text_that_is_to_be_changed_do_not_count(text: str) -> None:
    hard = "Prove that the novel distributed consensus protocol has no race condition or deadlock."
    assert effort(text.format(hard)) <= 4
    assert effort(hard) >= 8


def test_hard_words_in_pasted_logs_code_and_quotations_do_not_count() -> None:
    assert "needs thought" not in features("Count the lines by level.\n\n" + pasted("log", 500))
    assert "needs thought" not in features(
        "Add a docstring.\n```python\n# prove: deadlock, theorem\nx = 1\n```"
    )
    assert "needs thought" not in features("What language is this?\n> Prove the theorem about deadlocks.")
    assert "has a log pasted" in features("Count the lines by level.\n\n" + pasted("log", 500))


def test_a_question_behind_a_long_log_is_read() -> None:
    text = pasted("log", 3000) + "\n\nFind the root cause of the deadlock."
    assert len(text) > 200_000
    assert effort(text, characters=len(text)) >= 7


def test_a_tail_that_begins_within_a_fence_is_code() -> None:
    code = "\n".join(f"prove the theorem of deadlock {n}" for n in range(500))
    assert "needs thought" not in features(f"Add a docstring.\n```\n{code}\n```\n")


def test_asking_what_a_hard_thing_is_is_not_hard() -> None:
    assert effort("What is a race condition?") <= 3
    assert effort("Was ist ein Eigenwert?") <= 3
    assert effort("Find the race condition in this queue and prove that the fix is right.") >= 7


def test_accents_and_capitals_make_no_difference() -> None:
    accented = features("Wäge ab, was die Verschlüsselung bewirkt")
    assert accented == features("WAGE AB, WAS DIE VERSCHLUSSELUNG BEWIRKT")
    assert "needs thought" in accented
    assert "is a deep subject" in accented


def test_a_fact_is_asked_for_only_by_the_first_words() -> None:
    assert "asks for a fact" in features("Who is logged in?")
    assert "asks for a fact" not in features("Write a little script that says at once who is logged in")


def test_the_weights_of_the_features_add_up_to_the_score_and_the_heaviest_comes_first() -> None:
    for prompt in development():
        got = classify(ClassifiedRequest(text=prompt.text, tools=prompt.tools, images=prompt.images))
        assert got.score == pytest.approx(sum(feature.weight for feature in got.features), abs=0.01)
        weights = [abs(feature.weight) for feature in got.features]
        assert weights == sorted(weights, reverse=True)
        assert got.effort == min(10, max(1, int(got.score + 0.5)))


def test_a_feature_shows_the_words_that_it_was_found_by() -> None:
    got = classify(ClassifiedRequest(text="Our queue has a race condition; find the root cause."))
    thought = next(feature for feature in got.features if feature.name == "needs thought")
    assert "race condition" in thought.evidence
    assert "root cause" in thought.evidence


def test_it_is_surer_far_from_the_boundary_and_unsure_where_it_knows_no_word() -> None:
    near = classify(ClassifiedRequest(text="Untersuche, ob sich das lohnt."))
    far = classify(ClassifiedRequest(text="Prove the theorem by induction and find a counterexample."))
    foreign = classify(
        ClassifiedRequest(text="Почему наш сервер каждую ночь перестаёт отвечать после обновления?")
    )
    assert 0.5 <= near.confidence < far.confidence <= 1
    assert foreign.confidence <= 0.6


def test_the_table_of_features_lists_every_weight_and_no_other() -> None:
    rows = re.findall(r"^\| ([a-z ]+) \| (-?[\d.]+) \|", classifier.__doc__ or "", re.MULTILINE)
    assert {name: float(weight) for name, weight in rows} == classifier.WEIGHTS


@given(
    st.builds(
        ClassifiedRequest,
        text=st.text() | st.text(alphabet="\"'`„“«»\n{}();[]>|$\\^_ aeny,;:.0-1/+*=", max_size=5000),
        messages=st.integers(),
        characters=st.integers(),
        tools=st.booleans(),
        images=st.booleans(),
    )
)
def test_no_request_makes_it_raise_and_every_one_gets_an_effort(request_: ClassifiedRequest) -> None:
    got = classify(request_)
    assert 1 <= got.effort <= 10
    assert 0.5 <= got.confidence <= 1
    assert got == classify(request_)
