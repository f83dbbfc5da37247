"""The asynchronous client against a scripted control plane on real gRPC."""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import AsyncIterator
from typing import Any

import pytest

import rung
from rung import AsyncClient, codec, v1
from rung._client_calls import Reconnect
from rung.errors import (
    DrainingError,
    EngineFailedError,
    InvalidRequestError,
    JobCancelledError,
    NodeUnreachableError,
    NoTargetError,
    QueueFullError,
    RequestTooLargeError,
    RungError,
    UnavailableError,
    UnknownDeploymentError,
    UnknownJobError,
    UnknownModelError,
    UnknownNodeError,
)
from rung.types import (
    ChatMessage,
    Deployment,
    DeploymentSpec,
    EngineSpec,
    ExternalRuntime,
    FailureReason,
    FleetSnapshot,
    JobAccepted,
    JobCancelled,
    JobDone,
    JobFailed,
    JobKind,
    JobState,
    LifecycleDone,
    LifecycleEvent,
    LifecycleFailed,
    LifecycleProgress,
    Node,
    NodeState,
    OpenAiCompatibleEngine,
    Policy,
    Priority,
    Residency,
    Routed,
    Served,
    TokenDelta,
    Tool,
    ToolCall,
    ToolCallDelta,
    Usage,
    UsageReported,
)
from tests.fakes.control_plane import JOB_ID, ScriptedControlPlane, a_job, a_log
from tests.fakes.proxy import BreakableProxy

ACCEPTED = JobAccepted(JobKind.CHAT, "m")
SERVED = Served("m", "d", "workstation", "m-engine")
DETACHED = Policy(detached=True)


@pytest.fixture(autouse=True)
def no_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RUNG_ADDRESS", raising=False)
    monkeypatch.delenv("RUNG_TOKEN", raising=False)


@pytest.fixture
async def server() -> AsyncIterator[ScriptedControlPlane]:
    script = ScriptedControlPlane()
    await script.start()
    yield script
    await script.stop()


@pytest.fixture
async def proxy(server: ScriptedControlPlane) -> AsyncIterator[BreakableProxy]:
    relay = BreakableProxy(server.port)
    await relay.start()
    yield relay
    await relay.stop()


@pytest.fixture
async def client(server: ScriptedControlPlane) -> AsyncIterator[AsyncClient]:
    async with AsyncClient(server.address) as found:
        yield found


@pytest.fixture
async def proxied(proxy: BreakableProxy) -> AsyncIterator[AsyncClient]:
    async with AsyncClient(proxy.address) as found:
        yield found


# Generations.


async def test_a_chat_streams_its_events_and_adds_them_up(
    server: ScriptedControlPlane, client: AsyncClient
) -> None:
    server.log = a_log(
        ACCEPTED,
        Routed(SERVED),
        TokenDelta(reasoning="hm"),
        TokenDelta("Hel"),
        TokenDelta("lo"),
        TokenDelta("another choice", choice=1),
        ToolCallDelta(1, "call-b", "second", "{}"),
        ToolCallDelta(0, "call-a", "first", '{"x":'),
        ToolCallDelta(0, arguments="1}"),
        UsageReported(Usage(3, 2, 1)),
        JobDone("tool_calls"),
    )
    stream = client.chat("hi", model="m")
    assert stream.job_id == ""
    events = [event async for event in stream]
    assert events == server.log
    assert stream.job_id == JOB_ID
    assert await stream.result() == rung.ChatResult(
        job_id=JOB_ID,
        text="Hello",
        reasoning="hm",
        tool_calls=(
            ToolCall(id="call-a", name="first", arguments='{"x":1}'),
            ToolCall(id="call-b", name="second", arguments="{}"),
        ),
        usage=Usage(3, 2, 1),
        served=SERVED,
        finish_reason="tool_calls",
    )


async def test_events_arrive_while_the_job_runs(server: ScriptedControlPlane, client: AsyncClient) -> None:
    server.log = a_log(ACCEPTED)
    stream = client.chat("hi")
    assert (await anext(stream)).payload == ACCEPTED
    await server.append(TokenDelta("now"))
    assert (await anext(stream)).payload == TokenDelta("now")
    await server.append(JobDone("stop"))
    assert await stream.text() == "now"


