"""The fleet against scripted agents on real gRPC."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path

import pytest
from msgspec.structs import replace

from controlplane.fleet import DrainMarks, Fleet, FleetView, LifecycleAction
from controlplane.fleet import _node_session as node_session
from controlplane.fleet import _operations as operations
from controlplane.store import FleetMarks, JobStore
from rung import v1
from rung.errors import (
    AlreadyExistsError,
    EngineStartFailedError,
    FailedPreconditionError,
    InvalidRequestError,
    NodeUnreachableError,
    NotOursError,
    PinnedDeploymentError,
    StaleEpochError,
    UnknownDeploymentError,
    UnknownNodeError,
)
from rung.types import (
    DeploymentSpec,
    FailureReason,
    JobKind,
    LifecycleDone,
    LifecycleEvent,
    LifecycleFailed,
    LifecyclePayload,
    LifecycleProgress,
    NodeOwnership,
    NodeState,
    Residency,
    ResidencyClass,
)
from tests.fakes.agent_server import Call, ScriptedAgent, a_deployment, a_spec, a_status, comes_up

START, STOP = LifecycleAction.START, LifecycleAction.STOP


@dataclass(frozen=True)
class ANode:
    id: str
    address: str
    ownership: NodeOwnership = NodeOwnership.OWNED


@pytest.fixture
async def agent() -> AsyncIterator[ScriptedAgent]:
    agent = ScriptedAgent()
    await agent.start()
    yield agent
    await agent.stop()


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Shorter waits, so that silence is noticed within the time of a test."""
    monkeypatch.setattr(node_session, "SILENCE_S", 0.5)
    monkeypatch.setattr(node_session, "FIRST_BACKOFF_S", 0.02)
    monkeypatch.setattr(node_session, "LONGEST_BACKOFF_S", 0.05)


@asynccontextmanager
async def a_fleet(
    agents: Sequence[ScriptedAgent],
    deployments: Sequence[DeploymentSpec] = (),
    *,
    load: Callable[[str], tuple[int, int]] = lambda _: (0, 0),
    drained: Callable[[str], AbstractAsyncContextManager[None]] = lambda _: nullcontext(),
    drain_marks: DrainMarks | None = None,
) -> AsyncIterator[Fleet]:
    fleet = Fleet(
        nodes=[ANode(agent.node_id, agent.address) for agent in agents],
        deployments=deployments,
        epoch=7,
        load=load,
        drained=drained,
        own_host_id="host-1",
        drain_marks=drain_marks,
    )
    await fleet.start()
    try:
        yield fleet
    finally:
        await fleet.aclose()


def sampled_at(time_s: float) -> Callable[[FleetView], bool]:
    def wanted(view: FleetView) -> bool:
        status = view.nodes["box"].status
        return status is not None and status.sample_time_s == time_s

    return wanted


async def until(fleet: Fleet, wanted: Callable[[FleetView], bool]) -> FleetView:
    async with asyncio.timeout(10):
        async for view in fleet.changes():
            if wanted(view):
                return view
    raise AssertionError("the fleet was closed")


def node_is(state: NodeState, node_id: str = "box") -> Callable[[FleetView], bool]:
    return lambda view: view.nodes[node_id].state is state


def residency_is(residency: Residency, deployment_id: str = "chat-1") -> Callable[[FleetView], bool]:
    return lambda view: (
        deployment_id in view.deployments
        and view.deployments[deployment_id].deployment.residency is residency
    )


async def payloads(events: AsyncIterator[LifecycleEvent]) -> list[LifecyclePayload]:
    return [event.payload async for event in events]


# Following nodes


