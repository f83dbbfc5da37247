"""Nodes, GPUs and deployments, as configured and as they are.

Memory is in bytes, times are Unix seconds, durations are seconds. A figure that the platform does
not give is None, never 0.
"""

from __future__ import annotations

from enum import StrEnum
from typing import TypeAlias

from msgspec import Struct

from rung.types._job import FailureReason


class NodeState(StrEnum):
    """What the control plane knows of a node."""

    CONNECTING = "connecting"
    READY = "ready"
    DRAINING = "draining"
    DRAINED = "drained"
    UNREACHABLE = "unreachable"


class NodeOwnership(StrEnum):
    """Whose a node is."""

    OWNED = "owned"
    RENTED = "rented"


class MemorySource(StrEnum):
    """Where memory figures come from."""

    NVML = "nvml"
    HOST = "host"
    SIMULATED = "simulated"


class GpuHealth(StrEnum):
    """Whether a GPU can be used."""

    UNKNOWN = "unknown"
    OK = "ok"
    DEGRADED = "degraded"
    LOST = "lost"


class Residency(StrEnum):
    """Where a deployment's weights are. UNKNOWN while its node cannot be reached."""

    UNKNOWN = "unknown"
    STOPPED = "stopped"
    STARTING = "starting"
    AWAKE = "awake"
    FALLING_ASLEEP = "falling_asleep"
    ASLEEP = "asleep"
    WAKING = "waking"
    STOPPING = "stopping"
    FAILED = "failed"


class ResidencyClass(StrEnum):
    """What may be done to a deployment."""

    PINNED = "pinned"
    SLEEPABLE = "sleepable"
    ON_DEMAND = "on_demand"
    CACHE = "cache"


class EndpointScope(StrEnum):
    """From where an endpoint can be reached."""

    LOOPBACK = "loopback"
    NETWORK = "network"


class LlamaCppServer(StrEnum):
    """Which program serves a GGUF file."""

    LLAMA_SERVER = "llama-server"
    LLAMA_CPP_PYTHON = "llama-cpp-python"


class GpuProcess(Struct, frozen=True):
    """A process with memory on a GPU."""

    pid: int
    memory_bytes: int | None = None
    deployment_id: str = ""


class Gpu(Struct, frozen=True, kw_only=True):
    """One device. `memory_used_bytes` is total minus free."""

    index: int
    uuid: str
    name: str
    health: GpuHealth
    memory_source: MemorySource
    memory_total_bytes: int
    memory_used_bytes: int
    memory_free_bytes: int
    memory_reserved_bytes: int | None = None
    utilization_percent: float | None = None
    memory_utilization_percent: float | None = None
    power_watts: float | None = None
    power_limit_watts: float | None = None
    temperature_celsius: float | None = None
    throttle_reasons: tuple[str, ...] = ()
    processes: tuple[GpuProcess, ...] = ()
    unified_memory: bool = False


class HostStatus(Struct, frozen=True, kw_only=True):
    """The machine around the GPUs. `memory_available_bytes` is MemAvailable."""

    memory_total_bytes: int
    memory_available_bytes: int
    disk_total_bytes: int
    disk_free_bytes: int
    cpu_count: int
    cpu_utilization_percent: float
    hostname: str


class NodeStatus(Struct, frozen=True, kw_only=True):
    """What an agent measures, once a second and after each operation.

    `sample_age_s` is the time since it began to be measured, when it was sent; None if that is not told.
    """

    sample_time_s: float
    gpus: tuple[Gpu, ...]
    host: HostStatus
    agent_version: str
    host_id: str
    driver_version: str = ""
    simulated: bool = False
    warnings: tuple[str, ...] = ()
    sample_age_s: float | None = None


class Node(Struct, frozen=True, kw_only=True):
    """One machine of the fleet."""

    id: str
    address: str
    state: NodeState
    detail: str = ""
    ownership: NodeOwnership = NodeOwnership.OWNED
    status: NodeStatus | None = None
    last_seen_time_s: float | None = None
    epoch: int = 0


class Endpoint(Struct, frozen=True):
    """Where an engine listens."""

    base_url: str
    scope: EndpointScope = EndpointScope.LOOPBACK


class LlamaCppEngine(Struct, frozen=True, kw_only=True, tag="llamacpp", tag_field="kind"):
    """Parameters of llama.cpp. `gpu_layers` -1 means all; `context_tokens` 0 the model's own.

    `router_model` is one model of a llama-server in router mode that somebody else runs: it is loaded and
    unloaded by that name, with the router's own settings, and the other fields say nothing.

    The projector of a vision model is run by the CPU, and takes nothing of the GPU, unless
    `projector_on_gpu`; llama-cpp-python always has it on the GPU.
    """

    model_path: str = ""
    server: LlamaCppServer = LlamaCppServer.LLAMA_SERVER
    context_tokens: int = 0
    gpu_layers: int = -1
    parallel: int = 1
    embedding: bool = False
    projector_path: str = ""
    chat_template: str = ""
    kv_cache_type: str = ""
    router_model: str = ""
    projector_on_gpu: bool = False


