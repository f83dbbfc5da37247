"""Workflows on a terminal."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console, RenderableType
from rich.text import Text

from rung.cli.views._fleet import plain_table
from rung.types import Workflow, WorkflowParameter

_DEFAULTS = {"": "needed", "null": "-", '""': "-", "[]": "-"}


def workflows_table(workflows: Sequence[Workflow]) -> RenderableType:
    """What pictures are drawn from."""
    table = plain_table("WORKFLOW", "MAKES", "STARTS FROM", "WHAT IT DOES")
    for workflow in workflows:
        table.add_row(
            Text(workflow.name, style="bold"),
            Text("video" if workflow.video else "pictures"),
            Text(_images(workflow)),
            Text(workflow.description),
        )
    return table


def print_workflow(console: Console, workflow: Workflow) -> None:
    """One workflow, with all of its parameters."""
    console.print(Text(workflow.name, style="bold"))
    console.print(Text(workflow.description))
    console.print(Text(f"makes {'video' if workflow.video else 'pictures'} from {_images(workflow)}"))
    if not workflow.parameters:
        console.print(Text("It has no further parameters.", style="dim"))
        return
    table = plain_table("PARAMETER", "TYPE", "DEFAULT", "RANGE", "WHAT IT IS")
    for parameter in workflow.parameters:
        table.add_row(
            Text(parameter.name, style="bold"),
            Text(parameter.type),
            Text(_DEFAULTS.get(parameter.default_json, parameter.default_json)),
            Text(_range(parameter)),
            Text(parameter.description),
        )
    console.print()
    console.print(table)


def _images(workflow: Workflow) -> str:
    """`words`, or the pictures; those that may be left out in brackets."""
    shown = [f"[{name[:-1]}]" if name.endswith("?") else name for name in workflow.images]
    return ", ".join(shown) or "words"


def _range(parameter: WorkflowParameter) -> str:
    if parameter.choices:
        return ", ".join(parameter.choices)
    least = "" if parameter.minimum is None else f"{parameter.minimum:g}"
    most = "" if parameter.maximum is None else f"{parameter.maximum:g}"
    return f"{least}..{most}" if least or most else "-"
