"""What a job is told of a picture: the phases in order, with what is left of the time where that is known."""

from __future__ import annotations

import asyncio

from controlplane.jobs import LiveJob
from controlplane.pipelines.image._outlook import Outlook
from controlplane.pipelines.image._phases import PhaseOrder, Told
from rung.types import Phase, Served


class Telling:
    """Tells a job of one attempt at a target. It is also the job of who makes the target ready.

    Attributes:
        id: of the job.
        model: what the caller named.
    """

    def __init__(self, job: LiveJob) -> None:
        self.id = job.id
        self.model = job.model
        self._job = job
        self._order = PhaseOrder()
        self._outlook = Outlook()
        self._now_s = asyncio.get_running_loop().time
        self._began_s = self._now_s()
        self._phase: Phase | None = None
        self._phase_began_s = 0.0

    def expect(self, phase: Phase, expected_s: float | None) -> None:
        """A phase is expected to take so long in all; None if nobody knows."""
        self._outlook.expect(phase, expected_s)

    def tell(
        self,
        phase: Phase,
        detail: str = "",
        *,
        step: int | None = None,
        total: int | None = None,
        percent: float | None = None,
        left_s: float | None = None,
    ) -> None:
        """Say that a phase began, or moved on; `left_s` is what is known better of its rest."""
        now_s = self._now_s()
        for told in self._order.tell(Told(phase, detail, step, total, percent)):
            if told.phase is not self._phase:
                self._phase, self._phase_began_s = told.phase, now_s
            known_s = left_s if told.phase is phase else None
            own_s, whole_s = self._outlook.left_s(
                told.phase, now_s - self._phase_began_s, known_s, attempt_s=now_s - self._began_s
            )
            self._job.progress(
                told.phase,
                told.detail,
                step=told.step,
                total=told.total,
                percent=told.percent,
                remaining_s=_rounded(own_s),
                job_remaining_s=_rounded(whole_s),
            )

    def routed(self, served: Served) -> None:
        """Say who draws."""
        self._job.routed(served)

    # As who makes a target ready sees the job.

    def progress(
        self,
        phase: Phase,
        detail: str = "",
        *,
        percent: float | None = None,
        remaining_s: float | None = None,
    ) -> None:
        """A target is made ready, or a slot of it is waited for: that is before its own queue."""
        if phase is Phase.QUEUED:
            phase = Phase.HEALTH_CHECK
        if phase is Phase.HEALTH_CHECK and remaining_s is None:
            self._outlook.expect(phase, None)
        self.tell(phase, detail, percent=percent, left_s=remaining_s)

    def begin_generating(self, served: Served) -> None:
        """Say who draws."""
        self.routed(served)

    def spent(self, cost_usd: float) -> None:
        """Say what a cloud model took."""
        self._job.spent(cost_usd)


def _rounded(seconds: float | None) -> float | None:
    return None if seconds is None else round(seconds, 1)
