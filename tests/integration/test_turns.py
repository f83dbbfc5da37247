"""Models that cannot fit together take turns: real processes on a simulated GPU that really overflows."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from nodeagent.simulators.gpu import SimulatedGpus, SimulatedGpuSpec
from rung.errors import VramInfeasibleError
from rung.types import JobEvent, Phase, PhaseProgress, Residency, TokenDelta
from tests.integration.stack import Stack, stack

GIB = 1 << 30


def a_vllm(folder: Path, name: str, utilization: float, **fields: Any) -> dict[str, Any]:
    return {
        "id": name,
        "model": f"{name}-8b-fp8",
        "slots": 4,
        "engine": {
            "kind": "vllm",
            "model": f"{name}-8b-fp8",
            "gpu_memory_utilization": utilization,
            "max_model_len_tokens": 4096,
            "sleep_mode": fields.get("residency_class") == "sleepable",
        },
        "runtime": {
            "kind": "process",
            "executable": "vllm",
            "environment": {
                "RUNG_SIM_GPUS": str(folder / "gpus"),
                "RUNG_SIM_SPEED": "20",
                "RUNG_SIM_LOAD_S": "1",
            },
        },
        **fields,
    }


@pytest.fixture
async def box(tmp_path: Path) -> AsyncIterator[Stack]:
    """A card of 32 GiB: a pinned model of 10, and two of which only one fits beside it."""
    SimulatedGpus.create(
        tmp_path / "gpus",
        gpus=[SimulatedGpuSpec(name="NVIDIA GeForce RTX 5090", memory_total_bytes=32 * GIB)],
    )
    deployments = [
        a_vllm(tmp_path, "pinned", 0.3, residency_class="pinned"),
        a_vllm(tmp_path, "reasoner", 0.5, residency_class="sleepable"),
        a_vllm(tmp_path, "coder", 0.5, residency_class="on_demand"),
    ]
    async with stack(tmp_path, deployments, agent={"simulated_gpus": str(tmp_path / "gpus")}) as found:
        yield found


async def ask(box: Stack, name: str) -> list[JobEvent]:
    """A chat; returns its log."""
    stream = box.client.chat("count to 3", model=name)
    events = [event async for event in stream]
    assert (await stream.result()).served.target == name  # type: ignore[union-attr]
    return events


def details(events: list[JobEvent], phase: Phase) -> list[str]:
    return [
        event.payload.detail
        for event in events
        if isinstance(event.payload, PhaseProgress) and event.payload.phase is phase
    ]


async def residencies(box: Stack) -> dict[str, Residency]:
    return {each.spec.id: each.residency for each in await box.client.list_deployments()}


async def test_a_request_makes_room_for_its_model_and_the_other_gives_way(box: Stack) -> None:
    await ask(box, "pinned")
    await ask(box, "reasoner")
    before = await box.deployment("pinned")
    made_room = await ask(box, "coder")

    assert "putting reasoner to sleep" in details(made_room, Phase.VRAM_ACQUIRE)
    assert await residencies(box) == {
        "pinned": Residency.AWAKE,
        "reasoner": Residency.ASLEEP,
        "coder": Residency.AWAKE,
    }
    woke = await ask(box, "reasoner")

    assert "stopping coder" in details(woke, Phase.VRAM_ACQUIRE)
    assert details(woke, Phase.ENGINE_WAKE)
    await box.deployment("coder", Residency.STOPPED)
    after = await box.deployment("pinned")
    assert (after.pid, after.generation) == (before.pid, before.generation)


async def test_one_that_is_answering_is_not_disturbed_until_it_has_answered(box: Stack) -> None:
    await ask(box, "reasoner")
    long = box.client.chat("Tell me a long story, please.", model="reasoner")
    async for event in long:
        if isinstance(event.payload, TokenDelta):
            break

    done = asyncio.create_task(long.result())
    made_room = await ask(box, "coder")

    assert (await done).text
    assert "putting reasoner to sleep" in details(made_room, Phase.VRAM_ACQUIRE)


async def test_what_can_never_fit_is_refused_with_who_holds_what(box: Stack, tmp_path: Path) -> None:
    await ask(box, "pinned")
    outcome = await box.client.plan_reclaim("box/0", 30 * GIB)

    assert any("pinned holds" in line for line in outcome.remedies)  # type: ignore[union-attr]
    with pytest.raises(VramInfeasibleError, match="do not fit"):
        async with box.client.lease("box/0", 30 * GIB):
            pass
