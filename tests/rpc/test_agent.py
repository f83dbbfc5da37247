"""The agent's API on real gRPC: a supervisor over scripted engines, asked as a control plane asks."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc.aio
import pytest
from google.protobuf.descriptor_pool import Default
from prometheus_client import CollectorRegistry

from nodeagent.api import Drain, NodeAgentServicer
from nodeagent.engines import EngineHealth
from nodeagent.telemetry import GpuSample, Telemetry
from rung import codec, v1
from rung.errors import (
    AlreadyExistsError,
    EngineProtocolError,
    EngineStartFailedError,
    FailedPreconditionError,
    InvalidRequestError,
    NotAllowedError,
    NotAwakeError,
    PinnedDeploymentError,
    RungError,
    StaleEpochError,
    UnknownDeploymentError,
)
from rung.service import CallInterceptor, add_service
from rung.transport import ChannelOptions, error_from_rpc, open_channel
from rung.types import (
    DeploymentSpec,
    LifecycleDone,
    LifecycleEvent,
    LifecycleFailed,
    LifecycleProgress,
    Residency,
    ResidencyClass,
)
from tests.fakes.agent_server import a_spec
from tests.fakes.engines import AnAgent, an_agent, done
from tests.fakes.runs import a_run, answer_of, instructed, run_events, run_messages


class NoGpus:
    """A machine without GPUs."""

    def read(self) -> GpuSample:
        return GpuSample()

    def close(self) -> None:
        return


@dataclass
class Plane:
    """What a control plane asks of the agent."""

    agent: AnAgent
    telemetry: Telemetry
    #: The generated types know the blocking calls only.
    stub: Any

    def start(
        self, spec: DeploymentSpec, operation_id: str = "start-1", epoch: int = 1
    ) -> AsyncIterator[LifecycleEvent]:
        command = v1.Command(operation_id=operation_id, epoch=epoch)
        request = v1.StartEngineRequest(command=command, spec=codec.deployment_spec_to_proto(spec))
        return _lifecycle(self.stub.StartEngine(request))

    def stop(
        self,
        deployment_id: str = "chat-1",
        operation_id: str = "stop-1",
        epoch: int = 1,
        *,
        force: bool = False,
    ) -> AsyncIterator[LifecycleEvent]:
        command = v1.Command(operation_id=operation_id, epoch=epoch)
        request = v1.StopEngineRequest(command=command, deployment_id=deployment_id, force=force)
        return _lifecycle(self.stub.StopEngine(request))

    async def forget(
        self, deployment_id: str = "chat-1", operation_id: str = "forget-1", epoch: int = 1
    ) -> None:
        command = v1.Command(operation_id=operation_id, epoch=epoch)
        request = v1.ForgetEngineRequest(command=command, deployment_id=deployment_id)
        try:
            await self.stub.ForgetEngine(request)
        except grpc.aio.AioRpcError as failure:
            raise error_from_rpc(failure) from failure

    async def run(self, deployment_id: str = "chat-1") -> list[v1.RunEvent]:
        return [event async for event in run_events(self.stub, a_run(deployment_id))]

    async def log(self, deployment_id: str = "chat-1", tail_lines: int = 0) -> list[str]:
        request = v1.ReadEngineLogRequest(deployment_id=deployment_id, tail_lines=tail_lines)
        return [
            line async for response in _raised(self.stub.ReadEngineLog(request)) for line in response.lines
        ]


async def _raised(call: Any) -> AsyncIterator[Any]:
    try:
        async for response in call:
            yield response
    except grpc.aio.AioRpcError as failure:
        raise error_from_rpc(failure) from failure


async def _lifecycle(call: Any) -> AsyncIterator[LifecycleEvent]:
    async for response in _raised(call):
        yield codec.lifecycle_event_from_proto(response.event)


async def all_of(events: AsyncIterator[LifecycleEvent]) -> list[LifecycleEvent]:
    return [event async for event in events]


async def residency_after(events: AsyncIterator[LifecycleEvent]) -> Residency:
    outcome = (await all_of(events))[-1].payload
    assert isinstance(outcome, LifecycleDone), outcome
    return outcome.deployment.residency


async def first(events: AsyncIterator[LifecycleEvent], text: str) -> LifecycleEvent:
    """The first event that tells this."""
    async for event in events:
        if isinstance(event.payload, LifecycleProgress) and text in event.payload.detail:
            return event
    raise AssertionError(f"nothing told {text!r}")


@pytest.fixture
async def plane(tmp_path: Path) -> AsyncIterator[Plane]:
    telemetry = Telemetry(state_dir=tmp_path, agent_version="9.9", gpu_source=NoGpus(), interval_s=0.05)
    await telemetry.start()
    async with an_agent(tmp_path) as agent:
        server = grpc.aio.server(interceptors=[CallInterceptor(CollectorRegistry())])
        service = Default().FindServiceByName("rung.v1.NodeAgentService")
        add_service(
            server, service, NodeAgentServicer(agent.supervisor, telemetry, "instance-1", Drain("box"))
        )
        port = server.add_insecure_port("127.0.0.1:0")
        await server.start()
        async with open_channel(ChannelOptions(address=f"127.0.0.1:{port}")) as channel:
            yield Plane(agent, telemetry, v1.NodeAgentServiceStub(channel))
        await server.stop(None)
    await telemetry.aclose()


# Watch


async def test_a_watch_begins_with_a_snapshot_and_goes_on_with_changes(plane: Plane) -> None:
    await done(plane.agent.start(a_spec("before")))
    call = plane.stub.Watch(v1.WatchRequest(epoch=1))
    messages = _raised(call)

    opening = await anext(messages)
    assert opening.sequence == 1
    snapshot = opening.snapshot
    assert (snapshot.node_id, snapshot.agent_instance_id, snapshot.epoch) == ("box", "instance-1", 1)
    assert [each.spec.id for each in snapshot.deployments] == ["before"]
    assert snapshot.deployments[0].residency == v1.RESIDENCY_AWAKE
    assert snapshot.status.agent_version == "9.9"

    await done(plane.agent.start(a_spec("after")))
    await done(plane.agent.stop("before"))
    await plane.agent.forget("before")
    seen: list[tuple[str, int | None]] = []
    sequence = 1
    kinds = set()
    async with asyncio.timeout(10):
        while ("before", None) not in seen or "status" not in kinds:
            message = await anext(messages)
            sequence += 1
            assert message.sequence == sequence
            kinds.add(message.WhichOneof("event"))
            if message.HasField("deployment"):
                seen.append((message.deployment.spec.id, message.deployment.residency))
            elif message.HasField("removed_deployment_id"):
                seen.append((message.removed_deployment_id, None))
    assert seen[-1] == ("before", None)
    assert [residency for name, residency in seen if name == "after"][-1] == v1.RESIDENCY_AWAKE
    call.cancel()


async def test_a_watch_of_a_lower_epoch_is_refused(plane: Plane) -> None:
    await anext(_raised(plane.stub.Watch(v1.WatchRequest(epoch=5))))

    with pytest.raises(StaleEpochError) as caught:
        await anext(_raised(plane.stub.Watch(v1.WatchRequest(epoch=4))))

    assert caught.value.metadata["epoch"] == "5"


# Commands


def _commanded(plane: Plane, method: str, request: Callable[[v1.Command], Any]) -> Awaitable[object]:
    async def send() -> object:
        call = getattr(plane.stub, method)(request(v1.Command(operation_id=f"{method}-1", epoch=6)))
        if method != "ForgetEngine":
            return [response async for response in _raised(call)]
        try:
            return await call
        except grpc.aio.AioRpcError as failure:
            raise error_from_rpc(failure) from failure

    return send()


MUTATIONS: dict[str, Callable[[v1.Command], Any]] = {
    "StartEngine": lambda command: v1.StartEngineRequest(
        command=command, spec=codec.deployment_spec_to_proto(a_spec())
    ),
    "StopEngine": lambda command: v1.StopEngineRequest(command=command, deployment_id="chat-1"),
    "SleepEngine": lambda command: v1.SleepEngineRequest(command=command, deployment_id="chat-1"),
    "ShrinkEngine": lambda command: v1.ShrinkEngineRequest(command=command, deployment_id="chat-1"),
    "WakeEngine": lambda command: v1.WakeEngineRequest(command=command, deployment_id="chat-1"),
    "FreeEngine": lambda command: v1.FreeEngineRequest(command=command, deployment_id="chat-1"),
    "ForgetEngine": lambda command: v1.ForgetEngineRequest(command=command, deployment_id="chat-1"),
}


@pytest.mark.parametrize("method", MUTATIONS)
async def test_a_mutation_of_a_lower_epoch_is_refused_and_changes_nothing(plane: Plane, method: str) -> None:
    await done(plane.agent.start(a_spec()))
    plane.agent.supervisor.raise_epoch(7)
    before = plane.agent.supervisor.deployments

    with pytest.raises(StaleEpochError, match="epoch 6 is over"):
        await _commanded(plane, method, MUTATIONS[method])

    assert plane.agent.supervisor.deployments == before
    assert plane.agent.runtime.stops == []


@pytest.mark.parametrize("method", ["SleepEngine", "ShrinkEngine", "FreeEngine"])
async def test_what_an_engine_cannot_do_is_refused(plane: Plane, method: str) -> None:
    await done(plane.agent.start(a_spec()))

    with pytest.raises(FailedPreconditionError, match="chat-1"):
        await _commanded(plane, method, MUTATIONS[method])


async def test_a_command_needs_an_operation_id(plane: Plane) -> None:
    for call in (
        all_of(plane.start(a_spec(), "")),
        all_of(plane.stop(operation_id="")),
        plane.forget("x", ""),
    ):
        with pytest.raises(InvalidRequestError, match="operation_id"):
            await call
    assert plane.agent.supervisor.deployments == ()


async def test_a_start_of_another_nodes_deployment_is_refused(plane: Plane) -> None:
    with pytest.raises(InvalidRequestError, match="for the node elsewhere"):
        await all_of(plane.start(a_spec(node_id="elsewhere")))


async def test_a_start_that_the_allow_list_refuses_is_not_allowed(plane: Plane) -> None:
    plane.agent.runtime.check_error = NotAllowedError("not on the list", executable="engine")

    with pytest.raises(NotAllowedError) as caught:
        await all_of(plane.start(a_spec()))

    assert caught.value.metadata["executable"] == "engine"
    assert plane.agent.supervisor.deployments == ()


async def test_a_start_streams_its_progress_to_its_end(plane: Plane) -> None:
    events = await all_of(plane.start(a_spec(), "mine"))

    assert [event.sequence for event in events] == list(range(1, len(events) + 1))
    assert {event.operation_id for event in events} == {"mine"}
    assert isinstance(events[0].payload, LifecycleProgress)
    outcome = events[-1].payload
    assert isinstance(outcome, LifecycleDone)
    assert (outcome.deployment.residency, outcome.deployment.pid) == (Residency.AWAKE, 101)


async def test_a_failed_start_ends_its_stream_with_the_failure(plane: Plane) -> None:
    plane.agent.runtime.start_error = EngineStartFailedError("no such file")

    outcome = (await all_of(plane.start(a_spec())))[-1].payload

    assert isinstance(outcome, LifecycleFailed)
    assert outcome.detail == "no such file"


async def test_a_repeated_operation_joins_and_then_repeats_all_events(plane: Plane) -> None:
    plane.agent.runtime.may_start.clear()
    beginning = plane.start(a_spec())
    await anext(beginning)
    joined = asyncio.ensure_future(all_of(plane.start(a_spec())))
    await first(plane.start(a_spec()), "starting engine")
    plane.agent.runtime.may_start.set()

    events = await joined
    assert [event.sequence for event in events] == list(range(1, len(events) + 1))
    assert isinstance(events[-1].payload, LifecycleDone)
    assert await all_of(beginning) == events[1:]
    assert await all_of(plane.start(a_spec())) == events
    assert len(plane.agent.runtime.starts) == 1

    await residency_after(plane.stop())
    assert await all_of(plane.start(a_spec())) == events
    assert plane.agent.supervisor.engine("chat-1").residency is Residency.STOPPED


async def test_a_refusal_is_repeated_too(plane: Plane) -> None:
    plane.agent.runtime.check_error = NotAllowedError("not on the list")
    with pytest.raises(NotAllowedError):
        await all_of(plane.start(a_spec()))
    plane.agent.runtime.check_error = None

    with pytest.raises(NotAllowedError):
        await all_of(plane.start(a_spec()))
    assert await residency_after(plane.start(a_spec(), "start-2")) is Residency.AWAKE


async def test_an_operation_outlives_its_caller(plane: Plane) -> None:
    plane.agent.runtime.may_start.clear()
    call = plane.stub.StartEngine(MUTATIONS["StartEngine"](v1.Command(operation_id="start-1", epoch=1)))
    await call.read()
    call.cancel()
    plane.agent.runtime.may_start.set()

    assert await residency_after(plane.start(a_spec())) is Residency.AWAKE
    assert len(plane.agent.runtime.starts) == 1


async def test_an_id_belongs_to_one_operation(plane: Plane) -> None:
    await all_of(plane.start(a_spec(), "mine"))

    others: list[Awaitable[object]] = [
        all_of(plane.stop(operation_id="mine")),
        all_of(plane.start(a_spec("chat-2"), "mine")),
        plane.forget(operation_id="mine"),
    ]
    for other in others:
        with pytest.raises(AlreadyExistsError):
            await other
    assert [each.residency for each in plane.agent.supervisor.deployments] == [Residency.AWAKE]


async def test_an_unknown_deployment_is_not_found(plane: Plane) -> None:
    asked: list[Awaitable[object]] = [
        all_of(plane.stop("nowhere")),
        plane.forget("nowhere"),
        plane.run("nowhere"),
        plane.log("nowhere"),
        _commanded(plane, "SleepEngine", MUTATIONS["SleepEngine"]),
    ]
    for each in asked:
        with pytest.raises(UnknownDeploymentError):
            await each


async def test_a_pinned_engine_is_stopped_by_force_only(plane: Plane) -> None:
    await all_of(plane.start(a_spec(residency_class=ResidencyClass.PINNED)))

    with pytest.raises(PinnedDeploymentError):
        await all_of(plane.stop())
    assert plane.agent.runtime.runs(1)

    assert await residency_after(plane.stop(operation_id="stop-2", force=True)) is Residency.STOPPED


async def test_a_stopped_deployment_is_forgotten_once(plane: Plane) -> None:
    await all_of(plane.start(a_spec()))
    with pytest.raises(FailedPreconditionError):
        await plane.forget()
    await all_of(plane.stop())

    await plane.forget(operation_id="forget-2")
    await plane.forget(operation_id="forget-2")

    assert plane.agent.supervisor.deployments == ()
    with pytest.raises(UnknownDeploymentError):
        await plane.forget(operation_id="forget-3")


# Run


async def test_an_answer_comes_with_its_head_and_its_bytes(plane: Plane) -> None:
    await all_of(plane.start(a_spec()))
    plane.agent.adapter.reply.status = 429
    plane.agent.adapter.reply.retry_after = "7"

    events = await plane.run()

    head = events[0].head
    assert (head.status_code, head.content_type, head.retry_after) == (429, "text/event-stream", "7")
    assert b"".join(event.data for event in events[1:]) == b"data: 1\n\ndata: [DONE]\n\n"
    assert plane.agent.adapter.bodies == [b"{}"]
    assert plane.agent.supervisor.engine("chat-1").deployment.active_requests == 0


async def test_a_large_answer_comes_no_faster_than_it_is_taken(plane: Plane) -> None:
    await all_of(plane.start(a_spec()))
    body = bytes(range(256)) * 2500
    plane.agent.adapter.reply.pieces = (body, b"end")

    events = await plane.run()

    sizes = [len(event.data) for event in events[1:]]
    assert sizes[:2] == [262_144, 262_144]
    assert b"".join(event.data for event in events[1:]) == body + b"end"


async def test_a_short_answer_is_one_message(plane: Plane) -> None:
    await all_of(plane.start(a_spec()))
    plane.agent.adapter.reply.early = b"a"
    plane.agent.adapter.reply.pieces = (b"b",)

    messages = [message async for message in run_messages(plane.stub, a_run())]

    assert [event.WhichOneof("event") for event in messages[0].events] == ["head", "data", "end"]
    assert messages[0].events[1].data == b"ab"
    assert len(messages) == 1


async def test_a_stream_that_breaks_ends_with_what_failed(plane: Plane) -> None:
    await all_of(plane.start(a_spec()))
    plane.agent.adapter.reply.breaks = EngineProtocolError("the connection broke", engine="chat-1")

    messages = [message async for message in run_messages(plane.stub, a_run())]

    events = [event for message in messages for event in message.events]
    assert [event.WhichOneof("event") for event in events] == ["head", "data", "error"]
    found = events[-1].error
    assert (found.reason, found.message) == (EngineProtocolError.reason, "the connection broke")
    assert dict(found.metadata) == {"engine": "chat-1"}


async def test_a_generation_needs_an_engine_that_is_awake(plane: Plane) -> None:
    plane.agent.adapter.health = EngineHealth.LOADING
    await first(plane.start(a_spec()), "waiting for the engine")

    with pytest.raises(NotAwakeError, match="waiting for the engine"):
        await plane.run()

    assert not plane.agent.adapter.entered.is_set()


async def test_a_generation_needs_a_route(plane: Plane) -> None:
    await all_of(plane.start(a_spec()))

    with pytest.raises(InvalidRequestError):
        await answer_of(plane.stub, v1.RunBegin(deployment_id="chat-1"))


async def test_a_caller_that_leaves_cancels_the_generation_in_the_engine(plane: Plane) -> None:
    await all_of(plane.start(a_spec()))
    adapter = plane.agent.adapter
    adapter.reply.gate.clear()
    call = plane.stub.Run()
    await call.write(instructed(v1.RunInstruction(run_id=1, begin=a_run())))
    assert (await call.read()).events[0].HasField("head")
    assert plane.agent.supervisor.engine("chat-1").deployment.active_requests == 1
    assert not adapter.left.is_set()

    call.cancel()

    async with asyncio.timeout(10):
        await adapter.left.wait()
    assert not adapter.reply.gate.is_set()


async def test_many_streams_are_paced_and_what_is_no_stream_is_not(plane: Plane) -> None:
    await all_of(plane.start(a_spec()))
    reply = plane.agent.adapter.reply
    reply.gate.clear()

    async def begin() -> AsyncIterator[v1.RunEvent]:
        events = run_events(plane.stub, a_run())
        assert (await anext(events)).HasField("head")
        return events

    running = [await begin() for _ in range(9)]
    reply.content_type = "application/json"
    running.append(await begin())
    reply.gate.set()
    for responses in running:
        async for _ in responses:
            pass

    # Two pieces of each stream; none of the answer that is no stream.
    assert len(reply.intervals_s) == 2 * 9
    assert max(reply.intervals_s) == pytest.approx(10 * 0.00075)
    reply.content_type = "text/event-stream"
    async for _ in await begin():
        pass
    assert reply.intervals_s[18:] == [0.0, 0.0]


# Logs


async def test_the_output_of_an_engine_is_read_while_it_runs_and_after(plane: Plane) -> None:
    plane.agent.runtime.output = [f"line {number}" for number in range(150)]
    await all_of(plane.start(a_spec()))

    assert await plane.log() == [f"line {number}" for number in range(50, 150)]
    assert await plane.log(tail_lines=2) == ["line 148", "line 149"]

    await all_of(plane.stop())
    assert await plane.log(tail_lines=1) == ["line 149"]


async def test_an_output_is_followed_to_the_end_of_its_engine(plane: Plane) -> None:
    plane.agent.runtime.output = ["loaded"]
    await all_of(plane.start(a_spec()))
    call = plane.stub.ReadEngineLog(v1.ReadEngineLogRequest(deployment_id="chat-1", follow=True))
    assert list((await call.read()).lines) == ["loaded"]

    plane.agent.runtime.ends(1)

    async with asyncio.timeout(10):
        assert await call.read() is grpc.aio.EOF


async def test_a_defect_is_told_without_its_text(plane: Plane) -> None:
    await all_of(plane.start(a_spec()))
    # The runtime was asked for an engine that it never ran: a KeyError of the fake.
    plane.agent.runtime.ends(1)
    plane.agent.runtime._exits.clear()
    request = v1.ReadEngineLogRequest(deployment_id="chat-1", follow=True)

    with pytest.raises(RungError, match=r"^internal error"):
        async for _ in _raised(plane.stub.ReadEngineLog(request)):
            pass
