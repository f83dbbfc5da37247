"""Jobs and the events of their logs.

The structs are frozen and encode to JSON with `msgspec`: the event log, the NDJSON and SSE streams
and `--json` all show the same shapes. Times are Unix seconds, durations are seconds.
"""

from __future__ import annotations

from enum import StrEnum
from typing import TypeAlias

from msgspec import Struct


class JobState(StrEnum):
    """How far a job is."""

    PENDING = "pending"
    RUNNING = "running"
    DONE = "done"
    FAILED = "failed"
    CANCELLED = "cancelled"

    @property
    def ended(self) -> bool:
        """Whether nothing will be appended to the job's log."""
        return self in _ENDED


_ENDED = frozenset({JobState.DONE, JobState.FAILED, JobState.CANCELLED})


class JobKind(StrEnum):
    """Which pipeline a job runs."""

    CHAT = "chat"
    EMBEDDING = "embedding"
    IMAGE = "image"
    SPEECH = "speech"
    TRANSCRIPTION = "transcription"
    MESH = "mesh"
    VIDEO = "video"
    PREDICTION = "prediction"


class Priority(StrEnum):
    """Order among the demands for one node."""

    USER = "user"
    AGENT = "agent"
    BACKGROUND = "background"


class Phase(StrEnum):
    """A step of a job that a person would recognise."""

    ROUTE = "route"
    HEALTH_CHECK = "health_check"
    QUEUED = "queued"
    VRAM_ACQUIRE = "vram_acquire"
    ENGINE_START = "engine_start"
    ENGINE_WAKE = "engine_wake"
    SAFETY_FILTER = "safety_filter"
    PROMPT_ENHANCE = "prompt_enhance"
    MODEL_SWAP = "model_swap"
    WORKFLOW_BUILD = "workflow_build"
    SAMPLING = "sampling"
    ENCODING = "encoding"
    GENERATING = "generating"
    REASONING = "reasoning"
    RENTING = "renting"
    DONE = "done"


class FailureReason(StrEnum):
    """Why a job or an operation failed."""

    INVALID_REQUEST = "invalid_request"
    NO_TARGET = "no_target"
    ENGINE_ERROR = "engine_error"
    ENGINE_PROTOCOL = "engine_protocol"
    ENGINE_LOST = "engine_lost"
    ENGINE_START_FAILED = "engine_start_failed"
    TIMEOUT = "timeout"
    NODE_LOST = "node_lost"
    CONTROL_PLANE_RESTARTED = "control_plane_restarted"
    VRAM_INFEASIBLE = "vram_infeasible"
    BUDGET_EXHAUSTED = "budget_exhausted"
    INTERNAL = "internal"


class Policy(Struct, frozen=True):
    """Where a request may go and how it may be treated."""

    local_only: bool = False
    priority: Priority = Priority.AGENT
    detached: bool = False
    bridge_allowed: bool = False


class Usage(Struct, frozen=True):
    """What a generation consumed, in tokens, and in US dollars what cloud models took for it."""

    prompt_tokens: int = 0
    completion_tokens: int = 0
    cached_tokens: int = 0
    cost_usd: float = 0.0


class Served(Struct, frozen=True):
    """Who was asked for (`requested`) and who answered (`target` on `node`, as `model`)."""

    requested: str
    target: str
    node: str = ""
    model: str = ""


class Job(Struct, frozen=True, kw_only=True):
    """The record of one generation."""

    id: str
    kind: JobKind
    state: JobState
    model: str
    create_time_s: float
    request_id: str = ""
    served: Served | None = None
    end_time_s: float | None = None
    last_sequence: int = 0
    failure_reason: FailureReason | None = None
    detail: str = ""
    usage: Usage | None = None
    policy: Policy = Policy()


class JobAccepted(Struct, frozen=True, tag="accepted", tag_field="event"):
    """First event: the job exists."""

    kind: JobKind
    model: str


class Routed(Struct, frozen=True, tag="routed", tag_field="event"):
    """A target was chosen."""

    served: Served


