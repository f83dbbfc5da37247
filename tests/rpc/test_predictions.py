"""Predictions over HTTP and by the SDK, with real jobs, pipelines and connections."""

from __future__ import annotations

import asyncio
import math
from collections.abc import AsyncIterator
from typing import Any

import pytest
from msgspec.structs import replace

from controlplane.ladder import Modality, RungSpec, build_ladder
from rung import AsyncClient, Client
from rung.errors import InvalidRequestError, UnknownModelError
from rung.types import (
    ClassifyTask,
    FailureReason,
    ForecastTask,
    JobState,
    NodeOwnership,
    Policy,
    Predictions,
    QuantileForecast,
    RegressTask,
    Residency,
    Served,
)
from tests.fakes.api_server import an_api_server
from tests.fakes.fleet_view import NODE, deployment_view
from tests.fakes.gateway import Plane, a_plane

FORECAST: dict[str, Any] = {"task": "forecast", "series": [[1, 2, 3]], "horizon": 2}
CLASSIFY: dict[str, Any] = {
    "task": "classify",
    "context": [[1, 2], [3, 4]],
    "labels": ["a", "b"],
    "rows": [[1, 1]],
}


@pytest.fixture
async def plane() -> AsyncIterator[Plane]:
    async with a_plane() as plane:
        serve(plane, oracle=("prediction",))
        yield plane


def serve(plane: Plane, **capabilities: tuple[str, ...]) -> None:
    """Have these deployments, all of them at the plane's engine."""
    plane.fleet.show(
        *(
            deployment_view(name, plane.engine.url, model=name, capabilities=each, slots=1)
            for name, each in capabilities.items()
        )
    )


async def test_a_forecast_without_a_ladder_or_a_model(plane: Plane) -> None:
    plane.engine.predictions = {
        "forecasts": [[4, 5]],
        "quantiles": [{"level": 0.5, "forecasts": [[4, 5]]}],
    }
    status, answer, headers = await plane.post("/v1/predictions", FORECAST, **{"X-Request-Id": "mine"})

    assert status == 200
    job_id = headers["X-Rung-Job"]
    assert answer == {
        "task": "forecast",
        "forecasts": [[4.0, 5.0]],
        "quantiles": [{"level": 0.5, "forecasts": [[4.0, 5.0]]}],
        "rung": {
            "job": job_id,
            "requested": "",
            "target": "oracle",
            "node": "workstation",
            "model": "oracle-served",
        },
    }
    assert (headers["X-Rung-Target"], headers["X-Request-Id"]) == ("oracle", "mine")
    assert plane.engine.bodies == [FORECAST | {"model": "oracle-served"}]
    job = await plane.ended(job_id)
    assert (job.kind, job.state, job.request_id) == ("prediction", JobState.DONE, "mine")
    assert plane.slots.load("oracle") == (0, 0)


async def test_each_task_has_its_own_answer(plane: Plane) -> None:
    plane.engine.predictions = {"labels": ["b"]}
    _, answer, _ = await plane.post("/v1/predictions", CLASSIFY | {"model": "oracle"})
    assert (answer["labels"], answer["rung"]["requested"]) == (["b"], "oracle")
    plane.engine.predictions = {"values": [2.5]}
    regress = {"task": "regress", "context": [[1], [2]], "targets": [1, 2], "rows": [[3]]}
    _, answer, _ = await plane.post("/v1/predictions", regress)
    assert answer.keys() == {"task", "values", "rung"}
    assert answer["values"] == [2.5]


@pytest.mark.parametrize("rung_for_predictions", [False, True])
async def test_a_ladder_needs_no_rung_for_predictions_and_may_have_one(rung_for_predictions: bool) -> None:
    rungs = [RungSpec(name="all", chain="chat")]
    chains = {"chat": ["tiny"]}
    if rung_for_predictions:
        rungs.append(RungSpec(name="numbers", modality=Modality.PREDICTION, chain="numbers"))
        chains["numbers"] = ["oracle"]
    async with a_plane(ladder=build_ladder(rungs, chains)) as plane:
        serve(plane, tiny=("chat",), oracle=("prediction",))
        plane.engine.predictions = {"forecasts": [[4, 5]]}
        status, answer, _ = await plane.post("/v1/predictions", FORECAST)
        assert (status, answer["rung"]["target"]) == (200, "oracle")


