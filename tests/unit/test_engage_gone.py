"""An engine that is gone, but said to be awake: who is asked instead, and when it is started anew."""

from __future__ import annotations

import asyncio
from contextlib import suppress

import pytest
from msgspec.structs import replace

from controlplane.pipelines._engage import HEARD_WITHIN_S
from controlplane.pipelines._wish import Wish
from rung.errors import (
    EngineFailedError,
    EngineStartFailedError,
    EngineTimeoutError,
    EngineUnreachableError,
    NoTargetError,
    NotAwakeError,
    RungError,
)
from rung.types import JobKind, Policy, Priority, Residency
from tests.fakes.engaging import Place
from tests.fakes.fleet_view import deployment_view
from tests.fakes.virtual_time import in_virtual_time

GONE = [EngineUnreachableError("near cannot be reached"), NotAwakeError("near is failed")]
WAITS = "waiting up to 3 s to hear from workstation what became of it"
LOCAL = Policy(priority=Priority.USER, local_only=True)


def now_s() -> float:
    return asyncio.get_running_loop().time()


def is_told(place: Place, name: str, error: RungError | None = None) -> None:
    """The fleet hears that the engine has ended; the next one answers, or fails so."""
    place.answers.of.pop(name, None)
    if error is not None:
        place.answers.of[name] = error
    place.lies(name, Residency.FAILED)


@pytest.mark.parametrize("error", GONE)
@in_virtual_time
async def test_it_is_started_anew_and_answers_once_the_fleet_has_heard(error: RungError) -> None:
    place = Place(deployments=1, models=0)
    place.answers.of["near"] = error
    began_s = now_s()
    answer = asyncio.create_task(place.answered_by())
    await place.job.until(WAITS)
    assert not place.slots.pressure, "no slot is held while it is waited for"
    is_told(place, "near")

    assert await answer == "near"

    assert now_s() - began_s < 0.1, "as soon as it was heard"
    assert place.fleet.raised == ["near"]
    assert place.answers.asked == ["near", "near"]
    assert place.job.lines[0] == f"{error.message}; {WAITS}"
    assert not place.circuits
    assert not place.slots.pressure


@in_virtual_time
async def test_what_was_started_anew_meanwhile_is_asked_at_once() -> None:
    place = Place(deployments=1, models=0)
    place.answers.of["near"] = GONE[0]
    answer = asyncio.create_task(place.answered_by())
    await place.job.until(WAITS)
    place.answers.of.clear()
    found = place.fleet.view.deployments["near"]
    place.fleet.show(replace(found, deployment=replace(found.deployment, generation=1)))

    assert await answer == "near"
    assert place.fleet.raised == []


@in_virtual_time
async def test_of_many_that_wait_for_it_one_start_is_begun_and_all_are_answered() -> None:
    place = Place(deployments=1, models=0)
    place.answers.of["near"] = GONE[0]
    answers = [asyncio.create_task(place.answered_by()) for _ in range(4)]
    await place.job.until(WAITS, times=4)
    is_told(place, "near")

    assert await asyncio.gather(*answers) == ["near"] * 4
    assert not place.circuits
    assert not place.slots.pressure


@in_virtual_time
async def test_while_it_is_still_said_to_be_awake_the_request_fails_after_a_bounded_time() -> None:
    place = Place(deployments=1, models=0)
    place.answers.of["near"] = GONE[0]
    began_s = now_s()

    with pytest.raises(EngineUnreachableError, match="near cannot be reached"):
        await place.ask()

    assert now_s() - began_s == pytest.approx(HEARD_WITHIN_S, abs=0.1)
    assert place.answers.asked == ["near"]
    assert place.fleet.raised == []
    assert not place.slots.pressure
    assert place.circuits, "it counts, once"


@in_virtual_time
async def test_measurements_that_come_all_the_time_do_not_prolong_the_wait() -> None:
    place = Place(deployments=1, models=0)
    place.answers.of["near"] = GONE[0]

    async def measure() -> None:
        while True:
            await asyncio.sleep(0.5)
            place.lies("near", Residency.AWAKE)

    measuring = asyncio.create_task(measure())
    with pytest.raises(EngineUnreachableError):
        async with asyncio.timeout(HEARD_WITHIN_S + 1.0):
            await place.ask()
    measuring.cancel()
    with suppress(asyncio.CancelledError):
        await measuring


