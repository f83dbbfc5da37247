"""A control plane and an agent as real processes, with a configuration that a test writes."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import yaml

import rung
from rung.types import Deployment, Residency

_READY_TIMEOUT_S = 90.0

#: The simulators, as an agent's configuration permits them.
SIMULATORS: dict[str, Any] = {
    name: {
        "path": sys.executable,
        "arguments_prefix": ["-m", f"nodeagent.simulators.{module}"],
        "allow_arguments": True,
        "allow_environment": True,
    }
    for name, module in (("llama-server", "llama_server"), ("ollama", "ollama"), ("vllm", "vllm"))
}
#: llama.cpp's real server, from the package that the tests install.
LLAMA_CPP_PYTHON: dict[str, Any] = {"path": sys.executable, "arguments_prefix": ["-m", "llama_cpp.server"]}


class RungProcess:
    """`rung serve` or `rung agent run`, which can be killed and started again on the same state."""

    def __init__(self, arguments: Sequence[str], ready_file: Path, log_path: Path) -> None:
        self._arguments = arguments
        self._ready_file = ready_file
        self._log_path = log_path
        self._process: asyncio.subprocess.Process | None = None
        self.ready: dict[str, int] = {}

    async def start(self) -> None:
        """Start it and wait until it says that it is ready; one that does not in time is killed."""
        self._ready_file.unlink(missing_ok=True)
        with self._log_path.open("ab") as log:
            self._process = await asyncio.create_subprocess_exec(
                sys.executable, "-m", "rung.cli", *self._arguments, stdout=log, stderr=log
            )
        try:
            await self._ready(self._process)
        except BaseException:
            await self.end(signal.SIGKILL)
            raise

    async def _ready(self, process: asyncio.subprocess.Process) -> None:
        deadline = asyncio.get_running_loop().time() + _READY_TIMEOUT_S
        while True:
            with suppress(FileNotFoundError, json.JSONDecodeError):
                self.ready = json.loads(self._ready_file.read_text())
                return
            assert process.returncode is None, f"it ended:\n{self.log()[-3000:]}"
            assert asyncio.get_running_loop().time() < deadline, f"not ready:\n{self.log()[-3000:]}"
            await asyncio.sleep(0.05)

    async def end(self, number: signal.Signals) -> int:
        """Send a signal and return the exit code."""
        assert self._process is not None
        with suppress(ProcessLookupError):
            self._process.send_signal(number)
        return await asyncio.wait_for(self._process.wait(), 30)

    def log(self) -> str:
        """All that it printed."""
        return self._log_path.read_text(errors="replace")


class Stack:
    """One of each, and a client."""

    def __init__(self, agent: RungProcess, plane: RungProcess) -> None:
        self.agent = agent
        self.plane = plane
        self.client = rung.AsyncClient()

    @property
    def http(self) -> str:
        """Base URL of the gateway."""
        return f"http://127.0.0.1:{self.plane.ready['http_port']}"

    async def connect(self) -> None:
        """A client for the control plane that runs now."""
        await self.client.aclose()
        self.client = rung.AsyncClient(f"127.0.0.1:{self.plane.ready['grpc_port']}")

    async def heard(self) -> None:
        """Return once the control plane has heard its node after this call."""
        now_s = time.time()
        async with asyncio.timeout(30):
            async for fleet in self.client.watch_fleet():
                if all((node.last_seen_time_s or 0.0) > now_s for node in fleet.nodes):
                    return

    async def deployment(self, deployment_id: str, *wanted: Residency) -> Deployment:
        """A deployment, once its residency is one of those wanted."""
        async with asyncio.timeout(60):
            async for fleet in self.client.watch_fleet():
                for found in fleet.deployments:
                    if found.spec.id == deployment_id and (not wanted or found.residency in wanted):
                        return found
        raise AssertionError("the watch ended")


@asynccontextmanager
async def stack(
    folder: Path,
    deployments: Sequence[Mapping[str, Any]],
    *,
    agent: Mapping[str, Any] | None = None,
    server: Mapping[str, Any] | None = None,
    profiles: Sequence[Mapping[str, Any]] = (),
    ladder: Mapping[str, Any] | None = None,
    cloud: Sequence[Mapping[str, Any]] = (),
) -> AsyncIterator[Stack]:
    """Start both; at the end stop whatever engine is left, and both."""
    agent_file, plane_file = folder / "agent.yaml", folder / "rung.yaml"
    agent_config = {
        "node_id": "box",
        "port": 0,
        "state_dir": str(folder / "agent"),
        "executables": SIMULATORS,
    }
    agent_file.write_text(yaml.safe_dump(agent_config | dict(agent or {})))
    agent_process = RungProcess(
        ["agent", "run", "--config", str(agent_file)], folder / "agent" / "agent.json", folder / "agent.log"
    )
    await agent_process.start()
    # The next start listens on the same port: the control plane dials the address that it knows.
    agent_config["port"] = agent_process.ready["port"]
    agent_file.write_text(yaml.safe_dump(agent_config | dict(agent or {})))
    plane_config = {
        "server": {"grpc_port": 0, "http_port": 0, "state_dir": str(folder / "plane"), "drain": "2s"}
        | dict(server or {}),
        "nodes": [{"id": "box", "address": f"127.0.0.1:{agent_process.ready['port']}"}],
        "deployments": [{"node": "box", **deployment} for deployment in deployments],
        "profiles": list(profiles),
        "cloud": list(cloud),
    }
    if ladder is not None:
        plane_config["ladder"] = dict(ladder)
    plane_file.write_text(yaml.safe_dump(plane_config))
    plane_process = RungProcess(
        ["serve", "--config", str(plane_file)], folder / "plane" / "controlplane.json", folder / "plane.log"
    )
    found = Stack(agent_process, plane_process)
    try:
        await plane_process.start()
        await found.connect()
        # Any state will do: the node has been heard once it is not unknown.
        for deployment in deployments:
            known = [each for each in Residency if each is not Residency.UNKNOWN]
            await found.deployment(str(deployment["id"]), *known)
        yield found
    finally:
        await found.client.aclose()
        await plane_process.end(signal.SIGTERM)
        await agent_process.end(signal.SIGTERM)
        _kill_engines(folder)


def engine_pids(folder: Path) -> list[int]:
    """Processes of engines whose agent has its state in `folder`: their output goes there."""
    found: list[int] = []
    for name in os.listdir("/proc"):
        with suppress(OSError, ValueError):
            if os.readlink(f"/proc/{name}/fd/1").startswith(str(folder / "agent" / "logs")):
                found.append(int(name))
    return found


def _kill_engines(folder: Path) -> None:
    for pid in engine_pids(folder):
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
