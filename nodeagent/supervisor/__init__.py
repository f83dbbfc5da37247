"""The engines of a node: one supervisor each, records that survive, operations that can be joined."""

from nodeagent.supervisor._engine import EngineSupervisor
from nodeagent.supervisor._operations import Operation
from nodeagent.supervisor._records import EngineRecord, Records
from nodeagent.supervisor._residency import EDGES, require_edge
from nodeagent.supervisor._supervisor import Command, Supervisor

__all__ = [
    "EDGES",
    "Command",
    "EngineRecord",
    "EngineSupervisor",
    "Operation",
    "Records",
    "Supervisor",
    "require_edge",
]
