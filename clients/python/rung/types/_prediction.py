"""Structured prediction: classes, numbers and series, predicted from examples."""

from __future__ import annotations

from typing import TypeAlias

from msgspec import Struct

from rung.types._job import Served

#: Numbers of one record, or of one series with the oldest first.
Row: TypeAlias = tuple[float, ...]


class ClassifyTask(Struct, frozen=True, kw_only=True, tag="classify", tag_field="task"):
    """Choose a class for each of `rows`, from `context` with its `labels`."""

    context: tuple[Row, ...]
    labels: tuple[str, ...]
    rows: tuple[Row, ...]


class RegressTask(Struct, frozen=True, kw_only=True, tag="regress", tag_field="task"):
    """Estimate a number for each of `rows`, from `context` with its `targets`."""

    context: tuple[Row, ...]
    targets: Row
    rows: tuple[Row, ...]


class ForecastTask(Struct, frozen=True, kw_only=True, tag="forecast", tag_field="task"):
    """Continue each series by `horizon` steps."""

    series: tuple[Row, ...]
    horizon: int


PredictionTask: TypeAlias = ClassifyTask | RegressTask | ForecastTask


class QuantileForecast(Struct, frozen=True, kw_only=True):
    """The values that series stay below with the probability `level`; one row a series, in their order."""

    level: float
    forecasts: tuple[Row, ...]


class Predictions(Struct, frozen=True, kw_only=True):
    """What was predicted, in the order of the rows or series that were given.

    Attributes:
        labels: classes; of a `ClassifyTask`.
        values: numbers; of a `RegressTask`.
        forecasts: one a series, each as long as the horizon; of a `ForecastTask`.
        quantiles: how sure the forecasts are, by ascending level; empty if the model does not say.
        served: who answered.
        job_id: job under which it was done.
    """

    labels: tuple[str, ...] = ()
    values: Row = ()
    forecasts: tuple[Row, ...] = ()
    quantiles: tuple[QuantileForecast, ...] = ()
    served: Served | None = None
    job_id: str = ""
