"""Deployments that take turns on one port: which may, and which may not."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from rung import types
from rung.service import FieldError

_TAKING_TURNS = frozenset({types.ResidencyClass.SLEEPABLE, types.ResidencyClass.ON_DEMAND})


def check_ports(specs: Sequence[types.DeploymentSpec]) -> None:
    """Refuse two deployments on one port of a node, unless they take turns on one swap slot.

    Raises:
        FieldError: what is wrong, and where.
    """
    by_port: dict[tuple[str, int], types.DeploymentSpec] = {}
    members: dict[tuple[str, str], list[int]] = {}
    for place, spec in enumerate(specs):
        port = spec.engine.port
        other = by_port.setdefault((spec.node_id, port), spec)
        if port and other is not spec and not (spec.swap_slot and spec.swap_slot == other.swap_slot):
            raise FieldError(
                ("deployments", place, "port"),
                f"{other.id} has port {port} on the same node; give both the same swap_slot "
                "if they are to take turns on it",
            )
        if spec.swap_slot:
            members.setdefault((spec.node_id, spec.swap_slot), []).append(place)
    for (_, slot), places in members.items():
        for place in places if len(places) > 1 else ():
            _check_member(specs[place], specs[places[0]], slot, place)


def _check_member(spec: types.DeploymentSpec, first: types.DeploymentSpec, slot: str, place: int) -> None:
    if spec.residency_class not in _TAKING_TURNS:
        field, why = "residency_class", f"{spec.residency_class} deployments do not give way"
    elif spec.keep_running:
        field, why = "keep_running", "what is kept running does not give way"
    elif isinstance(spec.engine.runtime, types.ExternalRuntime):
        field, why = "runtime", "somebody else runs it, and nobody could stop it for another"
    elif spec.engine.gpus != first.engine.gpus:
        field, why = "gpus", f"{first.id} names other GPUs, and they are to take turns on the same"
    else:
        return
    raise FieldError(("deployments", place, field), f"{spec.id} shares swap_slot {slot}, but {why}")


def check_awake_together(
    specs: Mapping[str, types.DeploymentSpec], awake: Sequence[str], field: tuple[str | int, ...]
) -> None:
    """Refuse to want two of one swap slot awake. Raises FieldError at the field."""
    taken: dict[tuple[str, str], str] = {}
    for deployment_id in awake:
        spec = specs[deployment_id]
        other = taken.setdefault((spec.node_id, spec.swap_slot), deployment_id)
        if spec.swap_slot and other != deployment_id:
            raise FieldError(
                field, f"{other} and {deployment_id} take turns on swap_slot {spec.swap_slot}: one at a time"
            )
