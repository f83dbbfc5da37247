"""The demo's processes: started, named, and taken down again."""

from __future__ import annotations

import asyncio
import shutil
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager
from pathlib import Path

from controlplane.demo._ladder_layout import CLOUD_KEY, CLOUD_PROVIDER
from controlplane.demo._layout import (
    SPARK,
    WORKSTATION,
    DemoOptions,
    Layout,
    LocalLlamaCpp,
    find_llama_cpp,
)
from controlplane.demo._sweeper import Sweeper
from controlplane.local import (
    Child,
    ChildDiedError,
    ServerPorts,
    Watch,
    free_ports,
    rung_command,
    wait_for_ports,
)

_START_TIMEOUT_S = 30.0
_STOP_GRACE_S = 5.0
_PLANE = "controlplane"
#: Simulated machines by node.
PROFILES = {WORKSTATION: "workstation", SPARK: "spark"}


class Stage:
    """A running demo fleet. `started_s` is when its first process was started, on the monotonic clock."""

    def __init__(self, layout: Layout, ports: ServerPorts, processes: Processes, started_s: float) -> None:
        self.layout = layout
        self.ports = ports
        self.started_s = started_s
        self._processes = processes

    @property
    def children(self) -> tuple[Child, ...]:
        """The processes, the control plane first."""
        return tuple(self._processes.children.values())

    async def kill_agent(self, node_id: str) -> int:
        """Kill an agent without a warning; returns the pid that it had."""
        return await self._processes.kill(_agent_name(node_id))

    async def start_agent(self, node_id: str) -> int:
        """Start an agent again that was killed; returns its pid. Raises OSError."""
        return await self._processes.start(_agent_name(node_id))


class Processes:
    """The demo's processes by name, watched while they are meant to run."""

    def __init__(self, layout: Layout, watch: Watch) -> None:
        self.children: dict[str, Child] = {}
        self._layout = layout
        self._commands = _commands(layout)
        self._watch = watch

    async def start_all(self) -> Child:
        """Start them, and make the machines of the agents; returns the control plane.

        Raises:
            OSError: one cannot be started.
            StageFailedError: a machine could not be made.
        """
        # It takes longest, and asks nothing of the machines.
        await self.start(_PLANE)
        await _make_machines(self._layout)
        for name in self._commands:
            if name not in self.children:
                await self.start(name)
        return self.children[_PLANE]

    async def start(self, name: str) -> int:
        """Start one; returns its pid. Raises OSError."""
        layout = self._layout
        child = await Child.start(
            name, self._commands[name], log_path=layout.log_path(name), environment=layout.environment
        )
        self.children[name] = child
        self._watch.add(child)
        return child.pid

    async def kill(self, name: str) -> int:
        """Kill one that nobody shall miss; returns the pid that it had."""
        child = self.children[name]
        self._watch.remove(child)
        await child.kill()
        return child.pid

    async def stop(self) -> None:
        """The control plane first: it should not see its nodes vanish. Engines are left to the sweeper."""
        children = list(self.children.values())
        await asyncio.gather(*(child.stop(_STOP_GRACE_S) for child in children[:1]))
        await asyncio.gather(*(child.stop(_STOP_GRACE_S) for child in children[1:]))


class StageFailedError(Exception):
    """The fleet did not come up. `last_words` are the ends of its logs by process: the files are gone."""

    def __init__(self, message: str, last_words: dict[str, list[str]]) -> None:
        super().__init__(message)
        self.last_words = last_words


def last_words(children: Iterable[Child]) -> dict[str, list[str]]:
    """The ends of the logs by name of the process."""
    return {child.name: child.log_tail() for child in children}


@asynccontextmanager
async def open_stage(options: DemoOptions, watch: Watch) -> AsyncIterator[Stage]:
    """Start the fleet in a folder of its own, and leave nothing of it behind.

    Raises:
        FailedPreconditionError: a real llama.cpp is wanted and there is none.
        StageFailedError: one of the processes did not last, or is not ready in time.
    """
    llama_cpp = find_llama_cpp() if options.gguf is not None else None
    folder = Path(tempfile.mkdtemp(prefix="rung-demo-"))
    sweeper = await _start_sweeper(folder)
    processes: Processes | None = None
    try:
        layout = _layout(options, folder, llama_cpp)
        layout.write()
        started_s = time.monotonic()
        processes = Processes(layout, watch)
        plane = await processes.start_all()
        try:
            async with asyncio.timeout(_START_TIMEOUT_S):
                ports = await watch.during(wait_for_ports(layout.server_state_dir, plane.pid))
        except ChildDiedError as error:
            raise StageFailedError(str(error), last_words([error.child])) from error
        except TimeoutError as error:
            late = f"the control plane is not ready after {_START_TIMEOUT_S:.0f} s"
            raise StageFailedError(late, last_words(processes.children.values())) from error
        yield Stage(layout, ports, processes, started_s)
    finally:
        try:
            if processes is not None:
                await processes.stop()
        finally:
            await sweeper.sweep()


async def _start_sweeper(folder: Path) -> Sweeper:
    try:
        return await Sweeper.start(folder)
    except BaseException:
        shutil.rmtree(folder)
        raise


def _layout(options: DemoOptions, folder: Path, llama_cpp: LocalLlamaCpp | None) -> Layout:
    *agent_ports, cloud_port = free_ports(len(PROFILES) + 1)
    return Layout(
        folder=folder,
        agent_ports=dict(zip(PROFILES, agent_ports, strict=True)),
        cloud_port=cloud_port,
        gguf=options.gguf,
        llama_cpp=llama_cpp,
    )


async def _make_machines(layout: Layout) -> None:
    async def make(node_id: str, profile: str) -> None:
        # By name: the control plane imports nothing of the agent.
        process = await asyncio.create_subprocess_exec(
            sys.executable,
            *("-m", "nodeagent.simulators.gpu", "create", str(layout.gpus_dir(node_id))),
            *("--profile", profile),
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.STDOUT,
        )
        output, _ = await process.communicate()
        if process.returncode != 0:
            last = output.decode(errors="replace").strip().rsplit("\n", 1)[-1]
            raise StageFailedError(f"the simulated {node_id} could not be made: {last}", {})

    await asyncio.gather(*(make(node_id, profile) for node_id, profile in PROFILES.items()))


def _agent_name(node_id: str) -> str:
    return f"agent-{node_id}"


def _commands(layout: Layout) -> dict[str, tuple[str, ...]]:
    commands = {_PLANE: rung_command("serve", "--config", str(layout.config_path))}
    for node_id, port in layout.agent_ports.items():
        # Engines that really run here belong to one machine only.
        discover = "--discover" if node_id == WORKSTATION else "--no-discover"
        arguments = ["--config", str(layout.agent_config_path(node_id)), "--node-id", node_id]
        arguments += ["--port", str(port), "--state-dir", str(layout.folder / node_id), discover]
        arguments += ["--simulated-gpus", str(layout.gpus_dir(node_id))]
        commands[_agent_name(node_id)] = rung_command("agent", "run", *arguments)
    commands["cloud-api"] = (
        sys.executable,
        *("-m", "controlplane.simulators.cloud", "--provider", CLOUD_PROVIDER, "--api-key", CLOUD_KEY),
        *("--port", str(layout.cloud_port)),
    )
    return commands
