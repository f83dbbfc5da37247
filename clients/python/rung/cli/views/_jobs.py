"""Jobs and their event logs on a terminal."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import RenderableType
from rich.text import Text

from rung.cli.views._fleet import plain_table
from rung.cli.views._words import format_age, format_bytes, format_duration, format_left, printable
from rung.types import (
    ArtifactChunk,
    EmbeddingResult,
    EventPayload,
    Job,
    JobAccepted,
    JobCancelled,
    JobDone,
    JobEvent,
    JobFailed,
    JobState,
    PhaseProgress,
    Routed,
    Served,
    TokenDelta,
    ToolCallDelta,
    UsageReported,
)

_STATE_STYLES = {
    JobState.PENDING: "yellow",
    JobState.RUNNING: "cyan",
    JobState.DONE: "green",
    JobState.FAILED: "red",
    JobState.CANCELLED: "dim",
}
_LONGEST_DETAIL = 60


def served_name(served: Served | None) -> str:
    """`orchestrator on workstation`; `-` while nobody was chosen."""
    if served is None or not served.target:
        return "-"
    return f"{served.target} on {served.node}" if served.node else served.target


def jobs_table(jobs: Sequence[Job], *, now_s: float) -> RenderableType:
    """Jobs, newest first, or a sentence when there are none."""
    if not jobs:
        return Text("No jobs yet. Try `rung chat 'Hello'`.", style="dim")
    table = plain_table(
        "JOB", "KIND", "MODEL", "STATE", "SERVED BY", "CREATED", "TOOK", "TOKENS", right=("TOOK", "TOKENS")
    )
    for job in jobs:
        end_s = now_s if job.end_time_s is None else job.end_time_s
        state = Text(job.state.value, style=_STATE_STYLES[job.state])
        if job.state is JobState.FAILED and job.failure_reason is not None:
            state.append(f": {job.failure_reason.value}")
        table.add_row(
            Text(job.id),
            job.kind.value,
            Text(job.model or "-"),
            state,
            Text(served_name(job.served)),
            format_age(job.create_time_s, now_s),
            format_duration(end_s - job.create_time_s),
            str(job.usage.completion_tokens) if job.usage else "-",
        )
    return table


def event_line(event: JobEvent) -> Text:
    """One entry of a log: sequence, time since the start, what happened."""
    line = Text(f"{event.sequence or '':>5} {event.elapsed_s:9.3f} s  ", style="dim")
    name, detail = describe_event(event.payload)
    style = "red" if isinstance(event.payload, JobFailed) else "bold"
    line.append(f"{name:<9}", style=style)
    line.append(f" {detail}".rstrip())
    return line


def describe_event(payload: EventPayload) -> tuple[str, str]:
    """The event's name and what there is to say about it."""
    match payload:
        case JobAccepted(kind, model):
            return "accepted", f"{kind.value} {model}".rstrip()
        case Routed(served):
            return "routed", f"to {served_name(served)}"
        case PhaseProgress():
            return "progress", phase_words(payload)
        case TokenDelta(content, reasoning):
            return ("token", _quoted(content)) if content else ("thought", _quoted(reasoning))
        case ToolCallDelta(name=name, arguments=arguments):
            return "tool call", f"{name} {_quoted(arguments)}".strip()
        case ArtifactChunk(content_type=content_type, preview=True):
            return "preview", content_type
        case ArtifactChunk(artifact_id, content_type, offset_bytes, length_bytes=length_bytes):
            end = format_bytes(offset_bytes + length_bytes)
            return "artifact", f"{artifact_id} {content_type}, {end} so far"
        case UsageReported(usage):
            cached = f" ({usage.cached_tokens} cached)" if usage.cached_tokens else ""
            cost = f", ${usage.cost_usd:.4f}" if usage.cost_usd else ""
            return "usage", f"{usage.prompt_tokens}{cached} tokens in, {usage.completion_tokens} out{cost}"
        case EmbeddingResult(vectors):
            return "embedding", f"{len(vectors)} vectors"
        case JobDone(finish_reason, served):
            by = f", served by {served_name(served)}" if served is not None else ""
            return "done", f"{finish_reason or 'complete'}{by}"
        case JobFailed(reason, detail, delivered):
            after = f" (after {delivered} characters)" if delivered else ""
            return "failed", f"{reason.value}: {printable(detail)}{after}"
        case JobCancelled(by):
            return "cancelled", f"by {by}"


def phase_words(progress: PhaseProgress) -> str:
    """A phase in words: `engine start: loading weights, 40 %, 3.0 s left`."""
    words = progress.phase.value.replace("_", " ")
    if progress.detail:
        words += f": {printable(progress.detail)}"
    if progress.step is not None and progress.total:
        words += f", step {progress.step} of {progress.total}"
    if progress.percent is not None:
        words += f", {progress.percent:.0f} %"
    if progress.remaining_s is not None:
        words += f", {format_left(progress.remaining_s)}"
    return words


def _quoted(text: str) -> str:
    shown = text if len(text) <= _LONGEST_DETAIL else f"{text[:_LONGEST_DETAIL]}…"
    return repr(shown)
