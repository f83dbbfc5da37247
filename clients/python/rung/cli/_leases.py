"""`rung lease`: memory of a GPU for a while."""

from __future__ import annotations

from typing import Annotated

import typer

from rung._sizes import parse_size
from rung.cli._failures import ExitCode
from rung.cli._models import Json
from rung.cli._session import session_of
from rung.cli.views import print_reclaim
from rung.types import Infeasible, ReclaimGrade


def add_to(app: typer.Typer) -> None:
    """Add the commands of this module."""
    lease = typer.Typer(help="Ask for memory of a GPU.", no_args_is_help=True)
    lease.command()(plan)
    app.add_typer(lease, name="lease", rich_help_panel="VRAM")


def _size(text: str) -> int:
    try:
        found = parse_size(text)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None
    assert isinstance(found, int)
    return found


def plan(
    context: typer.Context,
    vram: Annotated[int, typer.Option(parser=_size, metavar="SIZE", help="How much, as in 20GiB.")],
    gpu: Annotated[str, typer.Option(metavar="NODE/INDEX", help="Where, as in workstation/0.")],
    max_grade: Annotated[
        ReclaimGrade, typer.Option(help="The most that others may be disturbed.")
    ] = ReclaimGrade.FULL,
    as_json: Json = False,
) -> None:
    """Say what a lease would disturb, or why it cannot be had; changes nothing. Exit code 1 if it cannot.

    Example: rung lease plan --vram 20GiB --gpu workstation/0
    """
    session = session_of(context)
    outcome = session.run(lambda client: client.plan_reclaim(gpu, vram, max_grade=max_grade))
    if as_json:
        session.print_json(outcome)
    else:
        print_reclaim(session.out, outcome, vram_bytes=vram, gpu=gpu)
    if isinstance(outcome, Infeasible):
        raise typer.Exit(ExitCode.FAILED)
