"""Predictions: a worker that classifies, regresses or forecasts, around TabFM, TimesFM or the like.

None of these has a server of its own: this is a worker (see `_worker`) whose work is `POST /predict`:

| `"task"` | what else is in the body | answer |
| --- | --- | --- |
| `classify` | `"context"`: rows, `"labels"`: their classes, `"rows"` | `{"labels"}`: a class for each row |
| `regress` | `"context"`: rows, `"targets"`: their numbers, `"rows"` | `{"values"}`: a number for each row |
| `forecast` | `"series"`: rows, oldest value first, `"horizon"` | `{"forecasts"}`: a row for each series |

A row is a list of finite numbers; those of `context` and `rows` have the same length. There are 10 classes at
most. Forecasts may come with `"quantiles"`: `[{"level", "forecasts"}]`, by ascending level between 0 and 1.
`"model"` is the worker's own. A task that it cannot do is the request's fault. It predicts once at a time,
within a second or so.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager

from nodeagent.engines._base import CommandLine, EngineStream, RunKind
from nodeagent.engines._openai_relay import PATHS
from nodeagent.engines._worker import WorkerAdapter
from rung.service import EngineClient
from rung.types import DeploymentSpec

#: JAX would take three quarters of the GPU at once, and give nothing back when a model is unloaded.
_JAX = {"XLA_PYTHON_CLIENT_PREALLOCATE": "false", "XLA_PYTHON_CLIENT_ALLOCATOR": "platform"}


class PredictionAdapter(WorkerAdapter):
    """Has a worker predict, once at a time."""

    def __init__(self, client: EngineClient) -> None:
        super().__init__(client, dialect="prediction")

    def command_line(self, spec: DeploymentSpec, *, listen_host: str, listen_port: int) -> CommandLine:
        """See `EngineAdapter.command_line`. Raises InvalidRequestError: it is no such deployment."""
        line = super().command_line(spec, listen_host=listen_host, listen_port=listen_port)
        return CommandLine(arguments=line.arguments, environment={**line.environment, **_JAX})

    def run(
        self, base_url: str, spec: DeploymentSpec, kind: RunKind, body: bytes, *, idle_timeout_s: float
    ) -> AbstractAsyncContextManager[EngineStream]:
        """Predict once. A worker that is busy with what a caller left is waited for.

        What it began it finishes: leaving the context early only stops listening. Raises what
        `EngineAdapter.run` and `WorkerAdapter.work` do.
        """
        if kind is not RunKind.PREDICTIONS:
            return super().run(base_url, spec, kind, body, idle_timeout_s=idle_timeout_s)
        return self._predict(base_url, spec, body, idle_timeout_s)

    @asynccontextmanager
    async def _predict(
        self, base_url: str, spec: DeploymentSpec, body: bytes, timeout_s: float
    ) -> AsyncIterator[EngineStream]:
        path = PATHS[RunKind.PREDICTIONS]
        async with await self.begin_when_idle(base_url, spec, path, body, timeout_s=timeout_s) as reply:
            yield reply
