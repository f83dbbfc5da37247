"""`rung status`."""

from __future__ import annotations

import time
from contextlib import aclosing
from typing import Annotated

import typer
from msgspec import Struct
from rich.console import Group, RenderableType
from rich.live import Live
from rich.text import Text

from rung import AsyncClient
from rung.cli._jobs import newest_jobs
from rung.cli._session import Session, session_of
from rung.cli.views import fleet_view, jobs_table
from rung.types import Deployment, FleetSnapshot, Job, MemoryAlert, Node

_DEFAULT_JOBS = 5
#: The fleet is told about at least once a second; jobs are asked for no more often than this.
_JOBS_INTERVAL_S = 1.0


class FleetStatus(Struct, frozen=True):
    """What `rung status --json` prints."""

    nodes: tuple[Node, ...]
    deployments: tuple[Deployment, ...]
    profile: str
    jobs: tuple[Job, ...]
    alerts: tuple[MemoryAlert, ...] = ()


def add_to(app: typer.Typer) -> None:
    """Add the commands of this module."""
    app.command()(status)


def status(
    context: typer.Context,
    watch: Annotated[bool, typer.Option("--watch", "-w", help="Keep showing it, until Ctrl-C.")] = False,
    jobs: Annotated[int, typer.Option(min=0, max=1000, help="How many recent jobs to show.")] = _DEFAULT_JOBS,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print JSON; with --watch one object a line (NDJSON).")
    ] = False,
) -> None:
    """Show the fleet: nodes, every GPU with a bar of its memory, deployments, recent jobs.

    Example: rung status --watch
    """
    session = session_of(context)
    if watch:
        session.run(lambda client: _watch(session, client, jobs, as_json=as_json))
        return
    found = session.run(lambda client: _look(client, jobs))
    if as_json:
        session.print_json(found)
    else:
        session.out.print(_view(session, found))


async def _look(client: AsyncClient, jobs: int) -> FleetStatus:
    async with aclosing(client.watch_fleet()) as snapshots:
        snapshot = await anext(snapshots)
    return _status_of(snapshot, await newest_jobs(client, jobs) if jobs else ())


async def _watch(session: Session, client: AsyncClient, limit: int, *, as_json: bool) -> None:
    jobs: tuple[Job, ...] = ()
    asked_s = float("-inf")
    live = Live(console=session.out, auto_refresh=False, vertical_overflow="crop")
    async with aclosing(client.watch_fleet()) as snapshots:
        if not as_json:
            live.start()
        try:
            async for snapshot in snapshots:
                if limit and time.monotonic() - asked_s >= _JOBS_INTERVAL_S:
                    jobs = await newest_jobs(client, limit)
                    asked_s = time.monotonic()
                found = _status_of(snapshot, jobs)
                if as_json:
                    session.print_json_line(found)
                else:
                    live.update(_view(session, found), refresh=True)
        finally:
            live.stop()


def _status_of(snapshot: FleetSnapshot, jobs: tuple[Job, ...]) -> FleetStatus:
    return FleetStatus(
        nodes=snapshot.nodes,
        deployments=snapshot.deployments,
        profile=snapshot.profile,
        jobs=jobs,
        alerts=snapshot.alerts,
    )


def _view(session: Session, found: FleetStatus) -> RenderableType:
    now_s = time.time()
    snapshot = FleetSnapshot(found.nodes, found.deployments, found.profile, found.alerts)
    console = session.out
    fleet = fleet_view(snapshot, now_s=now_s, width=console.width, ascii_only=console.options.ascii_only)
    return Group(fleet, Text(), jobs_table(found.jobs, now_s=now_s)) if found.jobs else fleet
