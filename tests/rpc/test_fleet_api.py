"""FleetService over real gRPC, with scripted agents behind it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from typing import TYPE_CHECKING, Any

import grpc
import grpc.aio
import pytest

from controlplane.fleet import FleetView
from rung import codec, v1
from rung.errors import (
    InvalidRequestError,
    NodeUnreachableError,
    PinnedDeploymentError,
    RungError,
    UnknownDeploymentError,
    UnknownNodeError,
)
from rung.transport import error_from_rpc
from rung.types import LifecycleDone, NodeState, Residency, ResidencyClass
from tests.fakes.agent_server import ScriptedAgent, a_deployment, a_spec, a_status
from tests.fakes.api_server import ApiServer, an_api_server

if TYPE_CHECKING:
    # In the stubs of the generated code only.
    from rung.v1.fleet_service_pb2_grpc import FleetServiceAsyncStub

SPEC = a_spec()


@pytest.fixture
async def agent() -> AsyncIterator[ScriptedAgent]:
    agent = ScriptedAgent()
    await agent.start()
    yield agent
    await agent.stop()


@pytest.fixture
async def plane(agent: ScriptedAgent) -> AsyncIterator[ApiServer]:
    pinned = a_spec("pinned", residency_class=ResidencyClass.PINNED)
    async with an_api_server([agent], [SPEC, pinned]) as plane:
        await until(plane, lambda view: view.nodes["box"].state is NodeState.READY)
        yield plane


async def until(plane: ApiServer, wanted: Callable[[FleetView], bool]) -> None:
    async with asyncio.timeout(10):
        async for view in plane.fleet.changes():
            if wanted(view):
                return


def stub(plane: ApiServer) -> FleetServiceAsyncStub:
    return v1.FleetServiceStub(plane.channel)


async def refused(call: Any) -> RungError:
    try:
        if hasattr(call, "__aiter__"):
            async for _ in call:
                pass
        else:
            await call
    except grpc.aio.AioRpcError as failure:
        return error_from_rpc(failure)
    pytest.fail("it was not refused")


async def test_what_there_is(plane: ApiServer) -> None:
    nodes = (await stub(plane).ListNodes(v1.ListNodesRequest())).nodes
    assert [(node.id, node.state, node.epoch) for node in nodes] == [("box", v1.NODE_STATE_READY, 1)]
    assert (await stub(plane).GetNode(v1.GetNodeRequest(node_id="box"))).node == nodes[0]

    plane.load["chat-1"] = (3, 2)
    found = (await stub(plane).ListDeployments(v1.ListDeploymentsRequest())).deployments
    assert [(each.spec.id, each.active_requests, each.queued_requests) for each in found] == [
        ("chat-1", 3, 2),
        ("pinned", 0, 0),
    ]
    one = await stub(plane).GetDeployment(v1.GetDeploymentRequest(deployment_id="chat-1"))
    assert one.deployment == found[0]

    page = await stub(plane).ListDeployments(v1.ListDeploymentsRequest(page_size=1))
    assert [each.spec.id for each in page.deployments] == ["chat-1"]
    rest = await stub(plane).ListDeployments(
        v1.ListDeploymentsRequest(page_size=1, page_token=page.next_page_token)
    )
    assert ([each.spec.id for each in rest.deployments], rest.next_page_token) == (["pinned"], "")


async def test_what_there_is_not(plane: ApiServer) -> None:
    fleet = stub(plane)
    assert isinstance(await refused(fleet.GetNode(v1.GetNodeRequest(node_id="x"))), UnknownNodeError)
    assert isinstance(await refused(fleet.DrainNode(v1.DrainNodeRequest(node_id="x"))), UnknownNodeError)
    request = v1.GetDeploymentRequest(deployment_id="x")
    assert isinstance(await refused(fleet.GetDeployment(request)), UnknownDeploymentError)
    bad = v1.ListNodesRequest(page_token="WzFd")
    assert isinstance(await refused(fleet.ListNodes(bad)), InvalidRequestError)


async def test_lifecycle(plane: ApiServer, agent: ScriptedAgent) -> None:
    start = stub(plane).StartDeployment(v1.StartDeploymentRequest(operation_id="o1", deployment_id="chat-1"))
    events = [codec.lifecycle_event_from_proto(response.event) async for response in start]
    assert isinstance(events[-1].payload, LifecycleDone)
    assert events[-1].payload.deployment.residency is Residency.AWAKE

    # What a scripted agent answers does not matter here, only what it was asked.
    fleet = stub(plane)
    begun: tuple[tuple[Any, Any], ...] = (
        (fleet.SleepDeployment, v1.SleepDeploymentRequest(operation_id="o2", level=2, force=True)),
        (fleet.WakeDeployment, v1.WakeDeploymentRequest(operation_id="o3")),
        (fleet.FreeDeployment, v1.FreeDeploymentRequest(operation_id="o4")),
        (fleet.StopDeployment, v1.StopDeploymentRequest(operation_id="o5", force=True)),
    )
    for method, request in begun:
        request.deployment_id = "chat-1"
        assert [response async for response in method(request)]
    assert [(call.action, call.operation_id, call.force, call.level) for call in agent.calls] == [
        ("start", "o1", False, 0),
        ("sleep", "o2", True, 2),
        ("wake", "o3", False, 0),
        ("free", "o4", False, 0),
        ("stop", "o5", True, 0),
    ]


async def test_what_lifecycle_refuses(plane: ApiServer, agent: ScriptedAgent) -> None:
    fleet = stub(plane)
    for request, error in (
        (v1.StopDeploymentRequest(operation_id="o1", deployment_id="pinned"), PinnedDeploymentError),
        (v1.StopDeploymentRequest(operation_id="o1", deployment_id="x"), UnknownDeploymentError),
        (v1.StopDeploymentRequest(deployment_id="chat-1"), InvalidRequestError),
    ):
        assert isinstance(await refused(fleet.StopDeployment(request)), error)
    assert not agent.calls


async def test_a_node_that_does_not_answer() -> None:
    async with an_api_server([ScriptedAgent(port=1)], [SPEC]) as plane:
        request = v1.StartDeploymentRequest(operation_id="o1", deployment_id="chat-1")
        error = await refused(stub(plane).StartDeployment(request))
        assert isinstance(error, NodeUnreachableError)
        assert error.metadata == {"node": "box"}


async def test_draining(plane: ApiServer) -> None:
    plane.load["chat-1"] = (1, 0)
    fleet = stub(plane)
    drained = await fleet.DrainNode(v1.DrainNodeRequest(operation_id="o1", node_id="box"))
    assert drained.node.state == v1.NODE_STATE_DRAINING
    resumed = await fleet.ResumeNode(v1.ResumeNodeRequest(operation_id="o2", node_id="box"))
    assert resumed.node.state == v1.NODE_STATE_READY


async def test_watching_gives_a_snapshot_then_only_what_changed(
    plane: ApiServer, agent: ScriptedAgent
) -> None:
    watch = aiter(stub(plane).WatchFleet(v1.WatchFleetRequest()))
    first = await anext(watch)
    assert [each.spec.id for each in first.snapshot.deployments] == ["chat-1", "pinned"]
    assert [node.id for node in first.snapshot.nodes] == ["box"]

    heartbeat = await anext(watch)
    assert heartbeat.WhichOneof("event") == "heartbeat"

    agent.report(a_deployment(SPEC, Residency.AWAKE))
    changes = [await anext(watch) for _ in range(2)]
    assert {change.WhichOneof("event") for change in changes} == {"node", "deployment"}
    assert changes[1].deployment.residency == v1.RESIDENCY_AWAKE
    assert [first.sequence, heartbeat.sequence, *(change.sequence for change in changes)] == [1, 2, 3, 4]

    plane.load["chat-1"] = (1, 0)
    agent.tick(a_status(sample_time_s=2.0))
    by_kind = {change.WhichOneof("event"): change for change in [await anext(watch) for _ in range(2)]}
    assert by_kind["deployment"].deployment.active_requests == 1
    assert by_kind["node"].node.status.sample_time.seconds == 2


async def test_watching_tells_what_is_gone(agent: ScriptedAgent) -> None:
    agent.deployments = {SPEC.id: a_deployment(SPEC, Residency.AWAKE)}
    async with an_api_server([agent]) as plane:
        await until(plane, lambda view: SPEC.id in view.deployments)
        watch = aiter(stub(plane).WatchFleet(v1.WatchFleetRequest()))
        await anext(watch)
        agent.remove(SPEC.id)
        events = [await anext(watch) for _ in range(2)]
        assert [event.removed_deployment_id for event in events if event.removed_deployment_id] == ["chat-1"]
