"""Slots: who is served, who waits, and that nothing leaks."""

from __future__ import annotations

import asyncio
import math

import pytest

from controlplane.pipelines import MAX_QUEUED, Slots
from rung.errors import QueueFullError


async def _hold(slots: Slots, got: asyncio.Event, places: list[int]) -> None:
    async for place in slots.acquire("d"):
        places.append(place)
    got.set()


async def _settle() -> None:
    for _ in range(5):
        await asyncio.sleep(0)


async def test_slots_are_limited_and_come_back() -> None:
    slots = Slots()

    assert slots.try_acquire("d", 2)
    assert slots.try_acquire("d", 2)
    assert not slots.try_acquire("d", 2)
    assert slots.load("d") == (2, 0)
    slots.release("d")
    assert slots.try_acquire("d", 2)
    slots.release("d")
    slots.release("d")
    assert slots.load("d") == (0, 0)


async def test_who_waits_longest_is_next() -> None:
    slots = Slots()
    slots.try_acquire("d", 1)
    events = [asyncio.Event() for _ in range(3)]
    places: list[list[int]] = [[], [], []]
    async with asyncio.TaskGroup() as tasks:
        for event, seen in zip(events, places, strict=True):
            tasks.create_task(_hold(slots, event, seen))
        await _settle()
        assert slots.load("d") == (1, 3)
        assert places == [[1], [2], [3]]
        for event in events:
            slots.release("d")
            await event.wait()
            assert slots.load("d")[0] == 1
    slots.release("d")
    assert slots.load("d") == (0, 0)


async def test_one_that_waits_may_leave() -> None:
    slots = Slots()
    slots.try_acquire("d", 1)
    got = asyncio.Event()
    leaver = asyncio.create_task(_hold(slots, asyncio.Event(), []))
    await _settle()
    stayer = asyncio.create_task(_hold(slots, got, []))
    await _settle()
    leaver.cancel()
    await asyncio.gather(leaver, return_exceptions=True)
    assert slots.load("d") == (1, 1)
    slots.release("d")
    await stayer
    assert slots.load("d") == (1, 0)


async def test_a_slot_granted_to_one_that_leaves_goes_on_to_the_next() -> None:
    slots = Slots()
    slots.try_acquire("d", 1)
    got = asyncio.Event()
    leaver = asyncio.create_task(_hold(slots, asyncio.Event(), []))
    stayer = asyncio.create_task(_hold(slots, got, []))
    await _settle()

    slots.release("d")
    leaver.cancel()
    await asyncio.gather(leaver, return_exceptions=True)
    await stayer

    assert got.is_set()
    assert slots.load("d") == (1, 0)


async def test_a_queue_has_an_end() -> None:
    slots = Slots()
    slots.try_acquire("d", 1)
    waiting = [asyncio.create_task(_hold(slots, asyncio.Event(), [])) for _ in range(MAX_QUEUED)]
    await _settle()

    with pytest.raises(QueueFullError):
        await _hold(slots, asyncio.Event(), [])

    for task in waiting:
        task.cancel()
    await asyncio.gather(*waiting, return_exceptions=True)
    assert slots.load("d") == (1, 0)


async def test_a_drain_waits_for_what_runs_and_holds_what_comes() -> None:
    slots = Slots()
    assert slots.try_acquire("d", 2)
    entered, leave = asyncio.Event(), asyncio.Event()

    async def drain() -> None:
        async with slots.drained("d"):
            entered.set()
            await leave.wait()

    draining = asyncio.create_task(drain())
    await asyncio.sleep(0)
    assert not slots.try_acquire("d", 2)
    comes = asyncio.create_task(_wait(slots))
    await asyncio.sleep(0)
    assert not entered.is_set()

    slots.release("d")
    await entered.wait()
    assert slots.load("d") == (0, 1)
    leave.set()
    await draining
    await comes
    assert slots.load("d") == (1, 0)
    slots.release("d")
    assert slots.load("d") == (0, 0)


