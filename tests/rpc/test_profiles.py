"""Profiles over real gRPC, with a scripted agent whose GPU follows what it is told."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from contextlib import aclosing, asynccontextmanager
from itertools import pairwise
from typing import Any

import pytest
from msgspec.structs import replace

from rung import AsyncClient, Client
from rung.errors import (
    AlreadyExistsError,
    FailedPreconditionError,
    HeldByProfileError,
    InvalidRequestError,
    UnavailableError,
    UnknownProfileError,
)
from rung.types import (
    FailureReason,
    LifecycleDone,
    LifecyclePayload,
    LifecycleProgress,
    NodeState,
    Profile,
    ProfileDone,
    ProfileEntry,
    ProfileEvent,
    ProfileFailed,
    ProfilePlan,
    ProfileStep,
    Residency,
    ResidencyClass,
    VllmEngine,
)
from tests.fakes.agent_server import Call, ScriptedAgent, a_spec
from tests.fakes.api_server import ApiServer, an_api_server
from tests.fakes.gpu_agent import GIB, GpuAgent
from tests.fakes.store import MemoryProfileStore

AWAKE, ASLEEP, STOPPED = Residency.AWAKE, Residency.ASLEEP, Residency.STOPPED
PINNED = replace(a_spec("pinned", residency_class=ResidencyClass.PINNED), vram_bytes=8 * GIB)
REASONER = replace(
    a_spec(
        "reasoner",
        residency_class=ResidencyClass.SLEEPABLE,
        engine=VllmEngine(model="m", gpu_memory_utilization=0.4, sleep_mode=True),
    ),
    vram_bytes=12 * GIB,
)
CODER = replace(a_spec("coder", keep_running=True), vram_bytes=6 * GIB)
IMAGES = replace(a_spec("images"), vram_bytes=14 * GIB)
SPECS = (PINNED, REASONER, CODER, IMAGES)

DEV = Profile(
    name="dev",
    description="all that is local",
    entries=(
        ProfileEntry("pinned", AWAKE),
        ProfileEntry("reasoner", AWAKE),
        ProfileEntry("coder", AWAKE),
        ProfileEntry("images", STOPPED),
    ),
)
CREATIVE = Profile(name="creative", entries=(ProfileEntry("reasoner", ASLEEP), ProfileEntry("images", AWAKE)))
GAMING = Profile(
    name="gaming",
    entries=(
        ProfileEntry("reasoner", STOPPED),
        ProfileEntry("coder", STOPPED),
        ProfileEntry("images", STOPPED),
    ),
    hold=True,
)
SMALL = Profile(name="small", entries=(ProfileEntry("reasoner", AWAKE, 0.2),))
PROFILES = (DEV, CREATIVE, GAMING, SMALL)


class Box:
    """A control plane, its agent and a client."""

    def __init__(self, card: GpuAgent, plane: ApiServer, client: AsyncClient) -> None:
        self.card = card
        self.plane = plane
        self.client = client

    async def switch(self, name: str, *, dry_run: bool = False, operation_id: str = "") -> list[ProfileEvent]:
        switch = self.client.switch_profile(name, dry_run=dry_run, operation_id=operation_id)
        async with asyncio.timeout(30), aclosing(switch) as events:
            return [event async for event in events]

    def residency(self, deployment_id: str) -> Residency:
        return self.plane.fleet.view.deployments[deployment_id].deployment.residency

    def told(self) -> list[tuple[str, str]]:
        """What was done since the last time."""
        found = list(self.card.told)
        self.card.agent.calls.clear()
        return found


@asynccontextmanager
async def a_box(
    card: GpuAgent, store: MemoryProfileStore, profiles: Sequence[Profile] = PROFILES
) -> AsyncIterator[Box]:
    async with an_api_server([card.agent], SPECS, profiles=profiles, profile_store=store) as plane:
        async with asyncio.timeout(10):
            async for view in plane.fleet.changes():
                if view.nodes["box"].state is NodeState.READY:
                    break
        async with AsyncClient(f"127.0.0.1:{plane.server.port}") as client:
            yield Box(card, plane, client)


@pytest.fixture
async def card() -> AsyncIterator[GpuAgent]:
    """A card of 32 GiB with all of `dev` awake."""
    card = GpuAgent(SPECS)
    for spec in (PINNED, REASONER, CODER):
        card.put(spec, AWAKE)
    async with card.running():
        yield card


@pytest.fixture
def store() -> MemoryProfileStore:
    return MemoryProfileStore()


@pytest.fixture
async def box(card: GpuAgent, store: MemoryProfileStore) -> AsyncIterator[Box]:
    async with a_box(card, store) as box:
        yield box


def steps(plan: ProfilePlan) -> list[tuple[str, Residency]]:
    return [(step.deployment_id, step.residency) for step in plan.steps]


def plans(events: Sequence[ProfileEvent]) -> list[ProfilePlan]:
    return [event.payload for event in events if isinstance(event.payload, ProfilePlan)]


def done(events: Sequence[ProfileEvent]) -> list[tuple[str, Residency]]:
    return [
        (event.payload.deployment_id, event.payload.residency)
        for event in events
        if isinstance(event.payload, ProfileStep) and event.payload.done
    ]


async def drained(stream: AsyncGenerator[Any, None]) -> None:
    async with aclosing(stream) as events:
        async for _ in events:
            pass


async def test_none_is_current_until_one_was_applied_whatever_runs(box: Box) -> None:
    # All of `dev` runs already, and that makes nothing current.
    listed = await box.client.list_profiles()
    assert (listed.current, listed.switching_to, listed.detail) == ("", "", "")
    assert listed.profiles == tuple(sorted(PROFILES, key=lambda profile: profile.name))

    assert [type(event.payload) for event in await box.switch("dev")] == [ProfilePlan, ProfileDone]
    assert (await box.client.list_profiles()).current == "dev"
    assert box.told() == []


async def test_a_dry_run_says_exactly_what_is_done_then(box: Box) -> None:
    dry = await box.switch("creative", dry_run=True)
    assert box.told() == []
    assert (await box.client.list_profiles()).current == ""
    events = await box.switch("creative")

    assert [type(event.payload) for event in dry] == [ProfilePlan]
    assert plans(dry) == plans(events)
    assert done(events) == steps(plans(dry)[0])
    assert done(events) == [("reasoner", ASLEEP), ("images", AWAKE)]
    assert box.told() == [("sleep", "reasoner"), ("start", "images")]
    assert [event.sequence for event in events] == list(range(1, len(events) + 1))
    assert events[-1].payload == ProfileDone("creative")


async def test_what_a_profile_does_not_name_is_in_the_plan_if_it_has_to_give_way(
    card: GpuAgent, store: MemoryProfileStore
) -> None:
    images = Profile(name="images", entries=(ProfileEntry("images", AWAKE),))
    async with a_box(card, store, [images]) as box:
        (plan,) = plans(await box.switch("images", dry_run=True))
        assert steps(plan) == [("coder", STOPPED), ("reasoner", ASLEEP), ("images", AWAKE)]
        assert "not in the profile, and its memory is needed" in plan.steps[0].detail
        await box.switch("images")
        assert box.told() == [("stop", "coder"), ("sleep", "reasoner"), ("start", "images")]


async def test_the_fleet_is_watched_through_a_switch(box: Box) -> None:
    seen: list[str] = []

    async def watch() -> None:
        async with aclosing(box.client.watch_fleet()) as snapshots:
            async for snapshot in snapshots:
                if not seen or seen[-1] != snapshot.profile:
                    seen.append(snapshot.profile)
                if snapshot.profile == "creative":
                    return

    await box.switch("dev")
    watching = asyncio.create_task(watch())
    await box.switch("creative")
    async with asyncio.timeout(10):
        await watching
    # In between none was applied and verified.
    assert seen[-1] == "creative"
    assert set(seen) <= {"dev", "", "creative"}


async def test_a_pinned_one_is_left_alone_by_every_profile(box: Box) -> None:
    before = box.plane.fleet.view.deployments["pinned"].deployment.generation
    for profile in PROFILES:
        await box.switch(profile.name)
    assert "pinned" not in {deployment for _, deployment in box.told()}
    assert box.plane.fleet.view.deployments["pinned"].deployment.generation == before


async def test_another_share_of_the_gpu_starts_the_engine_with_it(box: Box) -> None:
    await box.switch("small")
    assert [call.action for call in box.card.agent.calls] == ["stop", "start"]
    spec = box.card.agent.calls[-1].spec
    assert spec is not None
    assert isinstance(spec.engine.engine, VllmEngine)
    assert spec.engine.engine.gpu_memory_utilization == 0.2
    box.card.agent.calls.clear()

    # And the way back starts it with its own.
    await box.switch("dev")
    spec = box.card.agent.calls[-1].spec
    assert spec is not None
    assert isinstance(spec.engine.engine, VllmEngine)
    assert spec.engine.engine.gpu_memory_utilization == 0.4


async def test_a_step_that_fails_takes_everything_back(box: Box) -> None:
    await box.switch("dev")
    box.card.broken.add("images")
    events = await box.switch("creative")

    forth, back = plans(events)
    assert steps(forth) == [("reasoner", ASLEEP), ("images", AWAKE)]
    assert back.going_back
    assert steps(back) == [("reasoner", AWAKE)]
    failed = events[-1].payload
    assert isinstance(failed, ProfileFailed)
    assert failed.reason is FailureReason.ENGINE_START_FAILED
    assert failed.current == "dev"
    assert "images to awake" in failed.detail
    assert failed.detail.endswith("dev is back")
    assert box.residency("reasoner") is AWAKE
    listed = await box.client.list_profiles()
    assert (listed.current, listed.detail) == ("dev", failed.detail)


async def test_what_does_not_come_back_is_said_and_no_profile_is_current(box: Box) -> None:
    await box.switch("dev")
    box.card.broken |= {"images", "reasoner"}
    events = await box.switch("creative")

    failed = events[-1].payload
    assert isinstance(failed, ProfileFailed)
    assert failed.current == ""
    assert "not everything is back as it was: reasoner (" in failed.detail
    assert (await box.client.list_profiles()).current == ""


async def test_without_a_profile_before_it_goes_back_to_how_things_were(box: Box) -> None:
    box.card.broken.add("images")
    events = await box.switch("creative")
    failed = events[-1].payload
    assert isinstance(failed, ProfileFailed)
    assert failed.current == ""
    assert failed.detail.endswith("everything is back as it was before")
    assert box.residency("reasoner") is AWAKE


async def test_what_a_holding_profile_wants_down_is_not_woken(box: Box) -> None:
    await box.switch("gaming")
    with pytest.raises(HeldByProfileError, match="profile gaming holds it stopped"):
        await drained(box.client.start_deployment("reasoner"))
    # Not for a request either, nor because it is to be kept running.
    with pytest.raises(UnavailableError, match="profile gaming holds it stopped"):
        await drained(box.plane.fleet.ensure_awake("coder"))
    for _ in range(15):
        await box.plane.fleet.wait_changed(1.0)
    assert {box.residency(name) for name in ("reasoner", "coder", "images")} == {STOPPED}

    await box.switch("dev")
    assert box.residency("reasoner") is AWAKE


async def test_without_hold_turns_are_taken_as_ever_and_the_profile_stays_current(box: Box) -> None:
    await box.switch("creative")
    await drained(box.client.wake_deployment("reasoner"))
    assert box.residency("reasoner") is AWAKE
    assert (await box.client.list_profiles()).current == "creative"


async def test_one_switch_at_a_time_which_goes_on_when_its_caller_leaves(box: Box) -> None:
    gate = asyncio.Event()
    obey = box.card.agent.script

    async def slowly(agent: ScriptedAgent, call: Call) -> AsyncIterator[LifecyclePayload]:
        yield LifecycleProgress(Residency.FALLING_ASLEEP, "moving weights", remaining_s=3.0)
        await gate.wait()
        async for payload in obey(agent, call):
            yield payload

    box.card.agent.script = slowly
    heard: list[ProfileEvent] = []
    async with aclosing(box.client.switch_profile("creative", operation_id="mine")) as events:
        async for event in events:
            heard.append(event)
            if isinstance(event.payload, ProfileStep) and event.payload.detail == "moving weights":
                break
    assert (await box.client.list_profiles()).switching_to == "creative"
    for dry_run in (False, True):
        with pytest.raises(FailedPreconditionError, match="a switch to creative is under way"):
            await box.switch("gaming", dry_run=dry_run)
    with pytest.raises(AlreadyExistsError):
        await box.switch("gaming", operation_id="mine")
    # What is to be taken down is not woken by somebody else meanwhile.
    assert "a switch to creative is under way" in box.plane.fleet.view.deployments["reasoner"].hold

    gate.set()
    joined = await box.switch("creative", operation_id="mine")
    assert joined[: len(heard)] == heard
    assert joined[-1].payload == ProfileDone("creative")
    assert await box.switch("creative", operation_id="mine") == joined


async def test_something_is_heard_every_second_with_the_time_that_is_left(box: Box) -> None:
    gate = asyncio.Event()
    obey = box.card.agent.script

    async def silently(agent: ScriptedAgent, call: Call) -> AsyncIterator[LifecyclePayload]:
        await gate.wait()
        async for payload in obey(agent, call):
            yield payload

    box.card.agent.script = silently
    events: list[ProfileEvent] = []
    async with asyncio.timeout(20), aclosing(box.client.switch_profile("creative")) as stream:
        async for event in stream:
            events.append(event)
            if event.elapsed_s > 2.0:
                gate.set()
    gaps = [later.elapsed_s - event.elapsed_s for event, later in pairwise(events)]
    assert max(gaps) < 1.0
    assert isinstance(events[-1].payload, ProfileDone)


async def test_a_step_counts_once_it_is_measured_and_not_because_the_agent_says_so(box: Box) -> None:
    await box.switch("dev")
    obey = box.card.agent.script

    async def pretends(agent: ScriptedAgent, call: Call) -> AsyncIterator[LifecyclePayload]:
        if call.action == "sleep":
            yield LifecycleDone(replace(agent.deployments["reasoner"], residency=ASLEEP))
            return
        async for payload in obey(agent, call):
            yield payload

    box.card.agent.script = pretends
    events = await box.switch("creative")
    failed = events[-1].payload
    assert isinstance(failed, ProfileFailed)
    assert "reasoner is awake, not asleep" in failed.detail
    assert failed.current == "dev"
    assert ("start", "images") not in box.told()


async def test_the_blocking_client_switches_too(box: Box) -> None:
    def blocking() -> tuple[list[ProfileEvent], str]:
        with Client(f"127.0.0.1:{box.plane.server.port}") as client:
            events = list(client.switch_profile("creative"))
            return events, client.list_profiles().current

    events, current = await asyncio.to_thread(blocking)
    assert events[-1].payload == ProfileDone("creative")
    assert current == "creative"


async def test_sleeping_without_a_level_keeps_the_weights(box: Box) -> None:
    await drained(box.client.sleep_deployment("reasoner"))
    assert [call.level for call in box.card.agent.calls] == [1]


async def test_what_makes_no_sense_is_refused(box: Box) -> None:
    with pytest.raises(UnknownProfileError, match="profiles are: creative, dev, gaming, small"):
        await box.switch("developer")
    # The SDK makes an id where there is none.
    with pytest.raises(InvalidRequestError, match="needs an operation_id"):
        await anext(box.plane.profiles.switch("dev", ""))


async def test_what_cannot_fit_is_refused_before_anything_is_touched(
    card: GpuAgent, store: MemoryProfileStore
) -> None:
    everything = Profile(name="everything", entries=tuple(ProfileEntry(spec.id, AWAKE) for spec in SPECS))
    async with a_box(card, store, [everything]) as box:
        with pytest.raises(InvalidRequestError, match=r"profile everything does not fit: .* too much"):
            await box.switch("everything")
        assert box.told() == []
        assert store.written == []


async def test_a_switch_that_cannot_be_stored_is_not_begun(box: Box, store: MemoryProfileStore) -> None:
    store.failing = True
    with pytest.raises(UnavailableError, match="the disk is full"):
        await box.switch("creative")
    assert box.told() == []
    store.failing = False
    assert (await box.switch("creative"))[-1].payload == ProfileDone("creative")


async def test_the_current_profile_outlives_the_control_plane(
    card: GpuAgent, store: MemoryProfileStore
) -> None:
    async with a_box(card, store) as box:
        await box.switch("gaming", operation_id="mine")
        box.told()
    async with a_box(card, store) as box:
        assert (await box.client.list_profiles()).current == "gaming"
        # And it holds: `coder` is to be kept running, by its configuration.
        for _ in range(15):
            await box.plane.fleet.wait_changed(1.0)
        assert box.told() == []
        assert (await box.switch("gaming", operation_id="mine"))[-1].payload == ProfileDone("gaming")


async def test_a_control_plane_that_ended_in_a_switch_says_so_and_claims_nothing(
    card: GpuAgent, store: MemoryProfileStore
) -> None:
    obey = card.agent.script
    reached = asyncio.Event()

    async def never_starts(agent: ScriptedAgent, call: Call) -> AsyncIterator[LifecyclePayload]:
        if call.action == "start" and call.deployment_id == "images":
            reached.set()
            await asyncio.Event().wait()
        async for payload in obey(agent, call):
            yield payload

    card.agent.script = never_starts
    async with a_box(card, store) as box:
        await box.switch("dev")
        following = asyncio.create_task(box.switch("creative", operation_id="mine"))
        async with asyncio.timeout(10):
            await reached.wait()
        following.cancel()
    card.agent.script = obey
    async with a_box(card, store) as box:
        listed = await box.client.list_profiles()
        assert listed.current == ""
        assert "the switch to creative was cut short" in listed.detail
        # The same operation carries on from how things are now.
        events = await box.switch("creative", operation_id="mine")
        assert steps(plans(events)[0]) == [("images", AWAKE)]
        assert events[-1].payload == ProfileDone("creative")
        assert (await box.client.list_profiles()).detail == ""


async def test_a_profile_that_was_configured_anew_is_not_current_any_more(
    card: GpuAgent, store: MemoryProfileStore
) -> None:
    async with a_box(card, store) as box:
        await box.switch("dev")
    other = Profile(name="dev", entries=(ProfileEntry("reasoner", ASLEEP),))
    async with a_box(card, store, [other]) as box:
        listed = await box.client.list_profiles()
        assert (listed.current, "configured anew" in listed.detail) == ("", True)
