"""FleetService: what there is, and changing it."""

# ruff: noqa: N802 - methods have the names of the API

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping
from contextlib import aclosing
from typing import TYPE_CHECKING, Any, TypeAlias, TypeVar

import grpc.aio

from controlplane.api._fleet_stream import (
    DeploymentRemoved,
    FleetEvent,
    Heartbeat,
    NodeRemoved,
    ProfileChanged,
    follow,
    with_load,
)
from controlplane.api._paging import LARGEST_PAGE, decode_token, encode_token, page_size
from controlplane.fleet import Fleet, LifecycleAction
from controlplane.profiles import Profiles
from rung import codec, v1
from rung.errors import UnknownDeploymentError, UnknownNodeError
from rung.types import Deployment, FleetSnapshot, MemoryAlert, Node

if TYPE_CHECKING:
    Context: TypeAlias = grpc.aio.ServicerContext[Any, Any]

Item = TypeVar("Item")

#: Where the caller leaves it to us: weights in host RAM, from where they wake in seconds.
_SLEEP_LEVEL = 1


class FleetServicer:
    """Decodes, calls, encodes. What is not here answers UNIMPLEMENTED (see `add_service`)."""

    def __init__(self, fleet: Fleet, profiles: Profiles) -> None:
        self._fleet = fleet
        self._profiles = profiles

    async def ListNodes(self, request: v1.ListNodesRequest, context: Context) -> v1.ListNodesResponse:
        """All nodes."""
        found, token = _page(self._fleet.view.nodes, request.page_size, request.page_token)
        return v1.ListNodesResponse(
            nodes=[codec.node_to_proto(node) for node in found], next_page_token=token
        )

    async def GetNode(self, request: v1.GetNodeRequest, context: Context) -> v1.GetNodeResponse:
        """One node."""
        return v1.GetNodeResponse(node=self._node(request.node_id))

    async def DrainNode(self, request: v1.DrainNodeRequest, context: Context) -> v1.DrainNodeResponse:
        """Send no new work to a node."""
        await self._fleet.drain_node(request.node_id)
        return v1.DrainNodeResponse(node=self._node(request.node_id))

    async def ResumeNode(self, request: v1.ResumeNodeRequest, context: Context) -> v1.ResumeNodeResponse:
        """Take a drained node back."""
        await self._fleet.resume_node(request.node_id)
        return v1.ResumeNodeResponse(node=self._node(request.node_id))

    async def ListDeployments(
        self, request: v1.ListDeploymentsRequest, context: Context
    ) -> v1.ListDeploymentsResponse:
        """All deployments."""
        found, token = _page(self._fleet.view.deployments, request.page_size, request.page_token)
        deployments = [self._encoded(view.deployment) for view in found]
        return v1.ListDeploymentsResponse(deployments=deployments, next_page_token=token)

    async def GetDeployment(
        self, request: v1.GetDeploymentRequest, context: Context
    ) -> v1.GetDeploymentResponse:
        """One deployment."""
        found = self._fleet.view.deployments.get(request.deployment_id)
        if found is None:
            raise UnknownDeploymentError(
                f"there is no deployment {request.deployment_id}", deployment=request.deployment_id
            )
        return v1.GetDeploymentResponse(deployment=self._encoded(found.deployment))

    async def StartDeployment(
        self, request: v1.StartDeploymentRequest, context: Context
    ) -> AsyncIterator[v1.StartDeploymentResponse]:
        """Start an engine and stream its loading."""
        async for event in self._fleet.lifecycle(
            LifecycleAction.START, request.deployment_id, request.operation_id
        ):
            yield v1.StartDeploymentResponse(event=codec.lifecycle_event_to_proto(event))

    async def StopDeployment(
        self, request: v1.StopDeploymentRequest, context: Context
    ) -> AsyncIterator[v1.StopDeploymentResponse]:
        """Stop an engine."""
        async for event in self._fleet.lifecycle(
            LifecycleAction.STOP, request.deployment_id, request.operation_id, force=request.force
        ):
            yield v1.StopDeploymentResponse(event=codec.lifecycle_event_to_proto(event))

    async def SleepDeployment(
        self, request: v1.SleepDeploymentRequest, context: Context
    ) -> AsyncIterator[v1.SleepDeploymentResponse]:
        """Move weights to host memory."""
        async for event in self._fleet.lifecycle(
            LifecycleAction.SLEEP,
            request.deployment_id,
            request.operation_id,
            force=request.force,
            level=request.level or _SLEEP_LEVEL,
        ):
            yield v1.SleepDeploymentResponse(event=codec.lifecycle_event_to_proto(event))

    async def WakeDeployment(
        self, request: v1.WakeDeploymentRequest, context: Context
    ) -> AsyncIterator[v1.WakeDeploymentResponse]:
        """Move weights back."""
        async for event in self._fleet.lifecycle(
            LifecycleAction.WAKE, request.deployment_id, request.operation_id
        ):
            yield v1.WakeDeploymentResponse(event=codec.lifecycle_event_to_proto(event))

    async def FreeDeployment(
        self, request: v1.FreeDeploymentRequest, context: Context
    ) -> AsyncIterator[v1.FreeDeploymentResponse]:
        """Ask a cache to give back its memory."""
        async for event in self._fleet.lifecycle(
            LifecycleAction.FREE, request.deployment_id, request.operation_id
        ):
            yield v1.FreeDeploymentResponse(event=codec.lifecycle_event_to_proto(event))

    async def WatchFleet(
        self, request: v1.WatchFleetRequest, context: Context
    ) -> AsyncIterator[v1.WatchFleetResponse]:
        """A snapshot, then changes."""
        sequence = 0
        async for event in follow(self._fleet):
            sequence += 1
            response = _response(event)
            response.sequence = sequence
            yield response

    async def ListProfiles(
        self, request: v1.ListProfilesRequest, context: Context
    ) -> v1.ListProfilesResponse:
        """The profiles, and which is current."""
        return codec.profile_list_to_proto(self._profiles.listing())

    async def SwitchProfile(
        self, request: v1.SwitchProfileRequest, context: Context
    ) -> AsyncIterator[v1.SwitchProfileResponse]:
        """Apply a profile and stream its steps."""
        switch = self._profiles.switch(request.name, request.operation_id, dry_run=request.dry_run)
        async with aclosing(switch) as events:
            async for event in events:
                yield v1.SwitchProfileResponse(event=codec.profile_event_to_proto(event))

    def _node(self, node_id: str) -> v1.Node:
        node = self._fleet.view.nodes.get(node_id)
        if node is None:
            raise UnknownNodeError(f"there is no node {node_id}", node=node_id)
        return codec.node_to_proto(node)

    def _encoded(self, deployment: Deployment) -> v1.Deployment:
        return codec.deployment_to_proto(with_load(deployment, self._fleet.load))


