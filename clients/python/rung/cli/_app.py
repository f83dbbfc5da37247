"""The command's root: global options, sub-commands, and how failures end it."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib.metadata import version
from typing import Annotated

import typer

from rung._client import DEFAULT_ADDRESS
from rung.cli import (
    _chat,
    _deployments,
    _doctor,
    _image,
    _jobs,
    _leases,
    _mesh,
    _models,
    _nodes,
    _predict,
    _profiles,
    _routes,
    _speech,
    _status,
    _workflows,
)
from rung.cli._failures import DEBUG_VARIABLE, ExitCode, Failure, failure_of, wants_debug
from rung.cli._plugins import add_plugins, install_words
from rung.cli._session import Connection, OpenClient, Session, open_client, session_of
from rung.errors import RungError
from rung.transport import TlsOptions

_TLS_PANEL = "TLS"

_EPILOG = """
**Exit codes**: 0 all went well, 1 the operation failed, 2 wrong usage, 3 the control plane cannot be
reached, 4 what was named does not exist, 5 refused (not permitted, or not in this state),
130 interrupted.

**First steps**: `rung demo` shows everything without a GPU, `rung up` runs it on this box,
`rung doctor` says what is missing.

Every listing has `--json`. RUNG_DEBUG=1 shows tracebacks.
"""


def _root(
    context: typer.Context,
    address: Annotated[
        str,
        typer.Option(envvar="RUNG_ADDRESS", metavar="HOST:PORT", help="Where the control plane is (gRPC)."),
    ] = DEFAULT_ADDRESS,
    token: Annotated[
        str | None,
        typer.Option(envvar="RUNG_TOKEN", help="Bearer token to send with every call.", show_envvar=True),
    ] = None,
    tls_authority: Annotated[
        str | None,
        typer.Option(
            envvar="RUNG_TLS_AUTHORITY",
            metavar="FILE",
            help="Connect with TLS and trust this authority (PEM).",
            rich_help_panel=_TLS_PANEL,
        ),
    ] = None,
    tls_certificate: Annotated[
        str | None,
        typer.Option(
            envvar="RUNG_TLS_CERTIFICATE",
            metavar="FILE",
            help="Own certificate, for mutual TLS (PEM).",
            rich_help_panel=_TLS_PANEL,
        ),
    ] = None,
    tls_key: Annotated[
        str | None,
        typer.Option(
            envvar="RUNG_TLS_KEY",
            metavar="FILE",
            help="Private key of the certificate (PEM).",
            rich_help_panel=_TLS_PANEL,
        ),
    ] = None,
    show_version: Annotated[
        bool, typer.Option("--version", help="Show the version and exit.", is_eager=True)
    ] = False,
) -> None:
    """Your GPUs, owned and rented, as one big, well-mannered machine.

    `rung chat 'Why is the sky blue?'` asks it; `rung status --watch` shows it at work.
    """
    if show_version:
        typer.echo(f"rung {version('rung')}")
        raise typer.Exit
    if context.invoked_subcommand is None:
        typer.echo(context.get_help())
        raise typer.Exit(ExitCode.USAGE)
    tls = None
    if tls_authority or tls_certificate or tls_key:
        tls = TlsOptions(
            authority_file=tls_authority, certificate_file=tls_certificate, private_key_file=tls_key
        )
    session_of(context).connection = Connection(address=address, token=token, tls=tls)


def build_app() -> typer.Typer:
    """The whole command, with what other packages contribute."""
    app = typer.Typer(
        name="rung",
        rich_markup_mode="markdown",
        pretty_exceptions_enable=False,
        context_settings={"help_option_names": ["-h", "--help"]},
    )
    app.callback(invoke_without_command=True, epilog=_EPILOG)(_root)
    for commands in (
        _chat,
        _image,
        _mesh,
        _speech,
        _predict,
        _status,
        _models,
        _routes,
        _workflows,
        _jobs,
        _deployments,
        _nodes,
        _leases,
        _profiles,
        _doctor,
    ):
        commands.add_to(app)
    add_plugins(app)
    return app


def main(arguments: Sequence[str] | None = None, *, opening: OpenClient = open_client) -> int:
    """Run the `rung` command.

    Args:
        arguments: without the program's name; None takes those of the process.
        opening: makes the client of the control plane.

    Returns:
        The exit code; see `ExitCode`.
    """
    given = list(sys.argv[1:] if arguments is None else arguments)
    session = Session(opening)
    try:
        build_app()(args=given, prog_name="rung", obj=session)
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else ExitCode.OK if end.code is None else ExitCode.FAILED
    except KeyboardInterrupt:
        return ExitCode.INTERRUPTED
    except Exception as error:
        # The outermost boundary: one line instead of a traceback.
        if wants_debug():
            raise
        return _report(_failure(error, given, session.connection.address))
    return ExitCode.OK


def _failure(error: Exception, arguments: Sequence[str], address: str) -> Failure:
    if isinstance(error, RungError):
        return failure_of(error, address=address)
    if isinstance(error, ModuleNotFoundError):
        command = next((word for word in arguments if not word.startswith("-")), "")
        return Failure(
            f"the module {error.name} is not installed", install_words(command) + ".", ExitCode.FAILED
        )
    if isinstance(error, OSError):
        return Failure(str(error), "", ExitCode.FAILED)
    return Failure(
        f"unexpected {type(error).__name__}: {error}",
        f"This is a defect of rung. {DEBUG_VARIABLE}=1 shows where.",
        ExitCode.FAILED,
    )


def _report(failure: Failure) -> ExitCode:
    sys.stderr.write(f"error: {failure.message}\n")
    if failure.hint:
        sys.stderr.write(f"hint: {failure.hint}\n")
    return failure.code
