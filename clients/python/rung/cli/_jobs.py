"""`rung jobs`."""

from __future__ import annotations

import time
from collections.abc import AsyncIterable
from contextlib import aclosing
from typing import Annotated

import typer
from rich.console import Console
from rich.text import Text

from rung import AsyncClient
from rung.cli._failures import ExitCode
from rung.cli._models import Json
from rung.cli._session import Session, session_of
from rung.cli.views import event_line, jobs_table, show_phases
from rung.types import Job, JobAccepted, JobCancelled, JobDone, JobEvent, JobFailed, JobKind, JobState

_DEFAULT_LIMIT = 20
_WITHOUT_PHASES = frozenset({JobKind.CHAT, JobKind.EMBEDDING})
_EXIT_CODES = {JobDone: ExitCode.OK, JobFailed: ExitCode.FAILED, JobCancelled: ExitCode.FAILED}


def add_to(app: typer.Typer) -> None:
    """Add the commands of this module."""
    jobs = typer.Typer(
        help="List, follow and cancel jobs: everything that was asked for, with its event log.",
        no_args_is_help=True,
    )
    jobs.command("list")(list_jobs)
    jobs.command("watch")(watch)
    jobs.command("cancel")(cancel)
    app.add_typer(jobs, name="jobs")


async def newest_jobs(client: AsyncClient, limit: int, states: tuple[JobState, ...] = ()) -> tuple[Job, ...]:
    """The newest jobs, `limit` at most."""
    found: list[Job] = []
    async with aclosing(client.list_jobs(states, page_size=min(limit, 1000))) as jobs:
        async for job in jobs:
            found.append(job)
            if len(found) >= limit:
                break
    return tuple(found)


def list_jobs(
    context: typer.Context,
    state: Annotated[
        list[JobState] | None, typer.Option(help="Only jobs in this state; may be given more than once.")
    ] = None,
    limit: Annotated[int, typer.Option("--limit", "-n", min=1, help="Most jobs to show.")] = _DEFAULT_LIMIT,
    as_json: Json = False,
) -> None:
    """List jobs, newest first.

    Example: rung jobs list --state running --state pending
    """
    session = session_of(context)
    found = session.run(lambda client: newest_jobs(client, limit, tuple(state or ())))
    if as_json:
        session.print_json(found)
    else:
        session.out.print(jobs_table(found, now_s=time.time()))


def watch(
    context: typer.Context,
    job_id: Annotated[str, typer.Argument(metavar="JOB", help="Id of the job.")],
    after: Annotated[
        int, typer.Option(min=0, help="Only events after this sequence: resume where you left.")
    ] = 0,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object a line (NDJSON).")] = False,
    as_log: Annotated[
        bool,
        typer.Option("--log", help="Print every entry of the log, also where there are phases."),
    ] = False,
) -> None:
    """Follow a job, past and to come, until it ends: an answer by its log, all else by its phases.

    With --after or --log it is always the log. Ends with 0 if the job did well, and with 1 if it failed or
    was cancelled.

    Example: rung jobs watch JOB --after 42 --json
    """
    session = session_of(context)
    as_log = as_log or as_json or after > 0
    last = session.run(lambda client: _follow(session, client, job_id, after, as_json=as_json, as_log=as_log))
    raise typer.Exit(ExitCode.OK if last is None else _EXIT_CODES.get(type(last.payload), ExitCode.OK))


def cancel(
    context: typer.Context,
    job_id: Annotated[str, typer.Argument(metavar="JOB", help="Id of the job.")],
    as_json: Json = False,
) -> None:
    """Cancel a job; its engine stops working on it. A job that has ended stays as it is.

    Example: rung jobs cancel JOB
    """
    session = session_of(context)
    job = session.run(lambda client: client.cancel_job(job_id))
    if as_json:
        session.print_json(job)
    elif job.state.ended and job.state is not JobState.CANCELLED:
        session.out.print(Text(f"{job.id} had ended already: {job.state.value}"))
    else:
        session.out.print(Text(f"{job.id} is cancelled"))


async def _follow(
    session: Session, client: AsyncClient, job_id: str, after: int, *, as_json: bool, as_log: bool
) -> JobEvent | None:
    last: JobEvent | None = None
    live = _Heartbeat(session.err)
    try:
        # Nothing here shows what is in a file, and a video is large.
        watching = client.watch_job(job_id, after, heartbeats=True, artifact_data=False)
        async with aclosing(watching) as events:
            async for event in events:
                if _has_phases(event) and not as_log:
                    return await _show_phases(session, events)
                if event.sequence == 0 and not as_json:
                    live.show(event)
                    continue
                live.hide()
                last = event
                if as_json:
                    session.print_json_line(event)
                else:
                    session.out.print(event_line(event), soft_wrap=True)
    finally:
        live.hide()
    return last


def _has_phases(event: JobEvent) -> bool:
    """Whether this is how a job begins whose phases say more than the entries of its log."""
    return isinstance(event.payload, JobAccepted) and event.payload.kind not in _WITHOUT_PHASES


async def _show_phases(session: Session, events: AsyncIterable[JobEvent]) -> JobEvent | None:
    last = await show_phases(events, console=session.out)
    if last is not None and not isinstance(last.payload, JobDone):
        session.out.print(event_line(last), soft_wrap=True)
    return last


class _Heartbeat:
    """What goes on between two entries of the log; one line that is drawn anew, on a terminal only."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._status = console.status("")
        self._shown = False

    def show(self, event: JobEvent) -> None:
        if not self._console.is_terminal:
            return
        self._status.update(event_line(event))
        if not self._shown:
            self._status.start()
            self._shown = True

    def hide(self) -> None:
        if self._shown:
            self._status.stop()
            self._shown = False
