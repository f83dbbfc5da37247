"""What an operator starts or wakes on a GPU gets its room from the node's scheduler, and tells of that."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import pytest
from msgspec.structs import replace

from rung import AsyncClient
from rung.errors import FailedPreconditionError, NotOursError, VramInfeasibleError
from rung.types import (
    FailureReason,
    LifecycleDone,
    LifecycleEvent,
    LifecycleFailed,
    LifecycleProgress,
    NodeState,
    ReclaimGrade,
    Residency,
    ResidencyClass,
    VllmEngine,
)
from tests.fakes.agent_server import a_spec
from tests.fakes.api_server import an_api_server
from tests.fakes.gpu_agent import GIB, GpuAgent

PINNED = replace(a_spec("pinned", residency_class=ResidencyClass.PINNED), vram_bytes=10 * GIB)
REASONER = replace(
    a_spec(
        "reasoner",
        residency_class=ResidencyClass.SLEEPABLE,
        engine=VllmEngine(model="m", sleep_mode=True),
    ),
    vram_bytes=16 * GIB,
)
CODER = replace(a_spec("coder"), vram_bytes=16 * GIB)
HUGE = replace(a_spec("huge"), vram_bytes=24 * GIB)
OLLAMA = a_spec("ollama", external=True)
MODEST = replace(a_spec("modest"), vram_bytes=6 * GIB)
SPECS = (PINNED, REASONER, CODER, HUGE, MODEST, OLLAMA)


@pytest.fixture
async def card() -> AsyncIterator[GpuAgent]:
    """10 GiB are pinned and 16 of the sleepable reasoner; 5 are free."""
    card = GpuAgent(SPECS)
    card.put(PINNED, Residency.AWAKE)
    card.put(REASONER, Residency.AWAKE)
    card.put(OLLAMA, Residency.AWAKE)
    async with card.running():
        yield card


@pytest.fixture
async def client(card: GpuAgent) -> AsyncIterator[AsyncClient]:
    # What is modest disturbs nobody.
    async with an_api_server([card.agent], SPECS, own_grades={"modest": ReclaimGrade.QUICK}) as plane:
        async with asyncio.timeout(10):
            async for view in plane.fleet.changes():
                if view.nodes["box"].state is NodeState.READY:
                    break
        async with AsyncClient(f"127.0.0.1:{plane.server.port}") as client:
            yield client


async def all_of(events: AsyncIterator[LifecycleEvent]) -> list[LifecycleEvent]:
    async with asyncio.timeout(20):
        return [event async for event in events]


def details(events: list[LifecycleEvent]) -> list[str]:
    return [event.payload.detail for event in events if isinstance(event.payload, LifecycleProgress)]


async def test_a_start_makes_room_first_and_says_so(client: AsyncClient, card: GpuAgent) -> None:
    events = await all_of(client.start_deployment("coder"))

    assert card.told == [("sleep", "reasoner"), ("start", "coder")]
    assert "putting reasoner to sleep" in details(events)
    assert [event.sequence for event in events] == list(range(1, len(events) + 1))
    outcome = events[-1].payload
    assert isinstance(outcome, LifecycleDone)
    assert outcome.deployment.residency is Residency.AWAKE


async def test_so_does_a_wake(client: AsyncClient, card: GpuAgent) -> None:
    card.put(REASONER, Residency.ASLEEP)
    card.put(CODER, Residency.AWAKE)

    events = await all_of(client.wake_deployment("reasoner"))

    assert card.told == [("stop", "coder"), ("wake", "reasoner")]
    assert isinstance(events[-1].payload, LifecycleDone)


async def test_what_may_disturb_nobody_comes_up_in_what_is_free_or_not_at_all(
    client: AsyncClient, card: GpuAgent
) -> None:
    with pytest.raises(VramInfeasibleError, match="at grade quick"):
        await all_of(client.start_deployment("modest"))
    assert card.told == []

    await all_of(client.sleep_deployment("reasoner"))
    async with asyncio.timeout(20):
        async for fleet in client.watch_fleet():
            status = fleet.nodes[0].status
            if status is not None and status.gpus[0].memory_used_bytes < 16 * GIB:
                break
    events = await all_of(client.start_deployment("modest"))

    assert isinstance(events[-1].payload, LifecycleDone)
    assert card.told == [("sleep", "reasoner"), ("start", "modest")]


async def test_what_cannot_fit_is_refused_with_what_would_make_it_fit(
    client: AsyncClient, card: GpuAgent
) -> None:
    with pytest.raises(VramInfeasibleError, match=r"huge|pinned holds 10.0 GiB") as refused:
        await all_of(client.start_deployment("huge"))

    assert "pinned holds 10.0 GiB: it is pinned" in refused.value.message
    assert "would fit" in refused.value.message
    assert card.told == []


async def test_the_same_operation_is_begun_once_and_goes_on_without_its_reader(
    client: AsyncClient, card: GpuAgent
) -> None:
    async for _ in client.start_deployment("coder", operation_id="mine"):
        break

    events = await all_of(client.start_deployment("coder", operation_id="mine"))

    assert events[0].sequence == 1
    assert isinstance(events[-1].payload, LifecycleDone)
    assert card.told.count(("start", "coder")) == 1


async def test_an_engine_that_does_not_come_up_is_told_with_its_reason(
    client: AsyncClient, card: GpuAgent
) -> None:
    card.broken.add("coder")

    outcome = (await all_of(client.start_deployment("coder")))[-1].payload

    assert isinstance(outcome, LifecycleFailed)
    assert outcome.reason is FailureReason.ENGINE_START_FAILED
    assert "exit code 1" in outcome.detail


async def until_it_waits_for_a_lease(events: AsyncIterator[LifecycleEvent]) -> None:
    async with asyncio.timeout(20):
        async for event in events:
            if any("the lease of train.py ends" in detail for detail in details([event])):
                return


async def test_a_stop_calls_off_a_start_that_waits_for_room(client: AsyncClient, card: GpuAgent) -> None:
    card.put(CODER, Residency.STOPPED)
    async with client.lease("box/0", 18 * GIB, holder="train.py"):
        starting = client.start_deployment("coder")
        await until_it_waits_for_a_lease(starting)
        await all_of(client.stop_deployment("coder"))
        with pytest.raises(FailedPreconditionError, match="called off: it was told to stop"):
            await all_of(starting)

    assert ("start", "coder") not in card.told


async def test_a_start_waits_for_a_lease_and_begins_when_that_ends(
    client: AsyncClient, card: GpuAgent
) -> None:
    async with client.lease("box/0", 18 * GIB, holder="train.py"):
        starting = client.start_deployment("coder")
        await until_it_waits_for_a_lease(starting)
        assert card.told == [("sleep", "reasoner")]
    events = await all_of(starting)

    assert isinstance(events[-1].payload, LifecycleDone)
    assert card.told == [("sleep", "reasoner"), ("start", "coder")]


async def test_what_is_awake_or_somebody_elses_goes_to_the_agent_alone(
    client: AsyncClient, card: GpuAgent
) -> None:
    await all_of(client.start_deployment("reasoner"))
    await all_of(client.wake_deployment("ollama"))
    with pytest.raises(NotOursError):
        await all_of(client.start_deployment("ollama"))

    assert card.told == [("start", "reasoner"), ("wake", "ollama")]


async def test_to_wake_what_does_not_sleep_is_for_the_agent_to_refuse(
    client: AsyncClient, card: GpuAgent
) -> None:
    card.put(CODER, Residency.STOPPED)
    await all_of(client.wake_deployment("coder"))

    assert card.told == [("wake", "coder")]
