"""What the agent says of an engine is found out: whether it answers, whether its model is there, how long."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import msgspec

from nodeagent.supervisor import Operation
from rung.errors import EngineFailedError
from rung.types import Deployment, FailureReason, LifecycleProgress, Residency
from tests.fakes.agent_server import a_spec
from tests.fakes.engines import (
    AnAgent,
    ScriptedReply,
    ScriptedRuntime,
    an_agent,
    done,
    events_of,
    failed,
    told,
)
from tests.fakes.sleepers import ASLEEP_BYTES, AWAKE_BYTES, SleepyAdapter, a_sleeper
from tests.fakes.virtual_time import in_virtual_time

ASLEEP, AWAKE, FAILED = Residency.ASLEEP, Residency.AWAKE, Residency.FAILED


@asynccontextmanager
async def a_node(
    folder: Path, adapter: SleepyAdapter | None = None, runtime: ScriptedRuntime | None = None
) -> AsyncIterator[tuple[AnAgent, SleepyAdapter]]:
    adapter = adapter or SleepyAdapter()
    async with an_agent(folder, adapter=adapter, runtime=runtime, look=adapter.gpu.look) as agent:
        yield agent, adapter


async def awake(agent: AnAgent, adapter: SleepyAdapter) -> None:
    adapter.gpu.held["chat-1"] = AWAKE_BYTES
    await done(agent.start(a_sleeper()))


async def becomes(agent: AnAgent, residency: Residency) -> Deployment:
    """The deployment, once it is so."""
    async with asyncio.timeout(60):
        while agent.residency() is not residency:
            await agent.supervisor.changed.wait()
    return agent.supervisor.engine("chat-1").deployment


async def left_s(operation: Operation, text: str) -> list[float | None]:
    """The remaining times that go with such progress."""
    return [
        event.payload.remaining_s
        for event in await events_of(operation)
        if isinstance(event.payload, LifecycleProgress) and text in event.payload.detail
    ]


def unloader() -> SleepyAdapter:
    """An engine like Ollama: what it gives back is the deployment's model."""
    return SleepyAdapter(levels=(2,), frees_model=True)


# A model that comes and goes


@in_virtual_time
async def test_starting_a_server_loads_its_model(tmp_path: Path) -> None:
    adapter = unloader()
    adapter.asleep.add("chat-1")
    adapter.may_move.clear()
    async with a_node(tmp_path, adapter) as (agent, _):
        start = agent.start(a_sleeper())
        await told(start, "loading its model")
        assert agent.residency() is Residency.STARTING
        adapter.may_move.set()

        assert (await done(start)).deployment.residency is AWAKE
    assert adapter.calls == ["wake chat-1 2"]


@in_virtual_time
async def test_a_server_that_cannot_load_its_model_has_not_started(tmp_path: Path) -> None:
    adapter = unloader()
    adapter.asleep.add("chat-1")
    adapter.has_effect = False
    adapter.error = EngineFailedError("no room for it")
    runtime = ScriptedRuntime(output=["cudaMalloc failed"])
    async with a_node(tmp_path, adapter, runtime) as (agent, _):
        outcome = await failed(agent.start(a_sleeper()))

        assert outcome.reason is FailureReason.ENGINE_START_FAILED
        assert "could not load its model: no room for it" in outcome.detail
        assert "cudaMalloc failed" in outcome.detail
        assert (agent.residency(), runtime.stopped) == (FAILED, [1])


@in_virtual_time
async def test_what_was_flushed_with_its_model_sleeps_until_it_is_woken(tmp_path: Path) -> None:
    async with a_node(tmp_path, unloader()) as (agent, adapter):
        await awake(agent, adapter)

        freed = await done(agent.free())
        assert freed.freed_bytes == AWAKE_BYTES - ASLEEP_BYTES
        assert (freed.deployment.residency, freed.deployment.asleep_level) == (ASLEEP, 2)
        # Once more is no error, and asks nothing.
        assert (await done(agent.free())).deployment.residency is ASLEEP

        assert (await done(agent.wake())).deployment.residency is AWAKE
    assert adapter.calls == ["sleep chat-1 2", "wake chat-1 2"]


@in_virtual_time
async def test_also_somebody_elses_model_that_was_flushed_can_be_woken(tmp_path: Path) -> None:
    async with a_node(tmp_path, unloader()) as (agent, adapter):
        adapter.gpu.held["chat-1"] = AWAKE_BYTES
        await done(agent.start(a_spec(external=True)))

        assert (await done(agent.free())).deployment.residency is ASLEEP
        assert (await done(agent.wake())).deployment.residency is AWAKE


@in_virtual_time
async def test_somebody_elses_engine_is_found_asleep_and_left_so(tmp_path: Path) -> None:
    adapter = unloader()
    adapter.asleep.add("chat-1")
    async with a_node(tmp_path, adapter) as (agent, _):
        found = await done(agent.start(a_spec(external=True)))

        assert (found.deployment.residency, found.deployment.asleep_level) == (ASLEEP, 2)
        assert adapter.calls == []


@in_virtual_time
async def test_a_model_that_went_by_itself_is_noticed_and_one_that_came_back_too(tmp_path: Path) -> None:
    async with a_node(tmp_path, unloader()) as (agent, adapter):
        await awake(agent, adapter)

        adapter.asleep.add("chat-1")
        noticed = await becomes(agent, ASLEEP)
        assert (noticed.asleep_level, noticed.detail) == (2, "asleep: nobody here told it to")
        record = agent.record("chat-1")
        assert record is not None
        assert record.residency is ASLEEP

        adapter.asleep.clear()
        assert (await becomes(agent, AWAKE)).asleep_level == 0
    assert adapter.calls == []


