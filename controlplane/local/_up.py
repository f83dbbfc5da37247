"""`rung up`: a control plane and an agent on this box."""

from __future__ import annotations

import asyncio
import fcntl
import ipaddress
import re
import socket
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import yaml
from msgspec import Struct
from rich.console import Console
from rich.text import Text

from controlplane.local._child import Child, rung_command
from controlplane.local._ready import ServerPorts, wait_for_nodes, wait_for_ports
from controlplane.local._watch import ChildDiedError, StopRequestedError, Watch
from rung import AsyncClient
from rung.cli.views import fleet_view
from rung.errors import ConfigError, FailedPreconditionError
from rung.types import FleetSnapshot

if TYPE_CHECKING:
    from controlplane.config import Config

_START_TIMEOUT_S = 60.0
#: Engines that run here are asked who they are once the agent is up; one that is busy answers later.
_DISCOVERY_S = 1.5
#: More than a control plane takes to drain by default.
_STOP_GRACE_S = 45.0
_GENERATED = (
    "# Written by `rung up`, anew with every start. To keep changes, copy it to ./rung.yaml and edit that:\n"
    "# `rung up` prefers it from then on.\n"
)


class UpOptions(Struct, frozen=True, kw_only=True):
    """What to start. `config` None means a generated one, with this box as the only node.

    What `rung up` itself and the agent keep is under `state_dir`. Ports and a `server_state_dir` that are
    None are those of the configuration.
    """

    state_dir: Path
    server_state_dir: Path | None = None
    config: Path | None = None
    agent_config: Path | None = None
    node_id: str = ""
    grpc_port: int | None = None
    http_port: int | None = None
    agent_port: int = 8152
    simulated_gpus: Path | None = None
    log_level: str = "info"


class _Plan(Struct, frozen=True, kw_only=True):
    """Which files, names and ports it comes down to."""

    config: Path
    server_state_dir: Path
    node_id: str
    agent_port: int


def run_up(options: UpOptions, console: Console) -> int:
    """Run until Ctrl-C, SIGTERM, or the end of a child; returns the exit code. Engines keep running.

    Raises:
        ConfigError: a configuration that cannot be used, or has no node on this box.
        FailedPreconditionError: another `rung up` uses the state folder.
        OSError: the state folder cannot be written.
    """
    options.state_dir.mkdir(parents=True, exist_ok=True)
    with _locked(options.state_dir / "up.lock"):
        plan = _plan(options)
        return asyncio.run(_run(options, plan, console))


async def _run(options: UpOptions, plan: _Plan, console: Console) -> int:
    try:
        async with _children(options, plan, console) as (watch, plane):
            with console.status("starting the control plane and the agent"):
                ports, snapshot = await watch.during(_until_ready(plan, plane))
            _welcome(console, plan, ports, snapshot)
            await watch.until_stopped()
            console.print(Text("stopping; engines keep running", style="dim"))
        return 0
    except StopRequestedError:
        return 0
    except ChildDiedError as error:
        _mourn(console, error.child)
        return 1
    except TimeoutError:
        console.print(
            Text(
                f"error: not ready within {_START_TIMEOUT_S:.0f} s; logs: {options.state_dir / 'logs'}", "red"
            )
        )
        return 1


@asynccontextmanager
async def _children(options: UpOptions, plan: _Plan, console: Console) -> AsyncIterator[tuple[Watch, Child]]:
    """Agent and control plane, stopped in reverse: nobody should see nodes vanish while it drains."""
    logs = options.state_dir / "logs"
    started: list[Child] = []
    async with Watch() as watch:
        try:
            for name, command in (
                ("agent", _agent_command(options, plan)),
                ("controlplane", _serve_command(options, plan)),
            ):
                child = await Child.start(name, command, log_path=logs / f"{name}.log")
                started.append(child)
                watch.add(child)
            yield watch, started[-1]
        finally:
            for child in reversed(started):
                await asyncio.shield(child.stop(_STOP_GRACE_S))


async def _until_ready(plan: _Plan, plane: Child) -> tuple[ServerPorts, FleetSnapshot]:
    async with asyncio.timeout(_START_TIMEOUT_S):
        ports = await wait_for_ports(plan.server_state_dir, plane.pid)
        async with AsyncClient(ports.address) as client:
            return ports, await wait_for_nodes(client, settle_s=_DISCOVERY_S)


