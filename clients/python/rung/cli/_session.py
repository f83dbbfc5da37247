"""What a command has at hand: where the control plane is, and where its output goes."""

from __future__ import annotations

import asyncio
import os
import sys
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from typing import Any, TypeAlias, TypeVar

import msgspec
import typer
from rich.console import Console

from rung import AsyncClient, TlsOptions
from rung._client import DEFAULT_ADDRESS

T = TypeVar("T")

#: Width of what goes to a file or a pipe: tables are not squeezed there.
_PIPE_WIDTH = 160


@dataclass(frozen=True, slots=True, kw_only=True)
class Connection:
    """How to reach the control plane, as the options say."""

    address: str = DEFAULT_ADDRESS
    token: str | None = None
    tls: TlsOptions | None = None


OpenClient: TypeAlias = Callable[[Connection], AsyncClient]


def open_client(connection: Connection) -> AsyncClient:
    """A client of the control plane."""
    return AsyncClient(connection.address, tls=connection.tls, token=connection.token)


def make_console(*, stderr: bool = False) -> Console:
    """A console that does not fold tables to 80 columns when nobody's terminal is 80 wide."""
    stream = sys.stderr if stderr else sys.stdout
    width = None if stream.isatty() or "COLUMNS" in os.environ else _PIPE_WIDTH
    return Console(stderr=stderr, width=width, highlight=False)


class Session:
    """One run of the command. `connection` is what the options say, once they are read."""

    def __init__(self, opening: OpenClient = open_client) -> None:
        self.connection = Connection()
        self._open = opening
        self.out = make_console()
        self.err = make_console(stderr=True)

    def client(self) -> AsyncClient:
        """A new client."""
        return self._open(self.connection)

    def run(self, work: Callable[[AsyncClient], Coroutine[Any, Any, T]]) -> T:
        """Do asynchronous work with a client, which is closed afterwards."""

        async def with_client() -> T:
            async with self.client() as client:
                return await work(client)

        return asyncio.run(with_client())

    def print_json(self, value: object) -> None:
        """One JSON document, for people and `jq` alike."""
        text = msgspec.json.format(msgspec.json.encode(value), indent=2)
        self._write(text)

    def print_json_line(self, value: object) -> None:
        """One line of NDJSON, at once."""
        self._write(msgspec.json.encode(value))

    def _write(self, text: bytes) -> None:
        self.out.file.write(text.decode() + "\n")
        self.out.file.flush()


def session_of(context: typer.Context) -> Session:
    """The session of a command."""
    session = context.obj
    assert isinstance(session, Session)
    return session
