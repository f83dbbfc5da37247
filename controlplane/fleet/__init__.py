"""Nodes and their agents: dial, watch, reconcile; the fleet as one immutable view."""

from controlplane.fleet._agent_client import AgentClient
from controlplane.fleet._agent_runs import AgentRun
from controlplane.fleet._alerts import MemoryAlerts, log_alert
from controlplane.fleet._division import Division, utilization_of
from controlplane.fleet._fleet import ConfiguredNode, Fleet
from controlplane.fleet._marks import DrainMarks, NodeSwaps
from controlplane.fleet._operations import LifecycleAction
from controlplane.fleet._permits import is_external
from controlplane.fleet._pools import find_gpu, held_bytes, ledger_of, pool_of
from controlplane.fleet._raising import progress_of_event
from controlplane.fleet._schedulers import NodeSchedulers, freed_by
from controlplane.fleet._view import DeploymentView, FleetView, build_view, models

__all__ = [
    "AgentClient",
    "AgentRun",
    "ConfiguredNode",
    "DeploymentView",
    "Division",
    "DrainMarks",
    "Fleet",
    "FleetView",
    "LifecycleAction",
    "MemoryAlerts",
    "NodeSchedulers",
    "NodeSwaps",
    "build_view",
    "find_gpu",
    "freed_by",
    "held_bytes",
    "is_external",
    "ledger_of",
    "log_alert",
    "models",
    "pool_of",
    "progress_of_event",
    "utilization_of",
]
