"""Profiles with real processes, on a simulated GPU that really overflows."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import AsyncIterator
from contextlib import aclosing
from pathlib import Path
from typing import Any

import pytest

from nodeagent.simulators.gpu import SimulatedGpus, SimulatedGpuSpec
from rung.errors import RungError
from rung.types import ProfileDone, ProfileEvent, ProfileFailed, ProfilePlan, ProfileStep, Residency
from tests.integration.stack import Stack, stack
from tests.integration.test_turns import GIB, a_vllm

AWAKE, ASLEEP, STOPPED = Residency.AWAKE, Residency.ASLEEP, Residency.STOPPED

PROFILES: list[dict[str, Any]] = [
    {
        "name": "dev",
        "deployments": [
            {"deployment": "pinned", "residency": "awake"},
            {"deployment": "reasoner", "residency": "asleep"},
            {"deployment": "coder", "residency": "awake"},
        ],
    },
    {
        "name": "gaming",
        "others": "stopped",
        "hold": True,
        "deployments": [{"deployment": "pinned", "residency": "awake"}],
    },
    {
        "name": "wide",
        "deployments": [
            {"deployment": "reasoner", "residency": "stopped"},
            {"deployment": "coder", "residency": "awake", "gpu_memory_utilization": 0.6},
        ],
    },
    {
        "name": "broken",
        "deployments": [
            {"deployment": "coder", "residency": "stopped"},
            {"deployment": "broken", "residency": "awake"},
        ],
    },
]


@pytest.fixture
async def box(tmp_path: Path) -> AsyncIterator[Stack]:
    """A card of 32 GiB: a pinned model of 10, two of which only one fits beside it, and one that dies."""
    SimulatedGpus.create(
        tmp_path / "gpus",
        gpus=[SimulatedGpuSpec(name="NVIDIA GeForce RTX 5090", memory_total_bytes=32 * GIB)],
    )
    deployments = [
        a_vllm(tmp_path, "pinned", 0.3, residency_class="pinned"),
        a_vllm(tmp_path, "reasoner", 0.5, residency_class="sleepable"),
        a_vllm(tmp_path, "coder", 0.5, residency_class="on_demand"),
        a_vllm(tmp_path, "broken", 0.4, residency_class="on_demand"),
    ]
    deployments[-1]["runtime"]["environment"]["RUNG_SIM_FAULTS"] = "die_while_loading"
    agent = {"simulated_gpus": str(tmp_path / "gpus")}
    async with stack(tmp_path, deployments, agent=agent, profiles=PROFILES) as found:
        yield found


async def switch(box: Stack, name: str, *, dry_run: bool = False) -> list[ProfileEvent]:
    async with asyncio.timeout(90), aclosing(box.client.switch_profile(name, dry_run=dry_run)) as events:
        return [event async for event in events]


def plan_of(events: list[ProfileEvent]) -> list[tuple[str, Residency]]:
    assert isinstance(events[0].payload, ProfilePlan)
    return [(step.deployment_id, step.residency) for step in events[0].payload.steps]


def done(events: list[ProfileEvent]) -> list[tuple[str, Residency]]:
    steps = [event.payload for event in events if isinstance(event.payload, ProfileStep)]
    return [(step.deployment_id, step.residency) for step in steps if step.done]


async def free_bytes(box: Stack) -> int:
    await box.heard()
    (node,) = await box.client.list_nodes()
    assert node.status is not None
    return node.status.gpus[0].memory_free_bytes


async def test_from_dev_to_gaming_and_back(box: Stack) -> None:
    dry = await switch(box, "dev", dry_run=True)
    events = await switch(box, "dev")
    assert events[-1].payload == ProfileDone("dev")
    assert done(events) == plan_of(events) == plan_of(dry)
    # The sleeper is started while there is most room, and sleeps before the other comes.
    assert plan_of(dry)[:2] == [("reasoner", AWAKE), ("reasoner", ASLEEP)]
    assert (await box.client.list_profiles()).current == "dev"
    pinned = await box.deployment("pinned", AWAKE)
    busy_bytes = await free_bytes(box)

    dry = await switch(box, "gaming", dry_run=True)
    events = await switch(box, "gaming")
    assert events[-1].payload == ProfileDone("gaming")
    assert done(events) == plan_of(dry) == [("reasoner", STOPPED), ("coder", STOPPED)]
    assert await free_bytes(box) > busy_bytes + 15 * GIB
    # The game keeps the card: nobody's request takes it away.
    for name in ("coder", "reasoner"):
        with pytest.raises(RungError, match="profile gaming holds it stopped"):
            await box.client.chat("hello", model=name).result()
    assert (await box.client.chat("count to 3", model="pinned").result()).text

    # Nor does a control plane that was killed meanwhile.
    await box.plane.end(signal.SIGKILL)
    await box.plane.start()
    await box.connect()
    await box.deployment("pinned", AWAKE)
    assert (await box.client.list_profiles()).current == "gaming"
    with pytest.raises(RungError, match="profile gaming holds it stopped"):
        await box.client.chat("hello", model="coder").result()

    assert (await switch(box, "dev"))[-1].payload == ProfileDone("dev")
    await box.deployment("coder", AWAKE)
    await box.deployment("reasoner", ASLEEP)
    assert (await box.client.chat("count to 3", model="coder").result()).text
    after = await box.deployment("pinned", AWAKE)
    assert (after.pid, after.generation) == (pinned.pid, pinned.generation)


async def test_another_share_of_the_gpu_is_taken(box: Stack) -> None:
    await switch(box, "dev")
    before = (await box.deployment("coder", AWAKE)).vram_bytes
    assert before is not None
    events = await switch(box, "wide")
    assert done(events) == [("reasoner", STOPPED), ("coder", STOPPED), ("coder", AWAKE)]
    await box.heard()
    after = (await box.deployment("coder", AWAKE)).vram_bytes
    assert after is not None
    assert after - before == pytest.approx(0.1 * 32 * GIB, rel=0.1)


async def test_when_an_engine_dies_while_it_loads_everything_is_taken_back(box: Stack) -> None:
    await switch(box, "dev")
    events = await switch(box, "broken")

    failed = events[-1].payload
    assert isinstance(failed, ProfileFailed)
    assert failed.current == "dev"
    assert "broken to awake" in failed.detail
    assert failed.detail.endswith("dev is back")
    await box.deployment("coder", AWAKE)
    await box.deployment("reasoner", ASLEEP)
    assert (await box.client.list_profiles()).current == "dev"
