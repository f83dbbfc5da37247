"""What somebody who waits for memory is told, in order, until the grant or the raise ends it."""

from __future__ import annotations

from enum import StrEnum

from msgspec import Struct

from controlplane.vram._leases import Lease
from rung.types import ReclaimPlan, ReclaimStep


class Waiting(Struct, frozen=True, kw_only=True, tag="waiting", tag_field="event"):
    """Nothing new: why it waits.

    Attributes:
        detail: one line for a person.
        position: place in the queue of the pool, from 1.
        expected_s: how much longer what is under way should take; None if nobody knows.
    """

    detail: str
    position: int
    expected_s: float | None = None


class Planned(Struct, frozen=True, kw_only=True, tag="planned", tag_field="event"):
    """How room is made from here on. Another one follows when the truth turned out to be different."""

    plan: ReclaimPlan


class StepState(StrEnum):
    """How far a step is."""

    BEGUN = "begun"
    DONE = "done"
    FAILED = "failed"


class Step(Struct, frozen=True, kw_only=True, tag="step", tag_field="event"):
    """A step began or ended.

    Attributes:
        freed_bytes: what it freed; 0 before it is done.
        elapsed_s: since it began.
        detail: why it failed; empty otherwise.
    """

    step: ReclaimStep
    state: StepState
    freed_bytes: int = 0
    elapsed_s: float = 0.0
    detail: str = ""


class Granted(Struct, frozen=True, kw_only=True, tag="granted", tag_field="event"):
    """The lease; nothing follows."""

    lease: Lease


class Raised(Struct, frozen=True, kw_only=True, tag="raised", tag_field="event"):
    """The deployment is awake; nothing follows."""

    deployment_id: str


#: What `NodeScheduler.acquire` and `NodeScheduler.raise_deployment` yield.
SchedulerEvent = Waiting | Planned | Step | Granted | Raised