async def test_a_snapshot_then_changes(agent: ScriptedAgent) -> None:
    spec = a_spec()
    agent.deployments = {spec.id: a_deployment(spec, Residency.STARTING)}
    async with a_fleet([agent], [spec]) as fleet:
        assert fleet.view.nodes["box"].state is NodeState.CONNECTING
        assert fleet.view.deployments[spec.id].deployment.residency is Residency.UNKNOWN
        await until(fleet, residency_is(Residency.STARTING))

        agent.report(a_deployment(spec, Residency.AWAKE))
        view = await until(fleet, residency_is(Residency.AWAKE))
        assert view.deployments[spec.id].direct_url == "http://127.0.0.1:9"

        agent.tick(a_status(sample_time_s=5.0))
        assert (await until(fleet, sampled_at(5.0))).deployments[spec.id].node.status == agent.status

        agent.remove(spec.id)
        await until(fleet, residency_is(Residency.STOPPED))


async def test_measurements_are_as_old_as_their_agent_says(agent: ScriptedAgent) -> None:
    async with a_fleet([agent], []) as fleet:
        loop = asyncio.get_running_loop()
        sent_s = loop.time()
        agent.tick(replace(a_status(sample_time_s=5.0), sample_age_s=30.0))
        await until(fleet, sampled_at(5.0))
        assert sent_s - 31.0 < fleet.session("box").measured_s < loop.time() - 30.0

        agent.tick(replace(a_status(sample_time_s=6.0), sample_age_s=0.0))
        await until(fleet, sampled_at(6.0))
        assert sent_s - 1.0 < fleet.session("box").measured_s < loop.time()


async def test_a_report_about_an_older_engine_is_ignored(agent: ScriptedAgent) -> None:
    spec = a_spec()
    agent.deployments = {spec.id: a_deployment(spec, Residency.AWAKE, generation=5)}
    async with a_fleet([agent], [spec]) as fleet:
        await until(fleet, residency_is(Residency.AWAKE))
        agent.report(a_deployment(spec, Residency.FAILED, generation=4))
        agent.tick(a_status(sample_time_s=9.0))
        await until(fleet, lambda view: view.nodes["box"].status == agent.status)
        assert residency_is(Residency.AWAKE)(fleet.view)


async def test_after_a_reconnect_the_snapshot_wins(agent: ScriptedAgent) -> None:
    gone, kept = a_spec("gone"), a_spec("kept")
    agent.deployments = {spec.id: a_deployment(spec, Residency.AWAKE) for spec in (gone, kept)}
    async with a_fleet([agent]) as fleet:
        await until(fleet, residency_is(Residency.AWAKE, "gone"))
        del agent.deployments["gone"]
        agent.break_watches()
        view = await until(fleet, lambda view: "gone" not in view.deployments)
        assert residency_is(Residency.AWAKE, "kept")(view)


@pytest.mark.usefixtures("impatient")
async def test_a_lost_node_is_unreachable_and_its_deployments_unknown_until_it_is_back(
    agent: ScriptedAgent,
) -> None:
    spec = a_spec()
    agent.deployments = {spec.id: a_deployment(spec, Residency.AWAKE)}
    async with a_fleet([agent], [spec]) as fleet:
        await until(fleet, residency_is(Residency.AWAKE))
        await agent.stop()
        view = await until(fleet, node_is(NodeState.UNREACHABLE))
        shown = view.deployments[spec.id]
        assert shown.deployment.residency is Residency.UNKNOWN
        assert "has not been heard since" in shown.deployment.detail
        assert shown.direct_url is None
        await agent.start()
        view = await until(fleet, node_is(NodeState.READY))
        assert view.deployments[spec.id].deployment.residency is Residency.AWAKE


@pytest.mark.usefixtures("impatient")
async def test_a_silent_agent_is_dialled_again(agent: ScriptedAgent) -> None:
    async with a_fleet([agent]) as fleet:
        await until(fleet, node_is(NodeState.READY))
        await agent.until(lambda: agent.watches >= 2)


