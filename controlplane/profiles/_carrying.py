"""Carrying out one step of a switch, and making sure of it."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import Callable, Sequence
from contextlib import aclosing

from msgspec.structs import replace

from controlplane.fleet import Fleet, LifecycleAction
from rung import error_of_failure
from rung.errors import EngineStartFailedError, NodeUnreachableError, UnavailableError
from rung.types import (
    LifecycleDone,
    LifecycleFailed,
    LifecycleProgress,
    ProfileEntry,
    ProfileStep,
    Residency,
)

_GIB = 1 << 30
_SLEEPING = frozenset({Residency.FALLING_ASLEEP, Residency.ASLEEP, Residency.WAKING})
#: An agent says once a second what it measures; one that has not for so long is away.
_FRESH_S = 4.0


def is_as_wanted(fleet: Fleet, deployment_id: str, wanted: Residency) -> bool:
    """Whether a deployment is where it is wanted; one that failed holds nothing, as one that is stopped."""
    residency = residency_of(fleet, deployment_id)
    return residency is wanted or (wanted is Residency.STOPPED and residency is Residency.FAILED)


def residency_of(fleet: Fleet, deployment_id: str) -> Residency:
    """Where a deployment is now; UNKNOWN if it is gone."""
    found = fleet.view.deployments.get(deployment_id)
    return found.deployment.residency if found is not None else Residency.UNKNOWN


def differing(fleet: Fleet, entries: Sequence[ProfileEntry]) -> dict[str, str]:
    """Those that are not as wanted, each with how it is."""
    return {
        entry.deployment_id: f"{residency_of(fleet, entry.deployment_id)}, not {entry.residency}"
        for entry in entries
        if not is_as_wanted(fleet, entry.deployment_id, entry.residency)
    }


async def carry_out(fleet: Fleet, step: ProfileStep, say: Callable[[ProfileStep], None]) -> None:
    """Take a step, and wait until its node was measured after it and shows what was wanted.

    Args:
        fleet: the fleet.
        step: what to do.
        say: told whatever there is to tell; the last is the step, done.

    Raises:
        RungError: it did not work, or cannot be verified.
    """
    say(step)
    if is_as_wanted(fleet, step.deployment_id, step.residency):
        say(replace(step, detail=f"is {step.residency} already", expected_s=None, done=True))
        return
    operation_id = f"profile-{step.deployment_id}-{uuid.uuid4().hex[:12]}"
    action = _action(fleet, step)
    # Asleep is with the weights in host RAM.
    level = 1 if action is LifecycleAction.SLEEP else 0
    operation = fleet.lifecycle(action, step.deployment_id, operation_id, level=level)
    freed_bytes: int | None = None
    async with aclosing(operation) as events:
        async for event in events:
            match event.payload:
                case LifecycleProgress() as progress:
                    detail = progress.detail or str(progress.residency)
                    say(replace(step, detail=detail, expected_s=progress.remaining_s))
                case LifecycleDone() as done:
                    freed_bytes = done.freed_bytes
                case LifecycleFailed() as failed:
                    raise error_of_failure(failed)
    say(replace(step, detail="measuring", expected_s=None))
    await _verify(fleet, step)
    say(replace(step, detail=_measured_words(fleet, step, freed_bytes), expected_s=None, done=True))


def _action(fleet: Fleet, step: ProfileStep) -> LifecycleAction:
    if step.residency is Residency.STOPPED:
        return LifecycleAction.STOP
    if step.residency is Residency.ASLEEP:
        return LifecycleAction.SLEEP
    asleep = residency_of(fleet, step.deployment_id) in _SLEEPING
    return LifecycleAction.WAKE if asleep else LifecycleAction.START


async def _verify(fleet: Fleet, step: ProfileStep) -> None:
    """Wait until the node says, later than now, how the deployment is. Raises UnavailableError."""
    loop = asyncio.get_running_loop()
    ended_s = loop.time()
    while True:
        found = fleet.view.deployments.get(step.deployment_id)
        if found is None:
            raise UnavailableError(f"{step.deployment_id} is no longer deployed")
        fresh = fleet.session(found.node.id).measured_s > ended_s
        if fresh and is_as_wanted(fleet, step.deployment_id, step.residency):
            return
        left_s = ended_s + _FRESH_S - loop.time()
        if left_s <= 0:
            break
        await fleet.wait_changed(left_s)
    if not fresh:
        raise NodeUnreachableError(f"{found.node.id} has not measured since", node=found.node.id)
    deployment = found.deployment
    why = f" ({deployment.detail})" if deployment.detail else ""
    raise EngineStartFailedError(
        f"{step.deployment_id} is {deployment.residency}, not {step.residency}{why}",
        deployment=step.deployment_id,
    )


def _measured_words(fleet: Fleet, step: ProfileStep, freed_bytes: int | None) -> str:
    deployment = fleet.view.deployments[step.deployment_id].deployment
    words = str(deployment.residency)
    if freed_bytes:
        words += f", {freed_bytes / _GIB:.1f} GiB freed"
    if deployment.vram_bytes:
        words += f", holds {deployment.vram_bytes / _GIB:.1f} GiB"
    return words
