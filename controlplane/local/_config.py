"""Configuration as commands make and change it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Literal, TypeAlias

from rung.errors import ConfigError

if TYPE_CHECKING:
    # With it comes most of the control plane, which the demo's viewer would wait for.
    from controlplane.config import Config

LogLevel: TypeAlias = Literal["debug", "info", "warning", "error"]


def with_overrides(
    config: Config,
    *,
    grpc_port: int | None = None,
    http_port: int | None = None,
    state_dir: Path | None = None,
    log_level: LogLevel | None = None,
) -> Config:
    """`config` with what a command line says instead; None leaves what is there.

    Raises:
        ConfigError: the result makes no sense.
    """
    server = config.server
    ports = {
        "grpc_port": server.grpc_port if grpc_port is None else grpc_port,
        "http_port": server.http_port if http_port is None else http_port,
    }
    if ports["grpc_port"] and ports["grpc_port"] == ports["http_port"]:
        raise ConfigError(f"gRPC and HTTP cannot both have port {ports['grpc_port']}")
    log = server.log if log_level is None else server.log.model_copy(update={"level": log_level})
    changed = {**ports, "state_dir": state_dir or server.state_dir, "log": log}
    return config.model_copy(update={"server": server.model_copy(update=changed)})


#: What `rung config init` writes: it can be used as it is, and explains what else there is.
STARTER_CONFIG = """\
# Rung's configuration. Check it with `rung config check`; `rung config schema` has every field.

server:
  # Both ports listen on loopback only.
  grpc_port: 8151
  http_port: 8150
  # Jobs and their event logs. Default: ~/.local/state/rung
  # state_dir: /var/lib/rung
  # How long running jobs may go on when the control plane stops.
  drain: 20s
  # How long ended jobs are kept.
  job_retention: 7d
  log:
    level: info

# Machines, each with an agent (`rung agent run --node-id workstation`).
nodes:
  - id: workstation
    address: 127.0.0.1:8152

# What is served, by which engine, on which node. Engines that already run on a node are found by
# its agent and need not be listed.
deployments: []

# A model file served by llama.cpp, as a process. The agent runs only what its own configuration
# allows by name: `executables: {llama-server: {path: /usr/local/bin/llama-server}}`.
#
#   - id: orchestrator
#     node: workstation
#     model: nemotron-8b
#     residency_class: pinned      # pinned, sleepable, on_demand or cache
#     keep_running: true           # started with the fleet, and again when it ends
#     slots: 4                     # requests at a time
#     vram: 9GiB
#     engine:
#       kind: llamacpp
#       model_path: /models/nemotron-8b-q8_0.gguf
#       context_tokens: 16384
#       parallel: 4
#     runtime:
#       kind: process
#       executable: llama-server
#
# An engine that somebody else runs: used as it is, never started or stopped.
#
#   - id: writer
#     node: workstation
#     model: qwen3-32b
#     engine:
#       kind: openai_compatible
#     runtime:
#       kind: external
#       base_url: http://127.0.0.1:8000
"""
