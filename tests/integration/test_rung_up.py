"""`rung up` as a person runs it, from start to end."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import psutil
import pytest

from controlplane.local import free_ports, rung_command
from nodeagent.simulators.gpu import SimulatedGpus, SimulatedProfile

_START_S = 60.0


class Up:
    """A running `rung up`."""

    def __init__(self, process: asyncio.subprocess.Process, address: str) -> None:
        self.process = process
        self.address = address
        self.said = ""

    async def until(self, words: str) -> None:
        """Read its output until it has said something."""
        assert self.process.stdout is not None
        async with asyncio.timeout(_START_S):
            while words not in self.said:
                line = await self.process.stdout.readline()
                assert line, f"it ended, and said:\n{self.said}"
                self.said += line.decode()

    async def end(self) -> int:
        """Read what is left, and wait for its end."""
        assert self.process.stdout is not None
        async with asyncio.timeout(_START_S):
            self.said += (await self.process.stdout.read()).decode()
            return await self.process.wait()

    def children(self) -> dict[str, psutil.Process]:
        """Its control plane and its agent."""
        found = psutil.Process(self.process.pid).children()
        return {"agent" if "agent" in child.cmdline() else "serve": child for child in found}


@asynccontextmanager
async def running_up(folder: Path, *more: str) -> AsyncIterator[Up]:
    if not (folder / "gpus").exists():
        SimulatedGpus.create_profile(folder / "gpus", SimulatedProfile.WORKSTATION)
    grpc_port, http_port, agent_port = free_ports(3)
    process = await asyncio.create_subprocess_exec(
        *rung_command("up", "--state-dir", str(folder / "state"), "--node-id", "workstation"),
        *("--grpc-port", str(grpc_port), "--http-port", str(http_port), "--agent-port", str(agent_port)),
        *("--simulated-gpus", str(folder / "gpus"), *more),
        cwd=folder,
        env={**os.environ, "XDG_CONFIG_HOME": str(folder)},
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
    )
    up = Up(process, f"127.0.0.1:{grpc_port}")
    try:
        await up.until("Ctrl-C stops")
        yield up
    finally:
        if process.returncode is None:
            process.terminate()
            await up.end()


async def run_rung(*arguments: str) -> tuple[int, str]:
    process = await asyncio.create_subprocess_exec(
        *rung_command(*arguments), stdin=subprocess.DEVNULL, stdout=subprocess.PIPE
    )
    output, _ = await process.communicate()
    assert process.returncode is not None
    return process.returncode, output.decode()


class TestUp:
    async def test_runs_until_it_is_stopped(self, tmp_path: Path) -> None:
        async with running_up(tmp_path) as up:
            assert "NVIDIA GeForce RTX 5090" in up.said
            assert "OpenAI base URL" in up.said
            code, output = await run_rung("--address", up.address, "status", "--json")
            assert code == 0
            assert [node["id"] for node in json.loads(output)["nodes"]] == ["workstation"]
            again, _ = await run_rung("up", "--state-dir", str(tmp_path / "state"))
            assert again == 5
            children = up.children()
            assert set(children) == {"agent", "serve"}
            up.process.send_signal(signal.SIGINT)
            assert await up.end() == 0
            assert not any(child.is_running() for child in children.values())

    @pytest.mark.parametrize("victim", ["agent", "serve"])
    async def test_a_child_that_dies_ends_it(self, tmp_path: Path, victim: str) -> None:
        async with running_up(tmp_path) as up:
            children = up.children()
            children[victim].kill()
            assert await up.end() == 1
            assert "ended with exit code -9; its last words:" in up.said
            assert not any(child.is_running() for child in children.values())