def _serve_command(options: UpOptions, plan: _Plan) -> tuple[str, ...]:
    command = ["serve", "--config", str(plan.config), "--log-level", options.log_level]
    command += ["--state-dir", str(plan.server_state_dir)]
    for name, port in (("--grpc-port", options.grpc_port), ("--http-port", options.http_port)):
        if port is not None:
            command += [name, str(port)]
    return rung_command(*command)


def _agent_command(options: UpOptions, plan: _Plan) -> tuple[str, ...]:
    command = ["agent", "run", "--node-id", plan.node_id, "--port", str(plan.agent_port)]
    command += ["--state-dir", str(options.state_dir / "agent"), "--discover"]
    if options.agent_config is not None:
        command += ["--config", str(options.agent_config)]
    if options.simulated_gpus is not None:
        command += ["--simulated-gpus", str(options.simulated_gpus)]
    return rung_command(*command)


def _plan(options: UpOptions) -> _Plan:
    if options.config is None:
        path = options.state_dir / "rung.yaml"
        node_id = options.node_id or _host_name()
        path.write_text(_GENERATED + _generated_config(options, node_id))
        return _Plan(
            config=path,
            server_state_dir=options.state_dir,
            node_id=node_id,
            agent_port=options.agent_port,
        )
    # Most of the control plane comes with it, and who has no file need not wait for that.
    from controlplane.config import load_config

    config = load_config(options.config)
    node_id, port = _local_node(config, options)
    return _Plan(
        config=options.config,
        server_state_dir=options.server_state_dir or config.server.state_dir,
        node_id=node_id,
        agent_port=port,
    )


def _generated_config(options: UpOptions, node_id: str) -> str:
    document = {
        "server": {"state_dir": str(options.state_dir)},
        "nodes": [{"id": node_id, "address": f"127.0.0.1:{options.agent_port}"}],
    }
    return yaml.safe_dump(document, sort_keys=False)


def _local_node(config: Config, options: UpOptions) -> tuple[str, int]:
    """The configured node that is this box: the one with the wished id, or the first on loopback."""
    for node in config.nodes:
        host, _, port = node.address.rpartition(":")
        if _is_loopback(host) and options.node_id in ("", node.id):
            return node.id, int(port)
    wanted = f"node {options.node_id!r}" if options.node_id else "a node"
    raise ConfigError(
        f"{options.config}: nodes: `rung up` runs {wanted} of this box, and none is on 127.0.0.1; "
        "add one, or use `rung serve` and `rung agent run`"
    )


def _is_loopback(host: str) -> bool:
    try:
        return host == "localhost" or ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


def _host_name() -> str:
    name = re.sub(r"[^a-z0-9._-]", "-", socket.gethostname().split(".", 1)[0].lower())
    return name.strip("._-")[:63] or "local"


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    with path.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise FailedPreconditionError(
                f"another `rung up` runs with {path.parent}; use that one, or give another --state-dir"
            ) from None
        yield


def _welcome(console: Console, plan: _Plan, ports: ServerPorts, snapshot: FleetSnapshot) -> None:
    console.print(fleet_view(snapshot, now_s=time.time(), width=console.width))
    console.print()
    adopted = [each.spec.id for each in snapshot.deployments if each.adopted]
    if adopted:
        console.print(Text(f"Found running here, and adopted as they are: {', '.join(adopted)}"))
    address = "" if ports.address == "127.0.0.1:8151" else f" --address {ports.address}"
    facts = (
        ("OpenAI base URL", f"{ports.url}/v1"),
        ("gRPC", ports.address),
        ("config", str(plan.config)),
    )
    for name, value in facts:
        console.print(Text.assemble((f"{name:<16}", "bold"), value))
    console.print()
    console.print("Try, in another terminal:")
    # Without a deployment nobody would answer.
    chat = ("chat 'Why is the sky blue?'",) if snapshot.deployments else ()
    for command in (*chat, "status --watch", "models"):
        console.print(Text(f"  rung{address} {command}", style="cyan"))
    console.print(Text("Ctrl-C stops the control plane and the agent; engines keep running.", style="dim"))


def _mourn(console: Console, child: Child) -> None:
    console.print(Text(f"error: {child.name} ended with exit code {child.exit_code}; its last words:", "red"))
    for line in child.log_tail():
        console.print(Text(f"  {line}", style="dim"), soft_wrap=True)
    console.print(Text(f"hint: the whole log is {child.log_path}", style="dim"))
