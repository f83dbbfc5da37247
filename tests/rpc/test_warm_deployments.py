"""What is warm comes back by itself after it gave way, unless an operator or a drain says otherwise."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import aclosing

import pytest
from msgspec.structs import replace

from rung import AsyncClient
from rung.types import NodeState, Residency, ResidencyClass, VllmEngine
from tests.fakes.agent_server import a_spec
from tests.fakes.api_server import an_api_server
from tests.fakes.gpu_agent import GIB, GpuAgent

WARM = replace(
    a_spec(
        "reasoner",
        residency_class=ResidencyClass.SLEEPABLE,
        engine=VllmEngine(model="m", sleep_mode=True),
    ),
    vram_bytes=20 * GIB,
    warm=True,
)
LAZY = replace(WARM, id="coder", model="coder", vram_bytes=8 * GIB, warm=False)


@pytest.fixture
async def card() -> AsyncIterator[GpuAgent]:
    card = GpuAgent([WARM, LAZY])
    for spec in (WARM, LAZY):
        card.put(spec, Residency.AWAKE)
    async with card.running():
        yield card


@pytest.fixture
async def client(card: GpuAgent) -> AsyncIterator[AsyncClient]:
    async with (
        an_api_server([card.agent], [WARM, LAZY]) as plane,
        AsyncClient(f"127.0.0.1:{plane.server.port}") as client,
    ):
        async with asyncio.timeout(10):
            async for view in plane.fleet.changes():
                if view.nodes["box"].state is NodeState.READY:
                    break
        yield client


async def ticks(client: AsyncClient, count: int) -> None:
    """Some time, in which what would come back does."""
    async with asyncio.timeout(30), aclosing(client.watch_fleet()) as snapshots:
        async for _ in snapshots:
            count -= 1
            if not count:
                return


async def test_it_wakes_when_the_lease_that_it_slept_for_has_ended(
    client: AsyncClient, card: GpuAgent
) -> None:
    async with client.lease("box/0", 26 * GIB, holder="train.py"):
        assert sorted(card.told) == [("sleep", "coder"), ("sleep", "reasoner")]
    async with asyncio.timeout(15):
        await card.agent.until(lambda: ("wake", "reasoner") in card.told)

    assert ("wake", "coder") not in card.told


async def test_not_while_the_lease_is_held(client: AsyncClient, card: GpuAgent) -> None:
    async with client.lease("box/0", 26 * GIB, holder="train.py"):
        await ticks(client, 40)
        assert ("wake", "reasoner") not in card.told


async def test_not_what_an_operator_put_to_sleep(client: AsyncClient, card: GpuAgent) -> None:
    async for _ in client.sleep_deployment("reasoner"):
        pass
    await ticks(client, 40)
    assert card.told == [("sleep", "reasoner")]

    async for _ in client.wake_deployment("reasoner"):
        pass
    assert card.told == [("sleep", "reasoner"), ("wake", "reasoner")]


async def test_not_on_a_node_that_is_drained(client: AsyncClient, card: GpuAgent) -> None:
    await client.drain_node("box")
    card.put(WARM, Residency.STOPPED)
    await ticks(client, 40)
    assert card.told == []

    await client.resume_node("box")
    async with asyncio.timeout(15):
        await card.agent.until(lambda: card.told == [("start", "reasoner")])