async def test_a_task_goes_to_who_does_it(plane: Plane) -> None:
    serve(plane, tabfm=("prediction", "classify", "regress"), timesfm=("prediction", "forecast"))
    plane.engine.predictions = {"forecasts": [[4, 5]]}
    _, answer, _ = await plane.post("/v1/predictions", FORECAST)
    assert answer["rung"]["target"] == "timesfm"
    plane.engine.predictions = {"labels": ["a"]}
    _, answer, _ = await plane.post("/v1/predictions", CLASSIFY)
    assert answer["rung"]["target"] == "tabfm"

    status, answer, _ = await plane.post("/v1/predictions", FORECAST | {"model": "tabfm"})
    assert status == 503
    assert "does forecast: tabfm does classify, regress" in answer["error"]["message"]


async def test_what_is_local_only_does_not_leave_owned_hardware(plane: Plane) -> None:
    rented = replace(NODE, id="rented", ownership=NodeOwnership.RENTED)
    plane.fleet.show(
        deployment_view("far", plane.engine.url, model="far", node=rented, capabilities=("prediction",))
    )
    plane.engine.predictions = {"forecasts": [[4, 5]]}
    assert (await plane.post("/v1/predictions", FORECAST))[0] == 200
    plane.engine.bodies.clear()
    for local_only in (FORECAST | {"local_only": True}, FORECAST | {"local_only": True, "model": "far"}):
        status, answer, _ = await plane.post("/v1/predictions", local_only)
        assert (status, answer["error"]["code"]) == (503, "no_target")
    status, _, _ = await plane.post("/v1/predictions", FORECAST, **{"X-Rung-Local-Only": "true"})
    assert status == 503
    assert plane.engine.bodies == []


@pytest.mark.parametrize(
    ("body", "status", "why"),
    [
        ({"task": "guess"}, 400, "task is 'guess'; it must be one of classify, regress, forecast"),
        ({"series": [[1]]}, 400, "task is ''; it must be one of"),
        (FORECAST | {"horizont": 3}, 400, "there is no field 'horizont'; forecast has series, horizon"),
        ({"task": "forecast", "series": [[1]]}, 400, "missing required field `horizon`"),
        (FORECAST | {"horizon": 0}, 400, "horizon is 0; it must be 1 to 1024"),
        (CLASSIFY | {"rows": [[1, 1], [1, None]]}, 400, "Expected `float`, got `null` - at `$.rows[1][1]`"),
        (CLASSIFY | {"rows": [[1]]}, 400, "rows[0] has 1 features, and context[0] has 2"),
        (CLASSIFY | {"labels": ["a", "b", "a"]}, 400, "context has 2 rows and labels has 3"),
        (FORECAST | {"model": "nope"}, 404, "there is no model 'nope'"),
    ],
)
async def test_what_cannot_be_done_is_refused_before_an_engine_is_asked(
    plane: Plane, body: dict[str, Any], status: int, why: str
) -> None:
    found, answer, headers = await plane.post("/v1/predictions", body)
    assert found == status
    assert why in answer["error"]["message"]
    assert "X-Rung-Job" not in headers
    assert plane.engine.bodies == []


async def test_nobody_predicts_where_nobody_can(plane: Plane) -> None:
    serve(plane, tiny=("chat",))
    status, answer, _ = await plane.post("/v1/predictions", FORECAST)
    assert (status, answer["error"]["message"].split(";")[0]) == (404, "no deployment can do prediction")
    status, answer, _ = await plane.post("/v1/predictions", FORECAST | {"model": "tiny"})
    assert status == 400
    assert "tiny cannot do prediction" in answer["error"]["message"]


async def test_an_answer_to_something_else_fails_the_job_and_tells_the_circuit(plane: Plane) -> None:
    plane.engine.predictions = {"forecasts": [[4]]}
    status, answer, _ = await plane.post("/v1/predictions", FORECAST)
    assert status == 502
    assert "oracle sent 1 steps for series 0; 2 were asked for" in answer["error"]["message"]
    (job,) = await plane.jobs.list(page_size=5)
    assert (job.state, job.failure_reason) == (JobState.FAILED, FailureReason.ENGINE_PROTOCOL)
    assert plane.slots.load("oracle") == (0, 0)


