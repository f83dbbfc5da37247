"""What can go wrong, as one small tree that both servers raise and the SDK raises again.

Each class has a `status` (the canonical code, which decides the gRPC code and the HTTP status) and
a stable `reason` that programs may compare. `metadata` carries the typed facts. Messages are for
people: what happened, to what, and what to do next.
"""

from __future__ import annotations

from enum import StrEnum
from typing import ClassVar


class Status(StrEnum):
    """Canonical codes, by the names that gRPC gives them."""

    CANCELLED = "CANCELLED"
    INVALID_ARGUMENT = "INVALID_ARGUMENT"
    DEADLINE_EXCEEDED = "DEADLINE_EXCEEDED"
    NOT_FOUND = "NOT_FOUND"
    ALREADY_EXISTS = "ALREADY_EXISTS"
    PERMISSION_DENIED = "PERMISSION_DENIED"
    UNAUTHENTICATED = "UNAUTHENTICATED"
    RESOURCE_EXHAUSTED = "RESOURCE_EXHAUSTED"
    FAILED_PRECONDITION = "FAILED_PRECONDITION"
    ABORTED = "ABORTED"
    OUT_OF_RANGE = "OUT_OF_RANGE"
    UNIMPLEMENTED = "UNIMPLEMENTED"
    UNAVAILABLE = "UNAVAILABLE"
    INTERNAL = "INTERNAL"


class RungError(Exception):
    """Base of all errors. A bare one is a defect of ours: its text is not shown to callers."""

    status: ClassVar[Status] = Status.INTERNAL
    reason: ClassVar[str] = "INTERNAL"
    http_status: ClassVar[int] = 500

    def __init__(self, message: str, **metadata: str) -> None:
        super().__init__(message)
        self.message = message
        self.metadata = metadata


class InvalidRequestError(RungError):
    """The request is malformed."""

    status = Status.INVALID_ARGUMENT
    reason = "INVALID_REQUEST"
    http_status = 400


class ConfigError(InvalidRequestError):
    """A configuration file cannot be used; the message names file, line and field."""

    reason = "INVALID_CONFIG"


class EngineRejectedError(InvalidRequestError):
    """The engine refused the request as the caller's fault; `metadata["engine_status"]` has its status."""

    reason = "ENGINE_REJECTED"


class RequestTooLargeError(RungError):
    """The request is larger than the limit."""

    status = Status.RESOURCE_EXHAUSTED
    reason = "REQUEST_TOO_LARGE"
    http_status = 413


class NotFoundError(RungError):
    """What the request names does not exist."""

    status = Status.NOT_FOUND
    reason = "NOT_FOUND"
    http_status = 404


class UnknownModelError(NotFoundError):
    """No deployment serves the model."""

    reason = "UNKNOWN_MODEL"


class UnknownJobError(NotFoundError):
    """There is no such job."""

    reason = "UNKNOWN_JOB"


class UnknownNodeError(NotFoundError):
    """There is no such node."""

    reason = "UNKNOWN_NODE"


class UnknownDeploymentError(NotFoundError):
    """There is no such deployment."""

    reason = "UNKNOWN_DEPLOYMENT"


class UnknownProfileError(NotFoundError):
    """There is no such profile."""

    reason = "UNKNOWN_PROFILE"


class UnknownLeaseError(NotFoundError):
    """There is no such lease, or it has ended."""

    reason = "UNKNOWN_LEASE"


class UnknownArtifactError(NotFoundError):
    """There is no such artifact, or it was deleted."""

    reason = "UNKNOWN_ARTIFACT"


class AlreadyExistsError(RungError):
    """The id is taken by something else."""

    status = Status.ALREADY_EXISTS
    reason = "ALREADY_EXISTS"
    http_status = 409


class NotAllowedError(RungError):
    """The agent's allow-list, or a guardrail, forbids it."""

    status = Status.PERMISSION_DENIED
    reason = "NOT_ALLOWED"
    http_status = 403


class UnauthenticatedError(RungError):
    """The caller did not prove who it is."""

    status = Status.UNAUTHENTICATED
    reason = "UNAUTHENTICATED"
    http_status = 401


class FailedPreconditionError(RungError):
    """The state of things does not permit it now."""

    status = Status.FAILED_PRECONDITION
    reason = "FAILED_PRECONDITION"
    http_status = 409


class PinnedDeploymentError(FailedPreconditionError):
    """The deployment is pinned, and nobody said `force`."""

    reason = "PINNED_DEPLOYMENT"


class NotOursError(FailedPreconditionError):
    """The engine is run by somebody else, so its lifecycle is not ours to change."""

    reason = "EXTERNAL_ENGINE"


