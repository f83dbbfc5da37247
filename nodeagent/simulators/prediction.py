"""A simulated worker of predictions: python -m nodeagent.simulators.prediction --model timesfm-2.5-0.2b.

It is a worker (see `_worker`) with small models of its own (see `_little_models`). A model with `timesfm` in
its name forecasts and nothing else, with quantiles; one with `tabfm` classifies and regresses; any other one
does all three. `cut_mid_stream` gives out fewer predictions than were asked for.
"""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Awaitable, Callable, Sequence

import msgspec
from aiohttp import web

from nodeagent.simulators import _little_models
from nodeagent.simulators._faults import Fault
from nodeagent.simulators._http import json_response
from nodeagent.simulators._worker import RefusedError, SimulatedWorker, worker_main
from rung.types import ClassifyTask, ForecastTask, PredictionTask, RegressTask

_PREDICT_S = 0.5
_MOST_CLASSES = 10
_LEVELS = (0.1, 0.5, 0.9)
_TASKS: dict[str, tuple[type, ...]] = {"timesfm": (ForecastTask,), "tabfm": (ClassifyTask, RegressTask)}

Answer = dict[str, object]


class PredictionWorker(SimulatedWorker):
    """Its one prediction at a time."""

    engine = "predictions"
    work_path = "/predict"
    work_bytes = 500_000_000

    def read(self, body: bytes) -> Callable[[], Awaitable[web.Response]]:
        """See `SimulatedWorker.read`."""
        try:
            task: PredictionTask = msgspec.json.decode(body, type=PredictionTask)
        except msgspec.DecodeError as error:
            raise RefusedError(400, str(error)) from error
        name = self.model.lower()
        can = next((tasks for part, tasks in _TASKS.items() if part in name), None)
        if can is not None and not isinstance(task, can):
            raise RefusedError(400, f"{self.model} does not {_name(task)}")
        _check(task)
        return lambda: self._predict(task)

    async def _predict(self, task: PredictionTask) -> web.Response:
        await asyncio.sleep(_PREDICT_S / self.settings.speed)
        return json_response(_answer(task, cut=Fault.CUT_MID_STREAM in self.faults))


def _check(task: PredictionTask) -> None:
    """What a real model would trip over. Raises RefusedError."""
    if isinstance(task, ForecastTask):
        if task.horizon < 1 or not task.series or not all(task.series):
            raise RefusedError(400, "there is nothing to forecast")
        return
    known = len(task.labels if isinstance(task, ClassifyTask) else task.targets)
    if not task.context or len(task.context) != known:
        raise RefusedError(400, f"{len(task.context)} known rows, and {known} of what is known of them")
    if len({len(row) for row in (*task.context, *task.rows)}) != 1:
        raise RefusedError(400, "rows have different lengths")
    if isinstance(task, ClassifyTask) and len(set(task.labels)) > _MOST_CLASSES:
        raise RefusedError(400, f"more than {_MOST_CLASSES} classes")


def _answer(task: PredictionTask, *, cut: bool) -> Answer:
    keep = -1 if cut else None
    match task:
        case ClassifyTask():
            return {"labels": _little_models.classify(task.context, task.labels, task.rows)[:keep]}
        case RegressTask():
            return {"values": _little_models.regress(task.context, task.targets, task.rows)[:keep]}
        case ForecastTask():
            found = [_little_models.forecast(series, task.horizon) for series in task.series]
            quantiles = [
                {"level": level, "forecasts": [each.quantile(level) for each in found]} for level in _LEVELS
            ]
            return {"forecasts": [each.values for each in found][:keep], "quantiles": quantiles}


def _name(task: PredictionTask) -> str:
    return str(task.__struct_config__.tag)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the simulated engine; returns the exit code."""
    return worker_main(PredictionWorker, "prediction_worker.py", __doc__, arguments)


if __name__ == "__main__":
    sys.exit(main())