class PhaseProgress(Struct, frozen=True, tag="progress", tag_field="event", omit_defaults=True):
    """A phase began, moved on, or still goes on.

    `percent` is 0 to 100. `remaining_s` is the expected time until the phase ends, `job_remaining_s` until
    the job does; None where nobody knows.
    """

    phase: Phase
    detail: str = ""
    step: int | None = None
    total: int | None = None
    percent: float | None = None
    phase_elapsed_s: float = 0.0
    remaining_s: float | None = None
    job_remaining_s: float | None = None


class TokenDelta(Struct, frozen=True, tag="token", tag_field="event", omit_defaults=True, gc=False):
    """Text to append to the answer, or to its reasoning."""

    content: str = ""
    reasoning: str = ""
    choice: int = 0


class ToolCallDelta(Struct, frozen=True, tag="tool_call", tag_field="event", omit_defaults=True):
    """A part of a tool call, to be merged by `index`; `id` and `name` come with its first part."""

    index: int = 0
    id: str = ""
    name: str = ""
    arguments: str = ""
    choice: int = 0


class ArtifactChunk(Struct, frozen=True, tag="artifact", tag_field="event", omit_defaults=True):
    """A piece of a file of `length_bytes`; `sha256` (of the whole file) and `seed` come with the last piece.

    `data` is left out of a job's log: the artifact itself is stored. A `preview` is no result, and is not.
    """

    artifact_id: str
    content_type: str
    offset_bytes: int = 0
    data: bytes = b""
    sha256: str = ""
    size_bytes: int = 0
    length_bytes: int = 0
    preview: bool = False
    seed: int | None = None


class Artifact(Struct, frozen=True):
    """A file that a job made and that is stored whole. `create_time_s` is Unix time.

    `seed` is what it was made with; None where none was used, or nobody knows it.
    """

    id: str
    job_id: str
    content_type: str
    size_bytes: int
    sha256: str
    create_time_s: float
    seed: int | None = None


class UsageReported(Struct, frozen=True, tag="usage", tag_field="event"):
    """Consumption became known."""

    usage: Usage


class EmbeddingResult(Struct, frozen=True, tag="embedding", tag_field="event"):
    """Vectors, one an input, in order."""

    vectors: tuple[tuple[float, ...], ...]


class JobDone(Struct, frozen=True, tag="done", tag_field="event"):
    """Ended with a result."""

    finish_reason: str = ""
    served: Served | None = None


class JobFailed(Struct, frozen=True, tag="failed", tag_field="event"):
    """Ended without a complete result, after `delivered_characters` of text."""

    reason: FailureReason
    detail: str
    delivered_characters: int = 0


class JobCancelled(Struct, frozen=True, tag="cancelled", tag_field="event"):
    """Ended because `by` asked: `caller`, `caller_disconnected`, `operator` or `drain`."""

    by: str


EventPayload: TypeAlias = (
    JobAccepted
    | Routed
    | PhaseProgress
    | TokenDelta
    | ToolCallDelta
    | ArtifactChunk
    | UsageReported
    | EmbeddingResult
    | JobDone
    | JobFailed
    | JobCancelled
)

Terminal: TypeAlias = JobDone | JobFailed | JobCancelled
TERMINAL_EVENTS: tuple[type[JobDone], type[JobFailed], type[JobCancelled]] = (
    JobDone,
    JobFailed,
    JobCancelled,
)


class JobEvent(Struct, frozen=True):
    """One entry of a job's log. Sequences start at 1; sequence 0 marks a heartbeat outside the log."""

    job_id: str
    sequence: int
    time_s: float
    elapsed_s: float
    payload: EventPayload


def whole_artifact(event: JobEvent) -> Artifact | None:
    """The artifact of which an event is the last piece; None for any other event."""
    chunk = event.payload
    if not isinstance(chunk, ArtifactChunk) or chunk.preview or not chunk.sha256:
        return None
    return Artifact(
        id=chunk.artifact_id,
        job_id=event.job_id,
        content_type=chunk.content_type,
        size_bytes=chunk.size_bytes,
        sha256=chunk.sha256,
        create_time_s=event.time_s,
        seed=chunk.seed,
    )
