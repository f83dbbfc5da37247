"""Nodes: what is measured of them, and the fleet as a whole."""

from __future__ import annotations

from rung import v1
from rung.codec._deployment import deployment_from_proto, deployment_to_proto
from rung.codec._values import (
    EnumCodec,
    duration_from_proto,
    duration_to_proto,
    timestamp_from_proto,
    timestamp_to_proto,
)
from rung.types import (
    FleetSnapshot,
    Gpu,
    GpuHealth,
    GpuProcess,
    HostStatus,
    MemoryAlert,
    MemorySource,
    Node,
    NodeOwnership,
    NodeState,
    NodeStatus,
)

# A node in a state that we do not know gets no work; an owner that we do not know means that
# nothing may be destroyed.
NODE_STATES = EnumCodec(NodeState, v1.NodeState, prefix="NODE_STATE_", unknown=NodeState.UNREACHABLE)
NODE_OWNERSHIPS = EnumCodec(
    NodeOwnership, v1.NodeOwnership, prefix="NODE_OWNERSHIP_", unknown=NodeOwnership.OWNED
)
MEMORY_SOURCES = EnumCodec(MemorySource, v1.MemorySource, prefix="MEMORY_SOURCE_", unknown=MemorySource.HOST)
GPU_HEALTHS = EnumCodec(GpuHealth, v1.GpuHealth, prefix="GPU_HEALTH_", unknown=GpuHealth.UNKNOWN)


def gpu_to_proto(value: Gpu) -> v1.Gpu:
    """Encode a GPU."""
    return v1.Gpu(
        index=value.index,
        uuid=value.uuid,
        name=value.name,
        health=GPU_HEALTHS.to_proto[value.health],
        memory_source=MEMORY_SOURCES.to_proto[value.memory_source],
        memory_total_bytes=value.memory_total_bytes,
        memory_used_bytes=value.memory_used_bytes,
        memory_free_bytes=value.memory_free_bytes,
        memory_reserved_bytes=value.memory_reserved_bytes,
        utilization_percent=value.utilization_percent,
        memory_utilization_percent=value.memory_utilization_percent,
        power_watts=value.power_watts,
        power_limit_watts=value.power_limit_watts,
        temperature_celsius=value.temperature_celsius,
        throttle_reasons=value.throttle_reasons,
        processes=[
            v1.GpuProcess(pid=each.pid, memory_bytes=each.memory_bytes, deployment_id=each.deployment_id)
            for each in value.processes
        ],
        unified_memory=value.unified_memory,
    )


def gpu_from_proto(message: v1.Gpu) -> Gpu:
    """Decode a GPU."""
    has = message.HasField
    return Gpu(
        index=message.index,
        uuid=message.uuid,
        name=message.name,
        health=GPU_HEALTHS.from_proto(message.health),
        memory_source=MEMORY_SOURCES.from_proto(message.memory_source),
        memory_total_bytes=message.memory_total_bytes,
        memory_used_bytes=message.memory_used_bytes,
        memory_free_bytes=message.memory_free_bytes,
        memory_reserved_bytes=message.memory_reserved_bytes if has("memory_reserved_bytes") else None,
        utilization_percent=message.utilization_percent if has("utilization_percent") else None,
        memory_utilization_percent=message.memory_utilization_percent
        if has("memory_utilization_percent")
        else None,
        power_watts=message.power_watts if has("power_watts") else None,
        power_limit_watts=message.power_limit_watts if has("power_limit_watts") else None,
        temperature_celsius=message.temperature_celsius if has("temperature_celsius") else None,
        throttle_reasons=tuple(message.throttle_reasons),
        processes=tuple(
            GpuProcess(
                each.pid, each.memory_bytes if each.HasField("memory_bytes") else None, each.deployment_id
            )
            for each in message.processes
        ),
        unified_memory=message.unified_memory,
    )


def host_status_to_proto(value: HostStatus) -> v1.HostStatus:
    """Encode the machine around the GPUs."""
    return v1.HostStatus(
        memory_total_bytes=value.memory_total_bytes,
        memory_available_bytes=value.memory_available_bytes,
        disk_total_bytes=value.disk_total_bytes,
        disk_free_bytes=value.disk_free_bytes,
        cpu_count=value.cpu_count,
        cpu_utilization_percent=value.cpu_utilization_percent,
        hostname=value.hostname,
    )