@in_virtual_time
async def test_it_is_started_once_for_each_request_and_no_more() -> None:
    place = Place(deployments=1, models=0)
    place.answers.of["near"] = GONE[0]
    answer = asyncio.create_task(place.answered_by())
    await place.job.until(WAITS)
    is_told(place, "near", EngineUnreachableError("it died of the prompt"))

    with pytest.raises(EngineUnreachableError, match="died of the prompt"):
        await answer
    assert place.fleet.raised == ["near"]
    assert place.answers.asked == ["near", "near"]
    assert not place.slots.pressure


@in_virtual_time
async def test_one_that_does_not_start_again_says_so() -> None:
    place = Place(deployments=1, models=0)
    place.fleet.refuse_start = "near: exit code 1"
    place.answers.of["near"] = GONE[0]
    answer = asyncio.create_task(place.answered_by())
    await place.job.until(WAITS)
    is_told(place, "near")

    with pytest.raises(EngineStartFailedError, match="exit code 1"):
        await answer
    assert not place.slots.pressure


@in_virtual_time
async def test_a_target_that_is_ready_is_asked_instead_without_a_wait() -> None:
    place = Place()
    place.answers.of["near"] = GONE[0]
    began_s = now_s()

    assert await place.answered_by() == "far"

    assert now_s() == began_s
    assert place.answers.asked == ["near", "far"]
    assert place.fleet.raised == []


@in_virtual_time
async def test_it_is_waited_for_after_all_that_were_ready_have_failed_too() -> None:
    place = Place()
    place.answers.of = {
        "near": GONE[0],
        "far": EngineFailedError("far is sick"),
        "c/0": EngineFailedError("so is c/0"),
    }
    answer = asyncio.create_task(place.answered_by())
    await place.job.until(WAITS)
    assert place.answers.asked == ["near", "far", "c/0", "near"]
    is_told(place, "near")

    assert await answer == "near"
    assert place.fleet.raised == ["near"]
    assert not place.slots.pressure


@in_virtual_time
async def test_two_that_are_gone_do_not_wait_for_each_other() -> None:
    place = Place()
    place.answers.of = {"near": GONE[0], "far": EngineUnreachableError("far cannot be reached")}
    with pytest.raises(NoTargetError) as failed:
        async with asyncio.timeout(60):
            await place.ask(LOCAL)
    # Far is the last that might be ready, and near comes again after it.
    assert place.answers.asked == ["near", "far", "near"]
    assert "near cannot be reached" in failed.value.message
    assert "far cannot be reached" in failed.value.message
    assert not place.slots.pressure


@in_virtual_time
async def test_one_that_would_have_to_be_started_is_not_preferred_to_it() -> None:
    place = Place()
    place.lies("far", Residency.STOPPED)
    place.answers.of["near"] = GONE[0]
    answer = asyncio.create_task(place.answered_by(LOCAL))
    await place.job.until(WAITS)
    is_told(place, "near")

    assert await answer == "near"
    assert place.fleet.raised == ["near"]


@in_virtual_time
async def test_an_engine_that_somebody_else_runs_is_not_waited_for() -> None:
    place = Place(deployments=1, models=0)
    place.fleet.show(deployment_view("near", "http://near", slots=1, external=True))
    place.answers.of["near"] = GONE[0]
    began_s = now_s()

    with pytest.raises(EngineUnreachableError):
        await place.ask()
    assert now_s() == began_s


@pytest.mark.parametrize("error", [EngineTimeoutError("silent"), EngineFailedError("sick")])
@in_virtual_time
async def test_one_that_hangs_or_is_sick_is_not_gone(error: RungError) -> None:
    place = Place(deployments=1, models=0)
    place.answers.of["near"] = error
    began_s = now_s()

    with pytest.raises(type(error)):
        await place.ask()
    assert now_s() == began_s


@in_virtual_time
async def test_a_caller_that_leaves_while_it_is_waited_for_leaves_nothing_behind() -> None:
    place = Place(deployments=1, models=0)
    place.answers.of["near"] = GONE[0]
    answer = asyncio.create_task(place.answered_by())
    await place.job.until(WAITS)
    answer.cancel()
    with pytest.raises(asyncio.CancelledError):
        await answer
    assert not place.slots.pressure
    assert not place.circuits


@in_virtual_time
async def test_for_what_is_better_answered_by_nobody_than_late_it_is_not_waited_for() -> None:
    place = Place(deployments=1, models=0)
    place.answers.of["near"] = GONE[0]
    wish = Wish(kind=JobKind.CHAT, model="near", body=b"{}")
    targets = place.router.choose(place.router.route(wish))
    began_s = now_s()

    with pytest.raises(EngineUnreachableError):
        await place.engager.engage(place.job, wish, targets, stream=False, waits_for_gone=False)
    assert now_s() == began_s