class HeldByProfileError(FailedPreconditionError):
    """The current profile wants the deployment asleep or stopped; another profile would let it come up."""

    reason = "HELD_BY_PROFILE"
    http_status = 503


class NotAwakeError(FailedPreconditionError):
    """The deployment is not awake."""

    reason = "NOT_AWAKE"
    http_status = 503


class UnsuitableTargetError(FailedPreconditionError):
    """The target cannot do what the request wants; another might."""

    reason = "UNSUITABLE_TARGET"
    http_status = 400


class LoopbackOnlyError(FailedPreconditionError):
    """A port was asked to listen on an interface other than loopback."""

    reason = "LOOPBACK_ONLY"


class StaleEpochError(RungError):
    """The caller's epoch is lower than the highest seen; another replica owns the node."""

    status = Status.ABORTED
    reason = "STALE_EPOCH"
    http_status = 409


class QueueFullError(RungError):
    """Too many requests wait already."""

    status = Status.RESOURCE_EXHAUSTED
    reason = "QUEUE_FULL"
    http_status = 429


class BudgetExhaustedError(RungError):
    """The spending cap leaves no room for the request; the message says what was spent, and until when.

    `metadata` has `spent_usd`, `reserved_usd`, `cap_usd` and `retry_after`, the seconds until it resets.
    """

    status = Status.RESOURCE_EXHAUSTED
    reason = "BUDGET_EXHAUSTED"
    http_status = 429


class ArtifactNotStoredError(RungError):
    """An artifact cannot be kept: the disk is full, or it is larger than `artifacts.max_bytes`."""

    status = Status.RESOURCE_EXHAUSTED
    reason = "ARTIFACT_NOT_STORED"
    http_status = 507


class VramInfeasibleError(RungError):
    """The memory cannot be had; the message says why and what would make it fit.

    `metadata` has `missing_bytes` and `largest_fit_bytes`, the greatest demand that would fit, unless it was
    an engine that ran out of it at work.
    """

    status = Status.RESOURCE_EXHAUSTED
    reason = "VRAM_INFEASIBLE"
    http_status = 503


class UnavailableError(RungError):
    """What is needed is away for now; trying again may help."""

    status = Status.UNAVAILABLE
    reason = "UNAVAILABLE"
    http_status = 503


class ArtifactDamagedError(UnavailableError):
    """What arrived of an artifact is not what was stored; fetching it again may help."""

    reason = "ARTIFACT_DAMAGED"


class NoTargetError(UnavailableError):
    """No target can serve the request now; the message names each and why not."""

    reason = "NO_TARGET"


class NodeUnreachableError(UnavailableError):
    """The node's agent does not answer."""

    reason = "NODE_UNREACHABLE"


class EngineUnreachableError(UnavailableError):
    """The engine does not answer, or its connection broke."""

    reason = "ENGINE_UNREACHABLE"
    http_status = 502


class EngineStartFailedError(UnavailableError):
    """The engine did not become ready."""

    reason = "ENGINE_START_FAILED"


class EngineFailedError(UnavailableError):
    """The engine answered with a server error; `metadata["engine_status"]` has its status."""

    reason = "ENGINE_FAILED"
    http_status = 502


class EngineProtocolError(UnavailableError):
    """The engine's answer was cut or not understood."""

    reason = "ENGINE_PROTOCOL"
    http_status = 502


class DrainingError(UnavailableError):
    """The server is shutting down and takes no new work."""

    reason = "DRAINING"


class DeadlineExceededError(RungError):
    """It took longer than allowed."""

    status = Status.DEADLINE_EXCEEDED
    reason = "DEADLINE_EXCEEDED"
    http_status = 504


class EngineTimeoutError(DeadlineExceededError):
    """The engine said nothing for longer than allowed."""

    reason = "ENGINE_TIMEOUT"


class JobCancelledError(RungError):
    """The job was cancelled."""

    status = Status.CANCELLED
    reason = "JOB_CANCELLED"
    http_status = 499


class OutOfRangeError(RungError):
    """A stream cannot be resumed from there."""

    status = Status.OUT_OF_RANGE
    reason = "OUT_OF_RANGE"
    http_status = 416


class NotImplementedYetError(RungError):
    """The API has it; this version does not."""

    status = Status.UNIMPLEMENTED
    reason = "NOT_IMPLEMENTED"
    http_status = 501


def _tree(base: type[RungError]) -> list[type[RungError]]:
    return [base, *(found for child in base.__subclasses__() for found in _tree(child))]


#: Every class by its reason; the SDK finds here what to raise.
BY_REASON: dict[str, type[RungError]] = {found.reason: found for found in reversed(_tree(RungError))}

#: The most general class of each status, for errors with a reason that this version does not know.
BY_STATUS: dict[Status, type[RungError]] = {found.status: found for found in reversed(_tree(RungError))}
