"""What the state of a container, and what was heard of it, mean in words."""

from __future__ import annotations

import signal
from collections.abc import Mapping
from typing import Any

from msgspec import Struct

#: States in which a container holds what it was started with.
LIVE = frozenset({"running", "restarting", "paused"})

_MIB = 1024**2
_GIB = 1024**3
#: By convention the exit code of a process that a signal ended is this and the signal's number.
_SIGNALLED = 128
_KILLED = _SIGNALLED + signal.SIGKILL
#: Of what a HEALTHCHECK prints.
_MAX_CHARACTERS = 200


class Heard(Struct):
    """What events told of a container: its exit code, the last signal that came through Docker, an OOM."""

    exit_code: int | None = None
    signal: int = 0
    out_of_memory: bool = False

    def note(self, event: Mapping[str, Any]) -> None:
        """Take in an event of the Docker Engine API; those that say nothing of an end are passed over."""
        attributes = (event.get("Actor") or {}).get("Attributes") or {}
        match event.get("Action"):
            case "start":
                # What came before is of an earlier life.
                self.exit_code, self.signal, self.out_of_memory = None, 0, False
            case "kill":
                self.signal = _number(attributes.get("signal")) or 0
            case "oom":
                self.out_of_memory = True
            case "die":
                self.exit_code = _number(attributes.get("exitCode"))


def restarted(before: Mapping[str, Any], now: Mapping[str, Any]) -> bool:
    """Whether a container that runs has ended and was started anew since it was looked at before."""
    return bool(before["State"].get("StartedAt") != now["State"].get("StartedAt"))


def how_it_ended(attributes: Mapping[str, Any] | None, heard: Heard) -> tuple[int | None, str]:
    """The exit code of a container (negative for a signal, None if not known), and what happened to it.

    Args:
        attributes: as inspected after its end, or when it was last seen; None if it was never seen.
        heard: outdoes the state where both tell the same, for a state may be from before the end.
    """
    state = attributes["State"] if attributes is not None else {}
    code = heard.exit_code
    if code is None and state and state.get("Status") not in LIVE:
        code = int(state.get("ExitCode", 0))
    through_docker = f"{_name(heard.signal)} was sent through Docker" if heard.signal else ""
    if attributes is not None and (heard.out_of_memory or state.get("OOMKilled")):
        why = f"out of memory ({_limit(attributes)})"
        if code in (None, _KILLED):
            return -signal.SIGKILL, f"was killed by the kernel: {why}"
        return code, f"ended with exit code {code} after the kernel had killed a process of it: {why}"
    if code is None:
        return None, "ended"
    by_signal = code - _SIGNALLED
    if by_signal in set(signal.Signals):
        by_docker = ", which was sent through Docker" if by_signal == heard.signal else ""
        return -by_signal, f"was ended by {_name(by_signal)}{by_docker}"
    return code, f"ended with exit code {code}" + (f" after {through_docker}" if through_docker else "")


def complaint_of(attributes: Mapping[str, Any]) -> str:
    """What the image's HEALTHCHECK finds wrong with a container; "" if nothing, or if it has none."""
    health = attributes["State"].get("Health") or {}
    if health.get("Status") != "unhealthy":
        return ""
    checks = health.get("Log") or [{}]
    lines = [line.strip() for line in str(checks[-1].get("Output") or "").splitlines()]
    said = next((line for line in reversed(lines) if line), "")[:_MAX_CHARACTERS]
    return f"its HEALTHCHECK fails: {said}" if said else "its HEALTHCHECK fails"


def _limit(attributes: Mapping[str, Any]) -> str:
    limit = int((attributes.get("HostConfig") or {}).get("Memory") or 0)
    if not limit:
        return "it has no limit of its own: the machine's memory was used up"
    return f"limit {limit / _GIB:.1f} GiB" if limit >= _GIB else f"limit {limit // _MIB} MiB"


def _name(number: int) -> str:
    return signal.Signals(number).name if number in set(signal.Signals) else f"signal {number}"


def _number(text: object) -> int | None:
    return int(text) if isinstance(text, str) and text.isdigit() else None
