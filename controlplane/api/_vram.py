"""VramService: leases, what they would disturb, and what would fit."""

# ruff: noqa: N802 - methods have the names of the API

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import aclosing
from typing import TYPE_CHECKING, Any, TypeAlias

import grpc.aio

from controlplane.fleet import Fleet, NodeSchedulers, find_gpu, progress_of_event
from controlplane.vram import (
    Architecture,
    Demand,
    Granted,
    KvFormat,
    Lease,
    NodeScheduler,
    Planned,
    WeightFormat,
    estimate_footprint,
)
from rung import codec, types, v1
from rung.errors import InvalidRequestError, UnknownDeploymentError, UnknownLeaseError
from rung.types import PhaseProgress, ReclaimPlan

if TYPE_CHECKING:
    Context: TypeAlias = grpc.aio.ServicerContext[Any, Any]

_DEFAULT_TTL_S = 60.0


class VramServicer:
    """Decodes, calls, encodes."""

    def __init__(self, fleet: Fleet, schedulers: NodeSchedulers) -> None:
        self._fleet = fleet
        self._schedulers = schedulers

    async def AcquireLease(
        self, request: v1.AcquireLeaseRequest, context: Context
    ) -> AsyncIterator[v1.AcquireLeaseResponse]:
        """Wait for memory, and say why it takes long."""
        if not request.operation_id:
            raise InvalidRequestError("a demand needs an operation_id of the caller's choice")
        pool_id = request.demand.gpu
        scheduler = self._scheduler(pool_id)
        self._require_on_pool(request.demand.deployment_id, pool_id)
        ttl_s = (
            codec.duration_from_proto(request.time_to_live)
            if request.HasField("time_to_live")
            else _DEFAULT_TTL_S
        )
        events = scheduler.acquire(
            pool_id,
            _demand(request.demand),
            ttl_s=ttl_s,
            operation_id=request.operation_id,
            deployment_id=request.demand.deployment_id,
        )
        sequence = 0
        async with aclosing(events):
            async for event in events:
                sequence += 1
                response = v1.AcquireLeaseResponse(sequence=sequence)
                if isinstance(event, Granted):
                    response.granted.CopyFrom(codec.lease_to_proto(_lease(event.lease)))
                elif isinstance(event, Planned):
                    response.plan.CopyFrom(codec.reclaim_plan_to_proto(event.plan))
                else:
                    progress = progress_of_event(event)
                    if progress is None:
                        continue
                    response.progress.CopyFrom(
                        codec.phase_progress_to_proto(
                            PhaseProgress(
                                phase=progress.phase, detail=progress.detail, remaining_s=progress.remaining_s
                            )
                        )
                    )
                yield response

    async def RenewLease(self, request: v1.RenewLeaseRequest, context: Context) -> v1.RenewLeaseResponse:
        """Let a lease last its time again from now."""
        renewed = self._holder(request.lease_id).renew(request.lease_id)
        return v1.RenewLeaseResponse(lease=codec.lease_to_proto(_lease(renewed)))

    async def ReleaseLease(
        self, request: v1.ReleaseLeaseRequest, context: Context
    ) -> v1.ReleaseLeaseResponse:
        """End a lease."""
        for scheduler in self._schedulers.all:
            scheduler.release(request.lease_id)
        return v1.ReleaseLeaseResponse()

    async def ListLeases(self, request: v1.ListLeasesRequest, context: Context) -> v1.ListLeasesResponse:
        """Leases that are held."""
        held = [lease for scheduler in self._schedulers.all for lease in scheduler.leases]
        held.sort(key=lambda lease: lease.granted_s)
        return v1.ListLeasesResponse(leases=[codec.lease_to_proto(_lease(lease)) for lease in held])

    async def PlanReclaim(self, request: v1.PlanReclaimRequest, context: Context) -> v1.PlanReclaimResponse:
        """What a demand would disturb."""
        pool_id = request.demand.gpu
        outcome = await self._scheduler(pool_id).preview(pool_id, _demand(request.demand))
        if isinstance(outcome, ReclaimPlan):
            return v1.PlanReclaimResponse(plan=codec.reclaim_plan_to_proto(outcome))
        return v1.PlanReclaimResponse(infeasible=codec.infeasible_to_proto(outcome))

    async def EstimateFootprint(
        self, request: v1.EstimateFootprintRequest, context: Context
    ) -> v1.EstimateFootprintResponse:
        """What a model would need."""
        if request.bits_per_weight < 0 or request.kv_bits < 0:
            raise InvalidRequestError("bits_per_weight and kv_bits are not less than 0")
        architecture = Architecture(
            name="",
            parameters=request.parameter_count,
            layers=request.layers,
            key_value_heads=request.key_value_heads,
            head_size=request.head_size,
        )
        return codec.footprint_to_proto(
            estimate_footprint(
                architecture,
                weights=WeightFormat(name="", bits=request.bits_per_weight),
                kv=KvFormat(name="", bits=request.kv_bits),
                context_tokens=request.context_tokens,
                sequences=request.sequences or 1,
            )
        )

    def _scheduler(self, pool_id: str) -> NodeScheduler:
        """The scheduler of a GPU. Raises as `find_gpu`."""
        node, _ = find_gpu(self._fleet.view, pool_id)
        return self._schedulers.of_node(node.id)

    def _require_on_pool(self, deployment_id: str, pool_id: str) -> None:
        """Raise UnknownDeploymentError if a deployment that a demand names is not on the node of its GPU."""
        if not deployment_id:
            return
        node, _ = find_gpu(self._fleet.view, pool_id)
        found = self._fleet.view.deployments.get(deployment_id)
        if found is None or found.node.id != node.id:
            raise UnknownDeploymentError(
                f"{node.id} has no deployment {deployment_id}", deployment=deployment_id
            )

    def _holder(self, lease_id: str) -> NodeScheduler:
        """The scheduler that a lease is of. Raises UnknownLeaseError."""
        for scheduler in self._schedulers.all:
            if any(lease.id == lease_id for lease in scheduler.leases):
                return scheduler
        raise UnknownLeaseError(f"there is no lease {lease_id}, or it has ended", lease=lease_id)


def _demand(message: v1.Demand) -> Demand:
    if message.vram_bytes <= 0:
        raise InvalidRequestError("a demand needs vram_bytes of more than 0")
    return Demand(
        vram_bytes=message.vram_bytes,
        max_grade=codec.RECLAIM_GRADES.from_proto(message.max_grade),
        priority=codec.PRIORITIES.from_proto(message.priority),
        holder=message.holder,
    )


def _lease(lease: Lease) -> types.Lease:
    """A lease as callers see it: its times are those of the wall clock."""
    offset_s = time.time() - asyncio.get_running_loop().time()
    return types.Lease(
        id=lease.id,
        gpu=lease.pool_id,
        vram_bytes=lease.demand.vram_bytes,
        grade=lease.grade,
        grant_time_s=lease.granted_s + offset_s,
        expire_time_s=lease.expires_s + offset_s,
        holder=lease.demand.holder,
        deployment_id=lease.deployment_id,
        priority=lease.demand.priority,
    )
