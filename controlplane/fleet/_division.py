"""What a profile asks of the fleet: who is not to be made awake, and which share of a GPU an engine gets."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import msgspec
from msgspec import Struct
from msgspec.structs import replace

from rung.types import DeploymentSpec, VllmEngine


class Division(Struct, frozen=True, kw_only=True):
    """The division of the VRAM that holds now.

    Attributes:
        profile: the profile that was applied and verified; empty if none.
        holds: deployments that are not to be made awake, each with the reason.
        down: deployments that the profile wants asleep or stopped: nobody but who needs them starts them.
        utilizations: share of the GPU's memory with which a deployment is started next, where it is not the
            configured one.
    """

    profile: str = ""
    holds: Mapping[str, str] = msgspec.field(default_factory=dict)
    down: frozenset[str] = frozenset()
    utilizations: Mapping[str, float] = msgspec.field(default_factory=dict)


def utilization_of(spec: DeploymentSpec) -> float:
    """The share of the GPU's memory that an engine reserves; 0 if it is none that does so."""
    engine = spec.engine.engine
    return engine.gpu_memory_utilization if isinstance(engine, VllmEngine) else 0.0


def divided(specs: Sequence[DeploymentSpec], division: Division) -> tuple[DeploymentSpec, ...]:
    """The deployments with the shares that the division gives them."""
    return tuple(_with_share(spec, division.utilizations.get(spec.id, 0.0)) for spec in specs)


def _with_share(spec: DeploymentSpec, utilization: float) -> DeploymentSpec:
    engine = spec.engine.engine
    if not utilization or not isinstance(engine, VllmEngine):
        return spec
    return replace(
        spec, engine=replace(spec.engine, engine=replace(engine, gpu_memory_utilization=utilization))
    )
