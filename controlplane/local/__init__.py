"""A control plane and agents on this box, as child processes: for `rung up` and the demo."""

from controlplane.local._child import Child, free_ports, rung_command
from controlplane.local._config import STARTER_CONFIG, LogLevel, with_overrides
from controlplane.local._ready import ServerPorts, wait_for_nodes, wait_for_ports
from controlplane.local._up import UpOptions, run_up
from controlplane.local._watch import ChildDiedError, StopRequestedError, Watch

__all__ = [
    "STARTER_CONFIG",
    "Child",
    "ChildDiedError",
    "LogLevel",
    "ServerPorts",
    "StopRequestedError",
    "UpOptions",
    "Watch",
    "free_ports",
    "run_up",
    "rung_command",
    "wait_for_nodes",
    "wait_for_ports",
    "with_overrides",
]
