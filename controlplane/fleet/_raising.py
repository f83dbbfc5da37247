"""What is told while a deployment is made awake."""

from __future__ import annotations

from msgspec import Struct

from controlplane.vram import Planned, ReclaimAction, SchedulerEvent, Step, StepState, Waiting
from rung.types import LifecycleProgress, Phase, Residency

#: What a step is called while it is carried out.
_DOING = {
    ReclaimAction.SLEEP: "putting {} to sleep",
    ReclaimAction.STOP: "stopping {}",
    ReclaimAction.FREE: "flushing the cache of {}",
    ReclaimAction.SHRINK: "shrinking {}",
}


class RaisingProgress(Struct, frozen=True):
    """What is under way until a deployment is awake, in the phase of a job that it belongs to."""

    phase: Phase
    detail: str
    percent: float | None = None
    remaining_s: float | None = None


def progress_of_lifecycle(step: LifecycleProgress) -> RaisingProgress:
    """A word of the operation that starts or wakes it."""
    wakes = step.residency in (Residency.WAKING, Residency.ASLEEP)
    phase = Phase.ENGINE_WAKE if wakes else Phase.ENGINE_START
    return RaisingProgress(phase, step.detail, step.percent, step.remaining_s)


def progress_of_event(event: SchedulerEvent) -> RaisingProgress | None:
    """A scheduler's event in words; None for a grant and the like, which end the waiting.

    No remaining time: a plan is made of what was learnt, and of defaults where nothing was.
    """
    if isinstance(event, Waiting):
        return RaisingProgress(Phase.VRAM_ACQUIRE, event.detail)
    if isinstance(event, Planned):
        steps = len(event.plan.steps)
        detail = f"making room: {steps} step{'' if steps == 1 else 's'}, grade {event.plan.grade}"
        return RaisingProgress(Phase.VRAM_ACQUIRE, detail)
    if isinstance(event, Step):
        words = _DOING[event.step.action].format(event.step.deployment_id)
        if event.state is StepState.DONE:
            words = f"{words}: {event.freed_bytes / (1 << 30):.1f} GiB freed"
        elif event.state is StepState.FAILED:
            words = f"{words} did not work: {event.detail}"
        return RaisingProgress(Phase.VRAM_ACQUIRE, words)
    return None
