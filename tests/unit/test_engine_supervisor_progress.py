"""What an operation on an engine tells while it goes on: something each second, and the truth."""

from __future__ import annotations

import asyncio
from itertools import pairwise
from pathlib import Path

import pytest
from msgspec.structs import replace

from nodeagent.engines import EngineHealth
from nodeagent.supervisor import Operation
from nodeagent.supervisor._progress import Progress
from rung.errors import EngineStartFailedError, NotAwakeError
from rung.types import (
    DeploymentSpec,
    LifecycleDone,
    LifecycleEvent,
    LifecycleFailed,
    LifecycleProgress,
    Residency,
)
from tests.fakes.agent_server import a_spec
from tests.fakes.engines import ScriptedAdapter, ScriptedRuntime, an_agent, done, events_of, told
from tests.fakes.virtual_time import in_virtual_time


def longest_silence_s(events: list[LifecycleEvent]) -> float:
    times_s = [0.0, *(event.elapsed_s for event in events)]
    return max(after - before for before, after in pairwise(times_s))


def details(events: list[LifecycleEvent]) -> list[str]:
    return [event.payload.detail for event in events if isinstance(event.payload, LifecycleProgress)]


async def failed_stop(stop: Operation, runtime: ScriptedRuntime) -> None:
    """Let a stop fail; the engine goes on."""
    runtime.stop_error = EngineStartFailedError("it does not end")
    assert isinstance((await events_of(stop))[-1].payload, LifecycleFailed)
    runtime.stop_error = None


async def slow_start(adapter: ScriptedAdapter, takes_s: float, start: Operation) -> list[LifecycleEvent]:
    adapter.health = EngineHealth.LOADING
    asyncio.get_running_loop().call_later(takes_s, setattr, adapter, "health", EngineHealth.READY)
    return await events_of(start)


def with_grace(spec: DeploymentSpec, stop_grace_s: float) -> DeploymentSpec:
    return replace(spec, engine=replace(spec.engine, stop_grace_s=stop_grace_s))


@in_virtual_time
async def test_a_start_is_told_of_each_second_while_probes_take_their_time(tmp_path: Path) -> None:
    async with an_agent(tmp_path) as agent:
        agent.adapter.health = EngineHealth.ABSENT
        agent.adapter.probe_takes_s = 2.0
        asyncio.get_running_loop().call_later(9.0, setattr, agent.adapter, "health", EngineHealth.READY)

        events = await events_of(agent.start(a_spec()))

        assert isinstance(events[-1].payload, LifecycleDone)
        assert events[-1].elapsed_s > 9.0
        assert longest_silence_s(events) <= 1.0
        assert "waiting for its port (5 s)" in details(events)


@in_virtual_time
async def test_a_port_that_is_not_open_yet_is_waited_for(tmp_path: Path) -> None:
    async with an_agent(tmp_path) as agent:
        agent.adapter.health = EngineHealth.ABSENT
        agent.adapter.detail = "nothing listens"
        asyncio.get_running_loop().call_later(0.5, setattr, agent.adapter, "health", EngineHealth.READY)

        events = await events_of(agent.start(a_spec()))

        assert details(events)[-1] == "waiting for its port"
        assert not [detail for detail in details(events) if "nothing listens" in detail or "(0 s)" in detail]


@in_virtual_time
async def test_a_launch_that_takes_long_is_told_of_each_second(tmp_path: Path) -> None:
    async with an_agent(tmp_path) as agent:
        agent.runtime.may_start.clear()
        asyncio.get_running_loop().call_later(5.0, agent.runtime.may_start.set)

        events = await events_of(agent.start(a_spec()))

        assert longest_silence_s(events) <= 1.0
        assert "starting engine (4 s)" in details(events)


@in_virtual_time
async def test_the_end_of_a_failed_start_is_told_of_each_second(tmp_path: Path) -> None:
    loop = asyncio.get_running_loop()
    async with an_agent(tmp_path) as agent:
        agent.adapter.health = EngineHealth.LOADING
        agent.runtime.may_stop.clear()
        loop.call_later(1.0, agent.runtime.ends, 1)
        loop.call_later(9.0, agent.runtime.may_stop.set)

        events = await events_of(agent.start(a_spec()))

        assert isinstance(events[-1].payload, LifecycleFailed)
        assert events[-1].elapsed_s >= 9.0
        assert longest_silence_s(events) <= 1.0
        stopping = [
            event.payload
            for event in events
            if isinstance(event.payload, LifecycleProgress) and event.payload.residency is Residency.STOPPING
        ]
        assert stopping[-1].detail == "the start did not succeed; stopping what there is (7 s)"


