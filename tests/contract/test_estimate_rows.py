"""What is learnt of the times of steps survives a restart."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

from controlplane.estimates import Observations
from controlplane.store import EstimateRows, JobStore


@asynccontextmanager
async def rows(tmp_path: Path) -> AsyncIterator[EstimateRows]:
    store = await JobStore.open(tmp_path / "rung.db")
    try:
        yield EstimateRows(store)
    finally:
        await store.aclose()


def seen(deployment_id: str, *seconds: float, step: str = "load:flux") -> Observations:
    return Observations(deployment_id=deployment_id, step=step, seconds_per_unit=seconds)


async def test_observations_are_read_as_they_were_written_the_newest_last(tmp_path: Path) -> None:
    async with rows(tmp_path) as kept:
        await kept.write([seen("comfy", 18.5), seen("sana", 1.0)], [], time_s=10.0)
        await kept.write([seen("comfy", 18.5, 17.25)], [], time_s=20.0)
        await kept.write([seen("whisper", 3.0)], [], time_s=15.0)
    async with rows(tmp_path) as kept:
        assert await kept.read() == [seen("sana", 1.0), seen("whisper", 3.0), seen("comfy", 18.5, 17.25)]


async def test_what_is_forgotten_is_gone_and_nothing_happens_to_what_was_not_there(tmp_path: Path) -> None:
    async with rows(tmp_path) as kept:
        await kept.write([seen("comfy", 1.0), seen("comfy", 2.0, step="other")], [], time_s=10.0)
        await kept.write([], [("comfy", "load:flux"), ("comfy", "never")], time_s=11.0)
        assert await kept.read() == [seen("comfy", 2.0, step="other")]


async def test_a_deployment_that_is_gone_is_remembered_for_a_while(tmp_path: Path) -> None:
    async with rows(tmp_path) as kept:
        await kept.write([seen("here", 1.0), seen("long-gone", 1.0)], [], time_s=10.0)
        await kept.write([seen("just-gone", 1.0)], [], time_s=20.0)

        assert await kept.delete_gone({"here"}, before_s=15.0) == 1

        assert {each.deployment_id for each in await kept.read()} == {"here", "just-gone"}
