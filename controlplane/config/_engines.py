"""Engines and runtimes of deployments, as YAML has them."""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self
from urllib.parse import SplitResult, urlsplit

from pydantic import AfterValidator, BaseModel, Field, model_validator

from rung import types
from rung.errors import LoopbackOnlyError
from rung.service import ByteSize, ConfigModel, FieldError, require_loopback


def _on_the_node(model: str) -> str:
    if types.OllamaEngine(model=model).leaves_node:
        raise ValueError(
            f"{model} runs on Ollama's servers, not on this node; what may go to the internet belongs under "
            "cloud"
        )
    return model


def _loopback_url(url: str) -> str:
    parts = urlsplit(url)
    if parts.scheme != "http" or not parts.hostname:
        raise ValueError(f"{url!r} is not an http:// URL such as http://127.0.0.1:8000")
    if parts.path.strip("/") or parts.query or parts.username:
        raise ValueError(f"{url!r} has more than scheme, host and port; the adapter knows the paths")
    require_port(parts)
    _loopback_only_engine(parts.hostname)
    return url.rstrip("/")


def require_port(parts: SplitResult) -> None:
    """Raises ValueError for a URL with a port that there cannot be: it is not looked at before it is used."""
    try:
        port = parts.port
    except ValueError:
        port = 0
    if port == 0:
        raise ValueError(f"{parts.netloc} has no port from 1 to 65535")


def _loopback_only_engine(host: str) -> None:
    try:
        require_loopback(host, "an engine")
    except LoopbackOnlyError:
        raise ValueError(
            f"engines are reached over loopback only, not at {host}; run an agent on that machine"
        ) from None


class LlamaCppConfig(ConfigModel):
    """llama.cpp."""

    kind: Literal["llamacpp"]
    """llama.cpp."""
    model_path: str = ""
    """GGUF file on the node; unset with router_model."""
    server: types.LlamaCppServer = types.LlamaCppServer.LLAMA_SERVER
    """Which program serves the file; `llama-server` by default."""
    context_tokens: int = Field(default=0, ge=0)
    """Tokens of context, shared by all that run in parallel; 0, by default, means the model's own."""
    gpu_layers: int = Field(-1, ge=-1)
    """Layers on the GPU; -1, by default, means all."""
    parallel: int = Field(default=1, ge=1)
    """Requests at once; 1 by default."""
    embedding: bool = False
    """Serve embeddings instead of answers; off by default."""
    projector_path: str = ""
    """Projector of a vision model, on the node."""
    projector_on_gpu: bool = False
    """Where llama-server runs the projector; unset: by the CPU, which leaves the GPU's memory to others and
    takes a moment longer for each picture."""
    chat_template: str = ""
    """Name of a chat template that llama.cpp knows; unset: the file's own."""
    kv_cache_type: Literal["", "f16", "q8_0", "q4_0"] = ""
    """Format of the KV cache; unset: 16 bits (f16)."""
    router_model: str = ""
    """One model of a llama-server in router mode that somebody else runs, by its name there."""

    @model_validator(mode="before")
    @classmethod
    def _some_model(cls, given: object) -> object:
        # First of all: of a misspelt name it says what was meant.
        if isinstance(given, dict) and not (given.get("model_path") or given.get("router_model")):
            raise FieldError(("model_path",), "is missing; or name a router's model as router_model")
        return given

    @model_validator(mode="after")
    def _one_model(self) -> Self:
        if self.projector_on_gpu and not self.projector_path:
            raise FieldError(("projector_on_gpu",), "is for a projector: name it as projector_path")
        if not self.router_model:
            return self
        if self.server is not types.LlamaCppServer.LLAMA_SERVER:
            raise FieldError(("server",), f"{self.server} has no router mode; llama-server has")
        for name in sorted(self.model_fields_set - {"kind", "server", "router_model"}):
            raise FieldError((name,), "is for the router to say: remove it, or router_model")
        return self

    def value(self) -> types.Engine:
        """As the rest of the system has it."""
        return types.LlamaCppEngine(**_fields(self))


