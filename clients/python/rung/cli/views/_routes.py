"""Who would answer a request, and why."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console
from rich.text import Text

from rung.cli.views._fleet import plain_table
from rung.cli.views._words import format_duration, printable
from rung.types import ConsideredTarget, RouteExplanation


def print_route(console: Console, explained: RouteExplanation) -> None:
    """The effort and how it was found, the rung, and each target in the order of trying."""
    for line in _head(explained):
        console.print(Text(printable(line)), soft_wrap=True)
    if not explained.target:
        console.print(Text("nobody can answer now", style="red"))
    _print_targets(console, explained.considered)
    if explained.reason:
        console.print(Text("\nIt is offered the `reason` tool, which asks:"))
        _print_targets(console, explained.reason)
    elif explained.effort:
        console.print(Text("\nThe `reason` tool is not offered.", style="dim"))


def _head(explained: RouteExplanation) -> list[str]:
    if not explained.effort:
        return [explained.why] if explained.why else []
    why = f": {explained.why}" if explained.why else ""
    return [f"effort {explained.effort}{why}", f"rung {explained.rung}"]


def _print_targets(console: Console, targets: Sequence[ConsideredTarget]) -> None:
    table = plain_table("", "TARGET", "WAIT", "WHY")
    for each in targets:
        style = "bold" if each.taken else "" if each.place else "dim"
        table.add_row(
            str(each.place) if each.place else "-",
            Text(printable(each.target), style=style),
            "none" if each.expected_wait_s == 0 else format_duration(each.expected_wait_s),
            Text(printable(each.reason), style=style),
        )
    console.print(table)
