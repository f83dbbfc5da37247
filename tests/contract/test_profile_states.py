"""What is remembered of profiles survives the end of the process."""

from __future__ import annotations

from pathlib import Path

from controlplane.store import JobStore, ProfileState, ProfileStates
from rung.types import Profile, ProfileEntry, Residency

DEV = Profile(name="dev", description="all", entries=(ProfileEntry("a", Residency.AWAKE, 0.5),), hold=True)


async def test_a_new_store_remembers_nothing(tmp_path: Path) -> None:
    store = await JobStore.open(tmp_path / "rung.db")
    assert await ProfileStates(store).read() == ProfileState()
    await store.aclose()


async def test_what_was_written_last_is_there_after_a_restart(tmp_path: Path) -> None:
    store = await JobStore.open(tmp_path / "rung.db")
    await ProfileStates(store).write(ProfileState(operation_id="o", target=DEV, ended=False))
    last = ProfileState(current=DEV, operation_id="o", target=DEV, detail="why")
    await ProfileStates(store).write(last)
    await store.aclose()

    store = await JobStore.open(tmp_path / "rung.db")
    assert await ProfileStates(store).read() == last
    await store.aclose()
