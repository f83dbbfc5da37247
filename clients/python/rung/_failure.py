"""From the reason of a failure to the error that stands for it."""

from __future__ import annotations

from rung.errors import (
    BudgetExhaustedError,
    DeadlineExceededError,
    EngineFailedError,
    EngineProtocolError,
    EngineRejectedError,
    EngineStartFailedError,
    EngineTimeoutError,
    EngineUnreachableError,
    InvalidRequestError,
    NodeUnreachableError,
    NoTargetError,
    NotFoundError,
    RungError,
    UnavailableError,
    VramInfeasibleError,
)
from rung.types import FailureReason, JobFailed, LifecycleFailed, ProfileFailed

_ERRORS: dict[FailureReason, type[RungError]] = {
    FailureReason.INVALID_REQUEST: EngineRejectedError,
    FailureReason.NO_TARGET: NoTargetError,
    FailureReason.ENGINE_ERROR: EngineFailedError,
    FailureReason.ENGINE_PROTOCOL: EngineProtocolError,
    FailureReason.ENGINE_LOST: EngineUnreachableError,
    FailureReason.ENGINE_START_FAILED: EngineStartFailedError,
    FailureReason.TIMEOUT: EngineTimeoutError,
    FailureReason.NODE_LOST: NodeUnreachableError,
    FailureReason.CONTROL_PLANE_RESTARTED: UnavailableError,
    FailureReason.VRAM_INFEASIBLE: VramInfeasibleError,
    FailureReason.BUDGET_EXHAUSTED: BudgetExhaustedError,
    FailureReason.INTERNAL: RungError,
}


def error_of_failure(failure: JobFailed | LifecycleFailed | ProfileFailed) -> RungError:
    """The error for a job, an operation or a switch that failed. Its metadata has `failure_reason`.

    A job's failure also has `delivered_characters`: whether anything of the answer had arrived.
    """
    metadata = {"failure_reason": failure.reason.value}
    if isinstance(failure, JobFailed):
        metadata["delivered_characters"] = str(failure.delivered_characters)
    return _ERRORS[failure.reason](failure.detail, **metadata)


def reason_of_error(error: RungError) -> FailureReason:
    """The failure reason that stands for an error; INTERNAL for one that has none of its own."""
    if isinstance(error, InvalidRequestError):
        return FailureReason.INVALID_REQUEST
    if isinstance(error, NotFoundError):
        return FailureReason.NO_TARGET
    if isinstance(error, DeadlineExceededError):
        return FailureReason.TIMEOUT
    for reason, error_class in _ERRORS.items():
        if type(error) is error_class and error_class is not UnavailableError:
            return reason
    return FailureReason.ENGINE_LOST if isinstance(error, UnavailableError) else FailureReason.INTERNAL
