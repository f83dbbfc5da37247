"""A child process of its own session, with its output in a file."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import sys
from collections import deque
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import BinaryIO

_TAIL_LINES = 12


def rung_command(*arguments: str) -> tuple[str, ...]:
    """The command line of `rung` in exactly this environment, whatever is on PATH."""
    return (sys.executable, "-m", "rung.cli", *arguments)


def free_ports(count: int) -> tuple[int, ...]:
    """Distinct loopback ports that are free now."""
    with ExitStack() as stack:
        found = []
        for _ in range(count):
            listener = stack.enter_context(socket.socket())
            listener.bind(("127.0.0.1", 0))
            found.append(int(listener.getsockname()[1]))
        return tuple(found)


class Child:
    """A process that we started. Ctrl-C at the terminal does not reach it: it is stopped in its turn."""

    def __init__(self, name: str, process: asyncio.subprocess.Process, log_path: Path) -> None:
        self.name = name
        self.log_path = log_path
        self._process = process

    @classmethod
    async def start(
        cls,
        name: str,
        command: Sequence[str],
        *,
        log_path: Path,
        environment: Mapping[str, str] | None = None,
    ) -> Child:
        """Start a process. The log of the run before is kept beside the new one, as `.1`.

        Raises:
            OSError: it cannot be started, or its log not be written.
        """
        with _new_log(log_path) as log:
            process = await asyncio.create_subprocess_exec(
                *command,
                stdin=asyncio.subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env={**os.environ, **(environment or {})},
                start_new_session=True,
            )
        return cls(name, process, log_path)

    @property
    def pid(self) -> int:
        """Process id."""
        return self._process.pid

    @property
    def exit_code(self) -> int | None:
        """How it ended; None while it runs."""
        return self._process.returncode

    async def wait(self) -> int:
        """Wait for its end; returns the exit code, negative for a signal."""
        return await self._process.wait()

    async def stop(self, grace_s: float) -> None:
        """End it: politely, and by force after `grace_s`. Returns when it is gone.

        What it started in sessions of their own (engines) is left alone.
        """
        if self.exit_code is not None:
            return
        with suppress(ProcessLookupError):
            self._process.terminate()
        try:
            async with asyncio.timeout(grace_s):
                await self._process.wait()
        except TimeoutError:
            with suppress(ProcessLookupError):
                os.killpg(self.pid, signal.SIGKILL)
            await self._process.wait()

    async def kill(self) -> None:
        """End it at once, without a chance to say anything; returns when it is gone."""
        with suppress(ProcessLookupError):
            self._process.kill()
        await self._process.wait()

    def log_tail(self, lines: int = _TAIL_LINES) -> list[str]:
        """Its last words."""
        with suppress(OSError), self.log_path.open(errors="replace") as log:
            return [line.rstrip("\n") for line in deque(log, maxlen=lines)]
        return []


def _new_log(path: Path) -> BinaryIO:
    path.parent.mkdir(parents=True, exist_ok=True)
    with suppress(FileNotFoundError):
        path.replace(path.with_name(f"{path.name}.1"))
    return path.open("wb")
