"""Plans for making room, and footprints."""

from __future__ import annotations

from rung import v1
from rung.codec._job import PRIORITIES
from rung.codec._values import (
    EnumCodec,
    duration_from_proto,
    duration_to_proto,
    timestamp_from_proto,
    timestamp_to_proto,
)
from rung.types import Footprint, Infeasible, Lease, ReclaimAction, ReclaimGrade, ReclaimPlan, ReclaimStep

#: A grade that is not known, or not set, is the greatest: that is what unset means in a demand.
RECLAIM_GRADES = EnumCodec(ReclaimGrade, v1.ReclaimGrade, prefix="RECLAIM_GRADE_", unknown=ReclaimGrade.FULL)
#: An action that is not known is taken for the one that disturbs most.
RECLAIM_ACTIONS = EnumCodec(
    ReclaimAction, v1.ReclaimAction, prefix="RECLAIM_ACTION_", unknown=ReclaimAction.STOP
)


def reclaim_plan_to_proto(value: ReclaimPlan) -> v1.ReclaimPlan:
    """A plan as a message."""
    return v1.ReclaimPlan(
        grade=RECLAIM_GRADES.to_proto[value.grade],
        steps=[_step_to_proto(step) for step in value.steps],
        expected_free_bytes=value.expected_free_bytes,
        expected=duration_to_proto(value.expected_s),
        expected_harm=duration_to_proto(value.harm_s),
    )


def reclaim_plan_from_proto(message: v1.ReclaimPlan) -> ReclaimPlan:
    """A plan from a message."""
    return ReclaimPlan(
        grade=RECLAIM_GRADES.from_proto(message.grade),
        steps=tuple(_step_from_proto(step) for step in message.steps),
        expected_free_bytes=message.expected_free_bytes,
        expected_s=duration_from_proto(message.expected),
        harm_s=duration_from_proto(message.expected_harm),
    )


def _step_to_proto(value: ReclaimStep) -> v1.ReclaimStep:
    return v1.ReclaimStep(
        deployment_id=value.deployment_id,
        action=RECLAIM_ACTIONS.to_proto[value.action],
        level=value.level,
        expected_bytes=value.expected_bytes,
        expected=duration_to_proto(value.expected_s),
        drain=value.drain,
        expected_drain=duration_to_proto(value.drain_expected_s),
    )


def _step_from_proto(message: v1.ReclaimStep) -> ReclaimStep:
    return ReclaimStep(
        deployment_id=message.deployment_id,
        action=RECLAIM_ACTIONS.from_proto(message.action),
        level=message.level,
        expected_bytes=message.expected_bytes,
        expected_s=duration_from_proto(message.expected),
        drain=message.drain,
        drain_expected_s=duration_from_proto(message.expected_drain),
    )


def infeasible_to_proto(value: Infeasible) -> v1.Infeasible:
    """Why a demand cannot be met, as a message."""
    return v1.Infeasible(
        detail=value.detail,
        missing_bytes=value.missing_bytes,
        missing_at_full_bytes=value.missing_at_full_bytes,
        largest_fit_bytes=value.largest_fit_bytes,
        remedies=value.remedies,
        retry_when=value.retry_when,
    )


def infeasible_from_proto(message: v1.Infeasible) -> Infeasible:
    """Why a demand cannot be met, from a message."""
    return Infeasible(
        detail=message.detail,
        missing_bytes=message.missing_bytes,
        missing_at_full_bytes=message.missing_at_full_bytes,
        largest_fit_bytes=message.largest_fit_bytes,
        remedies=tuple(message.remedies),
        retry_when=tuple(message.retry_when),
    )


def footprint_to_proto(value: Footprint) -> v1.EstimateFootprintResponse:
    """What a model needs, as a message."""
    return v1.EstimateFootprintResponse(
        weights_bytes=value.weights_bytes,
        kv_cache_bytes=value.kv_cache_bytes,
        overhead_bytes=value.overhead_bytes,
        kv_bytes_per_token=value.kv_bytes_per_token,
    )


def footprint_from_proto(message: v1.EstimateFootprintResponse) -> Footprint:
    """What a model needs, from a message."""
    return Footprint(
        weights_bytes=message.weights_bytes,
        kv_cache_bytes=message.kv_cache_bytes,
        overhead_bytes=message.overhead_bytes,
        kv_bytes_per_token=message.kv_bytes_per_token,
    )


def lease_to_proto(value: Lease) -> v1.Lease:
    """A lease as a message."""
    return v1.Lease(
        id=value.id,
        demand=v1.Demand(
            gpu=value.gpu,
            vram_bytes=value.vram_bytes,
            priority=PRIORITIES.to_proto[value.priority],
            holder=value.holder,
            deployment_id=value.deployment_id,
        ),
        grade=RECLAIM_GRADES.to_proto[value.grade],
        grant_time=timestamp_to_proto(value.grant_time_s),
        expire_time=timestamp_to_proto(value.expire_time_s),
    )


def lease_from_proto(message: v1.Lease) -> Lease:
    """A lease from a message."""
    return Lease(
        id=message.id,
        gpu=message.demand.gpu,
        vram_bytes=message.demand.vram_bytes,
        grade=RECLAIM_GRADES.from_proto(message.grade),
        grant_time_s=timestamp_from_proto(message.grant_time),
        expire_time_s=timestamp_from_proto(message.expire_time),
        holder=message.demand.holder,
        priority=PRIORITIES.from_proto(message.demand.priority),
        deployment_id=message.demand.deployment_id,
    )
