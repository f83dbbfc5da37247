"""InferenceService over real gRPC, and what holds of every RPC."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import TYPE_CHECKING, Any

import grpc
import grpc.aio
import pytest
from google.protobuf.descriptor import MethodDescriptor
from google.protobuf.descriptor_pool import Default
from google.protobuf.duration_pb2 import Duration
from google.protobuf.message_factory import GetMessageClass

from controlplane.api import ACCESS, SERVICE_NAMES
from rung import codec, v1
from rung.errors import (
    DrainingError,
    InvalidRequestError,
    NotImplementedYetError,
    OutOfRangeError,
    RungError,
    UnknownJobError,
    UnknownModelError,
)
from rung.service import add_service
from rung.transport import DETAILS_TRAILER, error_from_rpc
from rung.types import (
    ForecastTask,
    Job,
    JobCancelled,
    JobDone,
    JobKind,
    JobState,
    Model,
    PhaseProgress,
    Policy,
    Predictions,
    QuantileForecast,
    Served,
    TokenDelta,
)
from tests.fakes.api_server import ApiServer, an_api_server

if TYPE_CHECKING:
    # In the stubs of the generated code only.
    from rung.v1.inference_service_pb2_grpc import InferenceServiceAsyncStub

METHODS = [method for name in SERVICE_NAMES for method in Default().FindServiceByName(name).methods]


@pytest.fixture
async def plane() -> AsyncIterator[ApiServer]:
    async with an_api_server() as plane:
        yield plane


def stub(plane: ApiServer) -> InferenceServiceAsyncStub:
    return v1.InferenceServiceStub(plane.channel)


def hello(model: str = "tiny", **more: Any) -> v1.GenerateRequest:
    conversation = v1.Conversation(messages=[v1.ChatMessage(role="user", content="Hi")])
    return v1.GenerateRequest(model=model, chat=v1.ChatInput(conversation=conversation), **more)


def error_of(failure: grpc.aio.AioRpcError) -> RungError:
    """The typed error, which must have come with rich details."""
    assert DETAILS_TRAILER in [key for key, _ in failure.trailing_metadata() or ()]
    return error_from_rpc(failure)


async def refused(call: Any) -> RungError:
    """The error of a call that is to fail, unary or streaming."""
    try:
        if hasattr(call, "__aiter__"):
            async for _ in call:
                pass
        else:
            await call
    except grpc.aio.AioRpcError as failure:
        return error_of(failure)
    pytest.fail("it was not refused")


async def call_with_nothing(plane: ApiServer, method: MethodDescriptor) -> RungError | None:
    """Call a method with an empty request and read one answer; the error if there was one."""
    make = plane.channel.unary_stream if method.server_streaming else plane.channel.unary_unary
    call: Any = make(
        f"/{method.containing_service.full_name}/{method.name}",
        request_serializer=GetMessageClass(method.input_type).SerializeToString,
        response_deserializer=GetMessageClass(method.output_type).FromString,
    )(GetMessageClass(method.input_type)())
    try:
        if method.server_streaming:
            await anext(aiter(call))
            call.cancel()
        else:
            await call
    except grpc.aio.AioRpcError as failure:
        return error_of(failure)
    return None


# What holds of every RPC


def test_every_rpc_has_an_access_policy_and_no_policy_is_left_over() -> None:
    names = {f"/{method.containing_service.full_name}/{method.name}" for method in METHODS}
    assert names == set(ACCESS)


async def test_every_rpc_is_served_and_every_error_is_rich(plane: ApiServer) -> None:
    unimplemented = set()
    for method in METHODS:
        error = await call_with_nothing(plane, method)
        if isinstance(error, NotImplementedYetError):
            assert method.name in error.message
            assert error.metadata == {"method": method.full_name}
            unimplemented.add(method.name)
        elif error is not None:
            assert error.status not in ("INTERNAL", "UNIMPLEMENTED"), f"{method.full_name}: {error.message}"
    assert unimplemented == {
        *("DeleteNode", "CreateJoinToken", "JoinNode"),
        *(method.name for method in Default().FindServiceByName("rung.v1.BurstService").methods),
    }


async def test_a_misspelt_method_is_not_taken_for_a_missing_one() -> None:
    class Misspelt:
        async def Genrate(self) -> None:  # noqa: N802 - like the API's names
            """Misspelt."""

    service = Default().FindServiceByName("rung.v1.InferenceService")
    with pytest.raises(TypeError, match="Genrate"):
        add_service(grpc.aio.server(), service, Misspelt())


# Generate


async def test_generate_streams_the_log(plane: ApiServer) -> None:
    events = [
        codec.job_event_from_proto(response.event)
        async for response in stub(plane).Generate(hello(effort=3, request_id="mine"))
    ]
    assert [event.sequence for event in events if event] == [1, 2, 3]
    assert [event.payload for event in events if event][1:] == [TokenDelta("Hi"), JobDone("stop")]
    wish = plane.pipelines.wishes[0]
    assert (wish.model, wish.effort, wish.request_id) == ("tiny", 3, "mine")


@pytest.mark.parametrize("detached", [False, True])
async def test_a_caller_that_goes_away_cancels_its_job_unless_it_is_detached(
    plane: ApiServer, detached: bool
) -> None:
    plane.pipelines.script = (TokenDelta("Hi"),)
    call = stub(plane).Generate(hello(policy=v1.Policy(detached=detached)))
    first = await anext(aiter(call))
    job = plane.jobs.live[first.event.job_id]
    call.cancel()
    if detached:
        other = stub(plane).WatchJob(v1.WatchJobRequest(job_id=job.id, after_sequence=2))
        job.append(TokenDelta("still here"))
        assert (await anext(aiter(other))).event.token.content == "still here"
        assert job.cancelled_by == []
    else:
        seen = [
            codec.job_event_from_proto(response.event)
            async for response in stub(plane).WatchJob(v1.WatchJobRequest(job_id=job.id))
        ]
        assert seen[-1] is not None
        assert seen[-1].payload == JobCancelled("caller_disconnected")
        assert job.cancelled_by == ["caller_disconnected"]


async def test_a_caller_that_does_not_read_cancels_its_job_when_it_goes(plane: ApiServer) -> None:
    plane.pipelines.script = tuple(TokenDelta("x" * 1000) for _ in range(2000))
    call = stub(plane).Generate(hello())
    await anext(aiter(call))
    job = plane.jobs.live["job-1"]
    changed = job.changed
    call.cancel()
    await asyncio.wait_for(changed.wait(), 10)
    assert job.cancelled_by == ["caller_disconnected"]


async def test_what_generate_refuses(plane: ApiServer) -> None:
    assert isinstance(await refused(stub(plane).Generate(hello("nope"))), UnknownModelError)
    assert isinstance(await refused(stub(plane).Generate(hello(effort=11))), InvalidRequestError)
    plane.pipelines.error = DrainingError("the control plane is shutting down")
    assert isinstance(await refused(stub(plane).Generate(hello())), DrainingError)
    plane.pipelines.error = RungError("a secret of ours")
    error = await refused(stub(plane).Generate(hello()))
    assert "secret" not in error.message
    assert plane.jobs.live == {}


async def test_a_request_beyond_the_limit_is_refused() -> None:
    async with an_api_server(max_request_bytes=1000) as plane:
        body = b'{"messages":["' + b"x" * 200_000 + b'"]}'
        call = stub(plane).Generate(v1.GenerateRequest(model="tiny", chat=v1.ChatInput(openai_json=body)))
        with pytest.raises(grpc.aio.AioRpcError) as raised:
            await anext(aiter(call))
        assert raised.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED


# Jobs


async def test_watching_resumes_after_a_sequence_and_hears_heartbeats(plane: ApiServer) -> None:
    plane.pipelines.script = (TokenDelta("a"), TokenDelta("b"))
    created = (await stub(plane).CreateJob(v1.CreateJobRequest(generate=hello()))).job
    assert plane.pipelines.wishes[0].policy.detached
    request = v1.WatchJobRequest(
        job_id=created.id, after_sequence=2, heartbeat_interval=Duration(nanos=100_000_000)
    )
    watch = aiter(stub(plane).WatchJob(request))
    assert (await anext(watch)).event.token.content == "b"
    heartbeat = codec.job_event_from_proto((await anext(watch)).event)
    assert heartbeat is not None
    assert heartbeat.sequence == 0
    assert isinstance(heartbeat.payload, PhaseProgress)


async def test_what_watching_refuses(plane: ApiServer) -> None:
    await stub(plane).CreateJob(v1.CreateJobRequest(generate=hello()))
    for request, error in (
        (v1.WatchJobRequest(job_id="nope"), UnknownJobError),
        (v1.WatchJobRequest(job_id="job-1", after_sequence=-1), InvalidRequestError),
        (v1.WatchJobRequest(job_id="job-1", after_sequence=99), OutOfRangeError),
        (v1.WatchJobRequest(job_id="job-1", heartbeat_interval=Duration(seconds=100)), InvalidRequestError),
        (v1.WatchJobRequest(job_id="job-1", heartbeat_interval=Duration()), InvalidRequestError),
    ):
        assert isinstance(await refused(stub(plane).WatchJob(request)), error)


async def test_getting_and_cancelling(plane: ApiServer) -> None:
    plane.pipelines.script = ()
    job_id = (await stub(plane).CreateJob(v1.CreateJobRequest(generate=hello()))).job.id
    assert (await stub(plane).GetJob(v1.GetJobRequest(job_id=job_id))).job.state == v1.JOB_STATE_RUNNING
    await stub(plane).CancelJob(v1.CancelJobRequest(job_id=job_id))
    assert plane.jobs.live[job_id].cancelled_by == ["caller"]
    for call in (
        stub(plane).GetJob(v1.GetJobRequest(job_id="nope")),
        stub(plane).CancelJob(v1.CancelJobRequest(job_id="nope")),
    ):
        assert isinstance(await refused(call), UnknownJobError)


async def test_jobs_are_paged_newest_first(plane: ApiServer) -> None:
    plane.jobs.records = [
        Job(id=f"job-{n}", kind=JobKind.CHAT, state=JobState.DONE, model="m", create_time_s=float(n))
        for n in range(5)
    ]
    pages: list[list[str]] = []
    token = ""
    while True:
        answer = await stub(plane).ListJobs(v1.ListJobsRequest(page_size=2, page_token=token))
        pages.append([job.id for job in answer.jobs])
        token = answer.next_page_token
        if not token:
            break
    assert pages == [["job-4", "job-3"], ["job-2", "job-1"], ["job-0"]]
    await stub(plane).ListJobs(v1.ListJobsRequest(states=[v1.JOB_STATE_FAILED]))
    assert plane.jobs.asked_states[-1] == {JobState.FAILED}


@pytest.mark.parametrize(
    "request_",
    [
        v1.ListJobsRequest(page_size=1001),
        v1.ListJobsRequest(page_size=-1),
        v1.ListJobsRequest(page_token="!"),
        v1.ListJobsRequest(page_token="WzFd"),
        v1.ListJobsRequest(states=[99]),  # type: ignore[list-item]
        v1.ListJobsRequest(states=[v1.JOB_STATE_UNSPECIFIED]),
    ],
)
async def test_a_bad_page_is_refused(plane: ApiServer, request_: v1.ListJobsRequest) -> None:
    assert isinstance(await refused(stub(plane).ListJobs(request_)), InvalidRequestError)


# The rest


async def test_embedding(plane: ApiServer) -> None:
    answer = await stub(plane).Embed(v1.EmbedRequest(model="embed", inputs=["a", "b"]))
    assert [list(vector.values) for vector in answer.vectors] == [[0.5, 1.0], [0.25, 0.0]]
    assert (answer.usage.prompt_tokens, answer.served.target, answer.job_id) == (4, "embed-1", "job-9")
    assert isinstance(await refused(stub(plane).Embed(v1.EmbedRequest(model="embed"))), InvalidRequestError)


async def test_a_prediction_is_decoded_and_encoded(plane: ApiServer) -> None:
    plane.pipelines.predictions = Predictions(
        forecasts=((4.0, 5.0),),
        quantiles=(QuantileForecast(level=0.9, forecasts=((6.0, 7.0),)),),
        served=Served("", "timesfm", "box", "timesfm-2.5"),
        job_id="job-7",
    )
    policy = v1.Policy(local_only=True)
    request = v1.PredictRequest(request_id="mine", model="timesfm", policy=policy)
    request.forecast.series.add(features=[1, 2, 3])
    request.forecast.horizon = 2
    answer = await stub(plane).Predict(request)
    assert [list(row.features) for row in answer.forecasts] == [[4, 5]]
    assert [(each.level, list(each.forecasts[0].features)) for each in answer.quantiles] == [(0.9, [6, 7])]
    assert (answer.served.target, answer.job_id) == ("timesfm", "job-7")
    task = ForecastTask(series=((1.0, 2.0, 3.0),), horizon=2)
    assert plane.pipelines.predicted == [(task, "timesfm", Policy(local_only=True), "mine")]


async def test_a_prediction_without_a_task_is_refused(plane: ApiServer) -> None:
    error = await refused(stub(plane).Predict(v1.PredictRequest(model="timesfm")))
    assert isinstance(error, InvalidRequestError)
    assert "set one of classify, regress, forecast" in error.message


async def test_explaining_starts_nothing(plane: ApiServer) -> None:
    answer = await stub(plane).ExplainRoute(v1.ExplainRouteRequest(generate=hello()))
    assert (answer.target, answer.effort, answer.rung) == ("chat-1", 8, "hard")
    assert answer.why == "it asks for a proof"
    assert (answer.considered[0].expected_wait.nanos, answer.considered[0].place) == (500_000_000, 1)
    assert answer.reason[0] == answer.considered[0]
    assert plane.jobs.live == {}


async def test_models(plane: ApiServer) -> None:
    tiny = Model(id="tiny", deployments=("chat-1",), ready=True, context_tokens=4096, capabilities=("chat",))
    plane.pipelines.found_models = (tiny, Model(id="rung/auto", deployments=(), ready=True))

    answer = await stub(plane).ListModels(v1.ListModelsRequest())

    assert [codec.model_from_proto(model) for model in answer.models] == list(plane.pipelines.found_models)
