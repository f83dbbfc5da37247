"""What of the fleet survives a restart of the control plane."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

from controlplane.fleet import DrainMarks, NodeSwaps
from controlplane.store import FleetMarks, JobStore
from controlplane.vram import Swap


@asynccontextmanager
async def marks(tmp_path: Path) -> AsyncIterator[FleetMarks]:
    store = await JobStore.open(tmp_path / "rung.db")
    try:
        yield FleetMarks(store)
    finally:
        await store.aclose()


async def test_drained_nodes_are_remembered_until_they_are_taken_back(tmp_path: Path) -> None:
    async with marks(tmp_path) as kept:
        for node_id in ("workstation", "spark", "spark"):
            await DrainMarks(kept).write(node_id, drained=True)
    async with marks(tmp_path) as kept:
        assert await DrainMarks(kept).read() == {"workstation", "spark"}
        await DrainMarks(kept).write("spark", drained=False)
        await DrainMarks(kept).write("spark", drained=False)
    async with marks(tmp_path) as kept:
        assert await DrainMarks(kept).read() == {"workstation"}


async def test_a_swap_is_remembered_with_its_newest_turn_until_it_is_over(tmp_path: Path) -> None:
    there = Swap(slot="reasoning", displaced="deepseek", taker="gemma")
    back = Swap(slot="reasoning", displaced="gemma", taker="deepseek")
    async with marks(tmp_path) as kept:
        await NodeSwaps(kept, "box").write(there)
        await NodeSwaps(kept, "box").write(back)
        await NodeSwaps(kept, "other").write(there)
    async with marks(tmp_path) as kept:
        assert await NodeSwaps(kept, "box").read() == (back,)
        await NodeSwaps(kept, "box").erase("reasoning")
    async with marks(tmp_path) as kept:
        assert await NodeSwaps(kept, "box").read() == ()
        assert await NodeSwaps(kept, "other").read() == (there,)
        assert await DrainMarks(kept).read() == frozenset()
