"""The scheduler of a node, rule by rule, on a simulated pool in virtual time."""

from __future__ import annotations

import asyncio
import itertools

import pytest

from controlplane.vram import (
    Demand,
    Granted,
    Measured,
    Measurement,
    NodeScheduler,
    PlacedDeployment,
    Planned,
    QueueRules,
    ReclaimAction,
    ReclaimGrade,
    ReclaimStep,
    SchedulerEvent,
    SchedulerOptions,
    Step,
    StepState,
    Waiting,
)
from rung.errors import (
    AlreadyExistsError,
    DrainingError,
    InvalidRequestError,
    UnavailableError,
    UnknownLeaseError,
    VramInfeasibleError,
)
from rung.types import Priority, Residency
from tests.fakes.scheduled_node import GIB, Node, everything, node_of, now_s, pinned, sleeper
from tests.fakes.simulated_pool import SimulatedPool
from tests.fakes.virtual_time import in_virtual_time

# Grants.


@in_virtual_time
async def test_what_is_free_is_granted_at_once_and_disturbs_nobody() -> None:
    async with node_of(pinned(), sleeper()) as node:
        began_s = now_s()
        lease = await node.lease(10)

        assert (lease.grade, now_s() - began_s, node.pool.steps) == (ReclaimGrade.QUICK, 0.0, [])
        assert node.leases() == [lease]


@in_virtual_time
async def test_room_is_made_step_by_step_and_told() -> None:
    async with node_of(pinned(), sleeper()) as node:
        events = await everything(node.ask(16))

    told = [event for event in events if not isinstance(event, Waiting)]
    assert isinstance(told[0], Planned)
    assert [event.state for event in told if isinstance(event, Step)] == [StepState.BEGUN, StepState.DONE]
    assert isinstance(told[2], Step)
    assert (told[2].freed_bytes, told[2].elapsed_s) == (11 * GIB, 2.0)
    assert isinstance(told[-1], Granted)
    assert told[-1].lease.grade is ReclaimGrade.STANDARD
    assert node.steps() == [("reasoner", ReclaimAction.SLEEP, 1)]


@in_virtual_time
async def test_two_demands_never_count_the_same_bytes() -> None:
    async with node_of(options=SchedulerOptions(heartbeat_s=50.0)) as node:
        first, second = (
            asyncio.create_task(node.lease(20)),
            asyncio.create_task(node.lease(20, operation="b")),
        )
        await asyncio.sleep(10.0)
        assert (first.done(), second.done()) == (True, False)

        node.scheduler.release(first.result().id)
        await asyncio.sleep(1.0)
        assert second.done()


@in_virtual_time
async def test_what_its_holder_has_measurably_taken_is_not_counted_twice() -> None:
    async with node_of() as node:
        lease = await node.lease(16)
        node.pool.take(lease.id, 16 * GIB)

        assert (await node.lease(14, operation="b")).grade is ReclaimGrade.QUICK


@in_virtual_time
async def test_a_demand_that_never_fits_fails_at_once_and_says_what_would_fit() -> None:
    async with node_of(pinned()) as node:
        with pytest.raises(
            VramInfeasibleError, match=r"a demand of up to 22\.0 GiB would fit.*is pinned"
        ) as refused:
            await node.lease(23)

        assert refused.value.metadata == {"missing_bytes": str(GIB), "largest_fit_bytes": str(22 * GIB)}


@in_virtual_time
async def test_a_demand_that_fits_later_waits_says_why_each_second_and_gets_its_turn() -> None:
    async with node_of() as node:
        lease = await node.lease(20, operation="training")
        heard: list[tuple[float, SchedulerEvent]] = []

        async def wait() -> None:
            async for event in node.ask(20, operation="b"):
                heard.append((now_s(), event))

        waiting = asyncio.create_task(wait())
        await asyncio.sleep(20.0)
        node.scheduler.release(lease.id)
        await asyncio.wait_for(waiting, 1.0)

        assert max(later - sooner for (sooner, _), (later, _) in itertools.pairwise(heard)) <= 1.0
        detail = [event.detail for _, event in heard if isinstance(event, Waiting)][1]
        assert "20.0 GiB do not fit" in detail
        assert "until the lease of training ends" in detail
        assert isinstance(heard[-1][1], Granted)


@pytest.mark.parametrize(("size_gib", "ttl_s"), [(0.0, 10.0), (-1.0, 10.0), (1.0, 0.0), (1.0, float("nan"))])
@in_virtual_time
async def test_a_demand_for_nothing_or_for_no_time_is_refused(size_gib: float, ttl_s: float) -> None:
    async with node_of() as node:
        with pytest.raises(InvalidRequestError):
            await node.lease(size_gib, ttl_s=ttl_s)


# Those who ask.


