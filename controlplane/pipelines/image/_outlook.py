"""How much longer it takes, of a phase and of the whole job: stated only where it is known. Pure."""

from __future__ import annotations

from controlplane.pipelines.image._phases import IMAGE_PHASES
from rung.types import Phase

#: Phases that take no time that anybody would wait for, unless something else is said.
_INSTANT = frozenset(
    {Phase.HEALTH_CHECK, Phase.SAFETY_FILTER, Phase.MODEL_SWAP, Phase.WORKFLOW_BUILD, Phase.DONE}
)
#: Goes on from the beginning of an attempt, beside the phases before it: what those take is not waited twice.
_BESIDE = Phase.PROMPT_ENHANCE


class Outlook:
    """What is expected of each phase of an attempt, in seconds; None where nobody knows."""

    def __init__(self) -> None:
        self._expected_s: dict[Phase, float | None] = {
            phase: 0.0 if phase in _INSTANT else None for phase in IMAGE_PHASES
        }

    def expect(self, phase: Phase, expected_s: float | None) -> None:
        """A phase is expected to take so long from its beginning to its end."""
        self._expected_s[phase] = expected_s

    def left_s(
        self, phase: Phase, passed_s: float, known_s: float | None = None, *, attempt_s: float = 0.0
    ) -> tuple[float | None, float | None]:
        """How much longer the phase takes, and how much longer the job.

        Args:
            phase: what is under way.
            passed_s: since it began.
            known_s: what is known better of the rest of this phase.
            attempt_s: since the attempt began.

        Returns:
            None for either where it is not known, or has taken longer than that already.
        """
        expected_s = self._expected_s[phase]
        own_s = known_s
        if phase is _BESIDE:
            passed_s = attempt_s
        if own_s is None and expected_s is not None and (expected_s == 0.0 or passed_s < expected_s):
            own_s = max(0.0, expected_s - passed_s)
        if own_s is None:
            return None, None
        whole_s = own_s
        for later in IMAGE_PHASES[IMAGE_PHASES.index(phase) + 1 :]:
            later_s = self._expected_s[later]
            if later_s is None:
                return own_s or None, None
            whole_s += max(0.0, later_s - attempt_s - whole_s) if later is _BESIDE else later_s
        return own_s or None, whole_s
