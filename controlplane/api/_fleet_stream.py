"""The fleet as a stream: a snapshot, then what differs, and a heartbeat when nothing does."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Callable, Iterator, Mapping
from typing import Protocol, TypeAlias

from msgspec import Struct
from msgspec.structs import replace

from controlplane.fleet import FleetView
from rung.types import Deployment, FleetSnapshot, MemoryAlert, Node

Load: TypeAlias = Callable[[str], tuple[int, int]]

HEARTBEAT_S = 1.0


class NodeRemoved(Struct, frozen=True):
    """A node is no longer there."""

    node_id: str


class DeploymentRemoved(Struct, frozen=True):
    """A deployment is no longer there."""

    deployment_id: str


class ProfileChanged(Struct, frozen=True):
    """Another profile is current; empty for none."""

    profile: str


class Heartbeat(Struct, frozen=True):
    """Nothing changed; the server's clock."""

    time_s: float


FleetEvent: TypeAlias = (
    FleetSnapshot
    | Node
    | Deployment
    | NodeRemoved
    | DeploymentRemoved
    | ProfileChanged
    | MemoryAlert
    | Heartbeat
)


class FollowedFleet(Protocol):
    """What following needs of the fleet."""

    @property
    def view(self) -> FleetView:
        """The fleet now."""
        ...

    @property
    def load(self) -> Load:
        """Active and queued requests of a deployment."""
        ...

    @property
    def alerts(self) -> Mapping[str, MemoryAlert]:
        """The newest alert of each GPU that had one."""
        ...

    async def wait_changed(self, timeout_s: float) -> bool:
        """Wait for the next change of the view."""
        ...


class Shown(Struct, frozen=True):
    """What a reader was shown: nodes, deployments with their load, the current profile, and alerts."""

    nodes: Mapping[str, Node]
    deployments: Mapping[str, Deployment]
    profile: str
    alerts: Mapping[str, MemoryAlert]


def with_load(deployment: Deployment, load: Load) -> Deployment:
    """A deployment with the requests that we serve and queue for it now."""
    active, queued = load(deployment.spec.id)
    if (active, queued) == (deployment.active_requests, deployment.queued_requests):
        return deployment
    return replace(deployment, active_requests=active, queued_requests=queued)


def shown_now(fleet: FollowedFleet) -> Shown:
    """What there is to show."""
    view, load = fleet.view, fleet.load
    deployments = {key: with_load(found.deployment, load) for key, found in view.deployments.items()}
    return Shown(view.nodes, deployments, view.profile, fleet.alerts)


def snapshot_of(shown: Shown) -> FleetSnapshot:
    """Everything, by id."""
    return FleetSnapshot(
        nodes=tuple(shown.nodes[key] for key in sorted(shown.nodes)),
        deployments=tuple(shown.deployments[key] for key in sorted(shown.deployments)),
        profile=shown.profile,
        alerts=tuple(alert for _, alert in sorted(shown.alerts.items()) if alert.low),
    )


def differences(before: Shown, now: Shown) -> Iterator[FleetEvent]:
    """What changed: nodes first, then deployments, then what is gone, then the profile, then alerts."""
    for key, node in now.nodes.items():
        known = before.nodes.get(key)
        if known is not node and known != node:
            yield node
    for key, deployment in now.deployments.items():
        shown = before.deployments.get(key)
        if shown is not deployment and shown != deployment:
            yield deployment
    for key in before.deployments:
        if key not in now.deployments:
            yield DeploymentRemoved(key)
    for key in before.nodes:
        if key not in now.nodes:
            yield NodeRemoved(key)
    if now.profile != before.profile:
        yield ProfileChanged(now.profile)
    for gpu, alert in now.alerts.items():
        if before.alerts.get(gpu) != alert:
            yield alert


async def follow(fleet: FollowedFleet, heartbeat_s: float = HEARTBEAT_S) -> AsyncGenerator[FleetEvent, None]:
    """Follow the fleet, for ever. A slow reader skips what has changed again."""
    loop = asyncio.get_running_loop()
    view = fleet.view
    shown = shown_now(fleet)
    yield snapshot_of(shown)
    said_s = loop.time()
    while True:
        left_s = said_s + heartbeat_s - loop.time()
        if fleet.view is view and left_s > 0:
            await fleet.wait_changed(left_s)
        view = fleet.view
        before, shown = shown, shown_now(fleet)
        quiet = True
        for event in differences(before, shown):
            quiet = False
            yield event
        if not quiet:
            said_s = loop.time()
        elif loop.time() >= said_s + heartbeat_s:
            yield Heartbeat(time.time())
            said_s = loop.time()
