"""`rung lease`: memory of a GPU for a while, for any program."""

from __future__ import annotations

import asyncio
import os
import time
from contextlib import suppress
from typing import Annotated, TypeAlias

import typer
from rich.console import Console

from rung import AsyncClient, HeldLease
from rung._sizes import parse_size
from rung.cli._failures import ExitCode
from rung.cli._models import Json
from rung.cli._session import session_of
from rung.cli.views import format_bytes, leases_table, print_reclaim, wait_words
from rung.errors import InvalidRequestError
from rung.types import Infeasible, PhaseProgress, Priority, ReclaimGrade, ReclaimPlan

Vram: TypeAlias = Annotated[
    int,
    typer.Option("--vram", parser=lambda text: _size(text), metavar="SIZE", help="How much, as in 20GiB."),
]
GpuName: TypeAlias = Annotated[
    str, typer.Option("--gpu", metavar="NODE/INDEX", help="Where, as in workstation/0.")
]
MaxGrade: TypeAlias = Annotated[ReclaimGrade, typer.Option(help="The most that others may be disturbed.")]


def add_to(app: typer.Typer) -> None:
    """Add the commands of this module."""
    lease = typer.Typer(help="Hold memory of a GPU for any program.", no_args_is_help=True)
    lease.command("list")(list_leases)
    lease.command()(plan)
    lease.command()(run)
    lease.command()(release)
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
    vram: Vram,
    gpu: GpuName,
    max_grade: MaxGrade = ReclaimGrade.FULL,
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


def run(
    context: typer.Context,
    command: Annotated[list[str], typer.Argument(metavar="-- COMMAND...", help="The program.")],
    vram: Vram,
    gpu: GpuName,
    max_grade: MaxGrade = ReclaimGrade.FULL,
    priority: Annotated[Priority, typer.Option(help="Order among those who wait.")] = Priority.USER,
    ttl: Annotated[
        float, typer.Option(min=5.0, help="Seconds that the lease outlives a crash of this command.")
    ] = 60.0,
) -> None:
    """Hold memory of a GPU while a program runs; says why it waits, and ends as the program does.

    Models that give way come back when somebody next asks for them.

    Example: rung lease run --vram 20GiB --gpu workstation/0 -- python train.py
    """
    session = session_of(context)

    async def hold(client: AsyncClient) -> int:
        said = ""

        def on_wait(step: PhaseProgress | ReclaimPlan) -> None:
            nonlocal said
            words = wait_words(step)
            if words != said:
                said = words
                session.err.print(words, markup=False, highlight=False)

        leased = client.lease(
            gpu,
            vram,
            max_grade=max_grade,
            priority=priority,
            holder=" ".join(command)[:80],
            ttl_s=ttl,
            on_wait=on_wait,
        )
        async with leased as holding:
            session.err.print(
                f"{format_bytes(vram)} of {gpu} are yours ({holding.lease.id}, grade {holding.lease.grade})",
                markup=False,
                highlight=False,
            )
            return await _run_program(command, holding, session.err)

    code = session.run(hold)
    if code:
        raise typer.Exit(code)


async def _run_program(command: list[str], holding: HeldLease, err: Console) -> int:
    """Run a program to its end; its exit code as a shell gives it."""
    try:
        process = await asyncio.create_subprocess_exec(
            *command, env=os.environ | {"RUNG_LEASE_ID": holding.lease.id}
        )
    except OSError as error:
        raise InvalidRequestError(f"{command[0]} cannot be started: {error.strerror}") from None
    ended = asyncio.ensure_future(process.wait())
    lost = asyncio.ensure_future(holding.lost.wait())
    try:
        await asyncio.wait({ended, lost}, return_when=asyncio.FIRST_COMPLETED)
        if lost.done() and not ended.done():
            err.print("the lease has ended: the control plane has not heard of it for too long", style="red")
        code = await ended
    except asyncio.CancelledError:
        # Ctrl-C reaches the program too, as part of this terminal's group; it may take its time to end.
        with suppress(ProcessLookupError):
            process.terminate()
        await process.wait()
        raise
    finally:
        lost.cancel()
    return code if code >= 0 else 128 - code


def list_leases(context: typer.Context, as_json: Json = False) -> None:
    """List who holds memory of which GPU, and for how long.

    Example: rung lease list --json | jq -r '.[].holder'
    """
    session = session_of(context)
    found = session.run(lambda client: client.list_leases())
    if as_json:
        session.print_json(found)
    else:
        session.out.print(leases_table(found, now_s=time.time()))


def release(
    context: typer.Context, lease: Annotated[str, typer.Argument(metavar="LEASE", help="Id of the lease.")]
) -> None:
    """End a lease: its memory is granted to the next who waits. The program that uses it is not stopped.

    Example: rung lease release lease-0123456789abcdef
    """
    session_of(context).run(lambda client: client.release_lease(lease))
