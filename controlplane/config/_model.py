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
from controlplane.config._base import ConfigModel
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
from rung.service import ByteSize, DurationS, FieldError, load_yaml_model, require_loopback

_ID = r"^[a-z0-9][a-z0-9._-]{0,62}$"
_ADDRESS = re.compile(r"[^\s:]+:\d{1,5}|\[[0-9a-fA-F:]+\]:\d{1,5}")
_DAY_S = 24 * 3600.0


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
    return address


class LogConfig(ConfigModel):
    """Logs."""

    level: Literal["debug", "info", "warning", "error"] = "info"
    form: Literal["auto", "json", "console"] = "auto"


class ServerConfig(ConfigModel):
    """The control plane itself."""

    host: Annotated[str, AfterValidator(_loopback)] = Field(
        default="127.0.0.1", description="Interface; loopback only."
    )
    grpc_port: int = Field(default=8151, ge=0, le=65535, description="0 picks a free one.")
    http_port: int = Field(default=8150, ge=0, le=65535, description="0 picks a free one.")
    state_dir: Path = Field(
        default_factory=default_state_dir,
        description="Where jobs and artifacts are stored; by default ~/.local/state/rung.",
    )
    max_request_bytes: ByteSize = Field(default=16 * 1024**2, ge=1024, description="Largest request.")
    drain_s: DurationS = Field(
        default=20.0, ge=0, alias="drain", description="Time for running jobs at a stop."
    )
    job_retention_s: DurationS = Field(default=7 * _DAY_S, gt=0, alias="job_retention")
    engine_idle_timeout_s: DurationS = Field(
        default=600.0, gt=0, alias="engine_idle_timeout", description="Longest silence of an engine."
    )
    direct_relay: bool = Field(default=True, description="Talk straight to engines on this machine.")
    log: LogConfig = LogConfig()

    @model_validator(mode="after")
    def _expand(self) -> Self:
        if self.grpc_port and self.grpc_port == self.http_port:
            raise FieldError(("http_port",), "is the same as grpc_port")
        object.__setattr__(self, "state_dir", self.state_dir.expanduser())
        return self


class NodeConfig(ConfigModel):
    """A machine with an agent."""

    id: str = Field(pattern=_ID)
    address: Annotated[str, AfterValidator(_address)] = Field(description="host:port of its agent.")
    ownership: types.NodeOwnership = types.NodeOwnership.OWNED
    vram_reserve_bytes: ByteSize = Field(
        default=Reserve().vram_bytes,
        ge=0,
        alias="vram_reserve",
        description="Kept free on each of its GPUs: for a driver, a desktop, and measuring a second late.",
    )
    host_reserve_bytes: ByteSize = Field(
        default=Reserve().host_bytes,
        ge=0,
        alias="host_reserve",
        description="Host memory that sleeping models never get.",
    )
    vram_bytes: ByteSize = Field(
        default=0,
        ge=0,
        alias="vram",
        description="Memory of each of its GPUs: lets profiles be checked before anything runs.",
    )

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
    node: str
    model: str = Field(min_length=1)
    engine: EngineConfig
    runtime: RuntimeConfig
    aliases: tuple[str, ...] = ()
    served_model_name: str = ""
    residency_class: types.ResidencyClass = types.ResidencyClass.ON_DEMAND
    keep_running: bool = False
    slots: int | None = Field(
        default=None,
        ge=1,
        le=4096,
        description="Requests that it serves at once; unset means 16, and 1 for what makes images, meshes or "
        "predictions, and for XTTS.",
    )
    vram_bytes: ByteSize = Field(default=0, ge=0, alias="vram")
    idle_timeout_s: DurationS | None = Field(default=None, alias="idle_timeout")
    max_grade: types.ReclaimGrade | None = Field(
        default=None,
        description="How much others may be disturbed, at most, to start or wake it; unset: as much as it "
        "takes (full), or for voice as `voice` says.",
    )
    shrinkable: bool = Field(
        default=False,
        description="May give up its KV cache for a while, even if pinned; vLLM with sleep mode.",
    )
    capabilities: tuple[str, ...] = ("chat",)
    context_tokens: int = Field(default=0, ge=0)
    port: int = Field(default=0, ge=0, le=65535)
    swap_slot: str = Field(
        default="",
        pattern=r"^([a-z0-9][a-z0-9._-]{0,62})?$",
        description="Deployments of a node with the same one take turns, on one port if they name the same.",
    )
    restore: Literal["lazy", "warm"] = Field(
        default="lazy",
        description="After it gave way it comes back when somebody needs it; warm: once there is room.",
    )
    gpus: tuple[str, ...] = ()
    start_timeout_s: DurationS = Field(default=600.0, gt=0, alias="start_timeout")
    stop_grace_s: DurationS = Field(default=10.0, ge=0, alias="stop_grace")

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
    nodes: tuple[NodeConfig, ...] = ()
    deployments: tuple[DeploymentConfig, ...] = ()
    profiles: tuple[ProfileConfig, ...] = ()
    cloud: tuple[CloudProviderConfig, ...] = ()
    ladder: LadderConfig | None = None
    artifacts: ArtifactsConfig = ArtifactsConfig()
    images: ImagesConfig = ImagesConfig()
    safety: SafetyConfig = SafetyConfig()
    prompt_enhancement: PromptEnhancementConfig = PromptEnhancementConfig()
    voice: VoiceConfig = VoiceConfig()

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
    return load_yaml_model(path, Config)


def default_config() -> Config:
    """What holds without a file: no nodes yet, everything else as documented."""
    return Config()


def config_schema() -> dict[str, Any]:
    """The JSON schema of a file, for editors."""
    schema = Config.model_json_schema(by_alias=True)
    head = {"$schema": "https://json-schema.org/draft/2020-12/schema"}
    return head | schema | {"title": "Rung configuration"}


def _unique(what: str, names: list[str]) -> None:
    counted = Counter(names)
    for place, name in enumerate(names):
        if counted[name] > 1 and name in names[:place]:
            raise FieldError((what, place, "id"), f"{name} is used twice")
