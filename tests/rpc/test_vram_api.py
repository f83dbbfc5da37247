"""VramService over real gRPC: what a demand would disturb, and what would fit."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import pytest
from msgspec.structs import replace

from rung import AsyncClient
from rung.errors import (
    AlreadyExistsError,
    InvalidRequestError,
    NotFoundError,
    UnavailableError,
    UnknownDeploymentError,
    UnknownLeaseError,
    UnknownNodeError,
    VramInfeasibleError,
)
from rung.types import (
    Deployment,
    DeploymentSpec,
    Gpu,
    GpuHealth,
    Infeasible,
    Lease,
    MemorySource,
    NodeState,
    ReclaimAction,
    ReclaimGrade,
    ReclaimPlan,
    Residency,
    ResidencyClass,
    VllmEngine,
)
from tests.fakes.agent_server import ScriptedAgent, a_deployment, a_spec, a_status
from tests.fakes.api_server import ApiServer, an_api_server

GIB = 1 << 30
SPECS = [
    a_spec("orchestrator", residency_class=ResidencyClass.PINNED),
    a_spec(
        "reasoner",
        residency_class=ResidencyClass.SLEEPABLE,
        engine=VllmEngine(model="m", sleep_mode=True),
    ),
    a_spec("vision", residency_class=ResidencyClass.ON_DEMAND),
]


def awake(spec: DeploymentSpec, gib: int) -> Deployment:
    return replace(a_deployment(spec, Residency.AWAKE), vram_bytes=gib * GIB)


def a_gpu(free_gib: int) -> Gpu:
    return Gpu(
        index=0,
        uuid="GPU-0",
        name="NVIDIA GeForce RTX 5090",
        health=GpuHealth.OK,
        memory_source=MemorySource.NVML,
        memory_total_bytes=32 * GIB,
        memory_used_bytes=(32 - free_gib) * GIB,
        memory_free_bytes=free_gib * GIB,
    )


@pytest.fixture
async def plane() -> AsyncIterator[ApiServer]:
    """A card of 32 GiB: 10 pinned, 12 of a sleepable, 6 on demand, 1 of a desktop, 3 free."""
    agent = ScriptedAgent()
    status = a_status()
    host = replace(status.host, memory_total_bytes=64 * GIB, memory_available_bytes=48 * GIB)
    agent.status = replace(status, gpus=(a_gpu(3),), host=host)
    for spec, gib in zip(SPECS, (10, 12, 6), strict=True):
        agent.deployments[spec.id] = awake(spec, gib)
    await agent.start()
    try:
        async with an_api_server([agent], SPECS) as plane:
            async with asyncio.timeout(10):
                async for view in plane.fleet.changes():
                    if view.nodes["box"].state is NodeState.READY:
                        break
            yield plane
    finally:
        await agent.stop()


@pytest.fixture
async def client(plane: ApiServer) -> AsyncIterator[AsyncClient]:
    async with AsyncClient(f"127.0.0.1:{plane.server.port}") as client:
        yield client


async def test_what_is_free_disturbs_nobody(client: AsyncClient) -> None:
    outcome = await client.plan_reclaim("box/0", 2 * GIB)

    assert outcome == ReclaimPlan(grade=ReclaimGrade.QUICK, expected_free_bytes=3 * GIB)


async def test_a_demand_is_planned_for_with_the_least_harm(client: AsyncClient) -> None:
    outcome = await client.plan_reclaim("box/0", 8 * GIB)

    assert isinstance(outcome, ReclaimPlan)
    assert outcome.grade is ReclaimGrade.STANDARD
    [step] = outcome.steps
    # Asleep it is back in seconds: less harm than stopping what takes long to start.
    assert (step.deployment_id, step.action, step.level) == ("reasoner", ReclaimAction.SLEEP, 1)
    assert step.expected_bytes == 12 * GIB - 3 * GIB // 2
    assert outcome.expected_free_bytes == 3 * GIB + step.expected_bytes


async def test_what_is_busy_is_drained_first(plane: ApiServer, client: AsyncClient) -> None:
    plane.load["reasoner"] = (2, 0)
    plane.load["vision"] = (1, 0)

    outcome = await client.plan_reclaim("box/0", 12 * GIB)

    assert isinstance(outcome, ReclaimPlan)
    assert [step.drain for step in outcome.steps] == [True]
    assert outcome.steps[0].drain_expected_s > 0


async def test_a_pinned_deployment_is_never_in_a_plan(client: AsyncClient) -> None:
    outcome = await client.plan_reclaim("box/0", 25 * GIB)

    assert isinstance(outcome, Infeasible)
    # 3 free less 1 kept, 12 of the sleepable stopped, 6 on demand.
    assert outcome.missing_bytes == (25 - 2 - 12 - 6) * GIB
    assert any("orchestrator holds 10.0 GiB: it is pinned" in line for line in outcome.remedies)


async def test_a_grade_is_kept(client: AsyncClient) -> None:
    outcome = await client.plan_reclaim("box/0", 8 * GIB, max_grade=ReclaimGrade.QUICK)

    assert isinstance(outcome, Infeasible)
    assert outcome.missing_bytes == 6 * GIB
    assert outcome.missing_at_full_bytes == 0


@pytest.mark.parametrize(
    ("gpu", "error"), [("box", InvalidRequestError), ("nope/0", UnknownNodeError), ("box/7", NotFoundError)]
)
async def test_what_is_no_gpu_is_refused(client: AsyncClient, gpu: str, error: type[Exception]) -> None:
    with pytest.raises(error):
        await client.plan_reclaim(gpu, GIB)


async def test_a_demand_is_for_something(client: AsyncClient) -> None:
    with pytest.raises(InvalidRequestError, match="more than 0"):
        await client.plan_reclaim("box/0", 0)


async def test_a_node_that_is_not_heard_has_no_plan() -> None:
    away = ScriptedAgent(port=9)
    async with (
        an_api_server([away], []) as plane,
        AsyncClient(f"127.0.0.1:{plane.server.port}") as client,
    ):
        with pytest.raises(UnavailableError, match="not known now"):
            await client.plan_reclaim("box/0", GIB)


async def test_a_footprint_is_estimated(client: AsyncClient) -> None:
    found = await client.estimate_footprint(
        parameters=8_000_000_000,
        bits_per_weight=4.5,
        layers=32,
        key_value_heads=8,
        head_size=128,
        kv_bits=8,
        context_tokens=32_768,
    )

    assert found.weights_bytes == 4_500_000_000
    assert found.kv_bytes_per_token == 65_536
    assert found.kv_cache_bytes == 2 * GIB
    with pytest.raises(InvalidRequestError):
        await client.estimate_footprint(parameters=-1, bits_per_weight=4)


async def test_a_lease_is_held_listed_renewed_and_given_back(client: AsyncClient) -> None:
    heard: list[object] = []
    async with client.lease("box/0", 1 * GIB, holder="train.py", on_wait=heard.append) as holding:
        lease = holding.lease
        assert (lease.gpu, lease.vram_bytes, lease.grade) == ("box/0", GIB, ReclaimGrade.QUICK)
        assert [each.holder for each in await client.list_leases()] == ["train.py"]
        renewed = await client.renew_lease(lease.id)
        assert renewed.expire_time_s >= lease.expire_time_s
        # What one was promised is not promised to another: 3 free, 1 kept, 1 leased.
        second = await client.plan_reclaim("box/0", 2 * GIB, max_grade=ReclaimGrade.QUICK)
        assert isinstance(second, Infeasible)

    assert await client.list_leases() == ()
    with pytest.raises(UnknownLeaseError):
        await client.renew_lease(lease.id)
    await client.release_lease(lease.id)


async def test_a_lease_may_name_the_deployment_that_takes_the_memory(client: AsyncClient) -> None:
    async with client.lease("box/0", 1 * GIB, deployment_id="vision") as holding:
        assert holding.lease.deployment_id == "vision"
        assert [each.deployment_id for each in await client.list_leases()] == ["vision"]
    with pytest.raises(UnknownDeploymentError, match="box has no deployment nope"):
        async with client.lease("box/0", 1 * GIB, deployment_id="nope"):
            pass


async def test_the_same_operation_gets_the_same_lease(client: AsyncClient) -> None:
    async def get(operation_id: str, size_bytes: int = GIB) -> Lease:
        steps = [step async for step in client.acquire_lease("box/0", size_bytes, operation_id=operation_id)]
        assert isinstance(steps[-1], Lease)
        return steps[-1]

    first = await get("mine")

    assert (await get("mine")).id == first.id
    with pytest.raises(AlreadyExistsError):
        await get("mine", GIB // 2)


async def test_what_can_never_fit_is_refused_at_once(client: AsyncClient) -> None:
    with pytest.raises(VramInfeasibleError, match="do not fit"):
        async for _ in client.acquire_lease("box/0", 30 * GIB):
            pass
    with pytest.raises(InvalidRequestError):
        async for _ in client.acquire_lease("box/0", 0):
            pass
    assert await client.list_leases() == ()
