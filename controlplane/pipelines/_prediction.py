"""Structured prediction: what is refused before it is sent, and what is believed of an answer."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Sequence
from itertools import chain

import msgspec
from msgspec import Struct

from controlplane.ladder import Candidate
from rung.errors import EngineProtocolError, InvalidRequestError, NoTargetError
from rung.types import (
    ClassifyTask,
    ForecastTask,
    Predictions,
    PredictionTask,
    QuantileForecast,
    RegressTask,
)

_MOST_CLASSES = 10
_LONGEST_LABEL = 200
_MOST_ROWS = 10_000
_MOST_FEATURES = 500
_LONGEST_HORIZON = 1024
#: Of a request, and of the point forecasts of an answer. The largest request takes 60 ms of the event loop.
_MOST_NUMBERS = 250_000
_MOST_FORECAST_NUMBERS = 100_000

Rows = Sequence[Sequence[float]]


class _Answer(Struct):
    """What a worker answers; see its adapter."""

    labels: tuple[str, ...] = ()
    values: tuple[float, ...] = ()
    forecasts: tuple[tuple[float, ...], ...] = ()
    quantiles: tuple[QuantileForecast, ...] = ()


_decoder = msgspec.json.Decoder(_Answer)


def task_name(task: PredictionTask) -> str:
    """`classify`, `regress` or `forecast`."""
    return str(task.__struct_config__.tag)


_TASK_NAMES = frozenset(str(kind.__struct_config__.tag) for kind in (ClassifyTask, RegressTask, ForecastTask))


def prediction_body(task: PredictionTask) -> bytes:
    """The JSON that a worker takes, but for its name of the model.

    Raises:
        InvalidRequestError: the task cannot be done; the message says where its numbers are wrong, counting
            rows and columns from 0.
    """
    match task:
        case ClassifyTask():
            _check_labels(task)
            _check_table(task.context, len(task.labels), "labels", task.rows)
        case RegressTask():
            _check_numbers("targets", task.targets)
            _check_table(task.context, len(task.targets), "targets", task.rows)
        case ForecastTask():
            _check_forecast(task)
    return msgspec.json.encode(task)


def suited(targets: Iterator[Candidate], task: PredictionTask) -> Iterator[Candidate]:
    """Those that do this task, best first: who has tasks among its capabilities does these and no others.

    Raises:
        NoTargetError: there is none.
    """
    wanted, passed = task_name(task), []

    def able() -> Iterator[Candidate]:
        for target in targets:
            tasks = target.capabilities & _TASK_NAMES
            if not tasks or wanted in tasks:
                yield target
            else:
                passed.append(f"{target.id} does {', '.join(sorted(tasks))}")

    found = able()
    first = next(found, None)
    if first is None:
        raise NoTargetError(f"nothing that can answer now does {wanted}: {'; '.join(passed)}")
    return chain((first,), found)


def read_predictions(body: bytes, task: PredictionTask, what: str) -> Predictions:
    """A worker's answer, if it is one to this task.

    Raises:
        EngineProtocolError: it is not; `what` is the worker's name for the message.
    """
    try:
        answer = _decoder.decode(body)
    except msgspec.DecodeError as error:
        raise EngineProtocolError(
            f"{what} sent predictions that are not understood: {error}", engine=what
        ) from None
    match task:
        case ClassifyTask():
            wrong, found = _wrong_labels(answer.labels, task), Predictions(labels=answer.labels)
        case RegressTask():
            wrong, found = _wrong_count("values", answer.values, task.rows), Predictions(values=answer.values)
        case ForecastTask():
            wrong = _wrong_forecasts(answer, task)
            found = Predictions(forecasts=answer.forecasts, quantiles=answer.quantiles)
    if wrong:
        raise EngineProtocolError(f"{what} sent {wrong}", engine=what)
    return found


def _check_labels(task: ClassifyTask) -> None:
    classes = set(task.labels)
    if len(classes) > _MOST_CLASSES:
        raise InvalidRequestError(f"labels has {len(classes)} classes; there may be {_MOST_CLASSES} at most")
    if task.labels and len(classes) == 1:
        raise InvalidRequestError(
            f"labels has one class only, {task.labels[0]!r}: there is nothing to choose"
        )
    for label in classes:
        if not 0 < len(label) <= _LONGEST_LABEL:
            at = task.labels.index(label)
            raise InvalidRequestError(
                f"labels[{at}] has {len(label)} characters; it must have 1 to {_LONGEST_LABEL}"
            )


def _check_table(context: Rows, known: int, name: str, rows: Rows) -> None:
    """Raises InvalidRequestError: rows that are no table, or too large a one."""
    if not context:
        raise InvalidRequestError("context is empty; give rows of which the answer is known")
    if len(context) != known:
        raise InvalidRequestError(
            f"context has {len(context)} rows and {name} has {known}; each row needs one"
        )
    if not rows:
        raise InvalidRequestError("rows is empty; give the rows to predict")
    features = len(context[0])
    if not 0 < features <= _MOST_FEATURES:
        raise InvalidRequestError(f"context[0] has {features} features; it must have 1 to {_MOST_FEATURES}")
    for part, table in (("context", context), ("rows", rows)):
        if len(table) > _MOST_ROWS:
            raise InvalidRequestError(f"{part} has {len(table)} rows; there may be {_MOST_ROWS} at most")
        for at, row in enumerate(table):
            if len(row) != features:
                raise InvalidRequestError(
                    f"{part}[{at}] has {len(row)} features, and context[0] has {features}; "
                    "all rows must have the same"
                )
    _check_size(features * (len(context) + len(rows)))
    for part, table in (("context", context), ("rows", rows)):
        for at, row in enumerate(table):
            _check_numbers(f"{part}[{at}]", row)


def _check_forecast(task: ForecastTask) -> None:
    if not task.series:
        raise InvalidRequestError("series is empty; give at least one")
    if not 1 <= task.horizon <= _LONGEST_HORIZON:
        raise InvalidRequestError(f"horizon is {task.horizon}; it must be 1 to {_LONGEST_HORIZON}")
    _check_size(sum(map(len, task.series)))
    if task.horizon * len(task.series) > _MOST_FORECAST_NUMBERS:
        raise InvalidRequestError(
            f"{len(task.series)} series by a horizon of {task.horizon} are more than "
            f"{_MOST_FORECAST_NUMBERS} numbers to forecast; ask several times"
        )
    for at, row in enumerate(task.series):
        if not row:
            raise InvalidRequestError(f"series[{at}] is empty")
        _check_numbers(f"series[{at}]", row)


def _check_size(count: int) -> None:
    if count > _MOST_NUMBERS:
        raise InvalidRequestError(f"there are {count} numbers; there may be {_MOST_NUMBERS} at most")


def _check_numbers(name: str, row: Sequence[float]) -> None:
    """Raises InvalidRequestError for what is no finite number."""
    if not all(map(math.isfinite, row)):
        at = next(index for index, value in enumerate(row) if not math.isfinite(value))
        raise InvalidRequestError(
            f"{name}[{at}] is {row[at]}; missing values and infinities are not taken: fill them in, "
            "or leave them out"
        )


def _wrong_labels(labels: Sequence[str], task: ClassifyTask) -> str:
    known = set(task.labels)
    strange = next((label for label in labels if label not in known), None)
    if strange is not None:
        return f"the class {strange[:_LONGEST_LABEL]!r}, which is none of the task's"
    return _wrong_count("labels", labels, task.rows)


def _wrong_count(name: str, found: Collection[object], wanted: Collection[object]) -> str:
    return "" if len(found) == len(wanted) else f"{len(found)} {name} for {len(wanted)} rows"


def _wrong_forecasts(answer: _Answer, task: ForecastTask) -> str:
    levels = [each.level for each in answer.quantiles]
    if levels != sorted(set(levels)) or not all(0.0 < level < 1.0 for level in levels):
        return "quantiles whose levels are not between 0 and 1, or not in order"
    for forecasts in (answer.forecasts, *(each.forecasts for each in answer.quantiles)):
        if len(forecasts) != len(task.series):
            return f"{len(forecasts)} forecasts for {len(task.series)} series"
        for at, row in enumerate(forecasts):
            if len(row) != task.horizon:
                return f"{len(row)} steps for series {at}; {task.horizon} were asked for"
    return ""