@in_virtual_time
async def test_a_start_that_waits_for_a_stop_says_so_each_second(tmp_path: Path) -> None:
    async with an_agent(tmp_path) as agent:
        await done(agent.start(a_spec()))
        agent.runtime.may_stop.clear()
        stop = agent.stop("chat-1")
        await told(stop, "stopping the engine")
        asyncio.get_running_loop().call_later(6.0, agent.runtime.may_stop.set)

        events = await events_of(agent.start(a_spec()))

        assert isinstance(events[-1].payload, LifecycleDone)
        assert longest_silence_s(events) <= 1.0
        first = events[0].payload
        assert first == LifecycleProgress(Residency.STOPPING, "waiting for the stop that is under way")
        assert "waiting for the stop that is under way (5 s)" in details(events)
        # What waits does not speak for the deployment: the stop does.
        assert longest_silence_s(await events_of(stop)) <= 1.0


@in_virtual_time
async def test_a_stop_counts_the_requests_that_it_lets_finish(tmp_path: Path) -> None:
    loop = asyncio.get_running_loop()
    async with an_agent(tmp_path) as agent:
        await done(agent.start(a_spec()))
        engine = agent.supervisor.engine("chat-1")
        first, second = engine.serving(), engine.serving()
        first.__enter__()
        second.__enter__()
        loop.call_later(2.5, first.__exit__, None, None, None)
        loop.call_later(5.5, second.__exit__, None, None, None)

        stop = agent.stop("chat-1")
        await told(stop, "letting 2 running requests finish, for 10 s at most")
        with pytest.raises(NotAwakeError), engine.serving():
            pass
        events = await events_of(stop)

        assert longest_silence_s(events) <= 1.0
        assert "letting 1 running request finish, for 10 s at most (4 s)" in details(events)
        assert 5.5 <= events[-1].elapsed_s < 6.0
        assert agent.runtime.stopped == [1]


@in_virtual_time
async def test_requests_that_do_not_end_hold_up_a_stop_for_the_grace_only(tmp_path: Path) -> None:
    async with an_agent(tmp_path) as agent:
        await done(agent.start(with_grace(a_spec(), 3.0)))
        with agent.supervisor.engine("chat-1").serving():
            events = await events_of(agent.stop("chat-1"))

        assert isinstance(events[-1].payload, LifecycleDone)
        assert events[-1].elapsed_s == pytest.approx(3.0)
        assert longest_silence_s(events) <= 1.0


@in_virtual_time
async def test_looking_for_what_a_failed_stop_left_is_told_of_each_second(tmp_path: Path) -> None:
    async with an_agent(tmp_path) as agent:
        await done(agent.start(a_spec()))
        await failed_stop(agent.stop("chat-1"), agent.runtime)
        agent.runtime.ends(1)
        agent.runtime.may_find.clear()
        asyncio.get_running_loop().call_later(4.0, agent.runtime.may_find.set)

        events = await events_of(agent.start(a_spec()))

        assert isinstance(events[-1].payload, LifecycleDone)
        assert longest_silence_s(events) <= 1.0
        assert "looking whether its engine is gone (3 s)" in details(events)


@in_virtual_time
async def test_a_start_tells_how_long_it_will_take_once_it_is_known(tmp_path: Path) -> None:
    async with an_agent(tmp_path) as agent:
        await slow_start(agent.adapter, 10.0, agent.start(a_spec()))
        await done(agent.stop("chat-1"))

        events = await slow_start(agent.adapter, 15.0, agent.start(a_spec()))

        left_s = [
            (event.elapsed_s, event.payload.remaining_s)
            for event in events
            if isinstance(event.payload, LifecycleProgress)
        ]
        usual_s = left_s[0][1]
        assert usual_s is not None
        assert usual_s == pytest.approx(10.0, abs=0.5)
        for elapsed_s, remaining_s in left_s:
            if elapsed_s < usual_s:
                assert remaining_s == pytest.approx(usual_s - elapsed_s)
            else:
                assert remaining_s is None


@in_virtual_time
async def test_changes_that_follow_close_on_each_other_are_told_together() -> None:
    told_s: list[tuple[float, str]] = []
    loop = asyncio.get_running_loop()
    began_s = loop.time()

    with Progress(
        lambda progress: told_s.append((loop.time() - began_s, progress.detail)), Residency.STARTING
    ) as progress:
        for piece in range(100):
            progress.say(f"piece {piece}")
            await asyncio.sleep(0.01)

    assert told_s[0] == (0.0, "piece 0")
    assert 8 <= len(told_s) <= 11


@in_virtual_time
async def test_nothing_is_told_after_the_end() -> None:
    told_details: list[str] = []
    with Progress(lambda progress: told_details.append(progress.detail), Residency.STARTING) as progress:
        progress.say("loading")

    await asyncio.sleep(5.0)

    assert told_details == ["loading"]
