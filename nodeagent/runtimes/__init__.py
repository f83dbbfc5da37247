"""How an engine is run: as a process, in a container, or by somebody else."""

from nodeagent.runtimes._allow import AllowedExecutable, AllowList
from nodeagent.runtimes._base import (
    EngineExit,
    EngineRuntime,
    HealthReport,
    LaunchPlan,
    OnProgress,
    RunningEngine,
    RuntimeProgress,
)
from nodeagent.runtimes._docker import DockerEngineRuntime
from nodeagent.runtimes._external import ExternalEngineRuntime
from nodeagent.runtimes._proc import become_subreaper, environment_of
from nodeagent.runtimes._process import ProcessEngineRuntime

__all__ = [
    "AllowList",
    "AllowedExecutable",
    "DockerEngineRuntime",
    "EngineExit",
    "EngineRuntime",
    "ExternalEngineRuntime",
    "HealthReport",
    "LaunchPlan",
    "OnProgress",
    "ProcessEngineRuntime",
    "RunningEngine",
    "RuntimeProgress",
    "become_subreaper",
    "environment_of",
]
