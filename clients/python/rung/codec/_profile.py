"""Profiles and the events of a switch."""

from __future__ import annotations

from rung import v1
from rung.codec._deployment import RESIDENCIES
from rung.codec._job import failure_reason_from_proto, failure_reason_to_proto
from rung.codec._values import duration_from_proto, duration_to_proto
from rung.types import (
    FailureReason,
    Profile,
    ProfileDone,
    ProfileEntry,
    ProfileEvent,
    ProfileFailed,
    ProfileList,
    ProfilePayload,
    ProfilePlan,
    ProfileStep,
    Residency,
)


def profile_to_proto(value: Profile) -> v1.Profile:
    """Encode a profile."""
    return v1.Profile(
        name=value.name,
        description=value.description,
        entries=[
            v1.ProfileEntry(
                deployment_id=entry.deployment_id,
                residency=RESIDENCIES.to_proto[entry.residency],
                gpu_memory_utilization=entry.gpu_memory_utilization,
            )
            for entry in value.entries
        ],
        hold=value.hold,
    )


def profile_from_proto(message: v1.Profile) -> Profile:
    """Decode a profile."""
    return Profile(
        name=message.name,
        description=message.description,
        entries=tuple(
            ProfileEntry(
                entry.deployment_id, RESIDENCIES.from_proto(entry.residency), entry.gpu_memory_utilization
            )
            for entry in message.entries
        ),
        hold=message.hold,
    )


def profile_list_to_proto(value: ProfileList) -> v1.ListProfilesResponse:
    """Encode the profiles and which is current."""
    return v1.ListProfilesResponse(
        profiles=[profile_to_proto(profile) for profile in value.profiles],
        current=value.current,
        switching_to=value.switching_to,
        detail=value.detail,
    )


def profile_list_from_proto(message: v1.ListProfilesResponse) -> ProfileList:
    """Decode the profiles and which is current."""
    return ProfileList(
        profiles=tuple(profile_from_proto(profile) for profile in message.profiles),
        current=message.current,
        switching_to=message.switching_to,
        detail=message.detail,
    )


def profile_event_to_proto(value: ProfileEvent) -> v1.ProfileEvent:
    """Encode a step of a switch."""
    message = v1.ProfileEvent(
        operation_id=value.operation_id,
        sequence=value.sequence,
        elapsed=duration_to_proto(value.elapsed_s),
    )
    match value.payload:
        case ProfilePlan() as plan:
            steps = [_step_to_proto(step) for step in plan.steps]
            message.plan.CopyFrom(v1.ProfilePlan(steps=steps, going_back=plan.going_back))
        case ProfileStep() as step:
            message.step.CopyFrom(_step_to_proto(step))
        case ProfileDone() as done:
            message.done.CopyFrom(v1.ProfileDone(name=done.name))
        case ProfileFailed() as failed:
            message.failed.reason = failure_reason_to_proto(failed.reason)
            message.failed.detail = failed.detail
            message.failed.current = failed.current
    return message


def profile_event_from_proto(message: v1.ProfileEvent) -> ProfileEvent:
    """Decode a step of a switch. A kind that this version does not know reads as a step of nothing."""
    payload: ProfilePayload
    match message.WhichOneof("event"):
        case "plan":
            steps = tuple(_step_from_proto(step) for step in message.plan.steps)
            payload = ProfilePlan(steps, message.plan.going_back)
        case "step":
            payload = _step_from_proto(message.step)
        case "done":
            payload = ProfileDone(message.done.name)
        case "failed":
            reason = failure_reason_from_proto(message.failed.reason) or FailureReason.INTERNAL
            payload = ProfileFailed(reason, message.failed.detail, message.failed.current)
        case _:
            payload = ProfileStep("", Residency.UNKNOWN)
    return ProfileEvent(message.operation_id, message.sequence, duration_from_proto(message.elapsed), payload)


def _step_to_proto(value: ProfileStep) -> v1.ProfileStep:
    return v1.ProfileStep(
        deployment_id=value.deployment_id,
        residency=RESIDENCIES.to_proto[value.residency],
        detail=value.detail,
        expected=None if value.expected_s is None else duration_to_proto(value.expected_s),
        done=value.done,
    )


def _step_from_proto(message: v1.ProfileStep) -> ProfileStep:
    return ProfileStep(
        deployment_id=message.deployment_id,
        residency=RESIDENCIES.from_proto(message.residency),
        detail=message.detail,
        expected_s=duration_from_proto(message.expected) if message.HasField("expected") else None,
        done=message.done,
    )