async def test_one_that_fails_is_followed_by_the_next(plane: Plane) -> None:
    plane.fleet.show(
        deployment_view("away", "http://127.0.0.1:1", model="a", capabilities=("prediction",), external=True),
        deployment_view(
            "near", plane.engine.url, model="b", capabilities=("prediction",), residency=Residency.ASLEEP
        ),
    )
    plane.fleet.awake_view = deployment_view(
        "near", plane.engine.url, model="b", capabilities=("prediction",)
    )
    plane.engine.predictions = {"forecasts": [[4, 5]]}
    status, answer, _ = await plane.post("/v1/predictions", FORECAST)
    assert (status, answer["rung"]["target"]) == (200, "near")


async def test_a_caller_that_goes_away_cancels_its_job(plane: Plane) -> None:
    call = asyncio.create_task(plane.post("/v1/predictions", FORECAST))
    await plane.engine.started.wait()
    (running,) = await plane.jobs.list(page_size=5)
    call.cancel()
    await asyncio.gather(call, return_exceptions=True)
    job = await plane.ended(running.id)
    assert job.state is JobState.CANCELLED
    async with asyncio.timeout(5):
        await plane.engine.broken_off.wait()
    assert plane.slots.load("oracle") == (0, 0)


async def test_a_job_that_is_cancelled_answers_its_caller(plane: Plane) -> None:
    call = asyncio.create_task(plane.post("/v1/predictions", FORECAST))
    await plane.engine.started.wait()
    (running,) = await plane.jobs.list(page_size=5)
    await plane.jobs.cancel(running.id, "somebody")
    status, answer, _ = await call
    assert "cancelled by somebody" in answer["error"]["message"]
    assert status >= 400


async def test_both_clients_predict() -> None:
    quantiles = (QuantileForecast(level=0.9, forecasts=((6.0,),)),)
    served = Served("timesfm", "timesfm-1", "box", "timesfm-2.5")
    everything = Predictions(
        labels=("b",), values=(2.5,), forecasts=((4.0,),), quantiles=quantiles, served=served, job_id="job-1"
    )
    table, rows = [[1, 2], [3, 4]], [[5, 6]]
    as_tuples: dict[str, Any] = {"context": ((1.0, 2.0), (3.0, 4.0)), "rows": ((5.0, 6.0),)}
    one, several = (
        ForecastTask(series=((1.0, 2.0),), horizon=1),
        ForecastTask(series=((1.0,), (2.0, 3.0)), horizon=1),
    )
    async with an_api_server() as server:
        server.pipelines.predictions = everything
        address = f"127.0.0.1:{server.server.port}"
        async with AsyncClient(address) as client:
            policy = Policy(local_only=True)
            assert await client.predict(one, model="timesfm", policy=policy, request_id="r") == everything
            assert await client.classify(table, ["a", "b"], rows, model="tabfm") == ("b",)
            assert await client.regress(table, [1, 2], rows) == (2.5,)
            assert await client.forecast([1, 2], 1) == everything
            assert await client.forecast([[1], [2, 3]], 1) == everything
            with pytest.raises(InvalidRequestError, match="side by side"):
                await client.forecast([1, [2]], 1)  # type: ignore[arg-type]  # on purpose

        def blocking() -> list[object]:
            with Client(address) as client:
                return [
                    client.predict(one, model="timesfm", policy=policy, request_id="r"),
                    client.classify(table, ["a", "b"], rows, model="tabfm"),
                    client.regress(table, [1, 2], rows),
                    client.forecast([1, 2], 1),
                    client.forecast([[1], [2, 3]], 1),
                ]

        assert await asyncio.to_thread(blocking) == [everything, ("b",), (2.5,), everything, everything]
        asked = server.pipelines.predicted
        server.pipelines.error = UnknownModelError("there is no model 'x'", model="x")
        async with AsyncClient(address) as client:
            with pytest.raises(UnknownModelError, match="no model 'x'"):
                await client.forecast([math.pi], 1, model="x")
    assert asked[:5] == asked[5:10]
    assert asked[:5] == [
        (one, "timesfm", policy, "r"),
        (ClassifyTask(labels=("a", "b"), **as_tuples), "tabfm", Policy(), ""),
        (RegressTask(targets=(1.0, 2.0), **as_tuples), "", Policy(), ""),
        (one, "", Policy(), ""),
        (several, "", Policy(), ""),
    ]
