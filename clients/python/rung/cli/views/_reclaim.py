"""Plans for making room."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console, RenderableType
from rich.text import Text

from rung.cli.views._fleet import plain_table
from rung.cli.views._words import format_age, format_bytes, format_duration, printable
from rung.types import Infeasible, Lease, PhaseProgress, ReclaimAction, ReclaimPlan, ReclaimStep

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


def wait_words(step: PhaseProgress | ReclaimPlan) -> str:
    """Why a lease is waited for, in one line."""
    if isinstance(step, ReclaimPlan):
        return "making room: " + "; ".join(_step_words(each) for each in step.steps)
    left = f", about {format_duration(step.remaining_s)} left" if step.remaining_s is not None else ""
    return f"{printable(step.detail)}{left}"


def leases_table(leases: Sequence[Lease], *, now_s: float) -> RenderableType:
    """Leases, or a sentence when there are none."""
    if not leases:
        return Text("No leases are held.", style="dim")
    table = plain_table(
        "LEASE", "GPU", "VRAM", "GRADE", "HOLDER", "SINCE", "ENDS IN", right=("VRAM", "ENDS IN")
    )
    for lease in leases:
        table.add_row(
            Text(lease.id),
            Text(lease.gpu),
            format_bytes(lease.vram_bytes),
            lease.grade.value,
            Text(printable(lease.holder) or "-"),
            format_age(lease.grant_time_s, now_s),
            format_duration(max(0.0, lease.expire_time_s - now_s)),
        )
    return table


def _step_words(step: ReclaimStep) -> str:
    level = " (weights dropped)" if step.level == 2 else ""
    words = (
        f"{_WORDS[step.action]} {printable(step.deployment_id)}{level}: {format_bytes(step.expected_bytes)}"
    )
    words += f", about {format_duration(step.expected_s)}"
    if step.drain:
        words += ", once its requests have ended"
    return words
