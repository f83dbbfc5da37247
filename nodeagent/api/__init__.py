"""The agent's gRPC service."""

from nodeagent.api._drain import Drain
from nodeagent.api._runs import Runs
from nodeagent.api._servicer import NodeAgentServicer

__all__ = ["Drain", "NodeAgentServicer", "Runs"]
