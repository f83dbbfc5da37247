"""Which residency may follow which. The table is the state machine; nothing else moves a deployment."""

from __future__ import annotations

from rung.types import Residency

R = Residency

#: From each residency, those that may follow. FAILED may follow whatever has, or gets, an engine.
EDGES: dict[Residency, frozenset[Residency]] = {
    # An agent that comes back may find that what it left running is gone.
    R.STOPPED: frozenset({R.STARTING, R.FAILED}),
    # What others run may be found asleep.
    R.STARTING: frozenset({R.AWAKE, R.ASLEEP, R.STOPPING, R.FAILED}),
    # Without having been told to: Ollama lets go of a model by itself, and others have hands, too.
    R.AWAKE: frozenset({R.FALLING_ASLEEP, R.ASLEEP, R.STOPPING, R.FAILED}),
    R.FALLING_ASLEEP: frozenset({R.ASLEEP, R.AWAKE, R.FAILED}),
    R.ASLEEP: frozenset({R.WAKING, R.AWAKE, R.STOPPING, R.FAILED}),
    # One that refuses to wake sleeps on.
    R.WAKING: frozenset({R.AWAKE, R.ASLEEP, R.FAILED}),
    R.STOPPING: frozenset({R.STOPPED, R.FAILED}),
    # An engine of somebody else that answers again is awake without having been started by us, or asleep.
    R.FAILED: frozenset({R.STARTING, R.STOPPING, R.STOPPED, R.AWAKE, R.ASLEEP}),
}


def require_edge(current: Residency, following: Residency) -> None:
    """Refuse a move that the table has not; one to itself changes the detail only.

    Raises:
        ValueError: a defect of the caller.
    """
    if following is not current and following not in EDGES.get(current, frozenset()):
        raise ValueError(f"a deployment does not go from {current} to {following}")
