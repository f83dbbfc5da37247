"""The scheduler against the truth: steps that fall short or hang, raises, telemetry, upkeep, guardrails."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

import pytest
from msgspec.structs import replace

from controlplane.vram import (
    Demand,
    Granted,
    Infeasible,
    Ledger,
    PlacedDeployment,
    Planned,
    Raised,
    ReclaimAction,
    ReclaimGrade,
    ReclaimPlan,
    ReclaimStep,
    SchedulerOptions,
    Step,
    StepState,
    VramAlert,
    Waiting,
)
from rung.errors import (
    EngineStartFailedError,
    PinnedDeploymentError,
    UnavailableError,
    UnknownDeploymentError,
    VramInfeasibleError,
)
from rung.types import Priority, Residency, ResidencyClass
from tests.fakes.scheduled_node import GIB, POOL, everything, node_of, now_s, pinned, sleeper
from tests.fakes.simulated_pool import Fault, SimulatedEngine, SimulatedPool
from tests.fakes.virtual_time import in_virtual_time

SLEEP, STOP, FREE = ReclaimAction.SLEEP, ReclaimAction.STOP, ReclaimAction.FREE

# Steps.


@in_virtual_time
async def test_a_sleep_that_freed_less_than_it_said_leads_to_the_next_step() -> None:
    async with node_of(pinned(), sleeper(faults=(Fault.LIES,))) as node:
        events = await everything(node.ask(16))

    assert node.steps() == [("reasoner", SLEEP, 1), ("reasoner", STOP, 0)]
    assert len([event for event in events if isinstance(event, Planned)]) == 2
    assert isinstance(events[-1], Granted)
    assert events[-1].lease.grade is ReclaimGrade.FULL


@in_virtual_time
async def test_an_engine_that_only_says_that_it_sleeps_is_not_told_so_again() -> None:
    async with node_of(pinned(), sleeper(faults=(Fault.IGNORES, Fault.IGNORES))) as node:
        await node.lease(16)

        assert node.steps() == [("reasoner", SLEEP, 1), ("reasoner", SLEEP, 2), ("reasoner", STOP, 0)]


@in_virtual_time
async def test_what_was_not_freed_is_never_granted_and_the_failure_says_who_fell_short() -> None:
    async with node_of(pinned(), sleeper(faults=(Fault.LIES,))) as node:
        with pytest.raises(
            VramInfeasibleError, match=r"reasoner was told to sleep and gave back 1\.4 of 11\.0 GiB"
        ):
            await node.lease(16, grade=ReclaimGrade.STANDARD)

        assert node.leases() == []


@in_virtual_time
async def test_an_engine_that_failed_is_planned_around_and_left_alone_for_a_while() -> None:
    async with node_of(pinned(), sleeper("a", 8), sleeper("b", 8, faults=(Fault.FAILS,))) as node:
        events = await everything(node.ask(12))
        assert [name for name, _, _ in node.steps()] == ["b", "a"]
        failed = [event for event in events if isinstance(event, Step) and event.state is StepState.FAILED]
        assert [event.detail for event in failed] == ["b answered 500"]
        assert isinstance(events[-1], Granted)
        node.scheduler.release(events[-1].lease.id)

        with pytest.raises(VramInfeasibleError, match=r"b did not do as told and is left alone for \d+ s"):
            await node.lease(15, operation="too soon")
        await asyncio.sleep(60.0)
        await node.lease(15, operation="later")


@in_virtual_time
async def test_a_step_that_hangs_ends_at_its_deadline() -> None:
    options = SchedulerOptions(patience=2.0, margin_s=5.0)
    async with node_of(
        pinned(), sleeper("a", 8), sleeper("b", 8, faults=(Fault.HANGS,)), options=options
    ) as node:
        began_s = now_s()
        await node.lease(12)

        assert [name for name, _, _ in node.steps()] == ["b", "a"]
        assert now_s() - began_s == pytest.approx(2.0 * 2.0 + 5.0 + 2.0)


@in_virtual_time
async def test_a_step_that_fails_with_nobody_to_plan_around_is_an_honest_failure() -> None:
    async with node_of(pinned(), sleeper(faults=(Fault.DIES,) * 2)) as node:
        # What died has given its memory back.
        assert (await node.lease(16)).grade is ReclaimGrade.STANDARD
    async with node_of(pinned(), sleeper(faults=(Fault.FAILS,) * 2)) as node:
        with pytest.raises(VramInfeasibleError, match="reasoner answered 500"):
            await node.lease(16)


@in_virtual_time
async def test_a_busy_deployment_is_drained_first_and_that_is_said() -> None:
    engine = sleeper()
    async with node_of(pinned(), engine) as node:
        engine.active = 1
        heard = await everything(node.ask(16))

    assert [(each.drain, each.expected_s) for each in node.pool.steps] == [(True, 4.0)]
    details = {event.detail for event in heard if isinstance(event, Waiting)}
    assert "reasoner is told to sleep once its requests have ended" in details


@in_virtual_time
async def test_a_demand_that_is_withdrawn_causes_no_further_step() -> None:
    async with node_of(pinned(), sleeper("a", 6), sleeper("b", 6)) as node:
        waiting = asyncio.create_task(node.lease(18))
        await asyncio.sleep(1.0)
        waiting.cancel()
        await asyncio.sleep(30.0)

        assert len(node.steps()) == 1


def _hostile(ledger: Ledger, demand: Demand) -> ReclaimPlan | Infeasible:
    """A planner that has lost its mind."""
    step = ReclaimStep(deployment_id="orchestrator", action=STOP, expected_bytes=8 * GIB, expected_s=1.0)
    return ReclaimPlan(grade=ReclaimGrade.FULL, steps=(step,), expected_free_bytes=30 * GIB)


@in_virtual_time
async def test_a_step_against_a_pinned_deployment_is_refused_whatever_the_plan_says() -> None:
    async with node_of(pinned(), planner=_hostile) as node:
        with pytest.raises(PinnedDeploymentError):
            await node.lease(25)

        assert node.steps() == []


@in_virtual_time
async def test_a_preview_is_the_plan_and_changes_nothing() -> None:
    async with node_of(pinned(), sleeper()) as node:
        outcome = await node.scheduler.preview(POOL, Demand(vram_bytes=16 * GIB))

        assert isinstance(outcome, ReclaimPlan)
        assert [step.action for step in outcome.steps] == [SLEEP]
        assert node.steps() == []


# Raises.


@in_virtual_time
async def test_a_sleeping_deployment_is_woken_and_others_give_way() -> None:
    async with node_of(pinned(), sleeper("a", 12), sleeper("b", 12, residency=Residency.ASLEEP)) as node:
        began_s = now_s()
        await node.awake("b")

        assert node.residency("b") is Residency.AWAKE
        assert node.steps() == [("a", SLEEP, 1)]
        assert now_s() - began_s == 2.0 + 3.0


@in_virtual_time
async def test_all_who_want_a_deployment_share_one_raise() -> None:
    async with node_of(sleeper(residency=Residency.STOPPED)) as node:
        await asyncio.gather(*(node.awake("reasoner") for _ in range(5)))

        assert node.pool.raised == ["reasoner"]
        await node.awake("reasoner")
        assert node.pool.raised == ["reasoner"]


@in_virtual_time
async def test_the_most_urgent_who_joined_decides_about_the_place_of_a_raise() -> None:
    async with node_of(sleeper(residency=Residency.STOPPED)) as node:
        blocker = await node.lease(20, operation="blocker")
        others = [
            asyncio.create_task(node.awake("reasoner", priority=Priority.BACKGROUND)),
            asyncio.create_task(node.lease(20, operation="agent", priority=Priority.AGENT)),
        ]
        await asyncio.sleep(1.0)
        urgent = asyncio.create_task(node.awake("reasoner"))
        await asyncio.sleep(1.0)
        node.scheduler.release(blocker.id)
        await urgent

        assert not others[1].done()
        await asyncio.gather(*others)


@in_virtual_time
async def test_what_is_coming_up_is_promised_what_it_will_take_and_holds_up_nobody_who_fits() -> None:
    async with node_of(sleeper(residency=Residency.STOPPED)) as node:
        rising = asyncio.create_task(node.awake("reasoner"))
        await asyncio.sleep(1.0)
        began_s = now_s()
        lease = await node.lease(18, operation="fits")
        assert now_s() == began_s
        too_large = asyncio.create_task(node.lease(1, operation="does not"))
        await asyncio.sleep(1.0)
        assert not too_large.done()

        await rising
        too_large.cancel()
        assert lease in node.leases()


@in_virtual_time
async def test_a_deployment_that_came_up_is_left_to_those_who_waited_for_it() -> None:
    async with node_of(sleeper("a", 20, residency=Residency.ASLEEP), sleeper("b", 20)) as node:
        next_one = asyncio.create_task(node.lease(20, operation="next", priority=Priority.AGENT))
        await node.awake("a")
        up_s = now_s()
        await next_one

        assert node.steps() == [("b", SLEEP, 1), ("a", SLEEP, 1)]
        assert now_s() - up_s == pytest.approx(SchedulerOptions().settle_s + 2.0)


@in_virtual_time
async def test_what_has_just_come_up_is_waited_for_if_others_would_be_disturbed_more_in_its_stead() -> None:
    comfyui = SimulatedEngine("comfyui", ResidencyClass.CACHE, 12 * GIB)
    comfyui.cache_bytes = 11 * GIB
    async with node_of(sleeper("a", 12, residency=Residency.ASLEEP), comfyui) as node:
        await node.awake("a")
        up_s = now_s()
        lease = await node.lease(14)

        assert node.steps() == [("a", SLEEP, 1)]
        assert lease.grade is ReclaimGrade.STANDARD
        assert now_s() - up_s >= SchedulerOptions().settle_s


@in_virtual_time
async def test_a_raise_that_fails_says_why_and_is_not_tried_again_at_once() -> None:
    async with node_of(sleeper(residency=Residency.STOPPED, faults=(Fault.FAILS,))) as node:
        with pytest.raises(EngineStartFailedError, match="reasoner did not come up"):
            await node.awake("reasoner")
        with pytest.raises(EngineStartFailedError, match=r"left alone for \d+ s"):
            await node.awake("reasoner")
        assert len(node.pool.raised) == 1

        await asyncio.sleep(60.0)
        await node.awake("reasoner")
        assert len(node.pool.raised) == 2


@in_virtual_time
async def test_what_was_given_up_while_coming_up_keeps_its_promise_until_it_has_settled() -> None:
    options = SchedulerOptions(margin_s=0.0, patience=2.0)
    async with node_of(sleeper(residency=Residency.STOPPED, faults=(Fault.HANGS,)), options=options) as node:
        with pytest.raises(EngineStartFailedError, match="was not awake after 20 s"):
            await node.awake("reasoner")
        waiting = asyncio.create_task(node.lease(25))
        await asyncio.sleep(1.0)
        assert not waiting.done()
        await node.lease(18, operation="rest")
        waiting.cancel()
        await asyncio.sleep(60.0)  # the engine has come up after all, and there was room

        assert node.residency("reasoner") is Residency.AWAKE
        assert node.pool.broken == []


class PullingPool(SimulatedPool):
    """A pool whose deployments fetch their models for ten minutes when they are started."""

    def deployments(self) -> Sequence[PlacedDeployment]:
        """Those of the pool, which pull."""
        return [replace(each, pulls=True) for each in super().deployments()]

    async def bring_up(self, pool_id: str, deployment_id: str) -> None:
        """Pull, then start; a wake pulls nothing."""
        if self.engines[deployment_id].residency is Residency.STOPPED:
            await asyncio.sleep(600.0)
        await super().bring_up(pool_id, deployment_id)


@in_virtual_time
async def test_a_start_that_pulls_its_model_has_the_time_for_it_and_a_wake_has_not() -> None:
    stopped = sleeper("stopped", residency=Residency.STOPPED)
    async with node_of(pool=PullingPool([stopped])) as node:
        began_s = now_s()
        await node.awake("stopped")
        assert now_s() - began_s > 600.0
    asleep = sleeper("asleep", residency=Residency.ASLEEP, faults=(Fault.HANGS,))
    async with node_of(pool=PullingPool([asleep])) as node:
        with pytest.raises(EngineStartFailedError, match="was not awake after"):
            await node.awake("asleep")


@in_virtual_time
async def test_a_deployment_that_nobody_knows_cannot_be_raised() -> None:
    async with node_of() as node:
        with pytest.raises(UnknownDeploymentError):
            await node.awake("nobody")


@in_virtual_time
async def test_a_raise_without_room_is_an_honest_failure() -> None:
    async with node_of(pinned(), sleeper(size_gib=23, residency=Residency.STOPPED)) as node:
        with pytest.raises(VramInfeasibleError):
            await node.awake("reasoner")


# Telemetry.


@in_virtual_time
async def test_nothing_is_granted_on_old_telemetry() -> None:
    async with node_of() as node:
        await node.lease(1, operation="first")
        node.pool.keep_s = 1000.0
        await node.scheduler.preview(POOL, Demand(vram_bytes=1))
        await asyncio.sleep(SchedulerOptions().measurement_age_s + 0.1)

        waiting = asyncio.create_task(everything(node.ask(1, operation="b")))
        await asyncio.sleep(5.0)
        assert not waiting.done()
        node.pool.keep_s = 0.0
        heard = await asyncio.wait_for(waiting, 1.0)
        assert Waiting(detail=f"{POOL} was not measured lately", position=1) in heard


@in_virtual_time
async def test_a_pool_that_is_not_measured_any_more_fails_those_who_wait_for_it() -> None:
    async with node_of() as node:
        node.pool.silent = True
        began_s = now_s()
        waiting = [asyncio.create_task(node.lease(1, operation=name)) for name in "ab"]
        for each in waiting:
            with pytest.raises(UnavailableError, match="was not measured for 10 s"):
                await each
        assert now_s() - began_s <= 11.0

        node.pool.silent = False
        await node.lease(1)


@in_virtual_time
async def test_a_measurement_from_before_the_end_of_a_step_says_nothing_about_now() -> None:
    pool = SimulatedPool([pinned(), sleeper()], keep_s=3.0)
    async with node_of(pool=pool) as node:
        await node.lease(16)

        assert node.steps() == [("reasoner", SLEEP, 1)]


# Upkeep.


@in_virtual_time
async def test_what_is_warm_is_raised_again_when_there_is_room() -> None:
    async with node_of(pinned(), sleeper(warm=True)) as node:
        lease = await node.lease(16)
        await asyncio.sleep(30.0)
        assert node.residency("reasoner") is Residency.ASLEEP

        node.scheduler.release(lease.id)
        await asyncio.sleep(5.0)
        assert node.residency("reasoner") is Residency.AWAKE


@in_virtual_time
async def test_who_wants_what_is_being_raised_for_warmth_joins_that() -> None:
    async with node_of(sleeper(residency=Residency.STOPPED, warm=True)) as node:
        await asyncio.sleep(1.0)
        heard = await everything(node.scheduler.raise_deployment("reasoner"))

        assert heard[0] == Waiting(detail="reasoner is coming up", position=1, expected_s=9.0)
        assert heard[-1] == Raised(deployment_id="reasoner")
        assert node.pool.raised == ["reasoner"]


@in_virtual_time
async def test_what_is_not_warm_stays_asleep_until_somebody_needs_it() -> None:
    async with node_of(pinned(), sleeper()) as node:
        node.scheduler.release((await node.lease(16)).id)
        await asyncio.sleep(300.0)

        assert node.residency("reasoner") is Residency.ASLEEP


@in_virtual_time
async def test_nobody_gives_way_for_what_is_only_warm() -> None:
    async with node_of(sleeper("a", 20), sleeper("b", 20, residency=Residency.ASLEEP, warm=True)) as node:
        await asyncio.sleep(60.0)

        assert (node.steps(), node.pool.raised) == ([], [])


def vision(
    idle_timeout_s: float | None = 60.0, kind: ResidencyClass = ResidencyClass.ON_DEMAND
) -> SimulatedEngine:
    return SimulatedEngine("vision", kind, 5 * GIB, idle_timeout_s=idle_timeout_s)


@in_virtual_time
async def test_an_on_demand_deployment_stops_when_it_was_idle_for_its_time() -> None:
    engine = vision()
    async with node_of(engine) as node:
        engine.used_s = now_s()
        await asyncio.sleep(59.0)
        assert node.steps() == []
        await asyncio.sleep(7.0)

        assert node.steps() == [("vision", STOP, 0)]


@pytest.mark.parametrize("why", ["busy", "leased", "no timeout", "sleepable", "pinned"])
@in_virtual_time
async def test_an_idle_deployment_does_not_stop(why: str) -> None:
    kind = {"sleepable": ResidencyClass.SLEEPABLE, "pinned": ResidencyClass.PINNED}.get(
        why, ResidencyClass.ON_DEMAND
    )
    engine = vision(None if why == "no timeout" else 60.0, kind)
    async with node_of(engine) as node:
        engine.used_s = now_s()
        engine.active = 1 if why == "busy" else 0
        if why == "leased":
            await node.lease(1, deployment_id="vision")
        await asyncio.sleep(300.0)

        assert node.steps() == []


@in_virtual_time
async def test_little_free_memory_raises_one_alert_and_its_end_another() -> None:
    async with node_of(vision(None)) as node:
        used_bytes = node.pool.used_bytes - node.pool.unattributed_bytes
        free_gib = [3.0, 1.9, 1.0, 2.2, 1.8, 2.4, 2.5, 3.0, 1.5]
        for each in free_gib:
            node.pool.unattributed_bytes = node.pool.total_bytes - used_bytes - int(each * GIB)
            await asyncio.sleep(6.0)

        assert [(alert.low, alert.free_bytes / GIB) for alert in node.alerts] == [
            (True, pytest.approx(1.9)),
            (False, 2.5),
            (True, 1.5),
        ]
        assert node.alerts[0] == VramAlert(
            pool_id=POOL, low=True, free_bytes=node.alerts[0].free_bytes, limit_bytes=2 * GIB
        )


@in_virtual_time
async def test_a_cache_is_flushed_for_a_full_demand_and_again_after_it_was_used() -> None:
    engine = SimulatedEngine("comfyui", ResidencyClass.CACHE, GIB)
    async with node_of(engine) as node:
        for number in range(2):
            engine.cache_bytes = 20 * GIB
            engine.resident_bytes = 21 * GIB
            lease = await node.lease(20, operation=f"image-{number}", deployment_id="comfyui")
            node.scheduler.release(lease.id)
            await asyncio.sleep(1.0)

        assert node.steps() == [("comfyui", FREE, 0)] * 2
