"""Jobs and their events.

`write_job_event` runs once a token: it fills a message in place, which costs half of building one
from parts, and finds the writer of a payload by its type.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from rung import v1
from rung.codec._values import (
    EnumCodec,
    duration_from_proto,
    duration_to_proto,
    timestamp_from_proto,
    timestamp_to_proto,
    write_duration,
    write_time,
)
from rung.types import (
    ArtifactChunk,
    ConsideredTarget,
    EmbeddingResult,
    EventPayload,
    FailureReason,
    Job,
    JobAccepted,
    JobCancelled,
    JobDone,
    JobEvent,
    JobFailed,
    JobKind,
    JobState,
    Model,
    Phase,
    PhaseProgress,
    Policy,
    Priority,
    Routed,
    RouteExplanation,
    Served,
    TokenDelta,
    ToolCallDelta,
    Usage,
    UsageReported,
)

JOB_STATES = EnumCodec(JobState, v1.JobState, prefix="JOB_STATE_", unknown=JobState.PENDING)
JOB_KINDS = EnumCodec(JobKind, v1.JobKind, prefix="JOB_KIND_", unknown=JobKind.CHAT)
PRIORITIES = EnumCodec(Priority, v1.Priority, prefix="PRIORITY_", unknown=Priority.AGENT)
PHASES = EnumCodec(Phase, v1.Phase, prefix="PHASE_", unknown=Phase.GENERATING)
FAILURE_REASONS = EnumCodec(
    FailureReason, v1.FailureReason, prefix="FAILURE_REASON_", unknown=FailureReason.INTERNAL
)


def failure_reason_to_proto(value: FailureReason | None) -> v1.FailureReason.ValueType:
    """None is UNSPECIFIED."""
    return v1.FAILURE_REASON_UNSPECIFIED if value is None else FAILURE_REASONS.to_proto[value]


def failure_reason_from_proto(number: int) -> FailureReason | None:
    """UNSPECIFIED is None."""
    return FAILURE_REASONS.from_proto(number) if number else None


def policy_to_proto(value: Policy) -> v1.Policy:
    """Encode a policy."""
    return v1.Policy(
        local_only=value.local_only,
        priority=PRIORITIES.to_proto[value.priority],
        detached=value.detached,
        bridge_allowed=value.bridge_allowed,
    )


def policy_from_proto(message: v1.Policy) -> Policy:
    """Decode a policy; an empty message is the default policy."""
    return Policy(
        local_only=message.local_only,
        priority=PRIORITIES.from_proto(message.priority),
        detached=message.detached,
        bridge_allowed=message.bridge_allowed,
    )


def usage_to_proto(value: Usage) -> v1.Usage:
    """Encode a usage."""
    return v1.Usage(
        prompt_tokens=value.prompt_tokens,
        completion_tokens=value.completion_tokens,
        cached_tokens=value.cached_tokens,
        cost_usd=value.cost_usd,
    )


def usage_from_proto(message: v1.Usage) -> Usage:
    """Decode a usage."""
    return Usage(message.prompt_tokens, message.completion_tokens, message.cached_tokens, message.cost_usd)


def served_to_proto(value: Served) -> v1.Served:
    """Encode who served."""
    return v1.Served(requested=value.requested, target=value.target, node=value.node, model=value.model)


def served_from_proto(message: v1.Served) -> Served:
    """Decode who served."""
    return Served(message.requested, message.target, message.node, message.model)


def job_to_proto(value: Job) -> v1.Job:
    """Encode a job."""
    return v1.Job(
        id=value.id,
        request_id=value.request_id,
        kind=JOB_KINDS.to_proto[value.kind],
        state=JOB_STATES.to_proto[value.state],
        model=value.model,
        served=served_to_proto(value.served) if value.served else None,
        create_time=timestamp_to_proto(value.create_time_s),
        end_time=None if value.end_time_s is None else timestamp_to_proto(value.end_time_s),
        last_sequence=value.last_sequence,
        failure_reason=failure_reason_to_proto(value.failure_reason),
        detail=value.detail,
        usage=usage_to_proto(value.usage) if value.usage else None,
        policy=policy_to_proto(value.policy),
    )


def job_from_proto(message: v1.Job) -> Job:
    """Decode a job."""
    return Job(
        id=message.id,
        request_id=message.request_id,
        kind=JOB_KINDS.from_proto(message.kind),
        state=JOB_STATES.from_proto(message.state),
        model=message.model,
        served=served_from_proto(message.served) if message.HasField("served") else None,
        create_time_s=timestamp_from_proto(message.create_time),
        end_time_s=timestamp_from_proto(message.end_time) if message.HasField("end_time") else None,
        last_sequence=message.last_sequence,
        failure_reason=failure_reason_from_proto(message.failure_reason),
        detail=message.detail,
        usage=usage_from_proto(message.usage) if message.HasField("usage") else None,
        policy=policy_from_proto(message.policy),
    )


def model_to_proto(value: Model) -> v1.Model:
    """Encode a model."""
    return v1.Model(
        id=value.id,
        deployments=value.deployments,
        ready=value.ready,
        context_tokens=value.context_tokens,
        capabilities=value.capabilities,
    )


def model_from_proto(message: v1.Model) -> Model:
    """Decode a model."""
    return Model(
        id=message.id,
        deployments=tuple(message.deployments),
        ready=message.ready,
        context_tokens=message.context_tokens,
        capabilities=tuple(message.capabilities),
    )


def route_explanation_to_proto(value: RouteExplanation) -> v1.ExplainRouteResponse:
    """Encode why a target would be taken."""
    return v1.ExplainRouteResponse(
        effort=value.effort,
        rung=value.rung,
        target=value.target,
        considered=[_considered_to_proto(each) for each in value.considered],
        why=value.why,
        reason=[_considered_to_proto(each) for each in value.reason],
    )


def route_explanation_from_proto(message: v1.ExplainRouteResponse) -> RouteExplanation:
    """Decode why a target would be taken."""
    return RouteExplanation(
        effort=message.effort,
        rung=message.rung,
        target=message.target,
        considered=tuple(_considered_from_proto(each) for each in message.considered),
        why=message.why,
        reason=tuple(_considered_from_proto(each) for each in message.reason),
    )


def _considered_to_proto(value: ConsideredTarget) -> v1.ConsideredTarget:
    wait_s = value.expected_wait_s
    return v1.ConsideredTarget(
        target=value.target,
        taken=value.taken,
        reason=value.reason,
        expected_wait=None if wait_s is None else duration_to_proto(wait_s),
        place=value.place,
    )


def _considered_from_proto(message: v1.ConsideredTarget) -> ConsideredTarget:
    has_wait = message.HasField("expected_wait")
    return ConsideredTarget(
        target=message.target,
        taken=message.taken,
        reason=message.reason,
        expected_wait_s=duration_from_proto(message.expected_wait) if has_wait else None,
        place=message.place,
    )


def job_event_to_proto(value: JobEvent) -> v1.JobEvent:
    """Encode an event."""
    message = v1.JobEvent()
    write_job_event(value, message)
    return message


def write_job_event(value: JobEvent, message: v1.JobEvent) -> None:
    """Encode an event into an empty message, such as the `event` of a response."""
    message.job_id = value.job_id
    message.sequence = value.sequence
    write_time(value.time_s, message.time)
    write_duration(value.elapsed_s, message.elapsed)
    payload = value.payload
    _WRITERS[type(payload)](payload, message)


def job_event_from_proto(message: v1.JobEvent) -> JobEvent | None:
    """Decode an event. None for a kind that this version does not know: skip it."""
    kind = message.WhichOneof("event")
    if kind is None:
        return None
    return JobEvent(
        message.job_id,
        message.sequence,
        timestamp_from_proto(message.time),
        duration_from_proto(message.elapsed),
        _READERS[kind](message),
    )


def _write_accepted(value: JobAccepted, message: v1.JobEvent) -> None:
    target = message.accepted
    target.kind = JOB_KINDS.to_proto[value.kind]
    target.model = value.model


def _write_routed(value: Routed, message: v1.JobEvent) -> None:
    message.routed.CopyFrom(served_to_proto(value.served))


def phase_progress_to_proto(value: PhaseProgress) -> v1.PhaseProgress:
    """Encode the progress of a phase."""
    return v1.PhaseProgress(
        phase=PHASES.to_proto[value.phase],
        detail=value.detail,
        step=value.step,
        total=value.total,
        percent=value.percent,
        phase_elapsed=duration_to_proto(value.phase_elapsed_s),
        remaining=None if value.remaining_s is None else duration_to_proto(value.remaining_s),
        job_remaining=None if value.job_remaining_s is None else duration_to_proto(value.job_remaining_s),
    )


def _write_progress(value: PhaseProgress, message: v1.JobEvent) -> None:
    message.progress.CopyFrom(phase_progress_to_proto(value))


def _write_token(value: TokenDelta, message: v1.JobEvent) -> None:
    write_token(value, message.token)


def write_token(value: TokenDelta, target: v1.TokenDelta) -> None:
    """Encode text into a member of a oneof."""
    # Set always: assigning is what selects the member of the oneof, even for an empty text.
    target.content = value.content
    if value.reasoning:
        target.reasoning = value.reasoning
    if value.choice:
        target.choice = value.choice


def _write_tool_call(value: ToolCallDelta, message: v1.JobEvent) -> None:
    target = message.tool_call
    target.index = value.index
    target.id = value.id
    target.name = value.name
    target.arguments = value.arguments
    target.choice = value.choice


def artifact_chunk_to_proto(value: ArtifactChunk) -> v1.ArtifactChunk:
    """Encode a piece of an artifact."""
    return v1.ArtifactChunk(
        artifact_id=value.artifact_id,
        content_type=value.content_type,
        offset_bytes=value.offset_bytes,
        data=value.data,
        sha256=value.sha256,
        size_bytes=value.size_bytes,
        length_bytes=value.length_bytes,
        preview=value.preview,
        seed=value.seed,
    )


def _write_artifact(value: ArtifactChunk, message: v1.JobEvent) -> None:
    message.artifact.CopyFrom(artifact_chunk_to_proto(value))


def _write_usage(value: UsageReported, message: v1.JobEvent) -> None:
    message.usage.CopyFrom(usage_to_proto(value.usage))


def embedding_vectors_to_proto(value: EmbeddingResult) -> list[v1.EmbeddingVector]:
    """Encode vectors. Components become 32-bit floats."""
    return [v1.EmbeddingVector(values=vector) for vector in value.vectors]


def _write_embedding(value: EmbeddingResult, message: v1.JobEvent) -> None:
    message.embedding.SetInParent()
    message.embedding.vectors.extend(embedding_vectors_to_proto(value))


def _write_done(value: JobDone, message: v1.JobEvent) -> None:
    message.done.finish_reason = value.finish_reason
    if value.served:
        message.done.served.CopyFrom(served_to_proto(value.served))


def _write_failed(value: JobFailed, message: v1.JobEvent) -> None:
    target = message.failed
    target.reason = FAILURE_REASONS.to_proto[value.reason]
    target.detail = value.detail
    target.delivered_characters = value.delivered_characters


def _write_cancelled(value: JobCancelled, message: v1.JobEvent) -> None:
    message.cancelled.by = value.by


_WRITERS: dict[type, Callable[[Any, v1.JobEvent], None]] = {
    JobAccepted: _write_accepted,
    Routed: _write_routed,
    PhaseProgress: _write_progress,
    TokenDelta: _write_token,
    ToolCallDelta: _write_tool_call,
    ArtifactChunk: _write_artifact,
    UsageReported: _write_usage,
    EmbeddingResult: _write_embedding,
    JobDone: _write_done,
    JobFailed: _write_failed,
    JobCancelled: _write_cancelled,
}


def _read_accepted(message: v1.JobEvent) -> JobAccepted:
    return JobAccepted(JOB_KINDS.from_proto(message.accepted.kind), message.accepted.model)


def _read_routed(message: v1.JobEvent) -> Routed:
    return Routed(served_from_proto(message.routed))


def phase_progress_from_proto(message: v1.PhaseProgress) -> PhaseProgress:
    """Decode the progress of a phase."""
    return PhaseProgress(
        phase=PHASES.from_proto(message.phase),
        detail=message.detail,
        step=message.step if message.HasField("step") else None,
        total=message.total if message.HasField("total") else None,
        percent=message.percent if message.HasField("percent") else None,
        phase_elapsed_s=duration_from_proto(message.phase_elapsed),
        remaining_s=duration_from_proto(message.remaining) if message.HasField("remaining") else None,
        job_remaining_s=(
            duration_from_proto(message.job_remaining) if message.HasField("job_remaining") else None
        ),
    )


def _read_progress(message: v1.JobEvent) -> PhaseProgress:
    return phase_progress_from_proto(message.progress)


def token_from_proto(message: v1.TokenDelta) -> TokenDelta:
    """Decode text."""
    return TokenDelta(message.content, message.reasoning, message.choice)


def _read_token(message: v1.JobEvent) -> TokenDelta:
    return token_from_proto(message.token)


def _read_tool_call(message: v1.JobEvent) -> ToolCallDelta:
    call = message.tool_call
    return ToolCallDelta(call.index, call.id, call.name, call.arguments, call.choice)


def artifact_chunk_from_proto(message: v1.ArtifactChunk) -> ArtifactChunk:
    """Decode a piece of an artifact."""
    return ArtifactChunk(
        artifact_id=message.artifact_id,
        content_type=message.content_type,
        offset_bytes=message.offset_bytes,
        data=message.data,
        sha256=message.sha256,
        size_bytes=message.size_bytes,
        length_bytes=message.length_bytes,
        preview=message.preview,
        seed=message.seed if message.HasField("seed") else None,
    )


def _read_artifact(message: v1.JobEvent) -> ArtifactChunk:
    return artifact_chunk_from_proto(message.artifact)


def _read_usage(message: v1.JobEvent) -> UsageReported:
    return UsageReported(usage_from_proto(message.usage))


def _read_embedding(message: v1.JobEvent) -> EmbeddingResult:
    return EmbeddingResult(tuple(tuple(vector.values) for vector in message.embedding.vectors))


def _read_done(message: v1.JobEvent) -> JobDone:
    done = message.done
    return JobDone(done.finish_reason, served_from_proto(done.served) if done.HasField("served") else None)


def _read_failed(message: v1.JobEvent) -> JobFailed:
    failed = message.failed
    return JobFailed(FAILURE_REASONS.from_proto(failed.reason), failed.detail, failed.delivered_characters)


def _read_cancelled(message: v1.JobEvent) -> JobCancelled:
    return JobCancelled(message.cancelled.by)


_READERS: dict[str, Callable[[v1.JobEvent], EventPayload]] = {
    "accepted": _read_accepted,
    "routed": _read_routed,
    "progress": _read_progress,
    "token": _read_token,
    "tool_call": _read_tool_call,
    "artifact": _read_artifact,
    "usage": _read_usage,
    "embedding": _read_embedding,
    "done": _read_done,
    "failed": _read_failed,
    "cancelled": _read_cancelled,
}
