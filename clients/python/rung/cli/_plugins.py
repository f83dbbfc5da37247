"""Commands that other packages contribute: `serve`, `up`, `agent` and the like."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from importlib.metadata import EntryPoint, entry_points
from typing import Any

import typer

from rung.cli._failures import ExitCode

GROUP = "rung.commands"
_PANEL = "Servers"
#: What to install for a command whose packages are missing.
_EXTRAS = {"agent": "agent", "demo": "server,agent", "up": "server,agent"}


def add_plugins(
    app: typer.Typer, found: Iterable[EntryPoint] | None = None, *, panel: str | None = _PANEL
) -> None:
    """Add every command of the entry-point group; one that cannot be imported says what it needs."""
    entries = entry_points(group=GROUP) if found is None else found
    for entry in sorted(entries, key=lambda entry: entry.name):
        try:
            command: Any = entry.load()
        except ModuleNotFoundError as error:
            command = _missing(entry.name, error.name or "a package")
            app.command(
                entry.name,
                help=f"Needs {install_words(entry.name)}.",
                rich_help_panel=panel,
                add_help_option=False,
                context_settings={"ignore_unknown_options": True, "allow_extra_args": True},
            )(command)
            continue
        if isinstance(command, typer.Typer):
            app.add_typer(command, name=entry.name, rich_help_panel=panel)
        else:
            app.command(entry.name, rich_help_panel=panel)(command)


def install_words(command: str) -> str:
    """How to install what a command needs."""
    return f"`pip install 'rung[{_EXTRAS.get(command, 'server')}]'`"


def _missing(name: str, module: str) -> Callable[[], None]:
    def say() -> None:
        typer.echo(f"error: `rung {name}` needs the module {module}, which is not installed", err=True)
        typer.echo(f"hint: {install_words(name)}", err=True)
        raise typer.Exit(ExitCode.FAILED)

    return say
