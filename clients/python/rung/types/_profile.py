"""Profiles: named divisions of the VRAM. Durations are seconds."""

from __future__ import annotations

from typing import TypeAlias

from msgspec import Struct

from rung.types._fleet import Residency
from rung.types._job import FailureReason


class ProfileEntry(Struct, frozen=True):
    """The residency that a profile wants of a deployment: AWAKE, ASLEEP or STOPPED.

    `gpu_memory_utilization` is the share of the GPU's memory that vLLM reserves; 0 leaves its own.
    """

    deployment_id: str
    residency: Residency
    gpu_memory_utilization: float = 0.0


class Profile(Struct, frozen=True, kw_only=True):
    """A named division of the VRAM. What it does not name stays as it is, and gives way if need be.

    With `hold`, what it wants asleep or stopped is not made awake while it is current.
    """

    name: str
    description: str = ""
    entries: tuple[ProfileEntry, ...] = ()
    hold: bool = False


class ProfileList(Struct, frozen=True, kw_only=True):
    """The profiles by name, and which of them was applied and verified ("" if none).

    `switching_to` is the one that a switch is under way to; `detail` says why none is current, or how the
    newest switch failed.
    """

    profiles: tuple[Profile, ...]
    current: str = ""
    switching_to: str = ""
    detail: str = ""


class ProfileStep(Struct, frozen=True, tag="step", tag_field="event", omit_defaults=True):
    """One change of one deployment, planned, under way or `done`: carried out, and measured afterwards.

    `expected_s` is the time that it takes, or while it is carried out the time left; None if not known.
    """

    deployment_id: str
    residency: Residency
    detail: str = ""
    expected_s: float | None = None
    done: bool = False


class ProfilePlan(Struct, frozen=True, tag="plan", tag_field="event"):
    """Steps in order; `going_back` if they are taken because one of the switch failed."""

    steps: tuple[ProfileStep, ...]
    going_back: bool = False


class ProfileDone(Struct, frozen=True, tag="done", tag_field="event"):
    """The profile is applied and verified."""

    name: str


class ProfileFailed(Struct, frozen=True, tag="failed", tag_field="event"):
    """The switch failed; `current` is the profile that is now current, "" if none is."""

    reason: FailureReason
    detail: str
    current: str = ""


ProfilePayload: TypeAlias = ProfilePlan | ProfileStep | ProfileDone | ProfileFailed


class ProfileEvent(Struct, frozen=True):
    """One step of a switch; the last is `ProfileDone` or `ProfileFailed`, of a dry run its `ProfilePlan`."""

    operation_id: str
    sequence: int
    elapsed_s: float
    payload: ProfilePayload
