"""How an agent puts engines to sleep, wakes them and has them give back their memory."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from itertools import pairwise
from pathlib import Path

import pytest
from msgspec.structs import replace

from nodeagent.engines import EngineHealth
from nodeagent.supervisor import Operation
from rung.errors import (
    EngineFailedError,
    FailedPreconditionError,
    InvalidRequestError,
    NotAwakeError,
    NotOursError,
    PinnedDeploymentError,
    RungError,
)
from rung.types import (
    FailureReason,
    GpuHealth,
    LifecycleProgress,
    Residency,
    ResidencyClass,
)
from tests.fakes.agent_server import a_spec
from tests.fakes.engines import AnAgent, ScriptedRuntime, an_agent, done, events_of, failed, told
from tests.fakes.sleepers import ASLEEP_BYTES, AWAKE_BYTES, GIB, SleepyAdapter, WatchedGpu, a_sleeper
from tests.fakes.virtual_time import in_virtual_time

ASLEEP, AWAKE, FAILED = Residency.ASLEEP, Residency.AWAKE, Residency.FAILED
FALLING_ASLEEP, WAKING = Residency.FALLING_ASLEEP, Residency.WAKING


@asynccontextmanager
async def a_node(
    folder: Path, adapter: SleepyAdapter | None = None, runtime: ScriptedRuntime | None = None
) -> AsyncIterator[tuple[AnAgent, SleepyAdapter]]:
    """An agent whose engines can sleep; after it, the next may follow with the same adapter and runtime."""
    adapter = adapter or SleepyAdapter()
    async with an_agent(folder, adapter=adapter, runtime=runtime, look=adapter.gpu.look) as agent:
        yield agent, adapter


async def awake(agent: AnAgent, adapter: SleepyAdapter, *ids: str, pinned: bool = False) -> None:
    """Start engines that hold memory."""
    for each in ids or ("chat-1",):
        adapter.gpu.held[each] = AWAKE_BYTES
        await done(agent.start(a_sleeper(each, pinned=pinned)))


async def residencies_of(operation: Operation) -> list[Residency]:
    """Those that it tells, without repeats."""
    told: list[Residency] = []
    for event in await events_of(operation):
        if isinstance(event.payload, LifecycleProgress) and event.payload.residency not in told:
            told.append(event.payload.residency)
    return told


def on_disk(agent: AnAgent) -> tuple[Residency, int, bool]:
    """What the record says: residency, level, and whether an engine runs."""
    record = agent.record("chat-1")
    assert record is not None
    return record.residency, record.sleep_level, record.running is not None


# There and back


@pytest.mark.parametrize("level", [1, 2])
@in_virtual_time
async def test_an_engine_falls_asleep_and_wakes_at_its_level(tmp_path: Path, level: int) -> None:
    async with a_node(tmp_path) as (agent, adapter):
        await awake(agent, adapter)

        slept = await done(agent.sleep(level=level))
        assert slept.freed_bytes == AWAKE_BYTES - ASLEEP_BYTES
        deployment = slept.deployment
        assert (deployment.residency, deployment.asleep_level) == (ASLEEP, level)
        assert deployment.vram_bytes == ASLEEP_BYTES
        assert deployment.detail == f"asleep at level {level}; gave back 13.0 GiB"
        assert on_disk(agent) == (ASLEEP, level, True)

        woken = await done(agent.wake())
        assert (woken.deployment.residency, woken.deployment.asleep_level) == (AWAKE, 0)
        assert (woken.deployment.vram_bytes, woken.freed_bytes) == (AWAKE_BYTES, None)
        assert on_disk(agent) == (AWAKE, 0, True)
        with agent.supervisor.engine("chat-1").serving() as url:
            assert url

    assert adapter.calls == [f"sleep chat-1 {level}", f"wake chat-1 {level}"]


@in_virtual_time
async def test_each_step_is_told_and_on_disk_before_it_is_done(tmp_path: Path) -> None:
    async with a_node(tmp_path) as (agent, adapter):
        await awake(agent, adapter)
        found: list[tuple[Residency, int, bool]] = []

        async def note() -> None:
            found.append(on_disk(agent))

        adapter.on_call = note
        assert await residencies_of(agent.sleep()) == [FALLING_ASLEEP]
        assert await residencies_of(agent.wake()) == [WAKING]

        assert found == [(FALLING_ASLEEP, 1, True), (WAKING, 1, True)]


@in_virtual_time
async def test_what_is_so_already_is_done_at_once(tmp_path: Path) -> None:
    async with a_node(tmp_path) as (agent, adapter):
        await awake(agent, adapter)
        assert (await done(agent.wake())).deployment.residency is AWAKE
        await done(agent.sleep())

        assert (await done(agent.sleep())).deployment.residency is ASLEEP
        with pytest.raises(FailedPreconditionError, match="no way to level 2"):
            await events_of(agent.sleep(level=2))

    assert adapter.calls == ["sleep chat-1 1"]


@in_virtual_time
async def test_a_repeated_operation_repeats_its_outcome(tmp_path: Path) -> None:
    async with a_node(tmp_path) as (agent, adapter):
        await awake(agent, adapter)
        first = await events_of(agent.sleep(operation_id="the-sleep"))
        await done(agent.wake())

        assert await events_of(agent.sleep(operation_id="the-sleep")) == first
        assert agent.residency() is AWAKE


@pytest.mark.parametrize("wakes", [False, True])
@in_virtual_time
async def test_a_long_transition_is_told_of_each_second(tmp_path: Path, wakes: bool) -> None:
    async with a_node(tmp_path) as (agent, adapter):
        await awake(agent, adapter)
        if wakes:
            await done(agent.sleep())
        adapter.may_move.clear()
        asyncio.get_running_loop().call_later(20, adapter.may_move.set)

        events = await events_of(agent.wake() if wakes else agent.sleep())

    times_s = [0.0, *(event.elapsed_s for event in events)]
    assert times_s[-1] > 20
    assert max(later - earlier for earlier, later in pairwise(times_s)) <= 1.0


# Requests


@in_virtual_time
async def test_running_requests_finish_before_the_engine_is_put_to_sleep(tmp_path: Path) -> None:
    async with a_node(tmp_path) as (agent, adapter):
        await awake(agent, adapter)
        engine = agent.supervisor.engine("chat-1")
        with engine.serving():
            operation = agent.sleep()
            await told(operation, "letting 1 running request finish")
            assert agent.residency() is FALLING_ASLEEP
            with pytest.raises(NotAwakeError), engine.serving():
                pass
            await asyncio.sleep(10)
            assert adapter.calls == []

        assert (await done(operation)).deployment.residency is ASLEEP
        with pytest.raises(NotAwakeError, match="asleep"), engine.serving():
            pass


@in_virtual_time
async def test_requests_that_did_not_come_through_the_agent_finish_too(tmp_path: Path) -> None:
    async with a_node(tmp_path) as (agent, adapter):
        await awake(agent, adapter)
        adapter.others_requests = 2
        operation = agent.sleep()
        await told(operation, "letting 2 running requests finish that did not come through the agent")
        await asyncio.sleep(5)
        assert adapter.calls == []
        # An engine that does not say how many holds nothing up.
        adapter.others_requests = None

        await done(operation)


@in_virtual_time
async def test_a_sleep_is_given_up_if_requests_do_not_end_in_time(tmp_path: Path) -> None:
    async with a_node(tmp_path) as (agent, adapter):
        await awake(agent, adapter)
        with agent.supervisor.engine("chat-1").serving():
            outcome = await failed(agent.sleep(drain_timeout_s=3.0))

            assert outcome.reason is FailureReason.TIMEOUT
            assert "stays awake: its requests did not end within 3 s" in outcome.detail
            assert (agent.residency(), on_disk(agent)) == (AWAKE, (AWAKE, 0, True))
            with agent.supervisor.engine("chat-1").serving():
                pass
        assert adapter.calls == []
        # It is looked after as before.
        agent.runtime.ends(1)
        await asyncio.sleep(1)
        assert agent.residency() is FAILED


# Refusals


@in_virtual_time
async def test_a_pinned_engine_is_not_touched_without_force(tmp_path: Path) -> None:
    async with a_node(tmp_path) as (agent, adapter):
        await awake(agent, adapter, pinned=True)
        for operation in (agent.sleep(), agent.free()):
            with pytest.raises(PinnedDeploymentError):
                await events_of(operation)
        assert (agent.residency(), adapter.calls) == (AWAKE, [])

        assert (await done(agent.sleep(force=True))).deployment.residency is ASLEEP
        # Waking one needs no force: it is where it should be afterwards.
        assert (await done(agent.wake())).deployment.residency is AWAKE


@in_virtual_time
async def test_one_that_became_pinned_while_a_sleep_waited_is_not_touched(tmp_path: Path) -> None:
    async with a_node(tmp_path) as (agent, adapter):
        await awake(agent, adapter)
        adapter.may_move.clear()
        flush = agent.free()
        await told(flush, "asking")
        pin = agent.start(a_sleeper(pinned=True))
        sleep = agent.sleep()
        await told(sleep, "waiting for the flush")
        adapter.may_move.set()

        await done(pin)
        with pytest.raises(PinnedDeploymentError):
            await events_of(sleep)
        assert adapter.calls == ["free chat-1"]


@in_virtual_time
async def test_an_engine_of_somebody_else_is_neither_put_to_sleep_nor_woken_but_may_be_flushed(
    tmp_path: Path,
) -> None:
    async with a_node(tmp_path) as (agent, adapter):
        await done(agent.start(a_spec(external=True)))
        for operation in (agent.sleep(), agent.sleep(force=True), agent.wake()):
            with pytest.raises(NotOursError):
                await events_of(operation)

        await done(agent.free())

    assert adapter.calls == ["free chat-1"]


@in_virtual_time
async def test_what_the_engine_cannot_do_is_refused(tmp_path: Path) -> None:
    async with a_node(tmp_path) as (agent, adapter):
        await awake(agent, adapter)
        with pytest.raises(InvalidRequestError, match="at level 1 or 2, not 3"):
            await events_of(agent.sleep(level=3))
        adapter.levels = ()
        with pytest.raises(FailedPreconditionError, match="not started so that it can sleep"):
            await events_of(agent.sleep())
        adapter.levels = (1, 2)
        await done(agent.stop("chat-1"))
        with pytest.raises(NotAwakeError, match="stopped"):
            await events_of(agent.sleep())
        with pytest.raises(NotAwakeError, match="stopped"):
            await events_of(agent.free())
        with pytest.raises(FailedPreconditionError, match="stopped"):
            await events_of(agent.wake())

    assert adapter.calls == []


# Measuring


@in_virtual_time
async def test_a_sleep_that_freed_too_little_is_done_and_says_so(tmp_path: Path) -> None:
    async with a_node(tmp_path) as (agent, adapter):
        await awake(agent, adapter)
        adapter.asleep_bytes = 11 * GIB
        began_s = asyncio.get_running_loop().time()

        slept = await done(agent.sleep())

        assert slept.freed_bytes == 3 * GIB
        assert slept.deployment.vram_bytes == 11 * GIB
        assert slept.deployment.detail == (
            "asleep at level 1; gave back 3.0 GiB where 12.5 GiB were expected"
        )
        assert 5.0 <= asyncio.get_running_loop().time() - began_s < 6.0


@in_virtual_time
async def test_a_sleep_that_took_memory_freed_none(tmp_path: Path) -> None:
    async with a_node(tmp_path) as (agent, adapter):
        await awake(agent, adapter)
        adapter.asleep_bytes = AWAKE_BYTES + GIB

        assert (await done(agent.sleep())).freed_bytes == 0


@in_virtual_time
async def test_memory_that_is_given_back_late_is_waited_for(tmp_path: Path) -> None:
    async with a_node(tmp_path) as (agent, adapter):
        await awake(agent, adapter)
        adapter.lag_s = 3.0
        operation = agent.sleep()
        await told(operation, "measuring what it gave back")

        assert (await done(operation)).freed_bytes == AWAKE_BYTES - ASLEEP_BYTES


@in_virtual_time
async def test_where_processes_have_no_figures_the_pool_is_measured(tmp_path: Path) -> None:
    adapter = SleepyAdapter(gpu=WatchedGpu(per_process=False))
    async with a_node(tmp_path, adapter) as (agent, _):
        await awake(agent, adapter)

        slept = await done(agent.sleep())
        assert slept.freed_bytes == AWAKE_BYTES - ASLEEP_BYTES
        assert slept.deployment.vram_bytes is None


@pytest.mark.parametrize("health", [GpuHealth.UNKNOWN, None])
@in_virtual_time
async def test_what_cannot_be_measured_is_not_told(tmp_path: Path, health: GpuHealth | None) -> None:
    gpu = WatchedGpu(count=0) if health is None else WatchedGpu(health=health)
    adapter = SleepyAdapter(gpu=gpu)
    async with a_node(tmp_path, adapter) as (agent, _):
        await awake(agent, adapter)

        slept = await done(agent.sleep())
        assert slept.freed_bytes is None
        assert "could not be measured" in slept.deployment.detail


@pytest.mark.parametrize("asleep", [False, True])
@in_virtual_time
async def test_a_stop_tells_what_it_freed_also_of_a_sleeper(tmp_path: Path, asleep: bool) -> None:
    async with a_node(tmp_path) as (agent, adapter):
        await awake(agent, adapter)
        if asleep:
            await done(agent.sleep())
        stop = agent.stop("chat-1")
        await told(stop, "measuring what it gave back")
        del adapter.gpu.held["chat-1"]

        outcome = await done(stop)

        assert outcome.freed_bytes == (ASLEEP_BYTES if asleep else AWAKE_BYTES)
        assert (outcome.deployment.residency, outcome.deployment.asleep_level) == (Residency.STOPPED, 0)
        assert on_disk(agent) == (Residency.STOPPED, 0, False)


@in_virtual_time
async def test_a_flush_gives_memory_back_and_it_stays_awake(tmp_path: Path) -> None:
    async with a_node(tmp_path) as (agent, adapter):
        await awake(agent, adapter)
        adapter.lag_s = 1.5
        freed = await done(agent.free())

        assert freed.freed_bytes == AWAKE_BYTES - ASLEEP_BYTES
        assert (freed.deployment.residency, freed.deployment.vram_bytes) == (AWAKE, ASLEEP_BYTES)


# One at a time


@pytest.mark.parametrize(
    ("first", "second", "waits"),
    [
        ((), (), True),
        ((), ("1",), True),
        (("0",), ("GPU-0",), True),
        (("1", "0"), ("0", "1"), True),
        (("0",), ("1",), False),
    ],
)
@in_virtual_time
async def test_what_changes_the_memory_of_one_gpu_waits_for_what_does_so_before_it(
    tmp_path: Path, first: tuple[str, ...], second: tuple[str, ...], waits: bool
) -> None:
    adapter = SleepyAdapter(gpu=WatchedGpu(count=2))
    async with a_node(tmp_path, adapter) as (agent, _):
        await done(agent.start(a_sleeper("a", gpus=first)))
        await done(agent.start(a_sleeper("b", gpus=second)))
        adapter.may_move.clear()
        one = agent.sleep("a")
        await told(one, "putting it to sleep")
        other = agent.sleep("b")

        if waits:
            await told(other, "waiting for the sleep of a on its GPU")
            # It serves until its time comes.
            assert agent.residency("b") is AWAKE
            assert adapter.calls == ["sleep a 1"]
        else:
            await told(other, "putting it to sleep")
            assert adapter.calls == ["sleep a 1", "sleep b 1"]
        adapter.may_move.set()
        await done(one)
        await done(other)

    assert adapter.calls == ["sleep a 1", "sleep b 1"]


@in_virtual_time
async def test_a_start_and_a_stop_wait_for_a_sleep_on_their_gpu(tmp_path: Path) -> None:
    async with a_node(tmp_path) as (agent, adapter):
        await awake(agent, adapter, "a", "b")
        adapter.may_move.clear()
        sleep = agent.sleep("a")
        await told(sleep, "putting it to sleep")
        stop, start = agent.stop("b"), agent.start(a_sleeper("c"))
        await told(stop, "waiting for the sleep of a")
        await told(start, "waiting for the sleep of a")
        assert (agent.runtime.stops, len(agent.runtime.starts)) == ([], 2)

        adapter.may_move.set()
        await asyncio.gather(done(sleep), done(stop), done(start))


@in_virtual_time
async def test_an_engine_that_loads_holds_up_waking_on_its_gpu_and_a_stop_ends_that(tmp_path: Path) -> None:
    async with a_node(tmp_path) as (agent, adapter):
        await awake(agent, adapter, "a")
        await done(agent.sleep("a"))
        adapter.health = EngineHealth.LOADING
        start = agent.start(a_sleeper("b"))
        await told(start, "waiting for the engine")
        wake = agent.wake("a")
        await told(wake, "waiting for the start of b")

        await done(agent.stop("b"))
        await failed(start)
        adapter.health = EngineHealth.READY
        assert (await done(wake)).deployment.residency is AWAKE


# Deaths


async def _draining(agent: AnAgent, adapter: SleepyAdapter) -> Operation:
    adapter.others_requests = 1
    operation = agent.sleep()
    await told(operation, "letting")
    return operation


async def _falling_asleep(agent: AnAgent, adapter: SleepyAdapter) -> Operation:
    adapter.may_move.clear()
    operation = agent.sleep()
    await told(operation, "putting it to sleep")
    return operation


async def _measuring(agent: AnAgent, adapter: SleepyAdapter) -> Operation:
    adapter.lag_s = 60
    operation = agent.sleep()
    await told(operation, "measuring")
    return operation


async def _waking(agent: AnAgent, adapter: SleepyAdapter) -> Operation:
    await done(agent.sleep())
    adapter.may_move.clear()
    operation = agent.wake()
    await told(operation, "waking it")
    return operation


async def _failing(agent: AnAgent, adapter: SleepyAdapter) -> Operation:
    """The call failed, and it is asked how it is."""
    adapter.error = EngineFailedError("500")
    operation = agent.sleep()
    await told(operation, "finding out")
    return operation


@pytest.mark.parametrize("until", [_draining, _falling_asleep, _measuring, _waking, _failing])
@in_virtual_time
async def test_an_engine_that_dies_meanwhile_has_failed_and_its_record_is_true(
    tmp_path: Path, until: Callable[[AnAgent, SleepyAdapter], Awaitable[Operation]]
) -> None:
    async with a_node(tmp_path) as (agent, adapter):
        await awake(agent, adapter)
        operation = await until(agent, adapter)

        agent.runtime.ends(1, "was killed by SIGKILL")

        outcome = await failed(operation)
        assert (outcome.reason, outcome.detail) == (
            FailureReason.ENGINE_LOST,
            "chat-1 was killed by SIGKILL",
        )
        deployment = agent.supervisor.engine("chat-1").deployment
        assert (deployment.residency, deployment.failure_reason) == (FAILED, FailureReason.ENGINE_LOST)
        assert deployment.asleep_level == 0
        assert on_disk(agent) == (FAILED, 0, False)
        # And it can be started again.
        adapter.error, adapter.others_requests = None, 0
        adapter.asleep.clear()
        adapter.may_move.set()
        await done(agent.start(a_sleeper()))


@in_virtual_time
async def test_a_sleeper_that_dies_has_failed(tmp_path: Path) -> None:
    async with a_node(tmp_path) as (agent, adapter):
        await awake(agent, adapter)
        await done(agent.sleep())
        # It answers no probe, and is none the worse for it.
        await asyncio.sleep(60)
        assert agent.residency() is ASLEEP
        assert "gave back" in agent.supervisor.engine("chat-1").deployment.detail

        agent.runtime.ends(1)
        await asyncio.sleep(1)

        assert agent.residency() is FAILED
        assert on_disk(agent) == (FAILED, 0, False)


# Calls that fail


@pytest.mark.parametrize(
    ("has_effect", "residency"), [(False, AWAKE), (True, ASLEEP)], ids=["it is awake", "it is asleep"]
)
@in_virtual_time
async def test_after_a_sleep_that_failed_it_is_what_the_engine_says(
    tmp_path: Path, has_effect: bool, residency: Residency
) -> None:
    async with a_node(tmp_path) as (agent, adapter):
        await awake(agent, adapter)
        adapter.error, adapter.has_effect = EngineFailedError("it answers 500"), has_effect
        if has_effect:
            assert (await done(agent.sleep())).freed_bytes == AWAKE_BYTES - ASLEEP_BYTES
        else:
            outcome = await failed(agent.sleep())
            assert (outcome.reason, outcome.detail) == (FailureReason.ENGINE_ERROR, "it answers 500")

        assert agent.residency() is residency
        assert on_disk(agent)[0] is residency


@pytest.mark.parametrize(
    ("has_effect", "residency"), [(False, ASLEEP), (True, AWAKE)], ids=["it is asleep", "it is awake"]
)
@in_virtual_time
async def test_after_a_waking_that_failed_it_is_what_the_engine_says(
    tmp_path: Path, has_effect: bool, residency: Residency
) -> None:
    async with a_node(tmp_path) as (agent, adapter):
        await awake(agent, adapter)
        await done(agent.sleep(level=2))
        adapter.error, adapter.has_effect = EngineFailedError("it answers 500"), has_effect
        if has_effect:
            await done(agent.wake())
        else:
            await failed(agent.wake())
            assert "did not wake: it answers 500" in agent.supervisor.engine("chat-1").deployment.detail

        assert agent.residency() is residency
        assert on_disk(agent)[:2] == (residency, 0 if has_effect else 2)


@in_virtual_time
async def test_one_that_neither_answers_nor_ends_has_failed_and_can_be_stopped(tmp_path: Path) -> None:
    async with a_node(tmp_path) as (agent, adapter):
        await awake(agent, adapter)
        adapter.error, adapter.health = EngineFailedError("it answers 500"), EngineHealth.UNWELL

        outcome = await failed(agent.sleep())

        assert outcome.reason is FailureReason.ENGINE_LOST
        assert "neither answers nor ends" in outcome.detail
        assert agent.residency() is FAILED
        # What is on disk is what the next agent would have to find out.
        assert on_disk(agent) == (FALLING_ASLEEP, 1, True)
        with pytest.raises(FailedPreconditionError, match="still runs; stop it first"):
            await events_of(agent.start(a_sleeper()))
        assert (await done(agent.stop("chat-1"))).deployment.residency is Residency.STOPPED


# Restarts of the agent


@pytest.mark.parametrize("until", [_draining, _falling_asleep, _measuring, _waking])
@pytest.mark.parametrize("asleep", [False, True])
@in_virtual_time
async def test_the_next_agent_finds_out_what_became_of_a_transition(
    tmp_path: Path, until: Callable[[AnAgent, SleepyAdapter], Awaitable[Operation]], asleep: bool
) -> None:
    adapter = SleepyAdapter()
    async with a_node(tmp_path, adapter) as (agent, _):
        await awake(agent, adapter)
        runtime = agent.runtime
        await until(agent, adapter)
    adapter.may_move.set()
    adapter.asleep = {"chat-1"} if asleep else set()
    before = list(adapter.calls)

    async with a_node(tmp_path, adapter, runtime) as (agent, _):
        assert agent.residency() in (FALLING_ASLEEP, WAKING)
        with pytest.raises(NotAwakeError), agent.supervisor.engine("chat-1").serving():
            pass
        await asyncio.sleep(1)

        assert agent.residency() is (ASLEEP if asleep else AWAKE)
        assert on_disk(agent) == ((ASLEEP, 1, True) if asleep else (AWAKE, 0, True))
        assert (adapter.calls, len(runtime.starts), runtime.stops) == (before, 1, [])
        if asleep:
            await done(agent.wake())
            assert adapter.calls[-1] == "wake chat-1 1"


@pytest.mark.parametrize("woken", [False, True])
@in_virtual_time
async def test_a_sleeper_is_taken_back_as_it_is(tmp_path: Path, woken: bool) -> None:
    adapter = SleepyAdapter()
    async with a_node(tmp_path, adapter) as (agent, _):
        await awake(agent, adapter)
        runtime = agent.runtime
        await done(agent.sleep(level=2))
    if woken:
        adapter.asleep.clear()

    async with a_node(tmp_path, adapter, runtime) as (agent, _):
        assert agent.residency() is ASLEEP
        await asyncio.sleep(1)

        deployment = agent.supervisor.engine("chat-1").deployment
        assert (deployment.residency, deployment.asleep_level) == ((AWAKE, 0) if woken else (ASLEEP, 2))
        # It is looked after again.
        runtime.ends(1)
        await asyncio.sleep(1)
        assert agent.residency() is FAILED


@pytest.mark.parametrize("until", [_falling_asleep, _measuring, _waking])
@in_virtual_time
async def test_one_that_is_gone_when_the_agent_comes_back_was_lost(
    tmp_path: Path, until: Callable[[AnAgent, SleepyAdapter], Awaitable[Operation]]
) -> None:
    adapter = SleepyAdapter()
    async with a_node(tmp_path, adapter) as (agent, _):
        await awake(agent, adapter)
        runtime = agent.runtime
        await until(agent, adapter)
    runtime.ends(1)

    async with a_node(tmp_path, adapter, runtime) as (agent, _):
        deployment = agent.supervisor.engine("chat-1").deployment
        assert (deployment.residency, deployment.failure_reason) == (FAILED, FailureReason.ENGINE_LOST)
        assert on_disk(agent) == (FAILED, 0, False)


@in_virtual_time
async def test_one_that_dies_or_is_dumb_while_the_next_agent_asks_has_failed(tmp_path: Path) -> None:
    adapter = SleepyAdapter()
    async with a_node(tmp_path, adapter) as (agent, _):
        await awake(agent, adapter)
        runtime = agent.runtime
        await _falling_asleep(agent, adapter)
    adapter.health = EngineHealth.UNWELL
    async with a_node(tmp_path, adapter, runtime) as (agent, _):
        await asyncio.sleep(120)
        assert agent.residency() is FAILED
        assert on_disk(agent) == (FALLING_ASLEEP, 1, True)
    async with a_node(tmp_path, adapter, runtime) as (agent, _):
        await asyncio.sleep(5)
        assert agent.residency() is FALLING_ASLEEP
        runtime.ends(1)
        await asyncio.sleep(1)
        assert on_disk(agent) == (FAILED, 0, False)


@in_virtual_time
async def test_a_later_spec_does_not_unpin_a_sleeper(tmp_path: Path) -> None:
    async with a_node(tmp_path) as (agent, adapter):
        await awake(agent, adapter, pinned=True)
        await done(agent.sleep(force=True))

        renewed = await done(agent.start(a_sleeper()))

        assert (renewed.deployment.residency, renewed.deployment.asleep_level) == (ASLEEP, 1)
        assert renewed.deployment.spec.residency_class is ResidencyClass.PINNED
        with pytest.raises(PinnedDeploymentError):
            await events_of(agent.stop("chat-1"))


@in_virtual_time
async def test_a_stop_that_comes_during_a_sleep_waits_for_it(tmp_path: Path) -> None:
    async with a_node(tmp_path) as (agent, adapter):
        await awake(agent, adapter)
        operation = await _falling_asleep(agent, adapter)
        stop = agent.stop("chat-1")
        await told(stop, "waiting for the sleep that is under way")
        adapter.may_move.set()

        await done(operation)
        assert (await done(stop)).deployment.residency is Residency.STOPPED


@in_virtual_time
async def test_a_flush_that_the_engine_refuses_leaves_it_awake(tmp_path: Path) -> None:
    async with a_node(tmp_path) as (agent, adapter):
        await awake(agent, adapter)
        error: RungError = EngineFailedError("it answers 500")
        adapter.error, adapter.has_effect = error, False

        assert (await failed(agent.free())).detail == "it answers 500"
        assert agent.residency() is AWAKE


@in_virtual_time
async def test_an_engine_that_dies_of_a_flush_is_told_as_lost(tmp_path: Path) -> None:
    async with a_node(tmp_path) as (agent, adapter):
        await awake(agent, adapter)
        adapter.lag_s = 60
        operation = agent.free()
        await told(operation, "measuring")
        agent.runtime.ends(1, "was killed by SIGKILL")

        outcome = await failed(operation)
        assert outcome.reason is FailureReason.ENGINE_LOST
        assert "SIGKILL" in outcome.detail


@in_virtual_time
async def test_a_declared_size_is_what_a_sleep_is_held_to_where_processes_have_no_figures(
    tmp_path: Path,
) -> None:
    adapter = SleepyAdapter(gpu=WatchedGpu(per_process=False), asleep_bytes=10 * GIB)
    async with a_node(tmp_path, adapter) as (agent, _):
        adapter.gpu.held["chat-1"] = AWAKE_BYTES
        await done(agent.start(replace(a_sleeper(), vram_bytes=AWAKE_BYTES)))

        slept = await done(agent.sleep())

        assert slept.freed_bytes == 4 * GIB
        assert "where 12.5 GiB were expected" in slept.deployment.detail
