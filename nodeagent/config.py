"""The configuration of an agent: what it is called, where it listens, and what it may run."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import socket
import sys
from pathlib import Path
from typing import Annotated, Any, Self, TypeAlias

from pydantic import AfterValidator, Field, model_validator

from nodeagent.runtimes import AllowedExecutable, AllowList
from rung.errors import LoopbackOnlyError
from rung.service import (
    ConfigModel,
    DurationS,
    LogConfig,
    OtherFile,
    load_yaml_model,
    published_schema,
    require_loopback,
)
from rung.types import EndpointScope

Port: TypeAlias = Annotated[int, Field(ge=1, le=65535)]

#: Programs that serve models and that an agent without a list of its own may run, if they are on PATH.
_USUAL_EXECUTABLES = ("llama-server", "vllm", "ollama")
#: What the file of a control plane has, which people take for this one.
_CONTROL_PLANE_FILE = OtherFile(
    fields=frozenset(
        {"server", "nodes", "deployments", "profiles", "cloud", "ladder", "artifacts", "images", "safety"}
        | {"prompt_enhancement", "voice"}
    ),
    what="this is a control plane's configuration: use `rung config check`, and `rung serve --config` to "
    "run it",
)


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


class ExecutableConfig(ConfigModel):
    """An executable that may be run, by name."""

    path: str = Field(min_length=1)
    """The program on this machine."""
    arguments_prefix: tuple[str, ...] = ()
    """Arguments that come before those that the agent adds."""
    environment: dict[str, str] = Field(default={})
    """Variables that are always set."""
    allow_arguments: bool = False
    """Whether a deployment may add arguments of its own; off by default."""
    allow_environment: bool = False
    """Whether a deployment may add variables of its own; off by default."""


class DiscoverPorts(ConfigModel):
    """Ports of loopback where engines of somebody else are looked for.

    A list replaces the usual ports of its kind, and an empty one leaves them out. What answers there is
    known by its answers, not by its port.
    """

    vllm: tuple[Port, ...] = (8000, 8199, 8176, 8209)
    """Ports of vLLM, or of any server with OpenAI's routes; 8000, 8199, 8176 and 8209 by default."""
    llamacpp: tuple[Port, ...] = (8080,)
    """Ports of llama.cpp; 8080 by default."""
    ollama: tuple[Port, ...] = (11434,)
    """Ports of Ollama; 11434 by default."""
    comfyui: tuple[Port, ...] = (8188,)
    """Ports of ComfyUI; 8188 by default."""

    @property
    def all(self) -> tuple[int, ...]:
        """The ports of all kinds."""
        return (*self.vllm, *self.llamacpp, *self.ollama, *self.comfyui)


class AgentConfig(ConfigModel):
    """An agent. Without `executables`, those usual programs that are installed may be run."""

    node_id: str = Field(default_factory=default_node_id, pattern=r"^[a-z0-9][a-z0-9._-]{0,62}$")
    """Name of this machine, as the control plane's `nodes` have it; by default its host name."""
    host: Annotated[str, AfterValidator(_loopback)] = "127.0.0.1"
    """Interface; loopback only."""
    port: int = Field(default=8152, ge=0, le=65535)
    """gRPC port; 8152 by default, 0 picks a free one."""
    state_dir: Path = Field(default_factory=default_state_dir)
    """Where records and logs of engines are kept; by default ~/.local/state/rung/agent."""
    executables: dict[str, ExecutableConfig] | None = None
    """Programs that may be run, by the names that deployments use; unset: the usual ones that are installed
    (llama-server, vllm, ollama, llama-cpp-python)."""
    images: tuple[str, ...] = ()
    """Images that containers may be of, with their tags; `*` stands for anything. None by default."""
    mount_folders: tuple[Path, ...] = ()
    """Folders below which containers may mount. None by default."""
    advertise: EndpointScope = EndpointScope.LOOPBACK
    """From where engines that listen on an address of the network may be reached; `loopback` by default."""
    discover: bool = False
    """Adopt engines that somebody else runs here on the ports of `discover_ports`; off by default. One that
    still loads is adopted when it is ready; one that wants an API key is not found."""
    discover_ports: DiscoverPorts = DiscoverPorts()
    """Where they are looked for; their usual ports by default."""
    simulated_gpus: Path | None = None
    """Folder of a simulated machine that is used instead of this one's GPUs, for tests."""
    drain_timeout_s: DurationS = Field(default=30.0, ge=0, alias="drain_timeout")
    """Time for running generations at a stop, 30 s by default; a second signal cuts it. Engines go on."""
    log: LogConfig = LogConfig()
    """What is logged, to stderr, and how."""

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
    return load_yaml_model(path, AgentConfig, other=_CONTROL_PLANE_FILE)


def agent_schema() -> dict[str, Any]:
    """The JSON schema of a file, for editors."""
    return published_schema(AgentConfig, name="agent", title="Configuration of a Rung agent")
