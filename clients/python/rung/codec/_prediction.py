"""Structured prediction."""

from __future__ import annotations

from collections.abc import Iterable

from rung import v1
from rung.codec._job import served_from_proto, served_to_proto
from rung.types import (
    ClassifyTask,
    ForecastTask,
    Predictions,
    PredictionTask,
    QuantileForecast,
    RegressTask,
)
from rung.types._prediction import Row


def write_prediction_task(value: PredictionTask, request: v1.PredictRequest) -> None:
    """Set the task of a request."""
    match value:
        case ClassifyTask():
            classify = v1.ClassifyTask(
                context=_rows(value.context), labels=value.labels, rows=_rows(value.rows)
            )
            request.classify.CopyFrom(classify)
        case RegressTask():
            regress = v1.RegressTask(
                context=_rows(value.context), targets=value.targets, rows=_rows(value.rows)
            )
            request.regress.CopyFrom(regress)
        case ForecastTask():
            request.forecast.CopyFrom(v1.ForecastTask(series=_rows(value.series), horizon=value.horizon))


def read_prediction_task(request: v1.PredictRequest) -> PredictionTask | None:
    """The task of a request; None if it has none that this version knows."""
    match request.WhichOneof("task"):
        case "classify":
            classify = request.classify
            return ClassifyTask(
                context=_tuples(classify.context), labels=tuple(classify.labels), rows=_tuples(classify.rows)
            )
        case "regress":
            regress = request.regress
            return RegressTask(
                context=_tuples(regress.context), targets=tuple(regress.targets), rows=_tuples(regress.rows)
            )
        case "forecast":
            forecast = request.forecast
            return ForecastTask(series=_tuples(forecast.series), horizon=forecast.horizon)
        case _:
            return None


def predictions_to_proto(value: Predictions) -> v1.PredictResponse:
    """Encode predictions."""
    return v1.PredictResponse(
        labels=value.labels,
        values=value.values,
        forecasts=_rows(value.forecasts),
        quantiles=[
            v1.QuantileForecast(level=each.level, forecasts=_rows(each.forecasts)) for each in value.quantiles
        ],
        served=served_to_proto(value.served) if value.served else None,
        job_id=value.job_id,
    )


def predictions_from_proto(message: v1.PredictResponse) -> Predictions:
    """Decode predictions."""
    return Predictions(
        labels=tuple(message.labels),
        values=tuple(message.values),
        forecasts=_tuples(message.forecasts),
        quantiles=tuple(
            QuantileForecast(level=each.level, forecasts=_tuples(each.forecasts))
            for each in message.quantiles
        ),
        served=served_from_proto(message.served) if message.HasField("served") else None,
        job_id=message.job_id,
    )


def _rows(rows: Iterable[Row]) -> list[v1.Row]:
    return [v1.Row(features=row) for row in rows]


def _tuples(rows: Iterable[v1.Row]) -> tuple[Row, ...]:
    return tuple(tuple(row.features) for row in rows)