@in_virtual_time
async def test_the_same_operation_joins_its_demand_and_later_its_lease() -> None:
    async with node_of() as node:
        blocker = await node.lease(20, operation="blocker")
        both = [asyncio.create_task(node.lease(20, operation="same")) for _ in range(2)]
        await asyncio.sleep(5.0)
        node.scheduler.release(blocker.id)

        first, second = await asyncio.gather(*both)
        third = await node.lease(20, operation="same")
        assert first == second == third
        assert len(node.leases()) == 1


@in_virtual_time
async def test_an_operation_is_one_demand_only() -> None:
    async with node_of() as node:
        await node.lease(20, operation="same")
        with pytest.raises(AlreadyExistsError):
            await node.lease(19, operation="same")

        waiting = asyncio.create_task(node.lease(20, operation="other"))
        await asyncio.sleep(1.0)
        with pytest.raises(AlreadyExistsError):
            await node.lease(19, operation="other")
        waiting.cancel()


@in_virtual_time
async def test_who_leaves_before_the_grant_has_withdrawn_the_demand() -> None:
    async with node_of() as node:
        blocker = await node.lease(20, operation="blocker")
        waiting = asyncio.create_task(node.lease(20, operation="gone"))
        await asyncio.sleep(1.0)
        waiting.cancel()
        await asyncio.sleep(0.0)
        node.scheduler.release(blocker.id)
        await asyncio.sleep(10.0)

        assert node.leases() == []


@in_virtual_time
async def test_a_demand_lives_on_when_one_of_two_leaves() -> None:
    async with node_of() as node:
        blocker = await node.lease(20, operation="blocker")
        leaving, staying = (asyncio.create_task(node.lease(20, operation="same")) for _ in range(2))
        await asyncio.sleep(1.0)
        leaving.cancel()
        node.scheduler.release(blocker.id)

        assert (await staying).operation_id == "same"


@in_virtual_time
async def test_who_comes_while_a_withdrawn_demand_of_the_same_name_is_being_served_is_not_forgotten() -> None:
    async with node_of(sleeper("a", 20), sleeper("b", 20, residency=Residency.ASLEEP)) as node:
        first = asyncio.create_task(node.awake("b"))
        await asyncio.sleep(1.0)
        node.pool.silent = True
        await asyncio.sleep(2.0)  # "a" has fallen asleep, and nobody measures
        first.cancel()
        await asyncio.sleep(0.0)
        second = asyncio.create_task(node.awake("b"))
        with pytest.raises(UnavailableError):
            await asyncio.wait_for(second, 60.0)


@in_virtual_time
async def test_a_grant_that_nobody_hears_of_is_taken_back() -> None:
    async with node_of() as node:
        events = node.ask(20)
        assert isinstance(await anext(events), Waiting)
        await asyncio.sleep(1.0)
        assert len(node.leases()) == 1

        await events.aclose()
        assert node.leases() == []


@in_virtual_time
async def test_what_waits_at_the_end_fails_and_nothing_new_is_taken() -> None:
    node = Node(SimulatedPool([]))
    running = asyncio.create_task(node.scheduler.run())
    await node.lease(20)
    waiting = asyncio.create_task(node.lease(20, operation="b"))
    await asyncio.sleep(1.0)
    running.cancel()

    with pytest.raises(DrainingError):
        await waiting
    with pytest.raises(DrainingError):
        await node.lease(1, operation="c")


# Leases.


@in_virtual_time
async def test_a_lease_lasts_as_long_as_it_is_renewed() -> None:
    async with node_of() as node:
        lease = await node.lease(20, ttl_s=10.0)
        for _ in range(5):
            await asyncio.sleep(9.0)
            assert node.scheduler.renew(lease.id).expires_s == now_s() + 10.0

        await asyncio.sleep(10.0)
        assert node.leases() == []
        with pytest.raises(UnknownLeaseError):
            node.scheduler.renew(lease.id)
        node.scheduler.release(lease.id)


@in_virtual_time
async def test_a_holder_that_vanishes_costs_at_most_its_ttl() -> None:
    async with node_of() as node:
        await node.lease(20, operation="vanished", ttl_s=30.0)
        began_s = now_s()
        await node.lease(20, operation="b")

        assert now_s() - began_s <= 30.5


# Order.


async def hold(node: Node, name: str, priority: Priority, deployment_id: str = "") -> None:
    """Have 20 GiB for a second."""
    lease = await node.lease(20, operation=name, priority=priority, deployment_id=deployment_id)
    await asyncio.sleep(1.0)
    node.scheduler.release(lease.id)


@in_virtual_time
async def test_users_go_before_agents_and_those_before_background_work() -> None:
    async with node_of() as node:
        blocker = await node.lease(20, operation="blocker")
        wishes = {"c": Priority.BACKGROUND, "b": Priority.AGENT, "a": Priority.USER}
        everybody = asyncio.gather(*(hold(node, *wish) for wish in wishes.items()))
        await asyncio.sleep(5.0)
        node.scheduler.release(blocker.id)
        await everybody

        assert node.granted == ["blocker", "a", "b", "c"]