def host_status_from_proto(message: v1.HostStatus) -> HostStatus:
    """Decode the machine around the GPUs."""
    return HostStatus(
        memory_total_bytes=message.memory_total_bytes,
        memory_available_bytes=message.memory_available_bytes,
        disk_total_bytes=message.disk_total_bytes,
        disk_free_bytes=message.disk_free_bytes,
        cpu_count=message.cpu_count,
        cpu_utilization_percent=message.cpu_utilization_percent,
        hostname=message.hostname,
    )


def node_status_to_proto(value: NodeStatus) -> v1.NodeStatus:
    """Encode a sample."""
    return v1.NodeStatus(
        sample_time=timestamp_to_proto(value.sample_time_s),
        gpus=[gpu_to_proto(gpu) for gpu in value.gpus],
        host=host_status_to_proto(value.host),
        agent_version=value.agent_version,
        host_id=value.host_id,
        driver_version=value.driver_version,
        simulated=value.simulated,
        warnings=value.warnings,
        sample_age=None if value.sample_age_s is None else duration_to_proto(value.sample_age_s),
    )


def node_status_from_proto(message: v1.NodeStatus) -> NodeStatus:
    """Decode a sample."""
    return NodeStatus(
        sample_time_s=timestamp_from_proto(message.sample_time),
        gpus=tuple(gpu_from_proto(gpu) for gpu in message.gpus),
        host=host_status_from_proto(message.host),
        agent_version=message.agent_version,
        host_id=message.host_id,
        driver_version=message.driver_version,
        simulated=message.simulated,
        warnings=tuple(message.warnings),
        sample_age_s=duration_from_proto(message.sample_age) if message.HasField("sample_age") else None,
    )


def node_to_proto(value: Node) -> v1.Node:
    """Encode a node."""
    return v1.Node(
        id=value.id,
        address=value.address,
        state=NODE_STATES.to_proto[value.state],
        detail=value.detail,
        ownership=NODE_OWNERSHIPS.to_proto[value.ownership],
        status=node_status_to_proto(value.status) if value.status else None,
        last_seen_time=None if value.last_seen_time_s is None else timestamp_to_proto(value.last_seen_time_s),
        epoch=value.epoch,
    )


def node_from_proto(message: v1.Node) -> Node:
    """Decode a node."""
    seen = message.HasField("last_seen_time")
    return Node(
        id=message.id,
        address=message.address,
        state=NODE_STATES.from_proto(message.state),
        detail=message.detail,
        ownership=NODE_OWNERSHIPS.from_proto(message.ownership),
        status=node_status_from_proto(message.status) if message.HasField("status") else None,
        last_seen_time_s=timestamp_from_proto(message.last_seen_time) if seen else None,
        epoch=message.epoch,
    )


def memory_alert_to_proto(value: MemoryAlert) -> v1.MemoryAlert:
    """Encode an alert."""
    return v1.MemoryAlert(
        gpu=value.gpu,
        low=value.low,
        free_bytes=value.free_bytes,
        limit_bytes=value.limit_bytes,
        time=timestamp_to_proto(value.time_s),
    )


def memory_alert_from_proto(message: v1.MemoryAlert) -> MemoryAlert:
    """Decode an alert."""
    return MemoryAlert(
        gpu=message.gpu,
        low=message.low,
        free_bytes=message.free_bytes,
        limit_bytes=message.limit_bytes,
        time_s=timestamp_from_proto(message.time),
    )


def fleet_snapshot_to_proto(value: FleetSnapshot) -> v1.FleetSnapshot:
    """Encode the fleet."""
    return v1.FleetSnapshot(
        nodes=[node_to_proto(node) for node in value.nodes],
        deployments=[deployment_to_proto(deployment) for deployment in value.deployments],
        profile=value.profile,
        memory_alerts=[memory_alert_to_proto(alert) for alert in value.alerts],
    )


def fleet_snapshot_from_proto(message: v1.FleetSnapshot) -> FleetSnapshot:
    """Decode the fleet."""
    return FleetSnapshot(
        nodes=tuple(node_from_proto(node) for node in message.nodes),
        deployments=tuple(deployment_from_proto(deployment) for deployment in message.deployments),
        profile=message.profile,
        alerts=tuple(memory_alert_from_proto(alert) for alert in message.memory_alerts),
    )
