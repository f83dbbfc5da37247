"""Waiting for a control plane, and for its nodes, to be ready."""

from __future__ import annotations

import asyncio
from contextlib import aclosing
from pathlib import Path

import msgspec
from msgspec import Struct

from rung import AsyncClient
from rung.types import FleetSnapshot, NodeState

#: The control plane writes it into its state folder when it serves.
READY_FILE = "controlplane.json"
_LOOK_INTERVAL_S = 0.05


class ServerPorts(Struct, frozen=True):
    """Where a control plane serves, as it says itself."""

    grpc_port: int
    http_port: int
    pid: int

    @property
    def address(self) -> str:
        """Of the gRPC API."""
        return f"127.0.0.1:{self.grpc_port}"

    @property
    def url(self) -> str:
        """Of the HTTP gateway."""
        return f"http://127.0.0.1:{self.http_port}"


async def wait_for_ports(state_dir: Path, pid: int) -> ServerPorts:
    """Wait until the control plane with this pid serves. Returns never if it does not: bound it."""
    path = state_dir / READY_FILE
    while True:
        try:
            ports = msgspec.json.decode(path.read_bytes(), type=ServerPorts)
        except (FileNotFoundError, msgspec.DecodeError):
            ports = None
        # Left over by one that was killed, the file has another pid.
        if ports is not None and ports.pid == pid:
            return ports
        # A file has nobody to wait for but its appearance.
        await asyncio.sleep(_LOOK_INTERVAL_S)


async def wait_for_nodes(client: AsyncClient, *, settle_s: float = 0.0) -> FleetSnapshot:
    """Wait until every node is ready and has been measured. Bound it as `wait_for_ports`.

    Args:
        client: of the control plane.
        settle_s: time for agents that are ready to find engines; the fleet after it is returned.
    """
    loop = asyncio.get_running_loop()
    settled_s: float | None = None
    async with aclosing(client.watch_fleet()) as snapshots:
        # There is one at least once a second.
        async for snapshot in snapshots:
            if not all(node.state is NodeState.READY and node.status for node in snapshot.nodes):
                continue
            if settled_s is None:
                settled_s = loop.time() + settle_s
            if loop.time() >= settled_s:
                return snapshot
    raise AssertionError("a watch of the fleet does not end")