class OpenAiCompatibleConfig(ConfigModel):
    """Any server with OpenAI's routes."""

    kind: Literal["openai_compatible"]
    """Any server with OpenAI's routes."""
    health_path: str = Field(default="/v1/models", pattern="^/")
    """Path that answers 200 once it is ready; `/v1/models` by default."""
    api_key_env: str = ""
    """Variable of the agent's environment that has the engine's key; unset: it needs none."""

    def value(self) -> types.Engine:
        """As the rest of the system has it."""
        return types.OpenAiCompatibleEngine(**_fields(self))


class VllmConfig(ConfigModel):
    """vLLM."""

    kind: Literal["vllm"]
    """vLLM."""
    model: str
    """Name at Hugging Face, or folder on the node."""
    gpu_memory_utilization: float = Field(default=0.0, ge=0, le=1)
    """Share of the GPU's memory that it reserves, 0 to 1; 0, by default, leaves vLLM's own."""
    max_model_len_tokens: int = Field(default=0, ge=0)
    """Longest sequence in tokens; 0, by default, means the model's own."""
    max_num_seqs: int = Field(default=0, ge=0)
    """Sequences at once; 0, by default, means vLLM's own."""
    kv_cache_dtype: str = ""
    """Format of the KV cache, such as fp8; unset: vLLM's own."""
    sleep_mode: bool = False
    """Start it so that it can be put to sleep; needed for `sleepable`. Off by default."""
    kv_cache_memory_bytes: ByteSize = 0
    """Size of the KV cache in bytes or such as `4GiB`, instead of what the share leaves; 0: unset."""
    tool_call_parser: str = ""
    """vLLM's parser for the model's tool calls, such as hermes; needed for tools."""
    reasoning_parser: str = ""
    """vLLM's parser for the model's thoughts, such as deepseek_r1 or qwen3."""

    def value(self) -> types.Engine:
        """As the rest of the system has it."""
        return types.VllmEngine(**_fields(self))


class OllamaConfig(ConfigModel):
    """Ollama."""

    kind: Literal["ollama"]
    """Ollama."""
    model: Annotated[str, AfterValidator(_on_the_node)]
    """Its tag, such as qwen3:8b."""
    pull: bool | None = None
    """Whether a start pulls a model that is not there; unset: unless Ollama is external."""

    def value(self) -> types.Engine:
        """As the rest of the system has it."""
        return types.OllamaEngine(**_fields(self))


class ComfyUiConfig(ConfigModel):
    """ComfyUI."""

    kind: Literal["comfyui"]
    """ComfyUI."""
    reserve_vram_bytes: ByteSize = Field(default=0, alias="reserve_vram")
    """GPU memory that it leaves to others, in bytes or such as `2GiB`; 0 means its own default."""

    def value(self) -> types.Engine:
        """As the rest of the system has it."""
        return types.ComfyUiEngine(**_fields(self))


class ServiceConfig(ConfigModel):
    """A server of speech, pictures, meshes or predictions with a dialect of its own."""

    kind: Literal["speaches", "piper", "xtts", "hunyuan3d", "sana", "prediction"]
    """Whose dialect it speaks."""

    def value(self) -> types.Engine:
        """As the rest of the system has it."""
        return types.ServiceEngine(dialect=self.kind)


EngineConfig = Annotated[
    LlamaCppConfig | OpenAiCompatibleConfig | VllmConfig | OllamaConfig | ComfyUiConfig | ServiceConfig,
    Field(discriminator="kind"),
]


class MountConfig(ConfigModel):
    """A folder of the node seen in a container."""

    source: str = Field(pattern="^/")
    """Folder on the node, below one that the agent's `mount_folders` names."""
    target: str = Field(pattern="^/")
    """Where the container sees it."""
    writable: bool = False
    """Whether the container may write there; off by default."""


