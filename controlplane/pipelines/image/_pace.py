"""How fast pictures are drawn: what is learnt from one, and what is therefore expected of the next. Pure."""

from __future__ import annotations

from typing import Protocol

from msgspec import Struct


class EstimatesPort(Protocol):
    """What was learnt, as `controlplane.estimates.Estimates` has it."""

    def expected_s(self, deployment_id: str, step: str, units: float = 1.0) -> float | None:
        """Seconds that so many units of a step take; None if that is not known."""
        ...

    def observe(self, deployment_id: str, step: str, seconds: float, units: float = 1.0) -> None:
        """Learn that they took so many seconds."""
        ...


class Drawing(Struct, frozen=True, kw_only=True):
    """What is drawn, as far as its time depends on it.

    Attributes:
        deployment_id: where.
        model: the checkpoint, with the operation where that is not `generate`.
        megapixels: of all pictures together.
        steps: of sampling.
        is_loaded: the model is there already.
    """

    deployment_id: str
    model: str
    megapixels: float
    steps: int
    is_loaded: bool

    @property
    def start_step(self) -> str:
        """Name of what comes before the first step of sampling."""
        return f"{'sampling_start' if self.is_loaded else 'model_load'}:{self.model}"

    @property
    def sampling_step(self) -> str:
        """Name of a step of sampling on a megapixel."""
        return f"sampling_step:{self.model}"

    @property
    def encoding_step(self) -> str:
        """Name of what comes after the last step of sampling, for a megapixel."""
        return f"encoding:{self.model}"


class Pace:
    """Follows a drawing by the clock.

    Args:
        drawing: what is drawn.
        estimates: what was learnt before, and learns of this one.
    """

    def __init__(self, drawing: Drawing, estimates: EstimatesPort) -> None:
        self._drawing = drawing
        self._estimates = estimates
        self._submitted_s = 0.0
        #: The first step and the newest one, with their times; steps are counted from 1.
        self._first: tuple[int, float] | None = None
        self._newest: tuple[int, float] | None = None
        #: More than one sampler, or one that begins again: steps say nothing of the whole.
        self._odd = False

    def start_s(self) -> float | None:
        """What is expected from the submission to the first step."""
        return self._estimates.expected_s(self._drawing.deployment_id, self._drawing.start_step)

    def sampling_s(self, steps: int | None = None) -> float | None:
        """What so many steps are expected to take, or all of them."""
        steps = self._drawing.steps if steps is None else steps
        drawing = self._drawing
        expected_s = self._estimates.expected_s(
            drawing.deployment_id, drawing.sampling_step, steps * drawing.megapixels
        )
        own_s = self._step_s()
        return own_s * steps if own_s is not None else expected_s

    def encoding_s(self) -> float | None:
        """What is expected after the last step."""
        drawing = self._drawing
        return self._estimates.expected_s(drawing.deployment_id, drawing.encoding_step, drawing.megapixels)

    def submitted(self, now_s: float) -> None:
        """The engine has it now."""
        self._submitted_s = now_s

    def sampled(self, step: int, total: int, percent: float | None, now_s: float) -> float | None:
        """A step of sampling was done; returns what is expected of the rest, if that is known."""
        alone = percent is None or abs(percent - 100 * step / total) < 1
        if not alone or (self._newest is not None and step < self._newest[0]):
            self._odd = True
        if self._odd:
            return None
        if step > 0:
            self._first = self._first or (step, now_s)
            self._newest = (step, now_s)
        return self.sampling_s(total - step)

    def ended(self, now_s: float) -> None:
        """The pictures are there: learn from it."""
        step_s = self._step_s()
        if self._odd or self._first is None or self._newest is None or step_s is None:
            return
        drawing = self._drawing
        observe = self._estimates.observe
        observe(drawing.deployment_id, drawing.sampling_step, step_s, drawing.megapixels)
        step, first_s = self._first
        observe(drawing.deployment_id, drawing.start_step, first_s - self._submitted_s - step * step_s)
        observe(drawing.deployment_id, drawing.encoding_step, now_s - self._newest[1], drawing.megapixels)

    def _step_s(self) -> float | None:
        """What a step takes in this drawing, if more than one was seen."""
        if self._first is None or self._newest is None or self._newest[0] <= self._first[0]:
            return None
        return (self._newest[1] - self._first[1]) / (self._newest[0] - self._first[0])