async def test_what_a_chat_asks_for_reaches_the_server(
    server: ScriptedControlPlane, client: AsyncClient
) -> None:
    server.log = a_log(ACCEPTED, JobDone())
    tool = Tool(name="add", description="adds", parameters={"type": "object", "minProperties": 2})
    policy = Policy(local_only=True, priority=Priority.USER)
    turns = (ChatMessage("system", "be brief"), ChatMessage("user", "hi"))
    await client.chat(
        turns,
        model="m",
        effort=7,
        tools=[tool],
        max_tokens=5,
        temperature=0.0,
        policy=policy,
        request_id="r",
    ).result()
    (request,) = server.requests
    conversation = codec.conversation_from_proto(request.chat.conversation)
    assert (conversation.messages, conversation.tools) == (turns, (tool,))
    assert (conversation.max_tokens, conversation.temperature) == (5, 0.0)
    assert (request.model, request.effort, request.request_id) == ("m", 7, "r")
    assert codec.policy_from_proto(request.policy) == policy
    assert server.deadlines[0] is None or server.deadlines[0] > 1e6  # a generation has none


async def test_an_openai_body_is_passed_on_as_it_is(
    server: ScriptedControlPlane, client: AsyncClient
) -> None:
    server.log = a_log(ACCEPTED, JobDone())
    body = b'{"messages": [], "model":"of-the-body", "logit_bias": {"1": 2}}'
    await client.generate_openai(body).result()
    await client.generate_openai({"model": "x", "messages": []}, model="other").result()
    first, second = server.requests
    assert (first.model, first.chat.openai_json) == ("of-the-body", body)
    assert (second.model, second.chat.openai_json) == ("other", b'{"model":"x","messages":[]}')


@pytest.mark.parametrize("body", [b"{", b"[]", b'{"model": 3}'])
def test_a_body_that_is_no_request_is_refused_before_it_is_sent(body: bytes) -> None:
    with pytest.raises(InvalidRequestError):
        AsyncClient("127.0.0.1:1").generate_openai(body)


async def test_a_refusal_is_typed_and_has_its_facts(
    server: ScriptedControlPlane, client: AsyncClient
) -> None:
    server.fail = UnknownModelError("no deployment serves gpt-9", model="gpt-9")
    with pytest.raises(UnknownModelError, match="gpt-9") as caught:
        await client.chat("hi", model="gpt-9").result()
    assert caught.value.metadata == {"model": "gpt-9"}
    assert caught.value.reason == "UNKNOWN_MODEL"


async def test_a_defect_of_the_server_shows_nothing_of_it(
    server: ScriptedControlPlane, client: AsyncClient
) -> None:
    server.fail = ZeroDivisionError("a secret")
    with pytest.raises(RungError) as caught:
        await client.chat("hi").result()
    assert type(caught.value) is RungError
    assert "secret" not in str(caught.value)


async def test_a_failed_job_is_an_event_and_then_a_typed_error(
    server: ScriptedControlPlane, client: AsyncClient
) -> None:
    failed = JobFailed(FailureReason.ENGINE_ERROR, "d answered 500", delivered_characters=2)
    server.log = a_log(ACCEPTED, TokenDelta("He"), failed)
    stream = client.chat("hi")
    assert [event.payload async for event in stream][-1] == failed
    with pytest.raises(EngineFailedError, match="d answered 500") as caught:
        await stream.result()
    assert caught.value.metadata == {"failure_reason": "engine_error", "delivered_characters": "2"}


async def test_a_cancelled_job_says_by_whom(server: ScriptedControlPlane, client: AsyncClient) -> None:
    server.log = a_log(ACCEPTED, JobCancelled("operator"))
    with pytest.raises(JobCancelledError) as caught:
        await client.chat("hi").text()
    assert caught.value.metadata == {"by": "operator"}


@pytest.mark.parametrize("reason", FailureReason)
def test_every_reason_of_failure_has_an_error(reason: FailureReason) -> None:
    error = rung.error_of_failure(JobFailed(reason, "what happened"))
    assert error.message == "what happened"
    assert error.metadata["failure_reason"] == reason.value
    of_operation = rung.error_of_failure(LifecycleFailed(reason, "x"))
    assert type(of_operation) is type(error)


async def test_closing_a_stream_cancels_the_call(server: ScriptedControlPlane, client: AsyncClient) -> None:
    server.log = a_log(ACCEPTED, TokenDelta("He"))
    async with client.chat("hi") as stream:
        await anext(stream)
    await server.until(lambda: server.cancelled == 1)
    with pytest.raises(StopAsyncIteration):
        await anext(stream)
    with pytest.raises(JobCancelledError):
        await stream.result()


