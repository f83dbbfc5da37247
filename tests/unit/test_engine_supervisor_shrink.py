"""How an agent shrinks an engine to its weights, and gives it its KV cache again."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest
from msgspec.structs import replace

from rung.errors import (
    EngineFailedError,
    FailedPreconditionError,
    NotAwakeError,
    NotOursError,
    PinnedDeploymentError,
)
from rung.types import FailureReason, Residency
from tests.fakes.agent_server import a_spec
from tests.fakes.engines import AnAgent, ScriptedRuntime, an_agent, done, events_of, failed, told
from tests.fakes.sleepers import ASLEEP_BYTES, AWAKE_BYTES, GIB, SHRUNK_BYTES, SleepyAdapter, a_sleeper
from tests.fakes.virtual_time import in_virtual_time

ASLEEP, AWAKE = Residency.ASLEEP, Residency.AWAKE


async def awake(
    agent: AnAgent, adapter: SleepyAdapter, *, pinned: bool = True, shrinkable: bool = True
) -> None:
    adapter.gpu.held["chat-1"] = AWAKE_BYTES
    await done(agent.start(a_sleeper(pinned=pinned, shrinkable=shrinkable)))


@in_virtual_time
async def test_a_pinned_engine_that_opted_in_shrinks_and_grows(tmp_path: Path) -> None:
    adapter = SleepyAdapter()
    runtime = ScriptedRuntime(output=["loading", f"KV {8 * GIB}"])
    async with an_agent(tmp_path, adapter=adapter, runtime=runtime, look=adapter.gpu.look) as agent:
        await awake(agent, adapter)
        assert agent.supervisor.deployments[0].kv_cache_bytes == 8 * GIB

        shrunk = await done(agent.shrink())

        found = shrunk.deployment
        assert shrunk.freed_bytes == AWAKE_BYTES - SHRUNK_BYTES
        assert (found.residency, found.shrunk, found.asleep_level) == (ASLEEP, True, 0)
        assert found.vram_bytes == SHRUNK_BYTES
        assert found.detail == "shrunk to its weights; gave back 8.0 GiB"
        with pytest.raises(NotAwakeError, match="shrunk"), agent.supervisor.engine("chat-1").serving():
            pass
        # What is so already is done at once.
        assert (await done(agent.shrink())).freed_bytes is None

        operation = agent.wake()
        await told(operation, "giving it its KV cache again")
        grown = (await done(operation)).deployment
        assert (grown.residency, grown.shrunk, grown.vram_bytes) == (AWAKE, False, AWAKE_BYTES)

    assert adapter.calls == ["shrink chat-1", "grow chat-1"]


@pytest.mark.parametrize("pinned", [True, False])
@in_virtual_time
async def test_one_whose_own_record_has_not_opted_in_is_refused(tmp_path: Path, pinned: bool) -> None:
    adapter = SleepyAdapter()
    async with an_agent(tmp_path, adapter=adapter, look=adapter.gpu.look) as agent:
        await awake(agent, adapter, pinned=pinned, shrinkable=False)

        with pytest.raises(PinnedDeploymentError if pinned else FailedPreconditionError):
            await events_of(agent.shrink())

        assert (agent.residency(), adapter.calls) == (AWAKE, [])
        # Nor is one that opted in put to sleep, or flushed.
        await done(agent.start(a_sleeper(pinned=True, shrinkable=True)))
        for operation in (agent.sleep(), agent.free()):
            with pytest.raises(PinnedDeploymentError):
                await events_of(operation)


@in_virtual_time
async def test_what_cannot_shrink_is_refused(tmp_path: Path) -> None:
    adapter = SleepyAdapter()
    async with an_agent(tmp_path, adapter=adapter, look=adapter.gpu.look) as agent:
        await done(agent.start(replace(a_spec("other", external=True), shrinkable=True)))
        with pytest.raises(NotOursError):
            await events_of(agent.shrink("other"))
        await awake(agent, adapter, pinned=False)
        await done(agent.sleep())
        with pytest.raises(FailedPreconditionError, match="wake it first"):
            await events_of(agent.shrink())
        await done(agent.wake())
        await done(agent.shrink())
        with pytest.raises(FailedPreconditionError, match="is shrunk, from which there is no way"):
            await events_of(agent.sleep())
        adapter.levels = ()
        with pytest.raises(FailedPreconditionError, match="not started so that it can sleep"):
            await events_of(agent.shrink())


@in_virtual_time
async def test_running_requests_finish_first_or_it_stays_as_it_is(tmp_path: Path) -> None:
    adapter = SleepyAdapter()
    async with an_agent(tmp_path, adapter=adapter, look=adapter.gpu.look) as agent:
        await awake(agent, adapter)
        with agent.supervisor.engine("chat-1").serving():
            outcome = await failed(agent.shrink(drain_timeout_s=3.0))
            assert outcome.reason is FailureReason.TIMEOUT
            assert (agent.residency(), adapter.calls) == (AWAKE, [])
            operation = agent.shrink()
            await told(operation, "letting 1 running request finish")
            assert adapter.calls == []

        assert (await done(operation)).deployment.shrunk


@pytest.mark.parametrize("has_effect", [True, False])
@in_virtual_time
async def test_after_a_shrink_that_failed_it_is_what_the_engine_says(
    tmp_path: Path, has_effect: bool
) -> None:
    adapter = SleepyAdapter()
    async with an_agent(tmp_path, adapter=adapter, look=adapter.gpu.look) as agent:
        await awake(agent, adapter)
        adapter.error, adapter.has_effect = EngineFailedError("it answers 500"), has_effect

        last = (await events_of(agent.shrink()))[-1].payload

        assert agent.residency() is (ASLEEP if has_effect else AWAKE), last
        adapter.error, adapter.has_effect = None, True
        assert (await done(agent.wake())).deployment.residency is AWAKE


@pytest.mark.parametrize("took_effect", [True, False])
@in_virtual_time
async def test_the_next_agent_knows_that_it_is_shrunk_and_grows_it(tmp_path: Path, took_effect: bool) -> None:
    adapter, runtime = SleepyAdapter(), ScriptedRuntime()
    async with an_agent(tmp_path, adapter=adapter, runtime=runtime, look=adapter.gpu.look) as agent:
        await awake(agent, adapter)
        adapter.may_move.clear()
        operation = agent.shrink()
        async with asyncio.timeout(10):
            await told(operation, "shrinking")
            await asyncio.sleep(1)
    if took_effect:
        # Asleep, its weights in host memory: it broke off between the two calls.
        adapter.asleep.add("chat-1")
        adapter.gpu.held["chat-1"] = ASLEEP_BYTES
    adapter.may_move.set()
    adapter.calls.clear()

    async with an_agent(tmp_path, adapter=adapter, runtime=runtime, look=adapter.gpu.look) as agent:
        await asyncio.sleep(5)
        found = agent.supervisor.deployments[0]
        assert (found.residency, found.shrunk) == ((ASLEEP, True) if took_effect else (AWAKE, False))
        await done(agent.wake())

        assert agent.residency() is AWAKE
        assert adapter.calls == (["grow chat-1"] if took_effect else [])
