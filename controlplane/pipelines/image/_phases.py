"""The phases of a picture, in the order in which they are told. Pure.

An attempt at a target tells each of them at least once, one after the other. A `route` among them begins
another attempt.
"""

from __future__ import annotations

from msgspec import Struct
from msgspec.structs import replace

from rung.types import Phase

#: All of them, in order.
IMAGE_PHASES = (
    Phase.HEALTH_CHECK,
    Phase.VRAM_ACQUIRE,
    Phase.SAFETY_FILTER,
    Phase.PROMPT_ENHANCE,
    Phase.MODEL_SWAP,
    Phase.WORKFLOW_BUILD,
    Phase.QUEUED,
    Phase.SAMPLING,
    Phase.ENCODING,
    Phase.DONE,
)
_PLACES = {phase: place for place, phase in enumerate(IMAGE_PHASES)}
#: What is told by others in words of their own, and the phase of a picture that this belongs to.
_BELONGS_TO = {
    Phase.ENGINE_START: Phase.VRAM_ACQUIRE,
    Phase.ENGINE_WAKE: Phase.VRAM_ACQUIRE,
    Phase.GENERATING: Phase.SAMPLING,
}
_SKIPPED = "Skipped"


class Told(Struct, frozen=True):
    """What is told of a phase."""

    phase: Phase
    detail: str = ""
    step: int | None = None
    total: int | None = None
    percent: float | None = None


class PhaseOrder:
    """Sees to it that what is told of one attempt is in order and complete, and said once."""

    def __init__(self) -> None:
        self._last: Told | None = None

    def tell(self, told: Told) -> tuple[Told, ...]:
        """What to tell, given what was told before: nothing of what was just said.

        What comes of a phase that is over, or of none of a picture's, is told of the one that is under way.
        A phase that was left out is told as skipped.
        """
        last = self._last
        before = -1 if last is None else _PLACES[last.phase]
        place = max(0, before, _PLACES.get(_BELONGS_TO.get(told.phase, told.phase), 0))
        now = replace(told, phase=IMAGE_PHASES[place])
        if now == last:
            return ()
        self._last = now
        return (*(Told(each, _SKIPPED) for each in IMAGE_PHASES[before + 1 : place]), now)
