"""What may be done to a deployment, and how a start that may not, or did not work, is told."""

from __future__ import annotations

from controlplane.fleet._operations import LifecycleAction
from controlplane.fleet._view import DeploymentView
from rung.errors import (
    EngineStartFailedError,
    FailedPreconditionError,
    HeldByProfileError,
    NodeUnreachableError,
    NotOursError,
    PinnedDeploymentError,
    RungError,
    UnavailableError,
)
from rung.types import (
    DeploymentSpec,
    ExternalRuntime,
    FailureReason,
    LifecycleFailed,
    NodeState,
    Residency,
    ResidencyClass,
)

#: States in which an agent does not answer.
AWAY = frozenset({NodeState.CONNECTING, NodeState.UNREACHABLE})
#: What makes a deployment awake.
RAISING = frozenset({LifecycleAction.START, LifecycleAction.WAKE})
_DRAINING = frozenset({NodeState.DRAINING, NodeState.DRAINED})


def is_external(spec: DeploymentSpec) -> bool:
    """Whether somebody else runs the engine."""
    return isinstance(spec.engine.runtime, ExternalRuntime)


def require_permitted(action: LifecycleAction, target: DeploymentView, *, force: bool) -> None:
    """Refuse what the agent would refuse too, and what needs no agent to know.

    Raises:
        PinnedDeploymentError: it is pinned and `force` is not set.
        NodeUnreachableError: its node does not answer.
        HeldByProfileError: it is to come up, and the profile wants it down.
        NotOursError: the engine is run by somebody else.
        FailedPreconditionError: its node drains, and it is to come up.
    """
    spec = target.deployment.spec
    node = target.node
    # First: of a pinned one, too, force would change nothing.
    if is_external(spec) and action in (LifecycleAction.START, LifecycleAction.STOP):
        raise NotOursError(
            f"{spec.id} is run by somebody else; {action} it where it was started", deployment=spec.id
        )
    pinned = spec.residency_class is ResidencyClass.PINNED
    permitted = action in RAISING or (action is LifecycleAction.SHRINK and spec.shrinkable)
    if pinned and not (permitted or force):
        raise PinnedDeploymentError(
            f"{spec.id} is pinned; nothing is done to it without force", deployment=spec.id
        )
    if node.state in AWAY:
        raise NodeUnreachableError(f"{node.id} does not answer: {node.detail or node.state}", node=node.id)
    if target.hold and action in RAISING and target.deployment.residency is not Residency.AWAKE:
        raise HeldByProfileError(f"{spec.id}: {target.hold}", deployment=spec.id)
    if node.state in _DRAINING and action in RAISING:
        raise FailedPreconditionError(
            f"{node.id} is {node.state}; resume it before anything is started there", node=node.id
        )


def start_error(deployment_id: str, node_id: str, failed: LifecycleFailed) -> UnavailableError:
    """The error for a start that failed at the agent."""
    if failed.reason is FailureReason.NODE_LOST:
        return NodeUnreachableError(failed.detail, node=node_id)
    return EngineStartFailedError(failed.detail, deployment=deployment_id)


def start_refused(deployment_id: str, error: RungError) -> UnavailableError:
    """The error for a start that was refused."""
    if isinstance(error, UnavailableError):
        return error
    return EngineStartFailedError(
        f"{deployment_id} cannot be started: {error.message}", deployment=deployment_id
    )
