"""Ends everything that a demo started and removes its folder, once the demo is gone.

Run as a script, `python _sweeper.py FOLDER`, with a pipe as stdin: the end of the pipe, which
also a killed demo closes, sets it off. Engines outlive the control plane and the agents by design,
so neither of them does this. What belongs to the demo is known by a variable in its environment.
"""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
import sys
from pathlib import Path

import psutil

#: Every process of a demo has its folder in this variable, engines included.
MARK = "RUNG_DEMO_DIR"
_GRACE_S = 3.0
_ROUNDS = 5
_WAIT_S = 30.0


class Sweeper:
    """The sweeper of a folder, as its demo sees it."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self._process = process

    @classmethod
    async def start(cls, folder: Path) -> Sweeper:
        """Start the process. Raises OSError."""
        environment = {key: value for key, value in os.environ.items() if key != MARK}
        process = await asyncio.create_subprocess_exec(
            sys.executable,
            # As a script: it needs nothing of the control plane, and should be there at once.
            *("-I", str(Path(__file__)), str(folder)),
            stdin=asyncio.subprocess.PIPE,
            env=environment,
            start_new_session=True,
        )
        return cls(process)

    async def sweep(self) -> None:
        """Have it done, and wait for it. Raises TimeoutError; the sweeper goes on all the same."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        async with asyncio.timeout(_WAIT_S):
            await self._process.wait()


def marked_processes(folder: Path) -> list[psutil.Process]:
    """Processes of the demo with this folder, other than this one."""
    found = []
    for process in psutil.process_iter():
        try:
            if process.pid != os.getpid() and process.environ().get(MARK) == str(folder):
                found.append(process)
        except (psutil.Error, OSError):
            # Ended just now, or somebody else's: not ours either way.
            continue
    return found


def sweep(folder: Path) -> None:
    """End what belongs to `folder`, politely first, and remove it."""
    for _ in range(_ROUNDS):
        # Again, since what is ended may have started something meanwhile.
        found = marked_processes(folder)
        if not found:
            break
        for process in found:
            _send(process, signal.SIGTERM)
        _, alive = psutil.wait_procs(found, timeout=_GRACE_S)
        for process in alive:
            _send(process, signal.SIGKILL)
        psutil.wait_procs(alive, timeout=_GRACE_S)
    shutil.rmtree(folder, ignore_errors=True)


def leftovers(folder: Path) -> list[str]:
    """What should be gone and is not, in words."""
    found = [f"process {process.pid}" for process in marked_processes(folder)]
    return [*found, str(folder)] if folder.exists() else found


def _send(process: psutil.Process, number: signal.Signals) -> None:
    try:
        # psutil makes sure that the pid is still that process.
        process.send_signal(number)
    except psutil.Error:
        return


def _main() -> int:
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    sys.stdin.buffer.read()
    sweep(Path(sys.argv[1]))
    return 0


if __name__ == "__main__":
    sys.exit(_main())
