"""`rung route`."""

from __future__ import annotations

from typing import Annotated

import typer

from rung import AsyncClient, Policy
from rung.cli._failures import ExitCode
from rung.cli._models import Json
from rung.cli._session import session_of
from rung.cli.views import print_route
from rung.types import Priority, RouteExplanation


def add_to(app: typer.Typer) -> None:
    """Add the commands of this module."""
    routes = typer.Typer(help="Say who would answer a request, and why.", no_args_is_help=True)
    routes.command("explain")(explain)
    app.add_typer(routes, name="route")


def explain(
    context: typer.Context,
    prompt: Annotated[str, typer.Argument(help="What would be asked.")] = "",
    model: Annotated[
        str, typer.Option("--model", "-m", help="A name from `rung models`; empty leaves the choice.")
    ] = "",
    effort: Annotated[
        int | None, typer.Option("--effort", "-e", min=1, max=10, help="How hard to think, 1 to 10.")
    ] = None,
    local_only: Annotated[bool, typer.Option("--local-only", help="Never leave your own hardware.")] = False,
    priority: Annotated[Priority, typer.Option(help="Who is in a hurry.")] = Priority.USER,
    as_json: Json = False,
) -> None:
    """Show the effort of a request, its rung, and every target with why it is taken or passed over.

    Nothing is started, and no model is asked. Ends with 1 if nobody can answer now.

    Example: rung route explain 'Prove that there are infinitely many primes'
    """
    session = session_of(context)

    async def ask(client: AsyncClient) -> RouteExplanation:
        policy = Policy(local_only=local_only, priority=priority)
        return await client.explain_route(prompt, model=model, effort=effort, policy=policy)

    explained = session.run(ask)
    if as_json:
        session.print_json(explained)
    else:
        print_route(session.out, explained)
    if not explained.target:
        raise typer.Exit(ExitCode.FAILED)
