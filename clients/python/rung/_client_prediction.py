"""Structured prediction: what a client has for it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from rung import codec, v1
from rung._client_calls import Connection
from rung.errors import InvalidRequestError
from rung.types import (
    ClassifyTask,
    ForecastTask,
    Policy,
    Predictions,
    PredictionTask,
    RegressTask,
)

#: A model may have to start before it can predict.
PREDICT_TIMEOUT_S = 600.0

#: Rows of numbers: of lists, tuples, arrays.
Rows = Iterable[Iterable[float]]


class PredictionCalls:
    """The part of a client that has things predicted."""

    _connection: Connection

    async def predict(
        self,
        task: PredictionTask,
        *,
        model: str = "",
        policy: Policy = Policy(),  # noqa: B008 - frozen
        request_id: str = "",
        timeout_s: float = PREDICT_TIMEOUT_S,
    ) -> Predictions:
        """Have a task done in one answer.

        Args:
            task: what to predict, from what.
            model: a name from `list_models`; empty leaves it to whoever can do the task.
            policy: where it may go.
            request_id: your own id for it.
            timeout_s: a model that sleeps has to wake within it, too.

        Raises:
            InvalidRequestError: the numbers are at fault; the message says which, counted from 0.
            UnknownModelError, NoTargetError: nobody can do it.
        """
        request = v1.PredictRequest(request_id=request_id, model=model, policy=codec.policy_to_proto(policy))
        codec.write_prediction_task(task, request)
        response = await self._connection.unary(
            self._connection.stubs.inference.Predict, request, timeout_s=timeout_s
        )
        return codec.predictions_from_proto(response)

    async def classify(
        self,
        context: Rows,
        labels: Iterable[str],
        rows: Rows,
        *,
        model: str = "",
        policy: Policy = Policy(),  # noqa: B008 - frozen
    ) -> tuple[str, ...]:
        """A class for each of `rows`, from known rows and their classes, 2 to 10 of them. See `predict`."""
        task = ClassifyTask(context=_rows(context), labels=tuple(labels), rows=_rows(rows))
        return (await self.predict(task, model=model, policy=policy)).labels

    async def regress(
        self,
        context: Rows,
        targets: Iterable[float],
        rows: Rows,
        *,
        model: str = "",
        policy: Policy = Policy(),  # noqa: B008 - frozen
    ) -> tuple[float, ...]:
        """A number for each of `rows`, from known rows and their numbers. See `predict`."""
        task = RegressTask(context=_rows(context), targets=_row(targets), rows=_rows(rows))
        return (await self.predict(task, model=model, policy=policy)).values

    async def forecast(
        self,
        series: Sequence[float] | Sequence[Sequence[float]],
        horizon: int,
        *,
        model: str = "",
        policy: Policy = Policy(),  # noqa: B008 - frozen
    ) -> Predictions:
        """One series or several, continued by `horizon` steps, with quantiles if the model has them.

        Args:
            series: the oldest value first; several may have different lengths.
            horizon: steps, 1 to 1024.
            model: as `predict`.
            policy: as `predict`.
        """
        task = ForecastTask(series=_series(series), horizon=horizon)
        return await self.predict(task, model=model, policy=policy)


def _row(values: Iterable[float]) -> tuple[float, ...]:
    return tuple(map(float, values))


def _rows(rows: Rows) -> tuple[tuple[float, ...], ...]:
    return tuple(map(_row, rows))


def _series(series: Sequence[float] | Sequence[Sequence[float]]) -> tuple[tuple[float, ...], ...]:
    rows = [each for each in series if isinstance(each, Iterable)]
    numbers = [each for each in series if not isinstance(each, Iterable)]
    if rows and numbers:
        raise InvalidRequestError("series has numbers and series side by side; give one series, or several")
    return _rows(rows) if rows else (_row(numbers),)
