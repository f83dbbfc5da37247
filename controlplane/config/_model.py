"""The configuration of a control plane, as YAML has it."""

from __future__ import annotations

import os
import re
from collections import Counter
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, Field, model_validator

from controlplane.cloud import CloudProvider
from controlplane.config._artifacts import ArtifactsConfig
from controlplane.config._cloud import CloudProviderConfig, check_cloud
from controlplane.config._engines import (
    EngineConfig,
    ExternalConfig,
    LlamaCppConfig,
    OllamaConfig,
    RuntimeConfig,
    require_router,
    require_shrinkable,
    require_tool_parser,
)
from controlplane.config._images import ImagesConfig
from controlplane.config._ladder import LadderConfig, check_targets
from controlplane.config._profiles import ProfileConfig, check_profiles
from controlplane.config._stages import PromptEnhancementConfig, SafetyConfig, check_asked
from controlplane.config._swap_slots import check_ports
from controlplane.config._voice import VoiceConfig, check_capabilities, check_voice
from controlplane.vram import Reserve
from rung import types
from rung.errors import LoopbackOnlyError
from rung.service import (
    ByteSize,
    ConfigModel,
    DurationS,
    FieldError,
    LogConfig,
    OtherFile,
    load_yaml_model,
    published_schema,
    require_loopback,
)
from rung.transport import DEFAULT_MAX_REQUEST_BYTES, LARGEST_REQUEST_BYTES, MAX_MESSAGE_BYTES

_ID = r"^[a-z0-9][a-z0-9._-]{0,62}$"
_ADDRESS = re.compile(r"[^\s:]+:\d{1,5}|\[[0-9a-fA-F:]+\]:\d{1,5}")
_DAY_S = 24 * 3600.0
#: What the file of an agent has, which people take for this one.
_AGENT_FILE = OtherFile(
    fields=frozenset(
        {"node_id", "host", "port", "state_dir", "executables", "images", "mount_folders", "advertise"}
        | {"discover", "simulated_gpus", "log"}
    ),
    what="this is an agent's configuration: use `rung agent check`, and `rung agent run --config` to run it",
)


def _fits_a_message(size_bytes: int) -> int:
    if size_bytes > LARGEST_REQUEST_BYTES:
        raise ValueError(
            f"a request goes on to an agent in one message of {MAX_MESSAGE_BYTES // 1024**2} MiB at most: "
            f"{LARGEST_REQUEST_BYTES // 1024**2}MiB is the most that can be set"
        )
    return size_bytes


def default_state_dir() -> Path:
    """`$XDG_STATE_HOME/rung`, which is `~/.local/state/rung` where nothing else is set."""
    base = os.environ.get("XDG_STATE_HOME") or "~/.local/state"
    return Path(base).expanduser() / "rung"


def _loopback(host: str) -> str:
    try:
        require_loopback(host, "the control plane")
    except LoopbackOnlyError as error:
        raise ValueError(error.message) from None
    return host


def _address(address: str) -> str:
    if not _ADDRESS.fullmatch(address):
        raise ValueError(f"{address!r} is not host:port, such as 127.0.0.1:8152")
    port = int(address.rpartition(":")[2])
    if not 1 <= port <= 65535:
        raise ValueError(f"{port} is not a port: those of servers are 1 to 65535")
    return address


