"""Who could answer, as values that a choice reads: deployments, rented boxes to come, cloud models.

Pure.
"""

from __future__ import annotations

from enum import StrEnum
from typing import Protocol

from msgspec import Struct

from rung.types import Deployment, ExternalRuntime, Node, NodeOwnership, NodeState, Residency


class TargetKind(StrEnum):
    """What a target is."""

    DEPLOYMENT = "deployment"
    BURST = "burst"
    CLOUD = "cloud"


class Candidate(Struct, frozen=True, kw_only=True):
    """A target, and what is known of it without asking anybody.

    Attributes:
        id: of the deployment or burst profile, or `provider/model` of a cloud model.
        kind: what it is.
        owned: whether a request to it stays on hardware of ours.
        refusal: why it cannot answer; empty if it can, at once or after it was started or woken.
        rank: how far it is from answering; 0 is ready. One that is not `known` is behind all others.
        known: what its node measures is current; else it may be idle, busy or broken.
        expected_wait_s: until it is ready, if it is not, without the time to make room; None if nobody knows.
        state: what it is doing, for a person.
        slots: requests that it takes at once; 0 for as many as come.
        capabilities: what it can do.
        capabilities_known: somebody said so; else it is found out by asking it.
        context_tokens: longest prompt with its answer; 0 if that is not known.
        usd_per_million_tokens: price of a million completion tokens, in US dollars; 0 for what costs nothing.
    """

    id: str
    kind: TargetKind
    owned: bool
    refusal: str = ""
    rank: int = 0
    known: bool = True
    expected_wait_s: float | None = None
    state: str = ""
    slots: int = 0
    capabilities: frozenset[str] = frozenset()
    capabilities_known: bool = True
    context_tokens: int = 0
    usd_per_million_tokens: float = 0.0


class PlacedDeployment(Protocol):
    """A deployment on its node, as the snapshot has it."""

    @property
    def deployment(self) -> Deployment:
        """The deployment."""
        ...

    @property
    def node(self) -> Node:
        """Its node."""
        ...

    @property
    def hold(self) -> str:
        """Why it is not to be made awake; empty if it may be."""
        ...

    @property
    def measurements_are_old(self) -> bool:
        """Whether its node is heard, and has measured nothing for a while."""
        ...


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
_LAST_RANK = 8


def candidate_of(placed: PlacedDeployment) -> Candidate:
    """A deployment as a candidate."""
    deployment, node = placed.deployment, placed.node
    spec, residency = deployment.spec, deployment.residency
    rank = _RANK.get(residency, _LAST_RANK)
    known = not placed.measurements_are_old
    wait_s = 0.0 if residency is Residency.AWAKE else deployment.awake_expected_s
    state = f"{residency} on {node.id}"
    if wait_s is None:
        state += "; it would be started or woken first"
    elif wait_s:
        state += f"; {awake_in(wait_s)}"
    if not known:
        state += "; not known for sure, since its node has measured nothing for a while"
    return Candidate(
        id=spec.id,
        kind=TargetKind.DEPLOYMENT,
        owned=node.ownership is NodeOwnership.OWNED,
        refusal=_refusal(placed),
        rank=rank if known else rank + _LAST_RANK + 1,
        known=known,
        expected_wait_s=wait_s if known else None,
        state=state,
        slots=spec.slots,
        capabilities=frozenset(spec.capabilities),
        capabilities_known=bool(spec.capabilities) and not deployment.adopted,
        context_tokens=spec.context_tokens,
    )


def awake_in(wait_s: float) -> str:
    """How long it takes until a deployment is awake, in words."""
    return f"awake in about {max(1, round(wait_s))} s"


def _refusal(placed: PlacedDeployment) -> str:
    deployment, node = placed.deployment, placed.node
    if node.state is not NodeState.READY:
        return f"its node {node.id} is {node.state}" + (f" ({node.detail})" if node.detail else "")
    if deployment.residency is Residency.UNKNOWN:
        return deployment.detail or "its state is not known"
    if placed.hold and deployment.residency is not Residency.AWAKE:
        return placed.hold
    external = isinstance(deployment.spec.engine.runtime, ExternalRuntime)
    if external and deployment.residency in (Residency.STOPPED, Residency.FAILED):
        return "it is run by somebody else and does not answer"
    return ""
