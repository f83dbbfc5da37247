"""Engines as plain subprocesses, for tests of adapters and simulators below the agent's runtimes."""

from __future__ import annotations

import asyncio
import os
import socket
import sys
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

import msgspec

from nodeagent.engines import EngineAdapter, EngineHealth, EngineStream, Probe, RunKind
from rung.types import DeploymentSpec

_POLL_S = 0.02
_START_TIMEOUT_S = 60.0


def free_port() -> int:
    """A port of loopback that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


async def until(condition: Callable[[], bool], what: str, timeout_s: float = 10.0) -> None:
    """Wait for a condition that another process brings about, and fail if it does not."""
    deadline = asyncio.get_running_loop().time() + timeout_s
    while not condition():
        assert asyncio.get_running_loop().time() < deadline, f"{what}: not within {timeout_s} s"
        await asyncio.sleep(_POLL_S)


class EngineProcess:
    """A running engine and its output."""

    def __init__(self, process: asyncio.subprocess.Process, base_url: str, log_path: Path) -> None:
        self.process = process
        self.base_url = base_url
        self._log_path = log_path

    @property
    def pid(self) -> int:
        """Its process id."""
        return self.process.pid

    def log(self) -> str:
        """All that it printed so far."""
        return self._log_path.read_text(errors="replace")

    async def exit_code(self, timeout_s: float = 30.0) -> int:
        """Wait for it to end by itself."""
        async with asyncio.timeout(timeout_s):
            return await self.process.wait()

    async def become(
        self, wanted: EngineHealth, adapter: EngineAdapter, spec: DeploymentSpec
    ) -> tuple[Probe, list[EngineHealth]]:
        """Probe until the engine is as wanted; also what it was on the way, without repeats."""
        seen: list[EngineHealth] = []
        deadline = asyncio.get_running_loop().time() + _START_TIMEOUT_S
        while True:
            probe = await adapter.probe(self.base_url, spec)
            if not seen or seen[-1] is not probe.health:
                seen.append(probe.health)
            if probe.health is wanted:
                return probe, seen
            assert self.process.returncode is None, f"the engine ended:\n{self.log()[-3000:]}"
            assert asyncio.get_running_loop().time() < deadline, f"{seen}:\n{self.log()[-3000:]}"
            await asyncio.sleep(_POLL_S)


@asynccontextmanager
async def engine_process(
    arguments: Sequence[str], *, port: int, log_path: Path, environment: Mapping[str, str] | None = None
) -> AsyncIterator[EngineProcess]:
    """Run `arguments` with a log file for output, and end it at the end."""
    with log_path.open("wb") as log:
        process = await asyncio.create_subprocess_exec(
            *arguments,
            stdin=asyncio.subprocess.DEVNULL,
            stdout=log,
            stderr=asyncio.subprocess.STDOUT,
            env={**os.environ, **(environment or {})},
        )
    try:
        yield EngineProcess(process, f"http://127.0.0.1:{port}", log_path)
    finally:
        if process.returncode is None:
            process.terminate()
            try:
                async with asyncio.timeout(10):
                    await process.wait()
            except TimeoutError:
                process.kill()
                await process.wait()


def python_module(module: str) -> list[str]:
    """The command of a module of ours, run by this interpreter."""
    return [sys.executable, "-m", module]


async def read_frames(stream: EngineStream) -> list[str]:
    """The data of all frames of an event stream, comments left out, whatever its line ends."""
    text = b"".join([chunk async for chunk in stream.chunks()]).decode()
    blocks = text.replace("\r\n", "\n").split("\n\n")
    return [block.removeprefix("data: ") for block in blocks if block.startswith("data: ")]


def chat_body(text: str, **more: object) -> bytes:
    """A streamed chat request."""
    messages = [{"role": "user", "content": text}]
    return msgspec.json.encode({"messages": messages, "stream": True, **more})


CHAT = RunKind.CHAT_COMPLETIONS