class ServerConfig(ConfigModel):
    """The control plane itself."""

    host: Annotated[str, AfterValidator(_loopback)] = "127.0.0.1"
    """Interface; loopback only."""
    grpc_port: int = Field(default=8151, ge=0, le=65535)
    """Port of gRPC on loopback; 8151 by default, 0 picks a free one."""
    http_port: int = Field(default=8150, ge=0, le=65535)
    """Port of HTTP on loopback; 8150 by default, 0 picks a free one."""
    state_dir: Path = Field(default_factory=default_state_dir)
    """Where jobs and artifacts are stored; by default ~/.local/state/rung."""
    max_request_bytes: Annotated[ByteSize, AfterValidator(_fits_a_message)] = Field(
        default=DEFAULT_MAX_REQUEST_BYTES, ge=1024
    )
    """Largest request, in bytes or such as `32MiB`; 16 MiB by default, 63 MiB at most."""
    drain_s: DurationS = Field(default=20.0, ge=0, alias="drain")
    """Time that running jobs have at a stop; 20 s by default."""
    job_retention_s: DurationS = Field(default=7 * _DAY_S, gt=0, alias="job_retention")
    """How long ended jobs and their logs are kept; 7 days by default."""
    engine_idle_timeout_s: DurationS = Field(default=600.0, gt=0, alias="engine_idle_timeout")
    """Longest silence of an engine in an answer before it is given up; 10 minutes by default."""
    direct_relay: bool = True
    """Talk straight to engines on this machine, and not through their agent; on by default."""
    log: LogConfig = LogConfig()
    """What is logged, to stderr, and how."""

    @model_validator(mode="after")
    def _expand(self) -> Self:
        if self.grpc_port and self.grpc_port == self.http_port:
            raise FieldError(("http_port",), "is the same as grpc_port")
        object.__setattr__(self, "state_dir", self.state_dir.expanduser())
        return self


class NodeConfig(ConfigModel):
    """A machine with an agent."""

    id: str = Field(pattern=_ID)
    """Name of the machine, as its agent has it (`node_id`)."""
    address: Annotated[str, AfterValidator(_address)]
    """host:port of its agent, such as 127.0.0.1:8152."""
    ownership: types.NodeOwnership = types.NodeOwnership.OWNED
    """Whose it is; `local_only` requests go to owned machines only. `owned` by default."""
    vram_reserve_bytes: ByteSize = Field(default=Reserve().vram_bytes, ge=0, alias="vram_reserve")
    """Kept free on each of its GPUs, such as `2GiB`: for a driver, a desktop, and measuring a second late."""
    host_reserve_bytes: ByteSize = Field(default=Reserve().host_bytes, ge=0, alias="host_reserve")
    """Host memory that sleeping models never get, such as `8GiB`."""
    vram_bytes: ByteSize = Field(default=0, ge=0, alias="vram")
    """Memory of each of its GPUs, such as `32GB`: lets profiles be checked before anything runs."""

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.vram_bytes and self.vram_reserve_bytes >= self.vram_bytes:
            raise FieldError(("vram_reserve",), "is all of its vram: nothing would ever be granted there")
        return self

    def reserve(self) -> Reserve:
        """As the schedulers have it."""
        return Reserve(vram_bytes=self.vram_reserve_bytes, host_bytes=self.host_reserve_bytes)


