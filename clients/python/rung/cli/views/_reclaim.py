"""Plans for making room."""

from __future__ import annotations

from rich.console import Console
from rich.text import Text

from rung.cli.views._words import format_bytes, format_duration, printable
from rung.types import Infeasible, ReclaimAction, ReclaimPlan, ReclaimStep

_WORDS = {
    ReclaimAction.SLEEP: "put to sleep",
    ReclaimAction.STOP: "stop",
    ReclaimAction.FREE: "flush the cache of",
    ReclaimAction.SHRINK: "shrink",
}


def print_reclaim(console: Console, outcome: ReclaimPlan | Infeasible, *, vram_bytes: int, gpu: str) -> None:
    """Say how room would be made, step by step, or why it cannot be."""
    wanted = f"{format_bytes(vram_bytes)} on {printable(gpu)}"
    if isinstance(outcome, Infeasible):
        console.print(Text(printable(outcome.detail), style="red"))
        for line in outcome.remedies:
            console.print(Text(f"  {printable(line)}"))
        if outcome.retry_when:
            console.print(Text(f"  it fits once {printable(' and '.join(outcome.retry_when))}"))
        return
    if not outcome.steps:
        console.print(Text(f"{wanted}: free now, nobody is disturbed (grade {outcome.grade})"))
        return
    took = format_duration(outcome.expected_s)
    console.print(Text(f"{wanted}: grade {outcome.grade}, {len(outcome.steps)} steps, about {took}"))
    for place, step in enumerate(outcome.steps, 1):
        console.print(Text(f"  {place}. {_step_words(step)}"))
    console.print(Text(f"then {format_bytes(outcome.expected_free_bytes)} are free"))


def _step_words(step: ReclaimStep) -> str:
    level = " (weights dropped)" if step.level == 2 else ""
    words = (
        f"{_WORDS[step.action]} {printable(step.deployment_id)}{level}: {format_bytes(step.expected_bytes)}"
    )
    words += f", about {format_duration(step.expected_s)}"
    if step.drain:
        words += ", once its requests have ended"
    return words
