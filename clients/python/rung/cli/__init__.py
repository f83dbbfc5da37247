"""The `rung` command. `main` is its entry point; `rung.cli.views` is what other commands share.

Commands of the servers come in through the entry points `rung.commands`: each is a Typer app or a
function, whose module must be cheap to import.
"""

from rung.cli._app import main

__all__ = ["main"]