@in_virtual_time
async def test_a_model_that_is_away_while_it_is_asked_is_on_its_way(tmp_path: Path) -> None:
    async with a_node(tmp_path, unloader()) as (agent, adapter):
        await awake(agent, adapter)
        with agent.supervisor.engine("chat-1").serving():
            adapter.asleep.add("chat-1")
            await asyncio.sleep(60)
            assert agent.residency() is AWAKE
        await becomes(agent, ASLEEP)


# A cache


@in_virtual_time
async def test_a_flush_waits_until_nothing_is_under_way(tmp_path: Path) -> None:
    async with a_node(tmp_path) as (agent, adapter):
        await awake(agent, adapter)
        adapter.others_requests = 2
        with agent.supervisor.engine("chat-1").serving():
            flush = agent.free()
            await told(flush, "letting 1 running request finish")
        await told(flush, "letting 2 running requests finish that did not come through the agent")
        assert adapter.calls == []

        adapter.others_requests = 0
        assert (await done(flush)).freed_bytes == AWAKE_BYTES - ASLEEP_BYTES
        assert agent.residency() is AWAKE


@in_virtual_time
async def test_a_flush_of_what_is_busy_for_too_long_asks_nothing_of_it(tmp_path: Path) -> None:
    async with a_node(tmp_path) as (agent, adapter):
        await awake(agent, adapter)
        adapter.others_requests = 1

        outcome = await failed(agent.free())

        assert outcome.reason is FailureReason.TIMEOUT
        assert "did not end within 300 s" in outcome.detail
        assert (agent.residency(), adapter.calls) == (AWAKE, [])


@in_virtual_time
async def test_a_flush_that_leaves_much_behind_says_so(tmp_path: Path) -> None:
    async with a_node(tmp_path) as (agent, adapter):
        await awake(agent, adapter)
        adapter.asleep_bytes = AWAKE_BYTES // 2

        freed = await done(agent.free())

        assert freed.freed_bytes == AWAKE_BYTES // 2
        assert "gave back 7.0 GiB and still holds 7.0 GiB" in freed.deployment.detail


# One token


@in_virtual_time
async def test_what_was_woken_is_asked_for_one_token(tmp_path: Path) -> None:
    async with a_node(tmp_path) as (agent, adapter):
        await awake(agent, adapter)
        await done(agent.sleep())
        assert adapter.bodies == []

        await done(agent.wake())

        (asked,) = adapter.bodies
        assert msgspec.json.decode(asked)["max_tokens"] == 1


@in_virtual_time
async def test_one_that_says_that_it_is_awake_and_fails_to_answer_has_failed(tmp_path: Path) -> None:
    runtime = ScriptedRuntime(output=["illegal memory access"])
    async with a_node(tmp_path, runtime=runtime) as (agent, adapter):
        await awake(agent, adapter)
        await done(agent.sleep())
        adapter.reply = ScriptedReply(pieces=(b"EngineDeadError",), status=500)

        outcome = await failed(agent.wake())

        assert outcome.reason is FailureReason.ENGINE_LOST
        for part in ("asked for one token it answers 500: EngineDeadError", "illegal memory access"):
            assert part in outcome.detail
        assert agent.residency() is FAILED
        # It may still run, and can be stopped.
        await done(agent.stop("chat-1"))
        assert runtime.stopped == [1]


@in_virtual_time
async def test_one_that_hangs_has_failed_within_a_bounded_time(tmp_path: Path) -> None:
    async with a_node(tmp_path) as (agent, adapter):
        await awake(agent, adapter)
        await done(agent.sleep())
        adapter.reply.gate.clear()
        began_s = asyncio.get_running_loop().time()

        outcome = await failed(agent.wake())

        assert "it gave no answer within 30 s" in outcome.detail
        assert asyncio.get_running_loop().time() - began_s < 40
        assert agent.residency() is FAILED


@in_virtual_time
async def test_a_refused_question_is_no_failure_of_the_engine(tmp_path: Path) -> None:
    async with a_node(tmp_path) as (agent, adapter):
        await awake(agent, adapter)
        await done(agent.sleep())
        adapter.reply = ScriptedReply(pieces=(b"no such route",), status=404)

        assert (await done(agent.wake())).deployment.residency is AWAKE


# How long it takes


@in_virtual_time
async def test_times_of_sleeps_and_wakes_are_learnt_and_outlive_the_agent(tmp_path: Path) -> None:
    adapter, runtime = SleepyAdapter(), ScriptedRuntime()

    async def slow() -> None:
        await asyncio.sleep(8)

    adapter.on_call = slow
    async with a_node(tmp_path, adapter, runtime) as (agent, _):
        await awake(agent, adapter)
        # Nothing is known before the first.
        assert set(await left_s(agent.sleep(), "")) == {None}
        assert set(await left_s(agent.wake(), "")) == {None}

    async with a_node(tmp_path, adapter, runtime) as (agent, _):
        adapter.others_requests = 1
        sleep = agent.sleep()
        await told(sleep, "letting 1 running request finish")
        await asyncio.sleep(20)
        adapter.others_requests = 0
        # Of requests nobody knows how long they take; of a sleep it is known.
        assert set(await left_s(sleep, "letting")) == {None}
        first = (await left_s(sleep, "putting it to sleep"))[0]
        assert first is not None
        assert 7 < first < 10

        first = (await left_s(agent.wake(), "waking it"))[0]
        assert first is not None
        assert 7 < first < 10
        # Another level takes another time.
        assert set(await left_s(agent.sleep(level=2), "putting it to sleep")) == {None}
