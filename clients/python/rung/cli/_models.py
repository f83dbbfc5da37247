"""`rung models`."""

from __future__ import annotations

from typing import Annotated, TypeAlias

import typer

from rung.cli._session import session_of
from rung.cli.views import models_table

Json: TypeAlias = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")]


def add_to(app: typer.Typer) -> None:
    """Add the commands of this module."""
    app.command()(models)


def models(context: typer.Context, as_json: Json = False) -> None:
    """List what can be asked for by name: models, their aliases, deployments.

    Example: rung models --json | jq -r '.[].id'
    """
    session = session_of(context)
    found = session.run(lambda client: client.list_models())
    if as_json:
        session.print_json(found)
    else:
        session.out.print(models_table(found))