class OpenAiCompatibleEngine(Struct, frozen=True, kw_only=True, tag="openai_compatible", tag_field="kind"):
    """Parameters of a server with OpenAI's routes."""

    health_path: str = "/v1/models"
    api_key_env: str = ""


class VllmEngine(Struct, frozen=True, kw_only=True, tag="vllm", tag_field="kind"):
    """Parameters of vLLM; 0 and "" mean the engine's default.

    Without `tool_call_parser` it refuses requests with tools; without `reasoning_parser` a model's thoughts
    are part of its answer.
    """

    model: str
    gpu_memory_utilization: float = 0.0
    max_model_len_tokens: int = 0
    max_num_seqs: int = 0
    kv_cache_dtype: str = ""
    sleep_mode: bool = False
    kv_cache_memory_bytes: int = 0
    tool_call_parser: str = ""
    reasoning_parser: str = ""


class OllamaEngine(Struct, frozen=True, kw_only=True, tag="ollama", tag_field="kind", omit_defaults=True):
    """Parameters of Ollama.

    A model that it does not have is pulled by a start if `pull` says so; None means that an Ollama of ours
    does, and one that somebody else runs does not.
    """

    model: str
    pull: bool | None = None

    @property
    def leaves_node(self) -> bool:
        """Whether the model is answered for from the internet, however local its name looks."""
        return self.model.endswith((":cloud", "-cloud"))


class ComfyUiEngine(Struct, frozen=True, kw_only=True, tag="comfyui", tag_field="kind"):
    """Parameters of ComfyUI."""

    reserve_vram_bytes: int = 0


class ServiceEngine(Struct, frozen=True, kw_only=True, tag="service", tag_field="kind"):
    """A server with a dialect of its own."""

    dialect: str


Engine: TypeAlias = (
    LlamaCppEngine | OpenAiCompatibleEngine | VllmEngine | OllamaEngine | ComfyUiEngine | ServiceEngine
)


class Mount(Struct, frozen=True, kw_only=True):
    """A folder of the node seen in a container."""

    source: str
    target: str
    writable: bool = False


class DockerRuntime(Struct, frozen=True, kw_only=True, tag="docker", tag_field="kind"):
    """Run the engine in a container. `container_port` 0 means the port that the engine is told."""

    image: str
    command: tuple[str, ...] = ()
    mounts: tuple[Mount, ...] = ()
    container_port: int = 0
    shared_memory_bytes: int = 0
    environment: dict[str, str] = {}


class ProcessRuntime(Struct, frozen=True, kw_only=True, tag="process", tag_field="kind"):
    """Run the engine as a process of an executable that the agent's allow-list names."""

    executable: str
    arguments: tuple[str, ...] = ()
    environment: dict[str, str] = {}


class ExternalRuntime(Struct, frozen=True, kw_only=True, tag="external", tag_field="kind"):
    """Somebody else runs the engine."""

    base_url: str


Runtime: TypeAlias = DockerRuntime | ProcessRuntime | ExternalRuntime


class EngineSpec(Struct, frozen=True, kw_only=True):
    """How to run an engine. `port` 0 lets the agent choose; no `gpus` means all."""

    engine: Engine
    runtime: Runtime
    port: int = 0
    gpus: tuple[str, ...] = ()
    start_timeout_s: float = 600.0
    stop_grace_s: float = 10.0

    @property
    def pulls(self) -> bool:
        """Whether a start has the engine fetch a model that it does not have. That time is not bounded."""
        engine = self.engine
        if not isinstance(engine, OllamaEngine):
            return False
        return not isinstance(self.runtime, ExternalRuntime) if engine.pull is None else engine.pull


#: Requests that an engine serves at once unless it was said; one that makes images, say, takes one.
LLM_SLOTS = 16
IMAGE_SLOTS = 1
#: Services that do one thing at a time.
_SERIAL = frozenset({"hunyuan3d", "prediction", "sana", "xtts"})


def default_slots(engine: Engine) -> int:
    """How many requests an engine serves at once if nobody says."""
    serial = isinstance(engine, ServiceEngine) and engine.dialect in _SERIAL
    return IMAGE_SLOTS if serial or isinstance(engine, ComfyUiEngine) else LLM_SLOTS