def _response(event: FleetEvent) -> v1.WatchFleetResponse:
    match event:
        case FleetSnapshot():
            return v1.WatchFleetResponse(snapshot=codec.fleet_snapshot_to_proto(event))
        case Node():
            return v1.WatchFleetResponse(node=codec.node_to_proto(event))
        case Deployment():
            return v1.WatchFleetResponse(deployment=codec.deployment_to_proto(event))
        case NodeRemoved():
            return v1.WatchFleetResponse(removed_node_id=event.node_id)
        case DeploymentRemoved():
            return v1.WatchFleetResponse(removed_deployment_id=event.deployment_id)
        case ProfileChanged():
            return v1.WatchFleetResponse(profile=event.profile)
        case MemoryAlert():
            return v1.WatchFleetResponse(memory_alert=codec.memory_alert_to_proto(event))
        case Heartbeat():
            heartbeat = v1.FleetHeartbeat(time=codec.timestamp_to_proto(event.time_s))
            return v1.WatchFleetResponse(heartbeat=heartbeat)


def _page(items: Mapping[str, Item], requested: int, token: str) -> tuple[list[Item], str]:
    """One page of what is kept by id, in the order of the ids, and the token of the next page."""
    size = page_size(requested, LARGEST_PAGE)
    after = decode_token(token, str) if token else ""
    keys = sorted(key for key in items if key > after)
    page = keys[:size]
    return [items[key] for key in page], encode_token(page[-1]) if len(keys) > size else ""
