"""`rung doctor`: what works, what does not, and what to do about it."""

from __future__ import annotations

import asyncio
import platform
import shutil
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table
from rich.text import Text

from rung.cli._doctor_box import check_disk, check_docker, check_gpus, check_packages
from rung.cli._doctor_check import Check, CheckStatus
from rung.cli._doctor_fleet import check_control_plane, check_http
from rung.cli._failures import ExitCode
from rung.cli._models import Json
from rung.cli._paths import default_state_dir
from rung.cli._session import Session, session_of

_STYLES = {CheckStatus.OK: "green", CheckStatus.WARN: "yellow", CheckStatus.FAIL: "bold red"}
_LEAST_PYTHON = (3, 11)
#: A wedged GPU driver or Docker daemon must not hang the doctor.
_PATIENCE_S = 10.0


def add_to(app: typer.Typer) -> None:
    """Add the commands of this module."""
    app.command()(doctor)


def doctor(
    context: typer.Context,
    http: Annotated[
        str | None,
        typer.Option(envvar="RUNG_HTTP", metavar="URL", help="The HTTP gateway; by default port 8150."),
    ] = None,
    state_dir: Annotated[
        Path | None, typer.Option(envvar="RUNG_STATE_DIR", help="Where state and logs are kept.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Check this box and the way to the control plane; works without one.

    Each line is OK, WARN (something optional is missing) or FAIL (it will not work), with what to do
    next. Exits with 1 if anything failed.

    Example: rung doctor
    """
    session = session_of(context)
    checks = asyncio.run(_examine(session, http or _http_url(session), state_dir or default_state_dir()))
    if as_json:
        session.print_json(checks)
    else:
        _show(session, checks)
    if any(check.status is CheckStatus.FAIL for check in checks):
        raise typer.Exit(ExitCode.FAILED)


async def _examine(session: Session, http_url: str, state_dir: Path) -> list[Check]:
    checks = [_check_python(), check_packages()]
    async with session.client() as client:
        checks += await check_control_plane(client, session.connection.address)
    checks.append(await _aside("HTTP gateway", lambda: check_http(http_url)))
    checks.append(await _aside("GPUs", check_gpus))
    checks.append(await _aside("Docker", check_docker))
    checks.append(check_disk(state_dir, shutil.disk_usage))
    return checks


async def _aside(name: str, look: Callable[[], Check]) -> Check:
    """Run a blocking check in a thread of its own, and give up on it after a while."""
    loop = asyncio.get_running_loop()
    result: asyncio.Future[Check] = loop.create_future()

    def tell(check: Check) -> None:
        if not result.done():
            result.set_result(check)

    def run() -> None:
        found = look()
        # The loop is gone if the doctor has given up on us.
        if not loop.is_closed():
            loop.call_soon_threadsafe(tell, found)

    # A daemon, unlike the threads of an executor: one that is stuck in a driver must not keep us here.
    threading.Thread(target=run, name=f"doctor-{name}", daemon=True).start()
    try:
        async with asyncio.timeout(_PATIENCE_S):
            return await result
    except TimeoutError:
        return Check(
            name=name,
            status=CheckStatus.FAIL,
            detail=f"no answer within {_PATIENCE_S:.0f} s",
            hint="Whatever answers here (a driver, a daemon) hangs; its logs say more, a reboot may help.",
        )


def _check_python() -> Check:
    found = platform.python_version()
    if sys.version_info[:2] >= _LEAST_PYTHON:
        return Check(name="Python", status=CheckStatus.OK, detail=f"{found} at {sys.executable}")
    return Check(
        name="Python",
        status=CheckStatus.FAIL,
        detail=found,
        hint="Rung needs Python 3.11 or newer.",
    )


def _http_url(session: Session) -> str:
    host = session.connection.address.rpartition(":")[0] or "127.0.0.1"
    return f"http://{host}:8150"


def _show(session: Session, checks: list[Check]) -> None:
    table = Table(box=None, show_header=False, pad_edge=False, padding=(0, 2, 0, 0))
    for check in checks:
        table.add_row(
            Text(check.status.value.upper(), style=_STYLES[check.status]),
            Text(check.name, style="bold"),
            Text(check.detail),
        )
        if check.hint:
            table.add_row("", "", Text(check.hint, style="dim"))
    session.out.print(table)
