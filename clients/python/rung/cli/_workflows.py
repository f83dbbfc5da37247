"""`rung workflow`: what pictures are drawn from."""

from __future__ import annotations

from difflib import get_close_matches
from importlib.metadata import entry_points
from typing import Annotated

import typer

from rung.cli._models import Json
from rung.cli._plugins import add_plugins
from rung.cli._session import session_of
from rung.cli.views import print_workflow, workflows_table
from rung.errors import NotFoundError

#: Entry points of the commands that need the server's packages.
GROUP = "rung.workflow_commands"


def add_to(app: typer.Typer) -> None:
    """Add the commands of this module."""
    workflows = typer.Typer(help="Show and check the workflows that pictures are drawn from.")
    workflows.command("list")(list_workflows)
    workflows.command("show")(show)
    add_plugins(workflows, entry_points(group=GROUP), panel=None)
    app.add_typer(workflows, name="workflow", no_args_is_help=True)


def list_workflows(context: typer.Context, as_json: Json = False) -> None:
    """List the workflows: those that come with Rung, and your own from `images.workflows_dir`.

    Example: rung workflow list --json | jq -r '.[].name'
    """
    session = session_of(context)
    found = session.run(lambda client: client.list_workflows())
    if as_json:
        session.print_json(found)
    else:
        session.out.print(workflows_table(found))


def show(
    context: typer.Context,
    name: Annotated[str, typer.Argument(metavar="WORKFLOW", help="Name of the workflow.")],
    as_json: Json = False,
) -> None:
    """Show one workflow: the pictures that it starts from, and its parameters.

    Example: rung workflow show inpaint
    """
    session = session_of(context)
    found = {workflow.name: workflow for workflow in session.run(lambda client: client.list_workflows())}
    if name not in found:
        near = get_close_matches(name, found, 1)
        guess = f"did you mean {near[0]}?" if near else f"there are: {', '.join(found)}"
        raise NotFoundError(f"there is no workflow {name!r}; {guess}")
    if as_json:
        session.print_json(found[name])
    else:
        print_workflow(session.out, found[name])
