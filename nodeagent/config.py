"""The configuration of an agent: what it is called, where it listens, and what it may run."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import socket
import sys
from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator

from nodeagent.runtimes import AllowedExecutable, AllowList
from rung.errors import LoopbackOnlyError
from rung.service import load_yaml_model, require_loopback
from rung.types import EndpointScope

#: Programs that serve models and that an agent without a list of its own may run, if they are on PATH.
_USUAL_EXECUTABLES = ("llama-server", "vllm", "ollama")


def _loopback(host: str) -> str:
    try:
        require_loopback(host, "the agent")
    except LoopbackOnlyError as error:
        raise ValueError(error.message) from None
    return host


def default_node_id() -> str:
    """The machine's name, as an id."""
    name = re.sub(r"[^a-z0-9._-]", "-", socket.gethostname().split(".")[0].lower()).strip("-._")
    return name or "node"


def default_state_dir() -> Path:
    """`$XDG_STATE_HOME/rung/agent`."""
    base = os.environ.get("XDG_STATE_HOME") or "~/.local/state"
    return Path(base).expanduser() / "rung" / "agent"


class _Model(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class LogConfig(_Model):
    """Logs."""

    level: Literal["debug", "info", "warning", "error"] = "info"
    form: Literal["auto", "json", "console"] = "auto"


class ExecutableConfig(_Model):
    """An executable that may be run, by name."""

    path: str = Field(min_length=1)
    arguments_prefix: tuple[str, ...] = ()
    environment: dict[str, str] = {}
    allow_arguments: bool = False
    allow_environment: bool = False


class AgentConfig(_Model):
    """An agent. Without `executables`, those usual programs that are installed may be run."""

    node_id: str = Field(default_factory=default_node_id, pattern=r"^[a-z0-9][a-z0-9._-]{0,62}$")
    host: Annotated[str, AfterValidator(_loopback)] = "127.0.0.1"
    port: int = Field(default=8152, ge=0, le=65535)
    state_dir: Path = Field(default_factory=default_state_dir)
    executables: dict[str, ExecutableConfig] | None = None
    images: tuple[str, ...] = ()
    mount_folders: tuple[Path, ...] = ()
    advertise: EndpointScope = EndpointScope.LOOPBACK
    discover: bool = False
    simulated_gpus: Path | None = None
    log: LogConfig = LogConfig()

    @model_validator(mode="after")
    def _expand(self) -> Self:
        object.__setattr__(self, "state_dir", self.state_dir.expanduser())
        return self

    def allow_list(self) -> AllowList:
        """What the agent may run."""
        if self.executables is None:
            executables = usual_executables()
        else:
            executables = {
                name: AllowedExecutable(**allowed.model_dump()) for name, allowed in self.executables.items()
            }
        return AllowList(executables=executables, images=self.images, mount_folders=self.mount_folders)


def usual_executables() -> dict[str, AllowedExecutable]:
    """The usual programs that are installed here."""
    found = {
        name: AllowedExecutable(path=path)
        for name in _USUAL_EXECUTABLES
        if (path := shutil.which(name)) is not None
    }
    if importlib.util.find_spec("llama_cpp") is not None:
        found["llama-cpp-python"] = AllowedExecutable(
            path=sys.executable, arguments_prefix=("-m", "llama_cpp.server")
        )
    return found


def load_agent_config(path: Path) -> AgentConfig:
    """Read a file. Raises ConfigError with a line for each problem: `file:line: field: what`."""
    return load_yaml_model(path, AgentConfig)
