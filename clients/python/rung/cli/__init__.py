"""The `rung` command. `main` is its entry point; `rung.cli.views` is what other commands share.

Commands of the servers come in through the entry points `rung.commands`: each is a Typer app or a
function, whose module must be cheap to import.
"""

from rung.cli._app import main
from rung.cli._checking import load_checked, print_schema
from rung.cli._failures import ExitCode
from rung.cli._paths import default_state_dir
from rung.cli._session import make_console

__all__ = ["ExitCode", "default_state_dir", "load_checked", "main", "make_console", "print_schema"]
