"""Failures as a person at a terminal sees them: one line, a hint, and an exit code."""

from __future__ import annotations

import os
from enum import IntEnum

from msgspec import Struct

from rung.errors import (
    ConfigError,
    DrainingError,
    EngineRejectedError,
    JobCancelledError,
    RungError,
    Status,
    UnavailableError,
)

#: Set to show tracebacks.
DEBUG_VARIABLE = "RUNG_DEBUG"


class ExitCode(IntEnum):
    """What the `rung` command exits with; documented in `rung --help`."""

    OK = 0
    FAILED = 1
    USAGE = 2
    UNREACHABLE = 3
    NOT_FOUND = 4
    REFUSED = 5
    INTERRUPTED = 130


_CODES = {
    Status.INVALID_ARGUMENT: ExitCode.USAGE,
    Status.NOT_FOUND: ExitCode.NOT_FOUND,
    Status.ALREADY_EXISTS: ExitCode.REFUSED,
    Status.PERMISSION_DENIED: ExitCode.REFUSED,
    Status.UNAUTHENTICATED: ExitCode.REFUSED,
    Status.FAILED_PRECONDITION: ExitCode.REFUSED,
    Status.ABORTED: ExitCode.REFUSED,
}

_HINTS = {
    "UNKNOWN_MODEL": "`rung models` lists the names that can be asked for.",
    "UNKNOWN_JOB": "`rung jobs list` shows the jobs that are known.",
    "UNKNOWN_DEPLOYMENT": "`rung deployments` lists them.",
    "UNKNOWN_NODE": "`rung status` shows the nodes.",
    "UNKNOWN_PROFILE": "`rung profile list` shows them.",
    "HELD_BY_PROFILE": "`rung profile list` shows the profiles; another one may let it come up.",
    "PINNED_DEPLOYMENT": "It is pinned so that nothing takes it away; add --force if you mean it.",
    "EXTERNAL_ENGINE": "Somebody else runs this engine: start and stop it the way it was started.",
    "NOT_AWAKE": "`rung start DEPLOYMENT` or `rung wake DEPLOYMENT` makes it ready.",
    "NO_TARGET": "`rung status` shows what is up, `rung doctor` why something is not.",
    "NODE_UNREACHABLE": "Is its agent running? `rung agent run` starts one; `rung doctor` looks closer.",
    "ENGINE_START_FAILED": "`rung status` shows its last words; `rung doctor` checks what engines need.",
    "QUEUE_FULL": "Too much is waiting already: try again shortly, or give the deployment more slots.",
    "UNAUTHENTICATED": "Give a token with --token or RUNG_TOKEN.",
    "NOT_IMPLEMENTED": "The server is of a version without it.",
}


class Failure(Struct, frozen=True):
    """One line that says what happened, what to do next (or ""), and the exit code."""

    message: str
    hint: str
    code: ExitCode


def is_unreachable(error: RungError) -> bool:
    """Whether the control plane did not answer, as against a node or an engine behind it."""
    return type(error) in (UnavailableError, DrainingError) and "failure_reason" not in error.metadata


def failure_of(error: RungError, *, address: str = "") -> Failure:
    """What to tell about an error of a call to the control plane at `address`."""
    if is_unreachable(error):
        at = f" at {address}" if address else ""
        hint = "Start one on this box with `rung up`, or say where it is with --address or RUNG_ADDRESS."
        why = error.metadata.get("why", "")
        if why:
            return Failure(f"cannot reach the control plane{at}: {why}", hint, ExitCode.UNREACHABLE)
        return Failure(
            f"cannot reach the control plane{at}",
            f"{hint} ({_first_line(error.message)})",
            ExitCode.UNREACHABLE,
        )
    # A configuration may have several faults, one a line.
    told = error.message.strip() if isinstance(error, ConfigError) else _first_line(error.message)
    message = told or error.reason
    return Failure(message, _HINTS.get(error.reason, ""), _code(error))


def wants_debug() -> bool:
    """Whether RUNG_DEBUG asks for tracebacks."""
    return os.environ.get(DEBUG_VARIABLE, "") not in ("", "0")


def _code(error: RungError) -> ExitCode:
    # Both are the caller's fault, but not by how the command was written.
    if isinstance(error, ConfigError | EngineRejectedError):
        return ExitCode.FAILED
    if isinstance(error, JobCancelledError):
        return ExitCode.FAILED
    return _CODES.get(error.status, ExitCode.FAILED)


def _first_line(text: str) -> str:
    return text.strip().split("\n", 1)[0]
