"""What `rung config` and `rung agent` have in common: checking a file, and printing a schema."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import typer

from rung.cli._failures import ExitCode
from rung.errors import ConfigError

T = TypeVar("T")


def load_checked(load: Callable[[Path], T], path: Path) -> T:
    """Read a configuration for a command that checks it.

    Raises:
        typer.Exit: it cannot be used; stderr says where and why, as compilers do, so that editors find the
            place.
    """
    try:
        return load(path)
    except ConfigError as error:
        typer.echo(error.message, err=True)
        raise typer.Exit(ExitCode.FAILED) from None


def print_schema(schema: dict[str, Any]) -> None:
    """Print a JSON schema as it is published."""
    typer.echo(json.dumps(schema, indent=2))
