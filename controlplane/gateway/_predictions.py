"""`POST /v1/predictions`: classes, numbers or series, predicted from examples."""

from __future__ import annotations

from typing import Any

import msgspec
from aiohttp import web
from msgspec import Struct
from msgspec.structs import replace

from controlplane.gateway._openai import read_policy, read_request_id
from controlplane.pipelines import Pipelines
from rung.errors import InvalidRequestError
from rung.types import ClassifyTask, ForecastTask, Predictions, PredictionTask, RegressTask


class _Envelope(Struct):
    """What a body has beside its task."""

    task: str = ""
    model: str = ""
    local_only: bool = False


_TASKS = {str(kind.__struct_config__.tag): kind for kind in (ClassifyTask, RegressTask, ForecastTask)}
_envelope_decoder = msgspec.json.Decoder(_Envelope)
_task_decoder: msgspec.json.Decoder[PredictionTask] = msgspec.json.Decoder(PredictionTask)
_names_decoder = msgspec.json.Decoder(dict[str, msgspec.Raw])


class PredictionRoutes:
    """The handler of `/v1/predictions`."""

    def __init__(self, pipelines: Pipelines) -> None:
        self._pipelines = pipelines

    async def create(self, request: web.Request) -> web.StreamResponse:
        """`POST /v1/predictions`.

        The body has `task`: `classify`, `regress` or `forecast`, and the fields of that; `model` and
        `local_only` may be given, too. The answer has what was predicted, and as `rung` who it is from.
        """
        envelope, task = _read(await request.read())
        policy = read_policy(request)
        found = await self._pipelines.predict(
            task,
            model=envelope.model,
            policy=replace(policy, local_only=policy.local_only or envelope.local_only),
            request_id=read_request_id(request),
        )
        return _answer(request, envelope, found)


def _read(body: bytes) -> tuple[_Envelope, PredictionTask]:
    """Raises InvalidRequestError: no JSON, no such task, or no such field."""
    try:
        envelope = _envelope_decoder.decode(body)
        kind = _TASKS.get(envelope.task)
        if kind is None:
            raise InvalidRequestError(f"task is {envelope.task!r}; it must be one of {', '.join(_TASKS)}")
        known = {*_Envelope.__struct_fields__, *kind.__struct_fields__}
        strange = next((name for name in _names_decoder.decode(body) if name not in known), None)
        if strange is not None:
            fields = ", ".join(kind.__struct_fields__)
            raise InvalidRequestError(f"there is no field {strange!r}; {envelope.task} has {fields}")
        return envelope, _task_decoder.decode(body)
    except msgspec.ValidationError as error:
        # A path such as $.rows[3][1] says which row and column; null is how JSON writes a missing value.
        raise InvalidRequestError(f"the request body is not valid: {error}") from None
    except msgspec.DecodeError as error:
        raise InvalidRequestError(f"the request body is not JSON: {error}") from None


def _answer(request: web.Request, envelope: _Envelope, found: Predictions) -> web.Response:
    served = found.served
    headers = {"X-Rung-Job": found.job_id}
    request_id = read_request_id(request)
    if request_id:
        headers["X-Request-Id"] = request_id
    rung: dict[str, str] = {"job": found.job_id, "requested": envelope.model}
    if served is not None:
        headers |= {
            "X-Rung-Requested": served.requested,
            "X-Rung-Target": served.target,
            "X-Rung-Node": served.node,
            "X-Rung-Model": served.model,
        }
        rung |= {"target": served.target, "node": served.node, "model": served.model}
    given: dict[str, Any] = {
        "labels": found.labels,
        "values": found.values,
        "forecasts": found.forecasts,
        "quantiles": found.quantiles,
    }
    body = {"task": envelope.task, **{name: value for name, value in given.items() if value}, "rung": rung}
    return web.Response(body=msgspec.json.encode(body), content_type="application/json", headers=headers)