async def test_a_stream_can_be_closed_by_another_task(
    server: ScriptedControlPlane, client: AsyncClient
) -> None:
    server.log = a_log(ACCEPTED)
    stream = client.chat("hi", policy=DETACHED)
    await anext(stream)
    reader = asyncio.create_task(_collect(stream))
    await asyncio.sleep(0)
    await stream.aclose()
    assert await reader == []
    await server.until(lambda: server.cancelled == 1)


async def test_cancelling_the_reading_task_cancels_the_call(
    server: ScriptedControlPlane, client: AsyncClient
) -> None:
    server.log = a_log(ACCEPTED)
    reader = asyncio.create_task(client.chat("hi").result())
    await server.until(lambda: len(server.requests) == 1)
    reader.cancel()
    with pytest.raises(asyncio.CancelledError):
        await reader
    await server.until(lambda: server.cancelled == 1)


async def test_a_stream_that_was_never_read_sends_nothing(
    server: ScriptedControlPlane, client: AsyncClient
) -> None:
    await client.chat("hi").aclose()
    await client.list_models()
    assert [type(request) for request in server.requests] == [v1.ListModelsRequest]


async def test_closing_the_client_ends_its_streams(server: ScriptedControlPlane) -> None:
    server.log = a_log(ACCEPTED)
    client = AsyncClient(server.address)
    stream = client.chat("hi")
    await anext(stream)
    reader = asyncio.create_task(stream.result())
    await asyncio.sleep(0)
    await client.aclose()
    with pytest.raises(JobCancelledError):
        await reader
    with pytest.raises(JobCancelledError, match="closed"):
        await client.list_models()


async def test_a_lost_connection_fails_a_generation_of_a_present_caller(
    server: ScriptedControlPlane, proxy: BreakableProxy, proxied: AsyncClient
) -> None:
    server.log = a_log(ACCEPTED, TokenDelta("He"))
    stream = proxied.chat("hi")
    await anext(stream)
    await anext(stream)
    proxy.cut()
    with pytest.raises(UnavailableError):
        await stream.result()
    await server.until(lambda: server.cancelled == 1)
    assert server.called(v1.WatchJobRequest) == []


async def test_a_detached_generation_goes_on_after_a_lost_connection(
    server: ScriptedControlPlane, proxy: BreakableProxy, proxied: AsyncClient
) -> None:
    server.log = a_log(ACCEPTED, TokenDelta("He"))
    stream = proxied.chat("hi", policy=DETACHED)
    await anext(stream)
    await anext(stream)
    proxy.cut()
    await server.append(TokenDelta("llo"), JobDone("stop"))
    assert await stream.text() == "Hello"
    (watch,) = server.called(v1.WatchJobRequest)
    assert (watch.job_id, watch.after_sequence) == (JOB_ID, 2)


async def test_nobody_listens() -> None:
    async with AsyncClient("127.0.0.1:1") as client:
        with pytest.raises(UnavailableError):
            await client.chat("hi").result()
        with pytest.raises(UnavailableError):
            await anext(client.watch_job(JOB_ID))
        with pytest.raises(UnavailableError):
            await anext(client.watch_fleet())


async def test_a_request_that_is_too_large(server: ScriptedControlPlane, client: AsyncClient) -> None:
    with pytest.raises(RequestTooLargeError):
        await client.chat("x" * (17 * 1024 * 1024)).result()
    assert server.requests == []


# Jobs.


async def test_a_watch_resumes_after_the_last_event_seen(
    server: ScriptedControlPlane, proxy: BreakableProxy, proxied: AsyncClient
) -> None:
    server.log = a_log(ACCEPTED, TokenDelta("a"), TokenDelta("b"))
    watch = proxied.watch_job(JOB_ID, after_sequence=1)
    seen = [(await anext(watch)).sequence, (await anext(watch)).sequence]
    for text in ("c", "d"):
        proxy.cut()
        await server.append(TokenDelta(text))
        seen.append((await anext(watch)).sequence)
    await server.append(JobDone())
    seen += [event.sequence async for event in watch]
    assert seen == [2, 3, 4, 5, 6]
    assert [request.after_sequence for request in server.called(v1.WatchJobRequest)] == [1, 3, 4]


