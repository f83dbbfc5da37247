"""Circuits: a target that fails is left alone for a while, then tried by one request before all come back.

Pure: time is given by the caller.
"""

from __future__ import annotations

from collections.abc import Callable
from enum import StrEnum

from msgspec import Struct


class CircuitState(StrEnum):
    """Whether requests go to a target."""

    CLOSED = "closed"
    OPEN = "open"
    HALF_OPEN = "half_open"


class CircuitOptions(Struct, frozen=True, kw_only=True):
    """When a circuit opens, and for how long.

    Attributes:
        failures: so many in a row open it.
        first_open_s: time that it stays open at first; doubled each time that the probe fails too.
        longest_open_s: never longer than this, unless the target itself asked for more.
        longest_retry_after_s: what a target asks for is believed up to here.
    """

    failures: int = 3
    first_open_s: float = 2.0
    longest_open_s: float = 60.0
    longest_retry_after_s: float = 3600.0


class _Circuit:
    __slots__ = ("detail", "failures", "open_until_s", "opened", "probing")

    def __init__(self) -> None:
        self.failures = 0
        self.opened = 0
        self.open_until_s = 0.0
        self.probing = False
        self.detail = ""


class Circuits:
    """One circuit for each target that failed since it last answered; the others cost nothing.

    Args:
        jitter: a factor for each time that a circuit stays open, so that many do not come back at once.
        options: when to open.
    """

    def __init__(self, *, jitter: Callable[[], float], options: CircuitOptions | None = None) -> None:
        self._options = options or CircuitOptions()
        self._jitter = jitter
        self._circuits: dict[str, _Circuit] = {}

    def __bool__(self) -> bool:
        return bool(self._circuits)

    def state(self, target: str, now_s: float) -> CircuitState:
        """Whether requests go to a target."""
        circuit = self._circuits.get(target)
        if circuit is None or circuit.open_until_s == 0.0:
            return CircuitState.CLOSED
        return CircuitState.OPEN if now_s < circuit.open_until_s else CircuitState.HALF_OPEN

    def allows(self, target: str, now_s: float) -> bool:
        """Whether a request may go to a target now."""
        circuit = self._circuits.get(target)
        return circuit is None or (circuit.open_until_s <= now_s and not circuit.probing)

    def left_alone(self, now_s: float) -> set[str]:
        """Targets that a request may not go to now."""
        return {target for target in self._circuits if not self.allows(target, now_s)}

    def refusal(self, target: str, now_s: float) -> str:
        """Why a request is not to go to a target now; empty if it may."""
        if self.allows(target, now_s):
            return ""
        circuit = self._circuits[target]
        left_s = circuit.open_until_s - now_s
        then = f"it is tried again in {left_s:.0f} s" if left_s > 0 else "one request is trying it again"
        return f"it failed ({circuit.detail}); {then}"

    def begin(self, target: str, now_s: float) -> None:
        """A request goes to a target: the first one after its time is the probe that others wait for."""
        circuit = self._circuits.get(target)
        if circuit is not None and 0.0 < circuit.open_until_s <= now_s:
            circuit.probing = True

    def answers(self, target: str) -> None:
        """A target began to answer: others may go to it.

        Its failures count until an answer has come to its end, for it may break each of them off.
        """
        circuit = self._circuits.get(target)
        if circuit is not None:
            circuit.probing = False
            circuit.open_until_s = 0.0

    def succeeded(self, target: str) -> None:
        """A target answered to the end: it has a clean sheet."""
        if self._circuits:
            self._circuits.pop(target, None)

    def abandoned(self, target: str) -> None:
        """A request ended without telling anything of its target: its caller left."""
        circuit = self._circuits.get(target)
        if circuit is not None:
            circuit.probing = False

    def failed(self, target: str, now_s: float, detail: str, *, retry_after_s: float | None = None) -> None:
        """A target failed.

        Args:
            target: which.
            now_s: now, on the clock of the other calls.
            detail: one line for a person.
            retry_after_s: how long the target itself asked to be left alone; 0 says no more than None.
        """
        options = self._options
        circuit = self._circuits.setdefault(target, _Circuit())
        circuit.failures += 1
        circuit.detail = detail
        was_probe, circuit.probing = circuit.probing, False
        if retry_after_s is not None and retry_after_s > 0.0:
            left_alone_s = min(retry_after_s, options.longest_retry_after_s)
            circuit.open_until_s = max(circuit.open_until_s, now_s + left_alone_s)
            return
        if was_probe or circuit.failures >= options.failures:
            if now_s < circuit.open_until_s:
                # Requests that were under way when it opened tell nothing new.
                return
            open_s = min(options.first_open_s * 2.0 ** min(circuit.opened, 30), options.longest_open_s)
            circuit.opened += 1
            circuit.open_until_s = now_s + open_s * self._jitter()
