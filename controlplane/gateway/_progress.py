"""How a phase of a job is told to readers of streams."""

from __future__ import annotations

import msgspec

from rung.types import PhaseProgress


def progress_comment(progress: PhaseProgress, elapsed_s: float) -> bytes:
    """A phase among server-sent events of OpenAI's, whose clients skip comments."""
    return b": rung.progress " + msgspec.json.encode(progress_line(progress, elapsed_s)) + b"\n\n"


def progress_line(progress: PhaseProgress, elapsed_s: float) -> dict[str, object]:
    """A phase as `/generate/stream` tells it: `elapsed_s` is since the job began."""
    line: dict[str, object] = {"phase": progress.phase.value, "elapsed_s": tenths(elapsed_s)}
    if progress.detail or progress.step is None:
        line["detail"] = progress.detail or progress.phase.value.replace("_", " ").capitalize()
    if progress.step is not None:
        line["step"] = progress.step
    if progress.total is not None:
        line["total"] = progress.total
    if progress.percent is not None:
        line["percent"] = round(progress.percent)
    if progress.remaining_s is not None:
        line["remaining_s"] = tenths(progress.remaining_s)
    if progress.job_remaining_s is not None:
        line["job_remaining_s"] = tenths(progress.job_remaining_s)
    return line


def tenths(seconds: float) -> float:
    """Seconds to the tenth, which is as exact as a reader is told."""
    return round(seconds, 1)
