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
#: Sampling is told in steps of so many percent, and its last one.
_STEP_PERCENT = 10.0


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
        #: How far sampling was told to be; and the same of what has its words now, such as a second sampler.
        self._percent = -_STEP_PERCENT
        self._own: tuple[str, float] = ("", -_STEP_PERCENT)

    def tell(self, told: Told) -> tuple[Told, ...]:
        """What to tell, given what was told before: nothing of what was just said.

        What comes of a phase that is over, or of none of a picture's, is told of the one that is under way,
        if it has words. A phase that was left out is told as skipped. Sampling never goes back.
        """
        last = self._last
        before = -1 if last is None else _PLACES[last.phase]
        own = _PLACES.get(_BELONGS_TO.get(told.phase, told.phase), 0)
        place = max(0, before, own)
        if own < place and not told.detail:
            # Its numbers would be read as those of another phase.
            return ()
        moved = replace(told, phase=IMAGE_PHASES[place])
        now = self._sampled(moved) if moved.phase is Phase.SAMPLING else moved
        if now is None or now == last:
            return ()
        self._last = now
        return (*(Told(each, _SKIPPED) for each in IMAGE_PHASES[before + 1 : place]), now)

    def _sampled(self, now: Told) -> Told | None:
        """What to tell of sampling; None for nothing."""
        percent = now.percent
        if percent is None:
            return now
        words, own = self._own
        if now.detail != words:
            own = -_STEP_PERCENT
        is_last = percent >= 100.0 > own
        if percent - own < _STEP_PERCENT and not is_last:
            return None
        self._own = (now.detail, percent)
        # Another sampler begins at nothing, and the whole does not.
        stands = percent >= self._percent + _STEP_PERCENT or percent >= 100.0 > self._percent
        if not stands:
            return replace(now, percent=None)
        self._percent = percent
        return now
