"""What a policy is: how a request gets from its arrival to an engine that is ready for it."""

from __future__ import annotations

from contextlib import AbstractAsyncContextManager
from typing import Protocol

from controlplane.simulation._node import TraceEngine
from controlplane.simulation._requests import Request
from controlplane.vram import GRADES
from rung.types import ReclaimAction, ReclaimGrade, ResidencyClass


class Visit:
    """What a request needed.

    Attributes:
        swapped: something had to give way, or had to be loaded, woken or started, for it or for those that
            it joined.
        grade: how much others were disturbed.
    """

    __slots__ = ("grade", "swapped")

    def __init__(self) -> None:
        self.swapped = False
        self.grade = ReclaimGrade.QUICK

    def disturbed(self, grade: ReclaimGrade) -> None:
        """Others gave way for it."""
        self.swapped = True
        self.grade = max(self.grade, grade, key=GRADES.index)


def grade_of(engine: TraceEngine, action: ReclaimAction) -> ReclaimGrade:
    """The grade at which Rung would do that to an engine, so that the policies can be compared."""
    if action is ReclaimAction.FREE:
        return ReclaimGrade.FULL
    if action is ReclaimAction.STOP and engine.kind is ResidencyClass.SLEEPABLE and engine.sleep_levels:
        return ReclaimGrade.FULL
    return ReclaimGrade.STANDARD


class Policy(Protocol):
    """Decides who is in the GPU."""

    async def run(self) -> None:
        """What it does of its own accord, until cancelled."""
        ...

    def admit(self, request: Request, visit: Visit) -> AbstractAsyncContextManager[None]:
        """Wait until the engine is awake, the request has a slot of it, and there is room.

        An image's checkpoint is loaded afterwards, into room that was promised to its engine.

        Raises:
            RungError: it cannot be served.
        """
        ...