async def test_a_watch_survives_a_restart_of_the_server(
    server: ScriptedControlPlane, proxy: BreakableProxy, proxied: AsyncClient
) -> None:
    server.log = a_log(ACCEPTED)
    watch = proxied.watch_job(JOB_ID)
    await anext(watch)
    second = ScriptedControlPlane()
    await second.start()
    second.log = a_log(ACCEPTED, JobFailed(FailureReason.CONTROL_PLANE_RESTARTED, "restarted"))
    proxy.send_to(second.port)
    await server.stop()
    assert [event.sequence async for event in watch] == [2]
    await second.stop()


async def test_heartbeats_are_passed_on_to_who_asks(
    server: ScriptedControlPlane, client: AsyncClient
) -> None:
    server.heartbeat_first = True
    server.log = a_log(ACCEPTED, JobDone())
    assert [event.sequence async for event in client.watch_job(JOB_ID)] == [1, 2]
    assert [event.sequence async for event in client.watch_job(JOB_ID, heartbeats=True)] == [0, 1, 2]


async def test_a_watch_that_is_left_tells_the_server(
    server: ScriptedControlPlane, client: AsyncClient
) -> None:
    server.log = a_log(ACCEPTED)
    watch = client.watch_job(JOB_ID)
    await anext(watch)
    await watch.aclose()
    await server.until(lambda: server.cancelled == 1)


async def test_a_watch_gives_up_when_the_server_stays_away(
    server: ScriptedControlPlane, proxy: BreakableProxy
) -> None:
    server.log = a_log(ACCEPTED)
    async with AsyncClient(proxy.address, reconnect_s=0.3) as client:
        watch = client.watch_job(JOB_ID)
        await anext(watch)
        proxy.refusing = True
        proxy.cut()
        with pytest.raises(UnavailableError):
            await anext(watch)


async def test_a_watch_of_an_unknown_job_is_not_tried_again(
    server: ScriptedControlPlane, client: AsyncClient
) -> None:
    server.fail = UnknownJobError("there is no job x")
    with pytest.raises(UnknownJobError):
        await anext(client.watch_job("x"))
    assert len(server.requests) == 1


async def test_jobs_by_id(server: ScriptedControlPlane, client: AsyncClient) -> None:
    server.jobs = [a_job(usage=Usage(1, 2))]
    assert await client.get_job(JOB_ID) == server.jobs[0]
    assert (await client.cancel_job(JOB_ID)).state is JobState.CANCELLED
    with pytest.raises(UnknownJobError) as caught:
        await client.get_job("other")
    assert caught.value.metadata == {"job": "other"}


async def test_jobs_are_listed_over_pages(server: ScriptedControlPlane, client: AsyncClient) -> None:
    server.jobs = [a_job(f"job-{number}") for number in range(5)]
    found = [job.id async for job in client.list_jobs((JobState.DONE,), page_size=2)]
    assert found == [job.id for job in server.jobs]
    assert [request.page_token for request in server.requests] == ["", "2", "4"]
    assert [list(request.states) for request in server.requests] == [[v1.JOB_STATE_DONE]] * 3


async def test_a_job_is_created_from_messages_or_a_body(
    server: ScriptedControlPlane, client: AsyncClient
) -> None:
    server.jobs = [a_job(state=JobState.PENDING, request_id="r")]
    assert await client.create_job("hi", model="m", request_id="r") == server.jobs[0]
    await client.create_job(body={"model": "m", "messages": []})
    first, second = (request.generate for request in server.requests)
    assert first.chat.conversation.messages[0].content == "hi"
    assert (second.model, second.chat.WhichOneof("form")) == ("m", "openai_json")
    with pytest.raises(InvalidRequestError):
        await client.create_job()
    with pytest.raises(InvalidRequestError):
        await client.create_job("hi", body={})


async def test_embeddings_models_and_routes(server: ScriptedControlPlane, client: AsyncClient) -> None:
    assert (await client.embed(["a", "bcd"], "m")).vectors == ((1.0, 0.5), (3.0, 0.5))
    assert (await client.embed("ab", "m")).vectors == ((2.0, 0.5),)
    (model,) = await client.list_models()
    assert (model.id, model.ready) == ("m", True)
    explained = await client.explain_route("hi", model="m")
    assert (explained.target, explained.considered[0].reason) == ("d", "awake")


# The fleet.


def a_deployment(deployment_id: str) -> Deployment:
    engine = EngineSpec(
        engine=OpenAiCompatibleEngine(), runtime=ExternalRuntime(base_url="http://127.0.0.1:8000")
    )
    spec = DeploymentSpec(id=deployment_id, node_id="a", model="m", engine=engine)
    return Deployment(spec=spec, residency=Residency.AWAKE)