async def test_a_node_that_is_heard_and_measures_nothing_any_more_is_not_known(
    agent: ScriptedAgent, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(node_session, "OLD_MEASUREMENTS_S", 0.2)
    spec = a_spec()
    agent.deployments = {spec.id: a_deployment(spec, Residency.AWAKE)}

    def is_old(view: FleetView) -> bool:
        return view.deployments[spec.id].measurements_are_old

    async with a_fleet([agent], [spec]) as fleet:
        await until(fleet, residency_is(Residency.AWAKE))
        view = await until(fleet, is_old)
        assert view.nodes["box"].state is NodeState.READY
        assert view.nodes["box"].detail == "its measurements are old"

        monkeypatch.undo()
        # Dialled again, it begins with the same sample.
        agent.break_watches()
        await agent.until(lambda: agent.watches >= 2)
        view = await until(fleet, lambda view: "old" in view.nodes["box"].detail or not is_old(view))
        assert is_old(view)

        agent.tick(a_status(sample_time_s=7.0))
        view = await until(fleet, lambda view: not is_old(view))
        assert view.nodes["box"].detail == ""


async def test_an_agent_that_restarts_at_once_disturbs_nobody(agent: ScriptedAgent) -> None:
    seen: list[NodeState] = []
    async with a_fleet([agent]) as fleet:
        await until(fleet, node_is(NodeState.READY))

        async def record() -> None:
            async for view in fleet.changes():
                seen.append(view.nodes["box"].state)

        recorder = asyncio.create_task(record())
        await agent.stop()
        await agent.start()
        await agent.until(lambda: agent.watches >= 2)
        await until(fleet, lambda view: view.nodes["box"].detail == "")
        recorder.cancel()
    assert set(seen) == {NodeState.READY}


@pytest.mark.usefixtures("impatient")
async def test_a_stall_of_our_own_is_not_taken_for_silence(
    agent: ScriptedAgent, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(node_session, "_STALL_S", 0.05)
    async with a_fleet([agent]) as fleet:
        await until(fleet, node_is(NodeState.READY))
        stalled = asyncio.Event()

        def stall() -> None:
            threading.Event().wait(0.7)
            stalled.set()

        asyncio.get_running_loop().call_soon(stall)
        await stalled.wait()
        await agent.until(lambda: agent.watches == 2)
        assert node_is(NodeState.READY)(fleet.view)


@pytest.mark.usefixtures("impatient")
async def test_an_agent_with_another_name_is_refused() -> None:
    agent = ScriptedAgent(node_id="spark")
    await agent.start()
    fleet = Fleet(nodes=[ANode("box", agent.address)], deployments=[], epoch=1)
    await fleet.start()
    view = await until(fleet, node_is(NodeState.UNREACHABLE))
    assert "calls itself 'spark'" in view.nodes["box"].detail
    await fleet.aclose()
    await agent.stop()


@pytest.mark.usefixtures("impatient")
async def test_a_node_of_another_control_plane_says_so(agent: ScriptedAgent) -> None:
    agent.watch_error = StaleEpochError("epoch 7 is lower than 9; another control plane owns box")
    async with a_fleet([agent]) as fleet:
        view = await until(fleet, node_is(NodeState.UNREACHABLE))
        assert "another control plane owns box" in view.nodes["box"].detail


# Operations


async def test_a_start_streams_and_its_effect_is_seen_by_who_reads_the_view(agent: ScriptedAgent) -> None:
    spec = a_spec()

    async def loads(agent: ScriptedAgent, call: Call) -> AsyncIterator[LifecyclePayload]:
        yield LifecycleProgress(Residency.STARTING, "loading", 50.0, 1.0)
        async for payload in comes_up(agent, call):
            yield payload

    agent.script = loads
    async with a_fleet([agent], [spec]) as fleet:
        await until(fleet, node_is(NodeState.READY))
        events = [event async for event in fleet.lifecycle(START, spec.id, "op-1")]
        assert [event.sequence for event in events] == [1, 2]
        assert {event.operation_id for event in events} == {"op-1"}
        assert events[0].payload == LifecycleProgress(Residency.STARTING, "loading", 50.0, 1.0)
        assert isinstance(events[1].payload, LifecycleDone)
        assert events[1].payload.deployment == fleet.view.deployments[spec.id].deployment
        assert residency_is(Residency.AWAKE)(fleet.view)

        again = [event async for event in fleet.lifecycle(START, spec.id, "op-1")]
        assert again == events
        assert [(call.operation_id, call.epoch) for call in agent.calls] == [("op-1", 7)]

        with pytest.raises(AlreadyExistsError):
            await payloads(fleet.lifecycle(STOP, spec.id, "op-1"))


async def test_an_operation_survives_its_reader_and_keeps_others_informed(
    agent: ScriptedAgent, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(operations, "KEEP_ALIVE_S", 0.05)
    spec = a_spec()
    go_on = asyncio.Event()

    async def slow(agent: ScriptedAgent, call: Call) -> AsyncIterator[LifecyclePayload]:
        yield LifecycleProgress(Residency.STARTING, "loading", 10.0, 60.0)
        await go_on.wait()
        async for payload in comes_up(agent, call):
            yield payload

    agent.script = slow
    async with a_fleet([agent], [spec]) as fleet:
        await until(fleet, node_is(NodeState.READY))
        leaves = fleet.lifecycle(START, spec.id, "op-1")
        await anext(leaves)
        await leaves.aclose()

        stays = fleet.lifecycle(START, spec.id, "op-1")
        heard = [await anext(stays) for _ in range(4)]
        assert [event.sequence for event in heard] == [1, 2, 3, 4]
        last = heard[-1].payload
        assert isinstance(last, LifecycleProgress)
        assert (last.detail, last.percent) == ("loading", 10.0)
        assert last.remaining_s is not None
        assert 50.0 < last.remaining_s < 60.0
        go_on.set()
        assert isinstance((await payloads(stays))[-1], LifecycleDone)
        assert len([call for call in agent.calls if call.deployment_id == "chat-1"]) == 1


@pytest.mark.usefixtures("impatient")
async def test_an_operation_attaches_again_after_the_agent_was_lost(agent: ScriptedAgent) -> None:
    spec = a_spec()
    attached = asyncio.Event()

    async def replays(agent: ScriptedAgent, call: Call) -> AsyncIterator[LifecyclePayload]:
        yield LifecycleProgress(Residency.STARTING, "loading")
        if len(agent.calls) == 1:
            attached.set()
            await asyncio.Event().wait()
        async for payload in comes_up(agent, call):
            yield payload

    agent.script = replays
    async with a_fleet([agent], [spec]) as fleet:
        await until(fleet, node_is(NodeState.READY))
        reading = asyncio.create_task(payloads(fleet.lifecycle(START, spec.id, "op-1")))
        await attached.wait()
        await agent.stop()
        await until(fleet, node_is(NodeState.UNREACHABLE))
        await agent.start()
        heard = await asyncio.wait_for(reading, 10)
    assert isinstance(heard[-1], LifecycleDone)
    said = [payload.detail for payload in heard if isinstance(payload, LifecycleProgress)]
    assert said[0] == "loading"
    assert any("box is not reachable" in detail for detail in said)
    assert {call.operation_id for call in agent.calls} == {"op-1"}
    assert len(agent.calls) >= 2


@pytest.mark.usefixtures("impatient")
async def test_a_node_that_stays_away_fails_the_operation(
    agent: ScriptedAgent, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(operations, "REATTACH_S", 0.3)
    spec = a_spec()
    attached = asyncio.Event()

    async def hangs(agent: ScriptedAgent, call: Call) -> AsyncIterator[LifecyclePayload]:
        yield LifecycleProgress(Residency.STARTING, "loading")
        attached.set()
        await asyncio.Event().wait()

    agent.script = hangs
    async with a_fleet([agent], [spec]) as fleet:
        await until(fleet, node_is(NodeState.READY))
        reading = asyncio.create_task(payloads(fleet.lifecycle(START, spec.id, "op-1")))
        await attached.wait()
        await agent.stop()
        last = (await asyncio.wait_for(reading, 10))[-1]
    assert isinstance(last, LifecycleFailed)
    assert last.reason is FailureReason.NODE_LOST


async def test_what_is_refused_before_the_agent_is_asked(agent: ScriptedAgent) -> None:
    external = a_spec("external", external=True, residency_class=ResidencyClass.PINNED)
    pinned = a_spec("pinned", residency_class=ResidencyClass.PINNED)
    async with a_fleet([agent], [external, pinned]) as fleet:
        with pytest.raises(NodeUnreachableError):
            await payloads(fleet.lifecycle(START, "pinned", "op-0"))
        await until(fleet, node_is(NodeState.READY))
        with pytest.raises(UnknownDeploymentError):
            await payloads(fleet.lifecycle(START, "nope", "op-1"))
        with pytest.raises(InvalidRequestError):
            await payloads(fleet.lifecycle(START, "pinned", ""))
        with pytest.raises(NotOursError):
            await payloads(fleet.lifecycle(STOP, "external", "op-2"))
        for action in (STOP, LifecycleAction.SLEEP, LifecycleAction.FREE):
            with pytest.raises(PinnedDeploymentError):
                await payloads(fleet.lifecycle(action, "pinned", f"op-{action}"))
        assert not [call for call in agent.calls if call.deployment_id == "pinned"]
        agent.deployments = {"pinned": a_deployment(pinned, Residency.AWAKE)}
        await payloads(fleet.lifecycle(STOP, "pinned", "op-3", force=True))
        asked = [(call.action, call.force) for call in agent.calls if call.deployment_id == "pinned"]
        assert asked == [("stop", True)]


async def test_what_the_agent_refuses_is_raised(agent: ScriptedAgent) -> None:
    async def refuses(agent: ScriptedAgent, call: Call) -> AsyncIterator[LifecyclePayload]:
        for payload in list[LifecyclePayload]():
            yield payload
        raise FailedPreconditionError("it runs with another spec")

    agent.script = refuses
    async with a_fleet([agent], [a_spec()]) as fleet:
        await until(fleet, node_is(NodeState.READY))
        for _ in range(2):
            with pytest.raises(FailedPreconditionError, match="another spec"):
                await payloads(fleet.lifecycle(START, "chat-1", "op-1"))
        assert len([call for call in agent.calls if call.deployment_id == "chat-1"]) == 1


async def test_adopted_deployments_are_operated_by_the_id_that_their_agent_uses() -> None:
    agents = [ScriptedAgent(node_id="a"), ScriptedAgent(node_id="b")]
    for agent in agents:
        spec = a_spec("found", node_id=agent.node_id)
        agent.deployments = {"found": a_deployment(spec, Residency.AWAKE)}
        await agent.start()
    async with a_fleet(agents) as fleet:
        await until(fleet, residency_is(Residency.AWAKE, "b/found"))
        await payloads(fleet.lifecycle(LifecycleAction.SLEEP, "b/found", "op-1", level=2))
        call = agents[1].calls[0]
        assert (call.deployment_id, call.level, agents[0].calls) == ("found", 2, [])
    for agent in agents:
        await agent.stop()


# Ensuring


async def test_those_who_need_a_deployment_share_one_start(agent: ScriptedAgent) -> None:
    spec = a_spec()
    go_on = asyncio.Event()

    async def slow(agent: ScriptedAgent, call: Call) -> AsyncIterator[LifecyclePayload]:
        yield LifecycleProgress(Residency.STARTING, "loading")
        await go_on.wait()
        async for payload in comes_up(agent, call):
            yield payload

    agent.script = slow
    async with a_fleet([agent], [spec]) as fleet:
        await until(fleet, node_is(NodeState.READY))

        async def ensure() -> list[str]:
            return [progress.detail async for progress in fleet.ensure_awake(spec.id)]

        both = [asyncio.create_task(ensure()) for _ in range(2)]
        await agent.until(lambda: len(agent.calls) == 1)
        go_on.set()
        for heard in await asyncio.gather(*both):
            assert heard[0] == "loading"
        assert residency_is(Residency.AWAKE)(fleet.view)
        assert len([call for call in agent.calls if call.deployment_id == "chat-1"]) == 1
        assert await ensure() == []


async def test_a_sleeper_is_woken_and_not_started(agent: ScriptedAgent) -> None:
    spec = a_spec()
    agent.deployments = {spec.id: a_deployment(spec, Residency.ASLEEP)}
    async with a_fleet([agent], [spec]) as fleet:
        await until(fleet, residency_is(Residency.ASLEEP))
        assert [progress async for progress in fleet.ensure_awake(spec.id)] == []
        assert [call.action for call in agent.calls] == ["wake"]


@pytest.mark.parametrize("action", [LifecycleAction.SLEEP, LifecycleAction.STOP, LifecycleAction.FREE])
async def test_nothing_is_taken_from_an_engine_before_its_requests_have_ended(
    agent: ScriptedAgent, action: LifecycleAction
) -> None:
    ended, holds = asyncio.Event(), list[str]()

    @asynccontextmanager
    async def drained(deployment_id: str) -> AsyncIterator[None]:
        await ended.wait()
        holds.append(deployment_id)
        yield
        holds.remove(deployment_id)

    async def obeys(agent: ScriptedAgent, call: Call) -> AsyncIterator[LifecyclePayload]:
        assert holds == ([] if call.force else ["chat-1"])
        yield LifecycleDone(agent.deployments["chat-1"])

    spec = a_spec()
    agent.deployments = {spec.id: a_deployment(spec, Residency.AWAKE)}
    agent.script = obeys
    async with a_fleet([agent], [spec], load=lambda _: (2, 0), drained=drained) as fleet:
        await until(fleet, residency_is(Residency.AWAKE))
        events = fleet.lifecycle(action, "chat-1", "op-1")
        first = (await anext(events)).payload
        assert isinstance(first, LifecycleProgress)
        assert first.detail == "waiting for 2 requests to end"
        assert agent.calls == []
        if action is not LifecycleAction.FREE:
            # Whoever insists does not wait.
            forced = fleet.lifecycle(action, "chat-1", "op-2", force=True)
            assert isinstance([event async for event in forced][-1].payload, LifecycleDone)
        ended.set()
        assert isinstance([event async for event in events][-1].payload, LifecycleDone)
        assert holds == []


async def test_a_start_that_fails_is_an_error(agent: ScriptedAgent) -> None:
    external = a_deployment(a_spec("external", external=True), Residency.STOPPED)

    async def fails(agent: ScriptedAgent, call: Call) -> AsyncIterator[LifecyclePayload]:
        if call.deployment_id == external.spec.id:
            yield LifecycleDone(external)
        else:
            yield LifecycleFailed(FailureReason.ENGINE_START_FAILED, "no such file: /m.gguf")

    agent.script = fails
    async with a_fleet([agent], [a_spec(), external.spec]) as fleet:
        await until(fleet, node_is(NodeState.READY))
        await agent.until(lambda: any(call.deployment_id == external.spec.id for call in agent.calls))
        with pytest.raises(EngineStartFailedError, match=r"no such file"):
            async for _ in fleet.ensure_awake("chat-1"):
                pass
        agent.report(a_deployment(external.spec, Residency.STARTING))
        await until(fleet, residency_is(Residency.STARTING, "external"))
        waiting = fleet.ensure_awake("external")
        assert (await anext(waiting)).residency is Residency.STARTING
        agent.report(external)
        with pytest.raises(EngineStartFailedError, match="somebody else"):
            await anext(waiting)
        with pytest.raises(EngineStartFailedError, match="somebody else"):
            async for _ in fleet.ensure_awake("external"):
                pass
        await fleet.drain_node("box")
        with pytest.raises(EngineStartFailedError, match="resume it"):
            async for _ in fleet.ensure_awake("chat-1"):
                pass
        assert len([call for call in agent.calls if call.deployment_id == "chat-1"]) == 1


# Keeping running


async def test_what_is_to_run_is_started_and_what_an_operator_stopped_stays_stopped(
    agent: ScriptedAgent,
) -> None:
    kept, left = a_spec("kept", keep_running=True), a_spec("left")

    async def obeys(agent: ScriptedAgent, call: Call) -> AsyncIterator[LifecyclePayload]:
        if call.action == "stop":
            stopped = a_deployment(kept, Residency.STOPPED)
            agent.report(stopped)
            yield LifecycleDone(stopped)
            return
        async for payload in comes_up(agent, call):
            yield payload

    agent.script = obeys
    async with a_fleet([agent], [kept, left]) as fleet:
        await until(fleet, residency_is(Residency.AWAKE, "kept"))
        assert [call.deployment_id for call in agent.calls] == ["kept"]
        await payloads(fleet.lifecycle(STOP, "kept", "op-1"))
        agent.tick(a_status(sample_time_s=3.0))
        await until(fleet, lambda view: view.nodes["box"].status == agent.status)
        assert [call.action for call in agent.calls] == ["start", "stop"]
        await payloads(fleet.lifecycle(START, "kept", "op-2"))
        agent.report(a_deployment(kept, Residency.FAILED, generation=9))
        await agent.until(lambda: len(agent.calls) == 4)
        assert agent.calls[-1].action == "start"


async def test_draining_starts_nothing_and_ends_when_the_requests_have(agent: ScriptedAgent) -> None:
    spec = a_spec(keep_running=True)
    agent.deployments = {spec.id: a_deployment(spec, Residency.AWAKE)}
    load = {spec.id: (2, 1)}
    async with a_fleet([agent], [spec], load=lambda key: load[key]) as fleet:
        await until(fleet, residency_is(Residency.AWAKE))
        await fleet.drain_node("box")
        assert node_is(NodeState.DRAINING)(fleet.view)
        assert "3 requests" in fleet.view.nodes["box"].detail
        load[spec.id] = (0, 0)
        agent.tick()
        await until(fleet, node_is(NodeState.DRAINED))
        agent.report(a_deployment(spec, Residency.FAILED, generation=2))
        await until(fleet, residency_is(Residency.FAILED))
        with pytest.raises(FailedPreconditionError):
            await payloads(fleet.lifecycle(START, spec.id, "op-1"))
        assert not agent.calls
        await fleet.resume_node("box")
        await until(fleet, residency_is(Residency.AWAKE))
        with pytest.raises(UnknownNodeError):
            await fleet.drain_node("nope")


async def test_a_node_stays_drained_over_a_restart_until_it_is_taken_back(
    agent: ScriptedAgent, tmp_path: Path
) -> None:
    store = await JobStore.open(tmp_path / "rung.db")
    marks = DrainMarks(FleetMarks(store))
    async with a_fleet([agent], drain_marks=marks) as fleet:
        await until(fleet, node_is(NodeState.READY))
        await fleet.drain_node("box")
    async with a_fleet([agent], drain_marks=marks) as fleet:
        await until(fleet, node_is(NodeState.DRAINED))
        await fleet.resume_node("box")
    async with a_fleet([agent], drain_marks=marks) as fleet:
        await until(fleet, node_is(NodeState.READY))
    await store.aclose()


# Running through the agent


async def test_nothing_runs_on_a_deployment_that_there_is_not(agent: ScriptedAgent) -> None:
    async with a_fleet([agent]) as fleet:
        with pytest.raises(UnknownDeploymentError):
            fleet.run_through_agent("nope", "job-1", JobKind.CHAT, b"{}", 30)


async def test_a_generation_outlives_the_stream_that_watches_its_node(agent: ScriptedAgent) -> None:
    go_on = asyncio.Event()

    async def waits(begin: v1.RunBegin) -> AsyncIterator[v1.RunHead | bytes]:
        yield v1.RunHead(status_code=200)
        await go_on.wait()
        yield b"whole"

    agent.run_script = waits
    spec = a_spec()
    agent.deployments = {spec.id: a_deployment(spec, Residency.AWAKE)}
    async with a_fleet([agent], [spec]) as fleet:
        await until(fleet, residency_is(Residency.AWAKE))
        async with fleet.run_through_agent("chat-1", "job-1", JobKind.CHAT, b"{}", 30) as reply:
            agent.break_watches()
            await agent.until(lambda: agent.watches == 2)
            await until(fleet, lambda view: view.nodes["box"].detail == "")
            go_on.set()
            assert await reply.read() == b"whole"
