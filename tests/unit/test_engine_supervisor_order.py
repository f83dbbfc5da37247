"""What is asked of one deployment at once: it takes effect in the order in which it was asked."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from nodeagent.engines import EngineHealth
from nodeagent.supervisor import Operation
from nodeagent.supervisor._progress import Emit, nobody
from nodeagent.supervisor._turns import Turns
from rung.errors import EngineStartFailedError, FailedPreconditionError, PinnedDeploymentError
from rung.types import (
    DeploymentSpec,
    FailureReason,
    LifecycleDone,
    LifecycleFailed,
    Residency,
    ResidencyClass,
)
from tests.fakes.agent_server import a_spec
from tests.fakes.engines import AnAgent, an_agent, done, events_of, told
from tests.fakes.virtual_time import in_virtual_time


def pinned() -> DeploymentSpec:
    return a_spec(residency_class=ResidencyClass.PINNED)


async def called_off(start: Operation) -> None:
    failed = (await events_of(start))[-1].payload
    assert failed == LifecycleFailed(
        FailureReason.ENGINE_START_FAILED, "the start of chat-1 was called off by a stop"
    )


async def loading(agent: AnAgent) -> Operation:
    """A start whose engine has been launched, and loads until it is told otherwise."""
    agent.adapter.health = EngineHealth.LOADING
    start = agent.start(a_spec())
    await told(start, "waiting for the engine")
    return start


def residency(agent: AnAgent) -> Residency:
    return agent.supervisor.engine("chat-1").residency


@in_virtual_time
async def test_the_machine_is_looked_at_when_an_operation_ends_before_anybody_hears_of_it(
    tmp_path: Path,
) -> None:
    looks: list[Residency] = []
    async with an_agent(tmp_path, look_soon=lambda: looks.append(residency(agent))) as agent:
        start = await loading(agent)
        assert looks == []

        agent.adapter.health = EngineHealth.READY
        async for event in start.events():
            ended = isinstance(event.payload, LifecycleDone)
            assert looks == ([Residency.AWAKE] if ended else [])
        assert ended


@in_virtual_time
async def test_a_stop_calls_off_the_start_that_is_under_way(tmp_path: Path) -> None:
    async with an_agent(tmp_path) as agent:
        start = await loading(agent)

        stopped = await done(agent.stop("chat-1"))

        await called_off(start)
        assert stopped.deployment.residency is Residency.STOPPED
        assert stopped.deployment.failure_reason is None
        assert not agent.runtime.runs(1)


@in_virtual_time
async def test_a_stop_calls_off_a_launch(tmp_path: Path) -> None:
    async with an_agent(tmp_path) as agent:
        agent.runtime.may_start.clear()
        start = agent.start(a_spec())
        await told(start, "starting engine")

        stopped = await done(agent.stop("chat-1"))

        await called_off(start)
        assert stopped.deployment.residency is Residency.STOPPED


@in_virtual_time
async def test_a_start_that_waits_does_not_run_before_the_stop_that_came_after_it(tmp_path: Path) -> None:
    async with an_agent(tmp_path) as agent:
        first = await loading(agent)
        second = agent.start(a_spec())
        await told(second, "waiting for the start that is under way")

        stopped = await done(agent.stop("chat-1"))

        await called_off(first)
        await called_off(second)
        assert stopped.deployment.residency is Residency.STOPPED
        assert len(agent.runtime.starts) == 1


@in_virtual_time
async def test_a_start_that_is_asked_after_a_stop_runs_after_it(tmp_path: Path) -> None:
    async with an_agent(tmp_path) as agent:
        first = await loading(agent)
        agent.adapter.health = EngineHealth.READY
        stop, second = agent.stop("chat-1"), agent.start(a_spec())

        assert (await done(second)).deployment.residency is Residency.AWAKE

        await called_off(first)
        assert (await done(stop)).deployment.residency is Residency.STOPPED
        assert [plan.generation for plan in agent.runtime.starts] == [1, 2]
        assert agent.runtime.stopped == [1]


@in_virtual_time
async def test_operations_that_are_asked_in_one_breath_keep_their_order(tmp_path: Path) -> None:
    async with an_agent(tmp_path) as agent:
        operations = [
            agent.start(a_spec()),
            agent.stop("chat-1"),
            agent.start(a_spec()),
            agent.stop("chat-1"),
            agent.start(a_spec()),
        ]

        assert (await done(operations[-1])).deployment.residency is Residency.AWAKE

        for stop in (operations[1], operations[3]):
            assert (await done(stop)).deployment.residency is Residency.STOPPED
        await called_off(operations[0])
        await called_off(operations[2])
        last = len(agent.runtime.starts)
        assert [number for number in range(9) if agent.runtime.runs(number)] == [last]


@in_virtual_time
async def test_two_stops_during_one_start_are_both_done_and_end_the_engine_once(tmp_path: Path) -> None:
    async with an_agent(tmp_path) as agent:
        start = await loading(agent)
        agent.runtime.may_stop.clear()

        stops = [agent.stop("chat-1")]
        await told(start, "stopping what there is")
        stops.append(agent.stop("chat-1"))
        await told(stops[1], "waiting for the start that is under way")
        agent.runtime.may_stop.set()

        for stop in stops:
            assert (await done(stop)).deployment.residency is Residency.STOPPED
        await called_off(start)
        assert agent.runtime.stops == agent.runtime.stopped == [1]


@in_virtual_time
async def test_a_stop_does_not_cut_short_the_end_of_a_failed_start(tmp_path: Path) -> None:
    async with an_agent(tmp_path) as agent:
        start = await loading(agent)
        agent.runtime.may_stop.clear()
        agent.runtime.ends(1)
        await told(start, "stopping what there is")

        stop = agent.stop("chat-1")
        await told(stop, "waiting for the start that is under way (3 s)")
        agent.runtime.may_stop.set()

        assert (await done(stop)).deployment.residency is Residency.STOPPED
        failed = (await events_of(start))[-1].payload
        assert isinstance(failed, LifecycleFailed)
        assert "ended with exit code 1 while it was loading" in failed.detail
        assert agent.runtime.stops == agent.runtime.stopped == [1]


@in_virtual_time
async def test_one_that_comes_between_two_turns_waits_and_says_so() -> None:
    turns = Turns(lambda: Residency.STOPPED)
    order: list[str] = []
    told_to_third: list[str] = []

    async def take(name: str, takes_s: float, emit: Emit) -> None:
        async with turns.turn(name, emit):
            order.append(name)
            await asyncio.sleep(takes_s)

    async def take_twice() -> None:
        await take("first", 1.0, nobody)
        # The second has been let in by now, and has not yet gone on.
        await take("third", 0.0, lambda progress: told_to_third.append(progress.detail))

    async with asyncio.TaskGroup() as tasks:
        tasks.create_task(take_twice())
        tasks.create_task(take("second", 3.0, nobody))

    assert order == ["first", "second", "third"]
    assert told_to_third[-1] == "waiting for the second that is under way (3 s)"


@in_virtual_time
async def test_a_pinned_engine_is_not_stopped_without_force(tmp_path: Path) -> None:
    async with an_agent(tmp_path) as agent:
        await done(agent.start(pinned()))

        with pytest.raises(PinnedDeploymentError):
            await events_of(agent.stop("chat-1"))
        assert residency(agent) is Residency.AWAKE
        assert agent.runtime.stops == []

        forced = await done(agent.stop("chat-1", force=True))
        assert forced.deployment.residency is Residency.STOPPED


@in_virtual_time
async def test_a_stop_is_refused_if_the_engine_became_pinned_while_it_waited(tmp_path: Path) -> None:
    async with an_agent(tmp_path) as agent:
        await done(agent.start(a_spec()))
        agent.runtime.may_stop.clear()
        first = agent.stop("chat-1")
        await told(first, "stopping the engine")
        start = agent.start(pinned())
        await told(start, "waiting for the stop")

        second = agent.stop("chat-1")
        await told(second, "waiting for the stop")
        agent.runtime.may_stop.set()

        await done(first)
        assert (await done(start)).deployment.residency is Residency.AWAKE
        with pytest.raises(PinnedDeploymentError):
            await events_of(second)
        assert residency(agent) is Residency.AWAKE
        assert agent.runtime.runs(2)


@in_virtual_time
async def test_force_calls_off_the_start_of_a_pinned_engine(tmp_path: Path) -> None:
    async with an_agent(tmp_path) as agent:
        agent.adapter.health = EngineHealth.LOADING
        start = agent.start(pinned())
        await told(start, "waiting for the engine")

        with pytest.raises(PinnedDeploymentError):
            await events_of(agent.stop("chat-1"))
        assert residency(agent) is Residency.STARTING
        await done(agent.stop("chat-1", force=True))

        await called_off(start)


@in_virtual_time
async def test_an_engine_that_runs_is_pinned_by_a_later_spec_and_not_unpinned(tmp_path: Path) -> None:
    async with an_agent(tmp_path) as agent:
        await done(agent.start(a_spec()))

        for spec in (pinned(), a_spec()):
            renewed = await done(agent.start(spec))
            assert renewed.deployment.spec.residency_class is ResidencyClass.PINNED
            with pytest.raises(PinnedDeploymentError):
                await events_of(agent.stop("chat-1"))

        assert len(agent.runtime.starts) == 1


@in_virtual_time
async def test_an_agent_that_ends_leaves_an_engine_that_loads_to_the_next_one(tmp_path: Path) -> None:
    async with an_agent(tmp_path) as agent:
        await loading(agent)
    assert agent.runtime.runs(1)
    assert agent.runtime.stops == []

    async with an_agent(tmp_path, runtime=agent.runtime, adapter=agent.adapter) as successor:
        assert residency(successor) is Residency.STARTING
        again = successor.start(a_spec())
        await told(again, "waiting for the start that is under way")
        successor.adapter.health = EngineHealth.READY

        awake = (await done(again)).deployment

        assert (awake.residency, awake.generation, awake.pid) == (Residency.AWAKE, 1, 101)


@in_virtual_time
async def test_a_stop_calls_off_the_loading_that_an_agent_took_back(tmp_path: Path) -> None:
    async with an_agent(tmp_path) as agent:
        await loading(agent)
    async with an_agent(tmp_path, runtime=agent.runtime, adapter=agent.adapter) as successor:
        await asyncio.sleep(1.0)

        stopped = await done(successor.stop("chat-1"))

        assert stopped.deployment.residency is Residency.STOPPED
        assert agent.runtime.stopped == [1]


@in_virtual_time
async def test_a_stop_that_a_restart_broke_off_is_finished(tmp_path: Path) -> None:
    async with an_agent(tmp_path) as agent:
        await done(agent.start(a_spec()))
        agent.runtime.may_stop.clear()
        await told(agent.stop("chat-1"), "stopping the engine")
    assert agent.runtime.runs(1)
    agent.runtime.may_stop.set()

    async with an_agent(tmp_path, runtime=agent.runtime) as successor:
        assert residency(successor) is Residency.STOPPING
        assert (await done(successor.stop("chat-1"))).deployment.residency is Residency.STOPPED
    assert agent.runtime.stopped == [1]


@in_virtual_time
async def test_a_deployment_is_not_forgotten_while_something_else_is_asked_of_it(tmp_path: Path) -> None:
    async with an_agent(tmp_path) as agent:
        await done(agent.start(a_spec()))
        agent.runtime.stop_error = EngineStartFailedError("it does not end")
        await events_of(agent.stop("chat-1"))
        agent.runtime.ends(1)
        agent.runtime.may_find.clear()
        forgetting = asyncio.ensure_future(agent.forget("chat-1"))
        await asyncio.sleep(0)
        start = agent.start(a_spec())
        await told(start, "waiting for the removal that is under way")
        agent.runtime.may_find.set()

        with pytest.raises(FailedPreconditionError, match="something else was asked"):
            await forgetting

        assert (await done(start)).deployment.residency is Residency.AWAKE
        assert agent.record("chat-1") is not None


@in_virtual_time
async def test_a_deployment_that_is_forgotten_can_be_started_in_the_same_breath(tmp_path: Path) -> None:
    async with an_agent(tmp_path) as agent:
        await done(agent.start(a_spec()))
        await done(agent.stop("chat-1"))
        forgetting = asyncio.ensure_future(agent.forget("chat-1"))
        await asyncio.sleep(0)

        started = (await events_of(agent.start(a_spec())))[-1].payload
        await forgetting

        assert isinstance(started, LifecycleDone)
        assert agent.supervisor.engine("chat-1").deployment is started.deployment
        assert started.deployment.generation == 1
        record = agent.record("chat-1")
        assert record is not None
        assert record.residency is Residency.AWAKE