def _node(node_id: str, state: NodeState = NodeState.READY) -> Node:
    return Node(id=node_id, address="127.0.0.1:8152", state=state)


async def test_listings_turn_pages(server: ScriptedControlPlane, client: AsyncClient) -> None:
    server.snapshot = FleetSnapshot(
        (_node("a"), _node("b"), _node("c")), (a_deployment("x"), a_deployment("y"))
    )
    assert await client.list_nodes() == server.snapshot.nodes
    assert await client.list_deployments() == server.snapshot.deployments
    assert await client.get_node("b") == _node("b")
    assert await client.get_deployment("y") == a_deployment("y")
    with pytest.raises(UnknownNodeError):
        await client.get_node("z")
    with pytest.raises(UnknownDeploymentError):
        await client.get_deployment("z")


async def test_the_fleet_is_folded_into_whole_snapshots(
    server: ScriptedControlPlane, client: AsyncClient
) -> None:
    server.snapshot = FleetSnapshot((_node("b"),), (a_deployment("y"),), "dev")
    draining = _node("b", NodeState.DRAINING)
    server.fleet_changes = [
        v1.WatchFleetResponse(sequence=2, node=codec.node_to_proto(draining)),
        v1.WatchFleetResponse(sequence=3, node=codec.node_to_proto(_node("a"))),
        v1.WatchFleetResponse(sequence=4, deployment=codec.deployment_to_proto(a_deployment("x"))),
        v1.WatchFleetResponse(sequence=5, heartbeat=v1.FleetHeartbeat()),
        v1.WatchFleetResponse(sequence=6, removed_node_id="b"),
        v1.WatchFleetResponse(sequence=7, removed_deployment_id="y"),
    ]
    watch = client.watch_fleet()
    seen = [await anext(watch) for _ in range(7)]
    await watch.aclose()
    both = (a_deployment("x"), a_deployment("y"))
    assert seen == [
        server.snapshot,
        FleetSnapshot((draining,), (a_deployment("y"),), "dev"),
        FleetSnapshot((_node("a"), draining), (a_deployment("y"),), "dev"),
        FleetSnapshot((_node("a"), draining), both, "dev"),
        FleetSnapshot((_node("a"), draining), both, "dev"),
        FleetSnapshot((_node("a"),), both, "dev"),
        FleetSnapshot((_node("a"),), (a_deployment("x"),), "dev"),
    ]


async def test_a_watch_of_the_fleet_begins_anew_after_a_lost_connection(
    server: ScriptedControlPlane, proxy: BreakableProxy, proxied: AsyncClient
) -> None:
    server.snapshot = FleetSnapshot((_node("a"), _node("gone")))
    watch = proxied.watch_fleet()
    assert await anext(watch) == server.snapshot
    server.snapshot = FleetSnapshot((_node("a"),))
    proxy.cut()
    assert await anext(watch) == server.snapshot
    await watch.aclose()


def _steps(*payloads: LifecycleProgress | LifecycleDone | LifecycleFailed) -> list[LifecycleEvent]:
    return [LifecycleEvent("op", place, float(place), payload) for place, payload in enumerate(payloads, 1)]


LOADING = LifecycleProgress(Residency.STARTING, "loading", 40.0, 2.0)


async def test_operations_stream_their_steps(server: ScriptedControlPlane, client: AsyncClient) -> None:
    server.lifecycle = _steps(LOADING, LifecycleDone(a_deployment("d")))
    assert [event async for event in client.start_deployment("d")] == server.lifecycle
    assert [event async for event in client.stop_deployment("d", force=True)] == server.lifecycle
    assert [event async for event in client.sleep_deployment("d", level=2)] == server.lifecycle
    assert [event async for event in client.wake_deployment("d")] == server.lifecycle
    assert [event async for event in client.free_deployment("d", operation_id="mine")] == server.lifecycle
    start, stop, sleep, _, free = server.requests
    assert len({start.operation_id, stop.operation_id, sleep.operation_id}) == 3
    assert (stop.force, sleep.force, sleep.level, free.operation_id) == (True, False, 2, "mine")


