"""What an agent says of how long its deployments take, learnt from what they took before."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from nodeagent.engines import EngineHealth
from rung.types import Deployment, Residency, TransitionTimes
from tests.fakes.engines import AnAgent, an_agent, done, events_of
from tests.fakes.sleepers import AWAKE_BYTES, SleepyAdapter, a_sleeper
from tests.fakes.virtual_time import in_virtual_time


def shown(agent: AnAgent) -> Deployment:
    [deployment] = agent.supervisor.deployments
    return deployment


@in_virtual_time
async def test_an_agent_says_how_long_a_deployment_takes_from_where_it_is(tmp_path: Path) -> None:
    adapter = SleepyAdapter()
    loop = asyncio.get_running_loop()
    takes_s = 0.0

    async def take() -> None:
        await asyncio.sleep(takes_s)

    adapter.on_call = take
    async with an_agent(tmp_path, adapter=adapter, look=adapter.gpu.look) as agent:
        adapter.gpu.held["chat-1"] = AWAKE_BYTES
        adapter.health = EngineHealth.LOADING
        loop.call_later(30.0, setattr, adapter, "health", EngineHealth.READY)
        starting = agent.start(a_sleeper("chat-1"))
        await asyncio.sleep(1.0)
        # It has never been started before.
        assert (shown(agent).residency, shown(agent).awake_expected_s) == (Residency.STARTING, None)
        await done(starting)
        loaded = shown(agent)
        start_s = loaded.usual_times.start_s
        assert start_s == pytest.approx(30.0, abs=1.0)
        assert (loaded.residency, loaded.awake_expected_s) == (Residency.AWAKE, None)

        takes_s = 2.0
        assert (await done(agent.sleep(level=1))).deployment.awake_expected_s is None
        takes_s = 6.0
        await done(agent.wake())
        await done(agent.sleep(level=1))
        asleep = shown(agent)
        assert asleep.usual_times.sleep_s == pytest.approx(4.0, abs=3.0)
        assert asleep.usual_times.wake_s == pytest.approx(6.0, abs=1.0)
        assert asleep.usual_times.reload_s is None
        assert asleep.awake_expected_s == asleep.usual_times.wake_s

        waking = agent.wake()
        await asyncio.sleep(3.5)
        left_s = shown(agent).awake_expected_s
        assert shown(agent).residency is Residency.WAKING
        # What is left as of the last word, which is told about once a second.
        assert left_s is not None
        assert 2.0 <= left_s <= 4.0
        await events_of(waking)

        await done(agent.stop("chat-1"))
        assert shown(agent).awake_expected_s == start_s

    async with an_agent(tmp_path, adapter=SleepyAdapter()) as following:
        again = shown(following)
        assert again.awake_expected_s == again.usual_times.start_s == start_s
        assert again.usual_times != TransitionTimes()
