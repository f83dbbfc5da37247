"""YAML into typed, validated configuration, with a published JSON schema."""

from controlplane.config._model import (
    Config,
    DeploymentConfig,
    NodeConfig,
    ServerConfig,
    config_schema,
    default_config,
    load_config,
)

__all__ = [
    "Config",
    "DeploymentConfig",
    "NodeConfig",
    "ServerConfig",
    "config_schema",
    "default_config",
    "load_config",
]
