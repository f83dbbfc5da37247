"""Which deployment of a model answers: awake before loading before asleep before stopped, then the idlest.

Pure: reads values, returns values.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol, TypeVar

from rung.types import ConsideredTarget, Deployment, ExternalRuntime, Node, NodeState, Residency


class Target(Protocol):
    """A deployment on its node, as the snapshot has it."""

    @property
    def deployment(self) -> Deployment:
        """The deployment."""
        ...

    @property
    def node(self) -> Node:
        """Its node."""
        ...


T = TypeVar("T", bound=Target)

_RANK = {
    Residency.AWAKE: 0,
    Residency.WAKING: 1,
    Residency.STARTING: 2,
    Residency.ASLEEP: 3,
    Residency.FALLING_ASLEEP: 4,
    Residency.STOPPED: 5,
    Residency.STOPPING: 6,
    Residency.FAILED: 7,
}


def order_targets(targets: Sequence[T], load: Callable[[str], tuple[int, int]]) -> list[T]:
    """The targets that can answer, best first.

    Order: residency (how long until it could begin), then load relative to its slots, then id.

    Args:
        targets: deployments of the wanted model.
        load: active and queued requests of a deployment.
    """
    if len(targets) == 1:
        return [targets[0]] if refusal(targets[0]) is None else []

    def key(target: T) -> tuple[int, float, str]:
        spec = target.deployment.spec
        active, queued = load(spec.id)
        return _RANK[target.deployment.residency], (active + queued) / max(1, spec.slots), spec.id

    return sorted((target for target in targets if refusal(target) is None), key=key)


def refusal(target: Target) -> str | None:
    """Why a target cannot answer, or None if it can, at once or after it was started or woken."""
    deployment, node = target.deployment, target.node
    if node.state is not NodeState.READY:
        return f"its node {node.id} is {node.state}" + (f" ({node.detail})" if node.detail else "")
    if deployment.residency is Residency.UNKNOWN:
        return deployment.detail or "its state is not known"
    external = isinstance(deployment.spec.engine.runtime, ExternalRuntime)
    if external and deployment.residency in (Residency.STOPPED, Residency.FAILED):
        return "it is run by somebody else and does not answer"
    return None


def explain_targets(
    targets: Sequence[T], load: Callable[[str], tuple[int, int]]
) -> tuple[ConsideredTarget, ...]:
    """What was thought of each target, in the order in which they would be tried."""
    ordered = order_targets(targets, load)
    considered = [
        ConsideredTarget(
            target=target.deployment.spec.id,
            taken=place == 0,
            reason=_reason(target, load),
            expected_wait_s=0.0 if target.deployment.residency is Residency.AWAKE else None,
        )
        for place, target in enumerate(ordered)
    ]
    passed_over = [
        ConsideredTarget(target=target.deployment.spec.id, taken=False, reason=reason)
        for target in targets
        if (reason := refusal(target)) is not None
    ]
    return (*considered, *passed_over)


def _reason(target: Target, load: Callable[[str], tuple[int, int]]) -> str:
    spec = target.deployment.spec
    active, queued = load(spec.id)
    residency = target.deployment.residency
    then = "" if residency is Residency.AWAKE else "; it would be started or woken first"
    return f"{residency} on {target.node.id}, {active} of {spec.slots} slots taken, {queued} waiting{then}"
