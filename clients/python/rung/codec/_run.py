"""What both ends of `NodeAgentService.Run` must agree on."""

from __future__ import annotations

from rung import v1
from rung.errors import BY_REASON, RungError

#: So much of an answer may be on its way, or wait at the caller's, before the caller has taken any of it.
RUN_WINDOW_BYTES = 256 * 1024
#: A message takes nothing more once it has so much.
RUN_MESSAGE_BYTES = 256 * 1024


def run_error_to_proto(error: RungError) -> v1.RunError:
    """What went wrong with one generation."""
    return v1.RunError(reason=error.reason, message=error.message, metadata=error.metadata)


def run_error_from_proto(error: v1.RunError) -> RungError:
    """The same error again; one that this version does not know becomes the most general."""
    error_class = BY_REASON.get(error.reason, RungError)
    return error_class(error.message, **dict(error.metadata))
