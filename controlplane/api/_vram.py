"""VramService: what would be disturbed, and what would fit."""

# ruff: noqa: N802 - methods have the names of the API

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeAlias

import grpc.aio

from controlplane.fleet import Fleet, ledger_of
from controlplane.vram import Architecture, Demand, KvFormat, WeightFormat, estimate_footprint, plan
from rung import codec, v1
from rung.errors import InvalidRequestError
from rung.types import ReclaimPlan

if TYPE_CHECKING:
    Context: TypeAlias = grpc.aio.ServicerContext[Any, Any]


class VramServicer:
    """Decodes, plans, encodes. What is not here answers UNIMPLEMENTED (see `add_service`)."""

    def __init__(self, fleet: Fleet, idle_s: Callable[[str], float]) -> None:
        self._fleet = fleet
        self._idle_s = idle_s

    async def PlanReclaim(self, request: v1.PlanReclaimRequest, context: Context) -> v1.PlanReclaimResponse:
        """What a demand would disturb."""
        demand = request.demand
        if demand.vram_bytes <= 0:
            raise InvalidRequestError("a demand needs vram_bytes of more than 0")
        ledger = ledger_of(self._fleet.view, demand.gpu, load=self._fleet.load, idle_s=self._idle_s)
        outcome = plan(
            ledger,
            Demand(
                vram_bytes=demand.vram_bytes,
                max_grade=codec.RECLAIM_GRADES.from_proto(demand.max_grade),
                priority=codec.PRIORITIES.from_proto(demand.priority),
                holder=demand.holder,
            ),
        )
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
