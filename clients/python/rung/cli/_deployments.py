"""`rung deployments` and what can be done to one of them."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from typing import Annotated, TypeAlias

import typer

from rung import AsyncClient
from rung._failure import error_of_failure
from rung.cli._models import Json
from rung.cli._session import Session, session_of
from rung.cli.views import deployments_table, show_operation
from rung.types import LifecycleEvent, LifecycleFailed

_PANEL = "Deployments"

DeploymentId: TypeAlias = Annotated[str, typer.Argument(metavar="DEPLOYMENT", help="Id of the deployment.")]
Force: TypeAlias = Annotated[bool, typer.Option("--force", help="Also if it is pinned.")]
Ndjson: TypeAlias = Annotated[
    bool, typer.Option("--json", help="Print each event as one JSON object a line (NDJSON).")
]
Begin: TypeAlias = Callable[[AsyncClient], AsyncGenerator[LifecycleEvent, None]]


def add_to(app: typer.Typer) -> None:
    """Add the commands of this module."""
    for command in (deployments, start, stop, sleep, wake, free):
        app.command(rich_help_panel=_PANEL)(command)


def deployments(context: typer.Context, as_json: Json = False) -> None:
    """List deployments: which model, served by what, where, and where its weights are.

    Example: rung deployments --json | jq '.[] | {id: .spec.id, residency}'
    """
    session = session_of(context)
    found = session.run(lambda client: client.list_deployments())
    if as_json:
        session.print_json(found)
    else:
        session.out.print(deployments_table(found))


def start(context: typer.Context, deployment: DeploymentId, as_json: Ndjson = False) -> None:
    """Start a deployment's engine and follow its loading. Starting one that runs changes nothing.

    Ctrl-C stops following, not loading.

    Example: rung start orchestrator
    """
    _operate(context, deployment, as_json, lambda client: client.start_deployment(deployment))


def stop(
    context: typer.Context, deployment: DeploymentId, force: Force = False, as_json: Ndjson = False
) -> None:
    """Stop a deployment's engine; its memory is free afterwards.

    Example: rung stop reasoner
    """
    _operate(context, deployment, as_json, lambda client: client.stop_deployment(deployment, force=force))


def sleep(
    context: typer.Context,
    deployment: DeploymentId,
    force: Force = False,
    level: Annotated[
        int, typer.Option(min=0, max=2, help="vLLM's sleep level; 0 leaves it to the server.")
    ] = 0,
    as_json: Ndjson = False,
) -> None:
    """Put a deployment to sleep: weights go to host memory, from where they wake in seconds.

    Example: rung sleep reasoner
    """
    _operate(
        context,
        deployment,
        as_json,
        lambda client: client.sleep_deployment(deployment, force=force, level=level),
    )


def wake(context: typer.Context, deployment: DeploymentId, as_json: Ndjson = False) -> None:
    """Wake a sleeping deployment: its weights go back to the GPU.

    Example: rung wake reasoner
    """
    _operate(context, deployment, as_json, lambda client: client.wake_deployment(deployment))


def free(context: typer.Context, deployment: DeploymentId, as_json: Ndjson = False) -> None:
    """Ask a deployment of class `cache` (such as ComfyUI) to give its memory back.

    Example: rung free comfyui
    """
    _operate(context, deployment, as_json, lambda client: client.free_deployment(deployment))


def _operate(context: typer.Context, deployment: str, as_json: bool, begin: Begin) -> None:
    session = session_of(context)
    session.run(lambda client: _follow(session, begin(client), deployment, as_json=as_json))


async def _follow(
    session: Session, operation: AsyncGenerator[LifecycleEvent, None], deployment: str, *, as_json: bool
) -> None:
    async with aclosing(operation) as events:
        if not as_json:
            await show_operation(events, console=session.out, title=deployment)
            return
        async for event in events:
            session.print_json_line(event)
            if isinstance(event.payload, LifecycleFailed):
                raise error_of_failure(event.payload)
