"""A pinned deployment that opted in is shrunk for who needs it, and never stays so."""

from __future__ import annotations

import asyncio

import pytest

from controlplane.vram import ReclaimAction, Step
from rung.errors import VramInfeasibleError
from rung.types import ReclaimGrade, Residency, ResidencyClass
from tests.fakes.scheduled_node import GIB, everything, node_of, sleeper
from tests.fakes.simulated_pool import Fault, SimulatedEngine
from tests.fakes.virtual_time import in_virtual_time

SHRINK = ("orchestrator", ReclaimAction.SHRINK, 0)


def orchestrator(*faults: Fault) -> SimulatedEngine:
    """Pinned, with 12 GiB, of which 7 are its KV cache."""
    return SimulatedEngine(
        "orchestrator", ResidencyClass.PINNED, 12 * GIB, shrunk_bytes=5 * GIB, faults=faults
    )


@in_virtual_time
async def test_it_is_shrunk_at_the_greatest_grade_only_and_grows_when_the_lease_ends() -> None:
    async with node_of(orchestrator()) as node:
        with pytest.raises(VramInfeasibleError):
            await everything(node.ask(20, grade=ReclaimGrade.STANDARD))

        lease = await node.lease(20)

        assert (lease.grade, node.steps()) == (ReclaimGrade.FULL, [SHRINK])
        await asyncio.sleep(60)
        assert node.residency("orchestrator") is Residency.ASLEEP
        node.scheduler.release(lease.id)
        await asyncio.sleep(10)
        assert node.residency("orchestrator") is Residency.AWAKE
        assert node.pool.raised == ["orchestrator"]


@in_virtual_time
async def test_what_the_lease_left_behind_is_flushed_so_that_it_can_grow() -> None:
    comfyui = SimulatedEngine("comfyui", ResidencyClass.CACHE, GIB)
    async with node_of(orchestrator(), comfyui) as node:
        lease = await node.lease(20, deployment_id="comfyui")
        comfyui.resident_bytes += 20 * GIB
        comfyui.cache_bytes += 20 * GIB
        node.scheduler.release(lease.id)

        await asyncio.sleep(20)

        assert node.steps() == [SHRINK, ("comfyui", ReclaimAction.FREE, 0)]
        assert node.residency("orchestrator") is Residency.AWAKE


@in_virtual_time
async def test_who_asks_for_it_waits_until_it_has_grown() -> None:
    async with node_of(orchestrator()) as node:
        lease = await node.lease(20)
        asked = asyncio.create_task(node.awake("orchestrator"))
        await asyncio.sleep(30)
        assert not asked.done()

        node.scheduler.release(lease.id)

        async with asyncio.timeout(10):
            await asked


@in_virtual_time
async def test_a_demand_that_is_withdrawn_after_the_shrink_leaves_it_as_it_was() -> None:
    async with node_of(orchestrator(), sleeper()) as node:
        events = node.ask(22)
        async for event in events:
            if isinstance(event, Step) and event.step.action is ReclaimAction.SHRINK and event.freed_bytes:
                break
        assert node.residency("orchestrator") is Residency.ASLEEP
        await events.aclose()

        await asyncio.sleep(20)

        assert node.residency("orchestrator") is Residency.AWAKE


@in_virtual_time
async def test_a_shrink_that_hangs_keeps_nobody_from_being_answered() -> None:
    async with node_of(orchestrator(Fault.HANGS)) as node:
        with pytest.raises(VramInfeasibleError, match="orchestrator was not shrunk"):
            await everything(node.ask(20))

        # It took effect, long after it was given up.
        await asyncio.sleep(60)
        await node.awake("orchestrator")

        assert node.pool.engines["orchestrator"].resident_bytes == 12 * GIB


@in_virtual_time
async def test_nobody_gives_way_on_account_of_a_lease_that_has_just_ended() -> None:
    async with node_of(sleeper(size_gib=10)) as node:
        node.pool.keep_s = 2.0
        lease = await node.lease(10)
        # What is known of the pool is from before its end.
        await asyncio.sleep(0.5)
        node.scheduler.release(lease.id)

        second = await node.lease(12, operation="second")

        assert (second.grade, node.steps()) == (ReclaimGrade.QUICK, [])
