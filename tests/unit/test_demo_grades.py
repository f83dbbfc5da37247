"""What the demo says while it waits for memory."""

from __future__ import annotations

import io

from rich.console import Console

from controlplane.demo._grades_act import Waiting
from controlplane.demo._screen import Screen
from rung.types import Phase, PhaseProgress, ReclaimAction, ReclaimGrade, ReclaimPlan, ReclaimStep

GIB = 1 << 30


class Told:
    """A demo's screen, and the time by a clock that is set by hand."""

    def __init__(self) -> None:
        self.now_s = 100.0
        self._file = io.StringIO()
        screen = Screen(Console(file=self._file, width=120))
        self.waiting = Waiting(screen, lambda: self.now_s)

    def hear(self, at_s: float, detail: str) -> None:
        self.now_s = 100.0 + at_s
        self.waiting.hear(PhaseProgress(Phase.VRAM_ACQUIRE, detail))

    @property
    def lines(self) -> list[str]:
        return [" ".join(line.split()) for line in self._file.getvalue().splitlines()]


def test_a_step_is_told_at_its_end_with_the_bytes_and_seconds_that_were_heard() -> None:
    told = Told()
    step = ReclaimStep(
        deployment_id="reasoner", action=ReclaimAction.SLEEP, expected_bytes=9 * GIB, expected_s=2.0
    )
    plan = ReclaimPlan(grade=ReclaimGrade.STANDARD, steps=(step,), expected_free_bytes=12 * GIB)
    told.waiting.hear(plan)
    told.hear(1.0, "putting reasoner to sleep")
    told.hear(2.5, "putting reasoner to sleep: 9.5 GiB freed")
    told.hear(2.6, "putting reasoner to sleep: 9.5 GiB freed")
    told.now_s = 103.0
    told.waiting.granted("standard")
    assert told.lines == [
        "0.00 s making room: put to sleep reasoner: 9.0 GiB, about 2.0 s",
        "2.5 s putting reasoner to sleep: 9.5 GiB freed in 1.5 s",
        "3.0 s granted, grade STANDARD",
    ]


def test_a_reason_to_wait_is_told_once_if_it_lasts() -> None:
    told = Told()
    told.hear(0.0, "waiting for its turn")
    told.hear(0.1, "workstation/0 was not measured lately")
    told.hear(0.6, "workstation/0 was not measured lately")
    told.now_s = 101.0
    told.waiting.granted("quick")
    assert told.lines == [
        "0.10 s workstation/0 was not measured lately",
        "1.0 s granted, grade QUICK, nobody was disturbed",
    ]


def test_a_step_that_did_not_work_is_told_as_it_was_heard() -> None:
    told = Told()
    told.hear(1.0, "putting reasoner to sleep")
    told.hear(9.0, "putting reasoner to sleep did not work: it does not answer")
    assert told.lines == [
        "1.0 s putting reasoner to sleep",
        "9.0 s putting reasoner to sleep did not work: it does not answer",
    ]