class DeploymentSpec(Struct, frozen=True, kw_only=True):
    """A deployment as configured: one model served by one engine on one node.

    Those of a node with the same `swap_slot` take turns: never are two of them up. One that is `warm` comes
    up again by itself once there is room and nobody waits.
    """

    id: str
    node_id: str
    model: str
    engine: EngineSpec
    aliases: tuple[str, ...] = ()
    served_model_name: str = ""
    residency_class: ResidencyClass = ResidencyClass.ON_DEMAND
    slots: int = LLM_SLOTS
    vram_bytes: int = 0
    keep_running: bool = False
    idle_timeout_s: float | None = None
    shrinkable: bool = False
    capabilities: tuple[str, ...] = ("chat",)
    context_tokens: int = 0
    swap_slot: str = ""
    warm: bool = False

    @property
    def engine_model_name(self) -> str:
        """The name by which the engine knows the model. Ollama knows it by its tag, a router by its own."""
        engine = self.engine.engine
        own = self.model
        if isinstance(engine, OllamaEngine):
            own = engine.model
        elif isinstance(engine, LlamaCppEngine):
            own = engine.router_model or own
        return self.served_model_name or own


class TransitionTimes(Struct, frozen=True, kw_only=True):
    """How long the transitions of a deployment usually take; None for one that nobody has seen yet.

    `sleep_s` and `wake_s` are of level 1, `discard_s` and `reload_s` of level 2, `shrink_s` and `grow_s` of
    the KV cache alone. What requests in flight take first is no part of them.
    """

    start_s: float | None = None
    sleep_s: float | None = None
    wake_s: float | None = None
    discard_s: float | None = None
    reload_s: float | None = None
    shrink_s: float | None = None
    grow_s: float | None = None


class Deployment(Struct, frozen=True, kw_only=True):
    """A deployment as it is. `generation` grows with every start of its engine.

    `asleep_level` is that at which it sleeps, falls asleep or from which it wakes; else 0. `shrunk` stands
    in its place where only the KV cache is given up, about `kv_cache_bytes`, and the weights stay on the
    GPU. `awake_expected_s` is the time until it is awake from where it is now, without that to make room
    for it; None when it is awake, or nobody knows.
    """

    spec: DeploymentSpec
    residency: Residency
    detail: str = ""
    endpoint: Endpoint | None = None
    vram_bytes: int | None = None
    active_requests: int = 0
    queued_requests: int = 0
    load_percent: float | None = None
    residency_time_s: float = 0.0
    failure_reason: FailureReason | None = None
    generation: int = 0
    adopted: bool = False
    pid: int = 0
    container_id: str = ""
    asleep_level: int = 0
    shrunk: bool = False
    kv_cache_bytes: int | None = None
    awake_expected_s: float | None = None
    usual_times: TransitionTimes = TransitionTimes()


class MemoryAlert(Struct, frozen=True, kw_only=True):
    """The free memory of a GPU (`node/index`) fell below a limit, or rose well above it again."""

    gpu: str
    low: bool
    free_bytes: int
    limit_bytes: int
    time_s: float


class FleetSnapshot(Struct, frozen=True):
    """Everything at one moment; nodes and deployments by id. `alerts` are of GPUs that are low."""

    nodes: tuple[Node, ...] = ()
    deployments: tuple[Deployment, ...] = ()
    profile: str = ""
    alerts: tuple[MemoryAlert, ...] = ()


class LifecycleProgress(Struct, frozen=True, tag="progress", tag_field="event", omit_defaults=True):
    """What an operation on a deployment is doing. `percent` is 0 to 100."""

    residency: Residency
    detail: str = ""
    percent: float | None = None
    remaining_s: float | None = None


class LifecycleDone(Struct, frozen=True, tag="done", tag_field="event"):
    """The operation ended well; the deployment as it is now.

    `freed_bytes` of GPU memory were given back, as measured; None if that was not measured, or nothing
    was to be given back.
    """

    deployment: Deployment
    freed_bytes: int | None = None


class LifecycleFailed(Struct, frozen=True, tag="failed", tag_field="event"):
    """The operation failed."""

    reason: FailureReason
    detail: str


LifecyclePayload: TypeAlias = LifecycleProgress | LifecycleDone | LifecycleFailed


class LifecycleEvent(Struct, frozen=True):
    """One step of an operation; the last one is `LifecycleDone` or `LifecycleFailed`."""

    operation_id: str
    sequence: int
    elapsed_s: float
    payload: LifecyclePayload


class Model(Struct, frozen=True, kw_only=True):
    """A name that a request may use."""

    id: str
    deployments: tuple[str, ...]
    ready: bool
    context_tokens: int = 0
    capabilities: tuple[str, ...] = ()