async def test_an_operation_is_joined_again_after_a_lost_connection(
    server: ScriptedControlPlane, proxy: BreakableProxy, proxied: AsyncClient
) -> None:
    server.lifecycle = _steps(LOADING)
    operation = proxied.start_deployment("d")
    first = await anext(operation)
    server.lifecycle = _steps(LOADING, LifecycleFailed(FailureReason.ENGINE_START_FAILED, "no"))
    proxy.cut()
    assert [first, *[event async for event in operation]] == server.lifecycle
    one, two = server.requests
    assert one.operation_id == two.operation_id != ""


async def test_an_operation_that_is_refused_is_not_tried_again(
    server: ScriptedControlPlane, client: AsyncClient
) -> None:
    server.fail = NodeUnreachableError("the agent of spark does not answer", node="spark")
    with pytest.raises(NodeUnreachableError):
        await anext(client.start_deployment("d"))
    assert len(server.requests) == 1


async def test_nodes_are_drained_and_resumed(client: AsyncClient) -> None:
    assert (await client.drain_node("a")).state is NodeState.DRAINING
    assert (await client.resume_node("a")).state is NodeState.READY


# The connection.


async def test_the_token_goes_with_every_call(server: ScriptedControlPlane) -> None:
    server.log = a_log(ACCEPTED, JobDone())
    async with AsyncClient(server.address, token="s3cret") as client:
        await client.list_models()
        await client.chat("hi").result()
    assert [found["authorization"] for found in server.metadata] == ["Bearer s3cret"] * 2


async def test_address_and_token_come_from_the_environment(
    server: ScriptedControlPlane, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert AsyncClient().address == "127.0.0.1:8151"
    monkeypatch.setenv("RUNG_ADDRESS", server.address)
    monkeypatch.setenv("RUNG_TOKEN", "from-env")
    assert AsyncClient("localhost:1").address == "localhost:1"
    async with AsyncClient() as client:
        await client.list_models()
    assert server.metadata[0]["authorization"] == "Bearer from-env"


async def test_no_token_sends_none(server: ScriptedControlPlane, client: AsyncClient) -> None:
    await client.list_models()
    assert "authorization" not in server.metadata[0]


async def test_unary_calls_have_a_deadline(server: ScriptedControlPlane) -> None:
    async with AsyncClient(server.address, timeout_s=5.0) as client:
        await client.list_models()
        await client.embed("x", timeout_s=50.0)
    unary, embed = server.deadlines
    assert unary is not None
    assert embed is not None
    # The server's clock has its own opinion about the last tenth.
    assert 0 < unary < 6.0 < embed < 51.0


async def test_reads_are_tried_again_and_mutations_are_not(
    server: ScriptedControlPlane, client: AsyncClient
) -> None:
    server.fail = QueueFullError("full")
    with pytest.raises(QueueFullError):
        await client.list_models()
    assert len(server.requests) == 1
    server.fail = NoTargetError("none is up")
    with pytest.raises(NoTargetError):
        await client.list_models()
    assert len(server.requests) > 2
    server.requests.clear()
    with pytest.raises(NoTargetError):
        await client.drain_node("a")
    assert len(server.requests) == 1


async def test_when_a_watch_tries_again() -> None:
    lost = UnavailableError("lost")
    with pytest.raises(UnavailableError):
        await Reconnect(60.0).pause(lost)
    reconnect = Reconnect(60.0)
    reconnect.connected()
    await reconnect.pause(lost)
    await reconnect.pause(DrainingError("shutting down"))
    with pytest.raises(NoTargetError):
        await reconnect.pause(NoTargetError("the server's word"))
    with pytest.raises(UnavailableError):
        await Reconnect(0.0, was_connected=True).pause(lost)


def test_the_public_names_are_pinned() -> None:
    assert sorted(rung.__all__) == rung.__all__
    assert all(hasattr(rung, name) for name in rung.__all__)
    assert {"AsyncClient", "Client", "JobStream", "RungError", "errors", "types"} <= set(rung.__all__)
    assert len(rung.__all__) == 43


def test_the_blocking_client_has_every_method_of_the_asynchronous_one() -> None:
    def methods(found: type) -> dict[str, inspect.Signature]:
        return {
            name: inspect.signature(member)
            for name, member in inspect.getmembers(found, inspect.isfunction)
            if not name.startswith("_") and name not in ("close", "aclose")
        }

    ours, theirs = methods(rung.Client), methods(AsyncClient)
    assert ours.keys() == theirs.keys()
    for name, signature in ours.items():
        assert signature.parameters == theirs[name].parameters, name


async def _collect(stream: AsyncIterator[Any]) -> list[Any]:
    return [item async for item in stream]