async def test_a_drain_that_is_given_up_lets_requests_begin_again() -> None:
    slots = Slots()
    assert slots.try_acquire("d", 1)
    draining = asyncio.create_task(_drain(slots))
    await asyncio.sleep(0)
    draining.cancel()
    await asyncio.gather(draining, return_exceptions=True)

    slots.release("d")

    assert slots.try_acquire("d", 1)


def test_idle_time_counts_from_the_end_of_the_last_request() -> None:
    slots = Slots()
    assert slots.idle_s("d") == math.inf
    assert slots.try_acquire("d", 1)
    assert slots.idle_s("d") == 0.0
    slots.release("d")
    assert 0.0 <= slots.idle_s("d") < 60.0


async def _wait(slots: Slots) -> None:
    async for _ in slots.acquire("d"):
        pass


async def _drain(slots: Slots) -> None:
    async with slots.drained("d"):
        pass


async def test_what_a_choice_reads_is_in_step_with_the_lanes() -> None:
    slots = Slots()

    assert slots.try_acquire("d", 2)
    assert (slots.pressure, slots.full) == ({"d": 0.5}, set())
    assert slots.try_acquire("d", 2)
    assert (slots.pressure, slots.full) == ({"d": 1.0}, {"d"})

    waiting = asyncio.create_task(_hold(slots, asyncio.Event(), []))
    await _settle()
    assert (slots.pressure, slots.full) == ({"d": 1.5}, {"d"})
    waiting.cancel()
    await _settle()
    assert (slots.pressure, slots.full) == ({"d": 1.0}, {"d"})

    slots.release("d")
    assert (slots.pressure, slots.full) == ({"d": 0.5}, set())
    slots.release("d")
    assert (slots.pressure, slots.full) == ({}, set())


async def test_one_that_is_being_drained_has_no_free_slot() -> None:
    slots = Slots()
    async with slots.drained("d"):
        assert (slots.pressure, slots.full) == ({"d": 1.0}, {"d"})
    assert (slots.pressure, slots.full) == ({}, set())


async def test_a_drain_does_not_wait_for_who_has_parked_its_slot_and_that_one_waits_for_the_drain() -> None:
    slots = Slots()
    slots.try_acquire("d", 1)
    said: list[str] = []

    async def hold() -> None:
        async with slots.parked("d"):
            said.append("parked")
            await asyncio.sleep(0)
        said.append("goes on")

    async def drain() -> None:
        async with slots.drained("d"):
            said.append("drained")
            await _settle()
            said.append("over")

    async with asyncio.timeout(5), asyncio.TaskGroup() as tasks:
        tasks.create_task(drain())
        await _settle()
        assert said == []
        tasks.create_task(hold())

    assert said == ["parked", "drained", "over", "goes on"]
    assert not slots.try_acquire("d", 1)
    slots.release("d")
    assert slots.load("d") == (0, 0)


async def test_a_drain_still_waits_for_others_than_the_one_that_has_parked() -> None:
    slots = Slots()
    slots.try_acquire("d", 2)
    slots.try_acquire("d", 2)
    drained = asyncio.Event()

    async def drain() -> None:
        async with slots.drained("d"):
            drained.set()

    async with asyncio.timeout(5), asyncio.TaskGroup() as tasks, slots.parked("d"):
        tasks.create_task(drain())
        await _settle()
        assert not drained.is_set()
        slots.release("d")
        await drained.wait()
    slots.release("d")
    assert slots.load("d") == (0, 0)


async def test_who_is_cancelled_while_parked_does_not_wait_for_the_drain() -> None:
    slots = Slots()
    slots.try_acquire("d", 1)

    async def hold() -> None:
        try:
            async with slots.parked("d"):
                await asyncio.Event().wait()
        finally:
            slots.release("d")

    holding = asyncio.create_task(hold())
    await _settle()
    async with asyncio.timeout(5), slots.drained("d"):
        holding.cancel()
        await asyncio.gather(holding, return_exceptions=True)
        assert slots.load("d") == (0, 0)
