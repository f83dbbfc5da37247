"""`rung drain` and `rung resume`: taking a node out of work, and back."""

from __future__ import annotations

from typing import Annotated, TypeAlias

import typer
from rich.text import Text

from rung.cli._session import Session, session_of
from rung.types import Node, NodeState

_PANEL = "Nodes"

NodeId: TypeAlias = Annotated[str, typer.Argument(metavar="NODE", help="Id of the node.")]
Json: TypeAlias = Annotated[bool, typer.Option("--json", help="Print the node as JSON.")]


def add_to(app: typer.Typer) -> None:
    """Add the commands of this module."""
    for command in (drain, resume):
        app.command(rich_help_panel=_PANEL)(command)


def drain(context: typer.Context, node: NodeId, as_json: Json = False) -> None:
    """Send no new work to a node, and start nothing there; what runs is left to finish.

    It stays so, also when the control plane is started again, until `rung resume`. Engines are not stopped.

    Example: rung drain workstation
    """
    session = session_of(context)
    _show(session, session.run(lambda client: client.drain_node(node)), as_json=as_json)


def resume(context: typer.Context, node: NodeId, as_json: Json = False) -> None:
    """Take a drained node back into work.

    Example: rung resume workstation
    """
    session = session_of(context)
    _show(session, session.run(lambda client: client.resume_node(node)), as_json=as_json)


def _show(session: Session, node: Node, *, as_json: bool) -> None:
    if as_json:
        session.print_json(node)
        return
    words = f"{node.id} is {node.state}"
    if node.state is NodeState.DRAINING and node.detail:
        words = f"{words}: {node.detail}"
    session.out.print(Text(words))
