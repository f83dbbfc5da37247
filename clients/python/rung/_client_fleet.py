"""Following the fleet and the operations on its deployments."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from typing import TYPE_CHECKING, Any, TypeAlias

from rung import codec, v1
from rung._client_calls import Connection, Reconnect
from rung.errors import UnavailableError
from rung.types import (
    Deployment,
    FleetSnapshot,
    LifecycleDone,
    LifecycleEvent,
    LifecycleFailed,
    MemoryAlert,
    Node,
)

if TYPE_CHECKING:
    import grpc.aio

    from rung._client_calls import Stubs

    ChooseMethod: TypeAlias = Callable[[Stubs], grpc.aio.UnaryStreamMultiCallable[Any, Any]]


class FleetFold:
    """A snapshot and the changes after it, as one snapshot."""

    def __init__(self) -> None:
        self._nodes: dict[str, Node] | None = None
        self._deployments: dict[str, Deployment] = {}
        self._profile = ""
        self._alerts: dict[str, MemoryAlert] = {}

    def add(self, message: v1.WatchFleetResponse) -> FleetSnapshot | None:
        """Take one message in. None before the first snapshot."""
        kind = message.WhichOneof("event")
        if kind == "snapshot":
            snapshot = codec.fleet_snapshot_from_proto(message.snapshot)
            self._nodes = {node.id: node for node in snapshot.nodes}
            self._deployments = {each.spec.id: each for each in snapshot.deployments}
            self._profile = snapshot.profile
            self._alerts = {alert.gpu: alert for alert in snapshot.alerts}
        if self._nodes is None:
            return None
        if kind == "node":
            self._nodes[message.node.id] = codec.node_from_proto(message.node)
        elif kind == "deployment":
            self._deployments[message.deployment.spec.id] = codec.deployment_from_proto(message.deployment)
        elif kind == "removed_node_id":
            self._nodes.pop(message.removed_node_id, None)
        elif kind == "removed_deployment_id":
            self._deployments.pop(message.removed_deployment_id, None)
        elif kind == "profile":
            self._profile = message.profile
        elif kind == "memory_alert":
            alert = codec.memory_alert_from_proto(message.memory_alert)
            self._alerts[alert.gpu] = alert
        return FleetSnapshot(
            nodes=tuple(node for _, node in sorted(self._nodes.items())),
            deployments=tuple(each for _, each in sorted(self._deployments.items())),
            profile=self._profile,
            alerts=tuple(alert for _, alert in sorted(self._alerts.items()) if alert.low),
        )


async def watch_snapshots(connection: Connection) -> AsyncGenerator[FleetSnapshot, None]:
    """The fleet after each message of the server, through lost connections."""
    reconnect = Reconnect(connection.reconnect_s)
    while True:
        fold = FleetFold()
        try:
            responses = connection.stream(connection.stubs.fleet.WatchFleet, v1.WatchFleetRequest())
            async with aclosing(responses):
                async for response in responses:
                    reconnect.connected()
                    snapshot = fold.add(response)
                    if snapshot is not None:
                        yield snapshot
            raise UnavailableError("the server ended the watch of the fleet")
        except UnavailableError as lost:
            await reconnect.pause(lost)


async def operate(
    connection: Connection, choose: ChooseMethod, request: Any
) -> AsyncGenerator[LifecycleEvent, None]:
    """The events of an operation to its last one.

    A lost connection is made again and the operation joined: its id makes the request safe to repeat.
    """
    reconnect = Reconnect(connection.reconnect_s)
    last_sequence = 0
    while True:
        try:
            responses = connection.stream(choose(connection.stubs), request)
            async with aclosing(responses):
                async for response in responses:
                    reconnect.connected()
                    event = codec.lifecycle_event_from_proto(response.event)
                    ended = isinstance(event.payload, LifecycleDone | LifecycleFailed)
                    if event.sequence > last_sequence or ended:
                        last_sequence = event.sequence
                        yield event
                    if ended:
                        return
            raise UnavailableError("the stream of the operation ended before its last event")
        except UnavailableError as lost:
            await reconnect.pause(lost)
