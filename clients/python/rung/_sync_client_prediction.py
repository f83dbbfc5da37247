"""The part of a blocking client that has things predicted."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from rung._client import AsyncClient
from rung._client_prediction import PREDICT_TIMEOUT_S, Rows
from rung._sync_calls import LoopThread
from rung.types import Policy, Predictions, PredictionTask


class SyncPredictionCalls:
    """What `PredictionCalls` has, method by method, without `await`."""

    _client: AsyncClient
    _thread: LoopThread

    def predict(
        self,
        task: PredictionTask,
        *,
        model: str = "",
        policy: Policy = Policy(),  # noqa: B008 - frozen
        request_id: str = "",
        timeout_s: float = PREDICT_TIMEOUT_S,
    ) -> Predictions:
        """See `AsyncClient.predict`."""
        return self._thread.run(
            self._client.predict(task, model=model, policy=policy, request_id=request_id, timeout_s=timeout_s)
        )

    def classify(
        self,
        context: Rows,
        labels: Iterable[str],
        rows: Rows,
        *,
        model: str = "",
        policy: Policy = Policy(),  # noqa: B008 - frozen
    ) -> tuple[str, ...]:
        """See `AsyncClient.classify`."""
        return self._thread.run(self._client.classify(context, labels, rows, model=model, policy=policy))

    def regress(
        self,
        context: Rows,
        targets: Iterable[float],
        rows: Rows,
        *,
        model: str = "",
        policy: Policy = Policy(),  # noqa: B008 - frozen
    ) -> tuple[float, ...]:
        """See `AsyncClient.regress`."""
        return self._thread.run(self._client.regress(context, targets, rows, model=model, policy=policy))

    def forecast(
        self,
        series: Sequence[float] | Sequence[Sequence[float]],
        horizon: int,
        *,
        model: str = "",
        policy: Policy = Policy(),  # noqa: B008 - frozen
    ) -> Predictions:
        """See `AsyncClient.forecast`."""
        return self._thread.run(self._client.forecast(series, horizon, model=model, policy=policy))