class DeploymentConfig(ConfigModel):
    """One model served by one engine on one node."""

    id: str = Field(pattern=_ID)
    """Name of this deployment; requests may use it as a model."""
    node: str
    """Id of the node whose agent runs or reaches it."""
    model: str = Field(min_length=1)
    """Name of the model that requests use; several deployments may serve the same one."""
    engine: EngineConfig
    """What serves it, by `kind`, and with which parameters."""
    runtime: RuntimeConfig
    """How the engine is run, by `kind`: as a process, in a container, or by somebody else."""
    aliases: tuple[str, ...] = ()
    """Further names of the model."""
    served_model_name: str = ""
    """Name by which the engine knows the model, where it is another one than `model`."""
    residency_class: types.ResidencyClass = types.ResidencyClass.ON_DEMAND
    """What may be done to it when others need its memory: `pinned` nothing, `sleepable` put to sleep,
    `on_demand` stopped (by default), `cache` flushed."""
    keep_running: bool = False
    """Started with the fleet, and again when it ends; off by default."""
    slots: int | None = Field(default=None, ge=1, le=4096)
    """Requests that it serves at once; unset means 16, and 1 for what makes images, meshes or predictions,
    and for XTTS."""
    vram_bytes: ByteSize = Field(default=0, ge=0, alias="vram")
    """GPU memory that it needs awake, in bytes or such as `12GiB`, until that has been measured."""
    idle_timeout_s: DurationS | None = Field(default=None, alias="idle_timeout")
    """An `on_demand` one is stopped after so long without requests, such as `15m`; unset: only when others
    need its memory."""
    max_grade: types.ReclaimGrade | None = None
    """How much others may be disturbed, at most, to start or wake it; unset: as much as it takes (full), or
    for voice as `voice` says."""
    shrinkable: bool = False
    """May give up its KV cache for a while, even if pinned; vLLM with sleep mode."""
    capabilities: tuple[str, ...] = ("chat",)
    """What it can do: chat, tools, vision, embedding, image, speech, …; chat alone by default."""
    context_tokens: int = Field(default=0, ge=0)
    """Tokens of its context, for choosing who can answer; 0 means that it is not known."""
    port: int = Field(default=0, ge=0, le=65535)
    """Port of the engine on the node's loopback; 0, by default, lets the agent choose a free one."""
    swap_slot: str = Field(default="", pattern=r"^([a-z0-9][a-z0-9._-]{0,62})?$")
    """Deployments of a node with the same one take turns, on one port if they name the same."""
    restore: Literal["lazy", "warm"] = "lazy"
    """After it gave way it comes back when somebody needs it; warm: once there is room."""
    gpus: tuple[str, ...] = ()
    """GPUs that it runs on, by index or UUID; empty, by default, means all of the node's."""
    start_timeout_s: DurationS = Field(default=600.0, gt=0, alias="start_timeout")
    """Longest time from start to ready; 10 minutes by default."""
    stop_grace_s: DurationS = Field(default=10.0, ge=0, alias="stop_grace")
    """Time to end by itself before it is killed; 10 s by default."""

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.residency_class is types.ResidencyClass.PINNED and self.idle_timeout_s is not None:
            raise FieldError(("idle_timeout",), "a pinned deployment is never stopped; remove one of the two")
        if self.restore == "warm" and self.idle_timeout_s is not None:
            raise FieldError(("idle_timeout",), "what is warm comes up again at once; remove one of the two")
        if self.shrinkable:
            require_shrinkable(self.engine, self.runtime)
        if isinstance(self.engine, OllamaConfig) and not self.context_tokens and "chat" in self.capabilities:
            raise FieldError(
                ("context_tokens",),
                "is missing: Ollama cuts a prompt that is longer than its context without a word, so it "
                "must be known how long that is",
            )
        if isinstance(self.engine, LlamaCppConfig) and self.engine.router_model:
            require_router(self.engine.router_model, self.runtime, self.served_model_name)
        check_capabilities(self.engine.kind, self.capabilities)
        if "tools" in self.capabilities and not isinstance(self.runtime, ExternalConfig):
            require_tool_parser(self.engine)
        return self

    def spec(self) -> types.DeploymentSpec:
        """As the rest of the system has it."""
        engine = self.engine.value()
        return types.DeploymentSpec(
            id=self.id,
            node_id=self.node,
            model=self.model,
            aliases=self.aliases,
            served_model_name=self.served_model_name,
            residency_class=self.residency_class,
            slots=self.slots or types.default_slots(engine),
            vram_bytes=self.vram_bytes,
            keep_running=self.keep_running,
            idle_timeout_s=self.idle_timeout_s,
            shrinkable=self.shrinkable,
            capabilities=self.capabilities,
            context_tokens=self.context_tokens,
            swap_slot=self.swap_slot,
            warm=self.restore == "warm",
            engine=types.EngineSpec(
                engine=engine,
                runtime=self.runtime.value(),
                port=self.port,
                gpus=self.gpus,
                start_timeout_s=self.start_timeout_s,
                stop_grace_s=self.stop_grace_s,
            ),
        )