@in_virtual_time
async def test_background_work_does_not_starve_among_users_who_never_stop_coming() -> None:
    async with node_of() as node:
        began_s = now_s()
        crowds = [asyncio.create_task(users_of(node, crowd)) for crowd in range(3)]
        await asyncio.sleep(1.0)
        await node.lease(20, operation="background", priority=Priority.BACKGROUND)
        for crowd in crowds:
            crowd.cancel()

        assert now_s() - began_s < 2 * 30.0 + 3 * 3.0 + 5.0


async def users_of(node: Node, crowd: int) -> None:
    """One user after the other, each for three seconds."""
    for number in itertools.count():
        lease = await node.lease(20, operation=f"user-{crowd}-{number}")
        await asyncio.sleep(3.0)
        node.scheduler.release(lease.id)


@in_virtual_time
async def test_small_demands_pass_a_large_one_that_waits_but_not_for_ever() -> None:
    options = SchedulerOptions(queue=QueueRules(max_overtakes=3, overtaking_s=20.0))
    async with node_of(options=options) as node:
        await node.lease(10, operation="long", ttl_s=60.0)
        began_s = now_s()
        large = asyncio.create_task(node.lease(28, operation="large"))
        await asyncio.sleep(1.0)
        small = [asyncio.create_task(users_small(node, crowd)) for crowd in range(2)]
        await large
        waited_s = now_s() - began_s
        for each in small:
            each.cancel()

        passed = [name for name in node.granted if name.startswith("small")]
        assert len(passed) == 3
        assert waited_s < 65.0


async def users_small(node: Node, crowd: int) -> None:
    for number in itertools.count():
        lease = await node.lease(9, operation=f"small-{crowd}-{number}")
        await asyncio.sleep(3.0)
        node.scheduler.release(lease.id)


@in_virtual_time
async def test_what_leaves_room_passes_a_demand_that_waits_for_a_lease_as_often_as_it_likes() -> None:
    async with node_of() as node:
        await node.lease(20, operation="long")
        large = asyncio.create_task(node.lease(20, operation="large"))
        await asyncio.sleep(1.0)
        for number in range(12):
            lease = await node.lease(9, operation=f"small-{number}")
            node.scheduler.release(lease.id)
            await asyncio.sleep(5.0)

        assert not large.done()
        large.cancel()


@in_virtual_time
async def test_neighbours_that_need_the_same_deployment_run_together() -> None:
    async with node_of() as node:
        blocker = await node.lease(29, operation="blocker", deployment_id="comfyui")
        wishes = {"a": "whisper", "b": "comfyui", "c": "whisper", "d": "comfyui"}
        everybody = asyncio.gather(
            *(hold(node, name, Priority.USER, deployment_id) for name, deployment_id in wishes.items())
        )
        await asyncio.sleep(1.0)
        node.scheduler.release(blocker.id)
        await everybody

        assert node.granted == ["blocker", "b", "d", "a", "c"]


# Several pools.


class TwoGpus:
    """Two pools of one node."""

    def __init__(self, *pools: SimulatedPool) -> None:
        self._pools: dict[str, SimulatedPool] = {}
        for index, pool in enumerate(pools):
            pool.pool_id = f"workstation/{index}"
            self._pools[pool.pool_id] = pool

    async def measure(self, pool_id: str) -> Measurement:
        return await self._pools[pool_id].measure(pool_id)

    def deployments(self) -> list[PlacedDeployment]:
        return [each for pool in self._pools.values() for each in pool.deployments()]

    async def carry_out(self, pool_id: str, step: ReclaimStep) -> Measured:
        return await self._pools[pool_id].carry_out(pool_id, step)

    async def bring_up(self, pool_id: str, deployment_id: str) -> None:
        await self._pools[pool_id].bring_up(pool_id, deployment_id)


@in_virtual_time
async def test_what_waits_for_one_gpu_does_not_hold_up_the_other() -> None:
    starting = sleeper("a", 20, residency=Residency.STOPPED)
    gpus = TwoGpus(SimulatedPool([starting]), SimulatedPool([sleeper("b", 20)]))
    ids = itertools.count()
    scheduler = NodeScheduler(
        pools=gpus, executor=gpus, new_lease_id=lambda: str(next(ids)), alert=lambda alert: None
    )
    running = asyncio.create_task(scheduler.run())

    def ask(operation: str, pool_id: str, size_gib: int) -> asyncio.Task[list[SchedulerEvent]]:
        demand = Demand(vram_bytes=size_gib * GIB)
        return asyncio.create_task(
            everything(scheduler.acquire(pool_id, demand, ttl_s=1000.0, operation_id=operation))
        )

    rising = asyncio.create_task(everything(scheduler.raise_deployment("a")))
    await asyncio.sleep(1.0)
    began_s = now_s()
    blocked, other = ask("blocked", "workstation/0", 25), ask("other", "workstation/1", 25)
    await other
    assert now_s() - began_s == 2.0  # "b" has fallen asleep
    assert not blocked.done()

    await rising
    await blocked
    assert [lease.pool_id for lease in scheduler.leases] == ["workstation/1", "workstation/0"]
    running.cancel()
