"""An agent that is told to stop, on real gRPC: what runs may end, nothing new is begun, streams end."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc.aio
import pytest
from google.protobuf.descriptor_pool import Default
from google.protobuf.message_factory import GetMessageClass
from prometheus_client import CollectorRegistry

from controlplane.fleet import AgentClient, AgentRun
from nodeagent.api import Drain, NodeAgentServicer
from nodeagent.engines import Generation
from nodeagent.telemetry import GpuSample, Telemetry
from rung import codec, v1
from rung.codec import GenerationEvent
from rung.errors import DrainingError, NodeUnreachableError
from rung.service import CallInterceptor, GrpcServer, ServerOptions, add_service
from rung.transport import ChannelOptions, error_from_rpc, open_channel
from rung.types import DeploymentSpec, JobKind, SpeechInput
from tests.fakes.agent_server import a_spec
from tests.fakes.engines import AnAgent, ScriptedAdapter, an_agent, done
from tests.fakes.runs import a_run, instructed

SERVICE = Default().FindServiceByName("rung.v1.NodeAgentService")
MUTATIONS = [
    method.name
    for method in SERVICE.methods
    if "command" in method.input_type.fields_by_name and hasattr(NodeAgentServicer, method.name)
]
#: Long enough for anything here, so that what ends before ended by itself.
LONG_S = 60.0
SOON_S = 10.0


class NoGpus:
    """A machine without GPUs."""

    def read(self) -> GpuSample:
        return GpuSample()

    def close(self) -> None:
        return


@dataclass
class Speaks(ScriptedAdapter):
    """An engine with a dialect of its own, which never comes to an end."""

    generates: asyncio.Event = field(default_factory=asyncio.Event)

    async def generate(
        self, base_url: str, spec: DeploymentSpec, generation: Generation
    ) -> AsyncIterator[GenerationEvent]:
        self.generates.set()
        try:
            await asyncio.Event().wait()
            for nothing in list[GenerationEvent]():
                yield nothing
        finally:
            self.left.set()


@dataclass
class Plane:
    """What a control plane has of an agent that is up, with one engine that is awake."""

    agent: AnAgent
    adapter: Speaks
    drain: Drain
    server: GrpcServer
    client: AgentClient
    #: The generated types know the blocking calls only.
    stub: Any

    def run(self) -> AgentRun:
        return self.client.run("chat-1", job_id="job-1", kind=JobKind.CHAT, body=b"{}", idle_timeout_s=LONG_S)


@pytest.fixture
async def plane(tmp_path: Path) -> AsyncIterator[Plane]:
    telemetry = Telemetry(state_dir=tmp_path, agent_version="9.9", gpu_source=NoGpus(), interval_s=0.05)
    await telemetry.start()
    adapter = Speaks()
    async with an_agent(tmp_path, adapter=adapter) as agent:
        await done(agent.start(a_spec()))
        drain = Drain("box")
        server = GrpcServer(
            ServerOptions(port=0),
            services=[SERVICE],
            interceptors=[CallInterceptor(CollectorRegistry())],
            what="the agent",
        )
        add_service(
            server.server, SERVICE, NodeAgentServicer(agent.supervisor, telemetry, "instance-1", drain)
        )
        await server.start()
        address = f"127.0.0.1:{server.port}"
        client = AgentClient("box", address)
        async with open_channel(ChannelOptions(address=address)) as channel:
            yield Plane(agent, adapter, drain, server, client, v1.NodeAgentServiceStub(channel))
        await client.aclose()
        await server.stop(0)
    await telemetry.aclose()


async def test_what_runs_comes_to_its_end_and_nothing_new_is_begun(plane: Plane) -> None:
    gate = plane.adapter.reply.gate
    gate.clear()
    async with asyncio.timeout(SOON_S), plane.run() as running:
        plane.drain.begin()
        ending = asyncio.create_task(plane.drain.end(LONG_S))

        with pytest.raises(DrainingError, match="the agent of box is shutting down and begins nothing new"):
            await plane.run().__aenter__()
        assert (plane.drain.running, plane.drain.over.is_set()) == (1, False)

        gate.set()
        assert await running.read() == b"data: 1\n\ndata: [DONE]\n\n"
        await ending
    assert len(plane.adapter.bodies) == 1


@pytest.mark.parametrize("method", MUTATIONS)
async def test_no_operation_is_begun(plane: Plane, method: str) -> None:
    before = plane.agent.supervisor.deployments
    plane.drain.begin()
    command = v1.Command(operation_id="late-1", epoch=1)
    request: Any = GetMessageClass(SERVICE.methods_by_name[method].input_type)(command=command)
    if method == "StartEngine":
        request.spec.CopyFrom(codec.deployment_spec_to_proto(a_spec("chat-2")))
    else:
        request.deployment_id = "chat-1"

    call = getattr(plane.stub, method)(request)
    with pytest.raises(grpc.aio.AioRpcError) as refused:
        await (call.read() if SERVICE.methods_by_name[method].server_streaming else call)

    assert refused.value.code() is grpc.StatusCode.UNAVAILABLE
    assert isinstance(error_from_rpc(refused.value), DrainingError)
    assert plane.agent.supervisor.deployments == before


def test_all_operations_are_among_these() -> None:
    assert {"StartEngine", "StopEngine", "SleepEngine", "WakeEngine", "ForgetEngine"} < set(MUTATIONS)


async def test_those_who_watch_go_on_while_something_runs(plane: Plane) -> None:
    plane.adapter.reply.gate.clear()
    watching = plane.stub.Watch(v1.WatchRequest(epoch=1))
    assert (await watching.read()).HasField("snapshot")
    async with asyncio.timeout(SOON_S), plane.run() as running:
        plane.drain.begin()
        while not (message := await watching.read()).HasField("deployment"):
            assert message is not grpc.aio.EOF
        assert message.deployment.active_requests == 1
        plane.adapter.reply.gate.set()
        await running.read()


async def test_streams_of_an_agent_that_does_nothing_end_by_themselves(plane: Plane) -> None:
    watching = plane.stub.Watch(v1.WatchRequest(epoch=1))
    assert (await watching.read()).HasField("snapshot")
    through = plane.stub.Run()
    await through.write(instructed(v1.RunInstruction(run_id=1, begin=a_run())))
    while not any(event.HasField("end") for event in (await through.read()).events):
        pass
    async with plane.run() as reply:
        await reply.read()

    plane.drain.begin()
    async with asyncio.timeout(SOON_S):
        await plane.drain.end(LONG_S)
        plane.agent.supervisor.changed.fire()
        # So long it would wait for streams that do not.
        await plane.server.stop(LONG_S)

        while await watching.read() is not grpc.aio.EOF:
            pass
        assert await watching.code() is grpc.StatusCode.OK
        assert await through.read() is grpc.aio.EOF
        assert await through.code() is grpc.StatusCode.OK
    with pytest.raises(NodeUnreachableError):
        await plane.run().__aenter__()


async def test_an_output_that_is_followed_ends_with_the_agent(plane: Plane) -> None:
    plane.agent.runtime.output = ["loaded"]
    call = plane.stub.ReadEngineLog(v1.ReadEngineLogRequest(deployment_id="chat-1", follow=True))
    assert list((await call.read()).lines) == ["loaded"]

    plane.drain.begin()
    async with asyncio.timeout(SOON_S):
        await plane.server.stop(LONG_S)
        assert await call.read() is grpc.aio.EOF
        assert await call.code() is grpc.StatusCode.OK


async def test_what_outlasts_the_drain_is_cut_and_its_caller_told_why(plane: Plane) -> None:
    plane.adapter.reply.gate.clear()
    async with asyncio.timeout(SOON_S), plane.run() as running:
        plane.drain.begin()
        await plane.drain.end(0.0)

        with pytest.raises(DrainingError, match="the agent of box shut down before this generation ended"):
            await running.read()
        await plane.adapter.left.wait()
        await plane.server.stop(LONG_S)


async def test_a_second_signal_waits_for_nothing(plane: Plane) -> None:
    plane.adapter.reply.gate.clear()
    async with asyncio.timeout(SOON_S), plane.run() as running:
        plane.drain.begin()
        ending = asyncio.create_task(plane.drain.end(LONG_S))
        plane.drain.cut()

        await ending
        with pytest.raises(DrainingError, match="before this generation ended"):
            await running.read()


async def test_a_generation_in_a_dialect_of_its_own_is_refused_or_cut_too(plane: Plane) -> None:
    async def speak() -> None:
        async for _ in plane.client.generate(
            "chat-1", job_id="job-1", wanted=SpeechInput(text="Hello"), idle_timeout_s=LONG_S
        ):
            pass

    async with asyncio.timeout(SOON_S):
        speaking = asyncio.create_task(speak())
        await plane.adapter.generates.wait()
        plane.drain.begin()
        assert plane.drain.running == 1
        with pytest.raises(DrainingError, match="begins nothing new"):
            await speak()

        plane.drain.cut()
        with pytest.raises(DrainingError, match="before this generation ended"):
            await speaking
        await plane.adapter.left.wait()