class Config(ConfigModel):
    """A control plane: nodes, deployments, profiles, cloud providers, and the ladder over all of them."""

    # Made anew, so that the schema has no default with the home of whoever printed it.
    server: ServerConfig = Field(default_factory=ServerConfig)
    """The control plane itself: its ports, its state, its limits, its log."""
    nodes: tuple[NodeConfig, ...] = ()
    """Machines, each with an agent."""
    deployments: tuple[DeploymentConfig, ...] = ()
    """What is served, by which engine, on which node. What an agent finds running need not be here."""
    profiles: tuple[ProfileConfig, ...] = ()
    """Named divisions of the GPUs' memory, for `rung profile switch`."""
    cloud: tuple[CloudProviderConfig, ...] = ()
    """Providers of cloud models, and how much may be spent there."""
    ladder: LadderConfig | None = None
    """Chains of targets and the rungs of effort that use them; unset: requests name their model."""
    artifacts: ArtifactsConfig = ArtifactsConfig()
    """How long, and how much, of the files that jobs made is kept."""
    images: ImagesConfig = ImagesConfig()
    """Pictures, still and moving: tiers, and workflows of one's own."""
    safety: SafetyConfig = SafetyConfig()
    """What is refused before anything is generated."""
    prompt_enhancement: PromptEnhancementConfig = PromptEnhancementConfig()
    """Prompts for pictures that say more, by asking a chat model."""
    voice: VoiceConfig = VoiceConfig()
    """How much of a node speech and transcriptions may have."""

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        _unique("nodes", [node.id for node in self.nodes])
        _unique("deployments", [deployment.id for deployment in self.deployments])
        nodes = {node.id for node in self.nodes}
        check_voice(self.voice, nodes)
        models = {deployment.model for deployment in self.deployments}
        for place, deployment in enumerate(self.deployments):
            if deployment.node not in nodes:
                known = ", ".join(sorted(nodes)) or "none"
                raise FieldError(
                    ("deployments", place, "node"), f"there is no node {deployment.node}; nodes are: {known}"
                )
            for alias in deployment.aliases:
                if alias in models and alias != deployment.model:
                    raise FieldError(
                        ("deployments", place, "aliases"), f"{alias} is the model of another deployment"
                    )
        check_ports(self.deployment_specs())
        aliases = {alias for deployment in self.deployments for alias in deployment.aliases}
        check_cloud(self.cloud, models | aliases)
        check_profiles(self.profiles, self._specs(), self.nodes)
        if self.ladder is not None:
            check_targets(self.ladder, self._targets())
        ladder = self.ladder.value() if self.ladder is not None else None
        check_asked(self.safety, self.prompt_enhancement, self._targets().keys(), ladder)
        return self

    def deployment_specs(self) -> tuple[types.DeploymentSpec, ...]:
        """The deployments as the rest of the system has them."""
        return tuple(deployment.spec() for deployment in self.deployments)

    def deployment_grades(self) -> dict[str, types.ReclaimGrade]:
        """How much others may be disturbed for a deployment, for those that say so themselves."""
        return {each.id: each.max_grade for each in self.deployments if each.max_grade is not None}

    def cloud_providers(self) -> tuple[CloudProvider, ...]:
        """The cloud providers as the rest of the system has them."""
        return tuple(provider.value() for provider in self.cloud)

    def profile_values(self) -> tuple[types.Profile, ...]:
        """The profiles as the rest of the system has them."""
        specs = self._specs()
        return tuple(profile.profile(specs) for profile in self.profiles)

    def _targets(self) -> dict[str, list[frozenset[str]]]:
        """Capabilities of what a chain may name, by each of its names."""
        found: dict[str, list[frozenset[str]]] = {}
        for spec in self.deployment_specs():
            names = {spec.id, spec.model, *spec.aliases, f"{spec.node_id}/{spec.model}"}
            for name in names:
                found.setdefault(name, []).append(frozenset(spec.capabilities))
        for provider in self.cloud_providers():
            for model in provider.models:
                for name in (model.id, *model.aliases):
                    found.setdefault(name, []).append(frozenset(model.capabilities))
        return found

    def _specs(self) -> dict[str, types.DeploymentSpec]:
        return {spec.id: spec for spec in self.deployment_specs()}


def load_config(path: Path) -> Config:
    """Read a file. Raises ConfigError with a line for each problem: `file:line: field: what`."""
    return load_yaml_model(path, Config, other=_AGENT_FILE)


def default_config() -> Config:
    """What holds without a file: no nodes yet, everything else as documented."""
    return Config()


def config_schema() -> dict[str, Any]:
    """The JSON schema of a file, for editors."""
    return published_schema(Config, name="config", title="Rung configuration")


def _unique(what: str, names: list[str]) -> None:
    counted = Counter(names)
    for place, name in enumerate(names):
        if counted[name] > 1 and name in names[:place]:
            raise FieldError((what, place, "id"), f"{name} is used twice")