class ProcessConfig(ConfigModel):
    """A process of an executable that the agent's allow-list names."""

    kind: Literal["process"]
    """A process of an executable that the agent's configuration names."""
    executable: str = Field(min_length=1)
    """Its name under `executables` of the agent."""
    arguments: tuple[str, ...] = ()
    """Further arguments, if the agent allows them (`allow_arguments`)."""
    environment: dict[str, str] = Field(default={})
    """Further variables, if the agent allows them (`allow_environment`)."""

    def value(self) -> types.Runtime:
        """As the rest of the system has it."""
        return types.ProcessRuntime(**_fields(self))


class DockerConfig(ConfigModel):
    """A container."""

    kind: Literal["docker"]
    """A container."""
    image: str = Field(min_length=1)
    """Image with its tag, one that the agent's `images` allow."""
    command: tuple[str, ...] = ()
    """What is run in it, before the engine's own arguments; unset: the image's own."""
    mounts: tuple[MountConfig, ...] = ()
    """Folders of the node that it sees."""
    container_port: int = Field(default=0, ge=0, le=65535)
    """Port on which it listens inside; 0, by default, means the one that it is told."""
    shared_memory_bytes: ByteSize = Field(default=0, alias="shared_memory")
    """Size of /dev/shm in bytes or such as `8GiB`; 0, by default, means Docker's own."""
    environment: dict[str, str] = Field(default={})
    """Variables in the container."""

    def value(self) -> types.Runtime:
        """As the rest of the system has it."""
        mounts = tuple(types.Mount(**_fields(mount)) for mount in self.mounts)
        return types.DockerRuntime(**(_fields(self) | {"mounts": mounts}))


class ExternalConfig(ConfigModel):
    """An engine that somebody else runs on the node."""

    kind: Literal["external"]
    """Run by somebody else: used as it is, never started or stopped."""
    base_url: Annotated[str, AfterValidator(_loopback_url)]
    """Where it listens on the node's loopback, such as http://127.0.0.1:8000, without a path."""

    def value(self) -> types.Runtime:
        """As the rest of the system has it."""
        return types.ExternalRuntime(base_url=self.base_url)


RuntimeConfig = Annotated[ProcessConfig | DockerConfig | ExternalConfig, Field(discriminator="kind")]


def require_tool_parser(engine: EngineConfig) -> None:
    """Refuse to have a vLLM called with tools that was not told how its model calls them."""
    if isinstance(engine, VllmConfig) and not engine.tool_call_parser:
        raise FieldError(
            ("engine", "tool_call_parser"),
            "is missing: without one vLLM refuses requests with tools; name the one for this model, such as "
            "hermes (Qwen, Nemotron), llama3_json or mistral",
        )


def require_router(router_model: str, runtime: RuntimeConfig, served_model_name: str) -> None:
    """Refuse a router that we would have to start, and a model that requests would name otherwise."""
    if not isinstance(runtime, ExternalConfig):
        raise FieldError(("runtime",), "a router is run by somebody else; write kind: external")
    if served_model_name not in ("", router_model):
        raise FieldError(
            ("served_model_name",), f"the router knows the model as {router_model} only; remove it"
        )


def require_shrinkable(engine: EngineConfig, runtime: RuntimeConfig) -> None:
    """Refuse to have an engine shrunk to its weights that cannot give up its KV cache alone."""
    if not isinstance(engine, VllmConfig):
        raise FieldError(("shrinkable",), f"{engine.kind} cannot give up its KV cache alone; vLLM can")
    if not engine.sleep_mode:
        raise FieldError(("shrinkable",), "vLLM shrinks only with engine.sleep_mode: true")
    if isinstance(runtime, ExternalConfig):
        raise FieldError(("shrinkable",), "an engine that somebody else runs is never shrunk")


def _fields(model: BaseModel) -> dict[str, Any]:
    return {name: getattr(model, name) for name in type(model).model_fields if name != "kind"}
