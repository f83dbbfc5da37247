"""The log of a switch: what goes on is told again, whoever comes late hears all of it, an end is an end."""

from __future__ import annotations

import asyncio
from contextlib import aclosing

import pytest

from controlplane.profiles._log import SwitchLog
from rung.errors import DrainingError
from rung.types import ProfileDone, ProfileEvent, ProfilePlan, ProfileStep, Residency

STEP = ProfileStep("reasoner", Residency.ASLEEP, "moving weights", 3.0)


async def all_of(log: SwitchLog) -> list[ProfileEvent]:
    async with asyncio.timeout(10), aclosing(log.events()) as events:
        return [event async for event in events]


async def test_a_step_that_goes_on_is_told_again_within_a_second_with_the_time_that_is_left() -> None:
    log = SwitchLog("o", "dev")
    log.add(STEP)
    async with asyncio.timeout(10), aclosing(log.events()) as events:
        first, again = await anext(events), await anext(events)
    log.add(ProfileDone("dev"))
    assert isinstance(again.payload, ProfileStep)
    assert again.elapsed_s - first.elapsed_s < 1.0
    assert again.payload.expected_s is not None
    assert 2.0 < again.payload.expected_s < 2.5
    assert again.payload.detail == "moving weights"


async def test_who_comes_late_hears_all_of_it() -> None:
    log = SwitchLog("o", "dev")
    for payload in (ProfilePlan((STEP,)), STEP, ProfileDone("dev")):
        log.add(payload)
    assert [event.payload for event in await all_of(log)] == [ProfilePlan((STEP,)), STEP, ProfileDone("dev")]


async def test_what_was_refused_is_raised_to_everybody() -> None:
    log = SwitchLog("o", "dev")
    log.add(STEP)
    log.refuse(DrainingError("the control plane is shutting down"))
    for _ in range(2):
        with pytest.raises(DrainingError):
            await all_of(log)
