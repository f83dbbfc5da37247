"""Structured prediction: what is refused before it is sent, and what is believed of an answer."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from typing import Any

import msgspec
import pytest

from controlplane.ladder import Candidate, TargetKind
from controlplane.pipelines._prediction import prediction_body, read_predictions, suited
from rung.errors import EngineProtocolError, InvalidRequestError, NoTargetError
from rung.types import ClassifyTask, ForecastTask, PredictionTask, QuantileForecast, RegressTask

TABLE = ((1.0, 2.0), (3.0, 4.0), (5.0, 6.0))
CLASSIFY = ClassifyTask(context=TABLE, labels=("a", "b", "a"), rows=((1.0, 1.0), (2.0, 2.0)))
REGRESS = RegressTask(context=TABLE, targets=(1.0, 2.0, 3.0), rows=((1.0, 1.0), (2.0, 2.0)))
FORECAST = ForecastTask(series=((1.0, 2.0), (3.0,)), horizon=3)
FORECASTS = [[1, 2, 3], [4, 5, 6]]


def changed(task: PredictionTask, **fields: Any) -> PredictionTask:
    return msgspec.structs.replace(task, **fields)


@pytest.mark.parametrize("task", [CLASSIFY, REGRESS, FORECAST], ids=["classify", "regress", "forecast"])
def test_a_worker_is_sent_the_task_and_nothing_else(task: PredictionTask) -> None:
    body = json.loads(prediction_body(task))
    assert body.keys() == {"task", *task.__struct_fields__}
    assert msgspec.convert(body, type(task)) == task


@pytest.mark.parametrize(
    ("task", "why"),
    [
        (changed(CLASSIFY, context=(), labels=()), "context is empty"),
        (changed(CLASSIFY, labels=("a", "b")), "context has 3 rows and labels has 2; each row needs one"),
        (changed(CLASSIFY, labels=("a", "a", "a")), "labels has one class only, 'a'"),
        (changed(CLASSIFY, labels=("a", "", "b")), r"labels\[1\] has 0 characters; it must have 1 to 200"),
        (changed(CLASSIFY, rows=()), "rows is empty"),
        (
            changed(CLASSIFY, context=((1.0, 2.0), (3.0,), (5.0, 6.0))),
            r"context\[1\] has 1 features, and context\[0\] has 2",
        ),
        (changed(CLASSIFY, rows=((1.0, 1.0), (1.0, 1.0, 1.0))), r"rows\[1\] has 3 features"),
        (changed(CLASSIFY, rows=((1.0, math.nan),)), r"rows\[0\]\[1\] is nan; missing values"),
        (changed(CLASSIFY, context=((), (), ())), r"context\[0\] has 0 features; it must have 1 to 500"),
        (changed(REGRESS, targets=(1.0, 2.0)), "context has 3 rows and targets has 2"),
        (changed(REGRESS, targets=(1.0, math.nan, 2.0)), r"targets\[1\] is nan"),
        (changed(REGRESS, context=((1.0, 2.0), (3.0, -math.inf), (5.0, 6.0))), r"context\[1\]\[1\] is -inf"),
        (changed(FORECAST, series=()), "series is empty; give at least one"),
        (changed(FORECAST, series=((1.0,), ())), r"series\[1\] is empty"),
        (changed(FORECAST, series=((1.0,), (2.0, math.nan))), r"series\[1\]\[1\] is nan; missing values"),
        (changed(FORECAST, horizon=0), "horizon is 0; it must be 1 to 1024"),
        (changed(FORECAST, horizon=1025), "horizon is 1025; it must be 1 to 1024"),
        (changed(FORECAST, series=((1.0,),) * 100, horizon=1001), "100 series by a horizon of 1001 are more"),
    ],
)
def test_what_cannot_be_done_is_refused_with_its_place(task: PredictionTask, why: str) -> None:
    with pytest.raises(InvalidRequestError, match=why):
        prediction_body(task)


def test_there_are_ten_classes_at_most() -> None:
    ten = tuple("abcdefghij")
    rows = ((1.0,),) * 11
    assert prediction_body(ClassifyTask(context=rows[:10], labels=ten, rows=rows))
    with pytest.raises(InvalidRequestError, match="labels has 11 classes; there may be 10 at most"):
        prediction_body(ClassifyTask(context=rows, labels=(*ten, "k"), rows=rows))


@pytest.mark.parametrize(
    ("task", "why"),
    [
        (RegressTask(context=((1.0,),), targets=(1.0,), rows=((1.0,),) * 10_001), "rows has 10001 rows"),
        (
            RegressTask(context=((1.0,) * 501,), targets=(1.0,), rows=((1.0,) * 501,)),
            r"context\[0\] has 501 features; it must have 1 to 500",
        ),
        (
            RegressTask(context=((1.0,) * 500,), targets=(1.0,), rows=((1.0,) * 500,) * 500),
            "there are 250500 numbers; there may be 250000 at most",
        ),
        (ForecastTask(series=((1.0,) * 250_001,), horizon=1), "there are 250001 numbers"),
    ],
)
def test_sizes_are_bounded(task: PredictionTask, why: str) -> None:
    with pytest.raises(InvalidRequestError, match=why):
        prediction_body(task)


@pytest.mark.parametrize("rows", [10_000])
def test_the_largest_request_fits_into_a_message_to_an_agent(rows: int) -> None:
    number = -1.2345678901234567e-300
    context = ((number,) * 24,) * rows
    body = prediction_body(RegressTask(context=context, targets=(number,) * rows, rows=context[:416]))
    assert len(body) < 16 * 1024 * 1024


def answered(answer: object, task: PredictionTask) -> Any:
    return read_predictions(json.dumps(answer).encode(), task, "tabfm-1")


def test_an_answer_to_each_task() -> None:
    assert answered({"labels": ["b", "a"]}, CLASSIFY).labels == ("b", "a")
    assert answered({"values": [1, 2.5]}, REGRESS).values == (1.0, 2.5)
    quantiles = [{"level": 0.1, "forecasts": FORECASTS}, {"level": 0.9, "forecasts": FORECASTS}]
    found = answered({"forecasts": FORECASTS, "quantiles": quantiles, "took_s": 3}, FORECAST)
    rows = ((1.0, 2.0, 3.0), (4.0, 5.0, 6.0))
    assert found.forecasts == rows
    assert found.quantiles == (
        QuantileForecast(level=0.1, forecasts=rows),
        QuantileForecast(level=0.9, forecasts=rows),
    )


@pytest.mark.parametrize(
    ("answer", "task", "why"),
    [
        ("done", CLASSIFY, "predictions that are not understood"),
        ({}, CLASSIFY, "0 labels for 2 rows"),
        ({"labels": ["a"]}, CLASSIFY, "1 labels for 2 rows"),
        ({"labels": ["a", "z"]}, CLASSIFY, "the class 'z', which is none of the task's"),
        ({"values": [1, 2, 3]}, REGRESS, "3 values for 2 rows"),
        ({"values": [1, None]}, REGRESS, "not understood.*null"),
        ({"forecasts": [[1, 2, 3]]}, FORECAST, "1 forecasts for 2 series"),
        ({"forecasts": [[1, 2, 3], [4]]}, FORECAST, "1 steps for series 1; 3 were asked for"),
        (
            {"forecasts": FORECASTS, "quantiles": [{"level": 0.5, "forecasts": [[1]]}]},
            FORECAST,
            "1 forecasts for 2 series",
        ),
        (
            {"forecasts": FORECASTS, "quantiles": [{"level": 1.0, "forecasts": FORECASTS}]},
            FORECAST,
            "levels are not between 0 and 1",
        ),
        (
            {
                "forecasts": FORECASTS,
                "quantiles": [
                    {"level": 0.9, "forecasts": FORECASTS},
                    {"level": 0.1, "forecasts": FORECASTS},
                ],
            },
            FORECAST,
            "not in order",
        ),
    ],
)
def test_an_answer_to_something_else_is_not_believed(answer: object, task: PredictionTask, why: str) -> None:
    with pytest.raises(EngineProtocolError, match=f"tabfm-1 sent .*{why}"):
        answered(answer, task)


def targets(*capabilities: Sequence[str]) -> Iterator[Candidate]:
    for at, each in enumerate(capabilities):
        yield Candidate(
            id=f"d{at}", kind=TargetKind.DEPLOYMENT, owned=True, capabilities=frozenset(["prediction", *each])
        )


def test_who_has_tasks_among_its_capabilities_does_these_and_no_others() -> None:
    found = suited(targets(["classify", "regress"], ["forecast"], []), FORECAST)
    assert [each.id for each in found] == ["d1", "d2"]
    found = suited(targets(["classify", "regress"], ["forecast"], []), CLASSIFY)
    assert [each.id for each in found] == ["d0", "d2"]


def test_a_task_that_nobody_does_is_refused_with_what_they_do() -> None:
    with pytest.raises(NoTargetError, match=r"does forecast: d0 does classify, regress; d1 does classify$"):
        suited(targets(["classify", "regress"], ["classify"]), FORECAST)


def test_later_targets_are_not_looked_at_before_they_are_needed() -> None:
    looked = []

    def lazily() -> Iterator[Candidate]:
        for each in targets([], []):
            looked.append(each.id)
            yield each

    found = suited(lazily(), FORECAST)
    assert next(found).id == "d0"
    assert looked == ["d0"]
