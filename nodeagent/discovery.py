"""Finding engines that already run here, so that a first start needs no configuration.

A few ports on loopback are asked a few harmless questions. An engine is known by how it answers,
not by its port; what is not understood is somebody else's business and is left out without a word.
"""

from __future__ import annotations

import asyncio
import itertools
import re
from collections.abc import Sequence
from pathlib import PurePath
from typing import TypeVar

import httpx
import msgspec
from msgspec import Struct

from rung.types import (
    ComfyUiEngine,
    DeploymentSpec,
    Engine,
    EngineSpec,
    ExternalRuntime,
    LlamaCppEngine,
    LlamaCppServer,
    OllamaEngine,
    OpenAiCompatibleEngine,
    ResidencyClass,
    VllmEngine,
)

#: Loopback answers in milliseconds; an engine that is busy compiling may need longer.
_REQUEST_TIMEOUT_S = 2.0
_PORT_TIMEOUT_S = 5.0

#: No answer that we look for is larger. Some strangers answer with all they have.
_MAX_BODY_BYTES = 4 * 1024**2

_COMFYUI_MODEL = "comfyui"


class _OpenAiModel(Struct):
    id: str
    owned_by: str = ""
    parent: str | None = None
    root: str | None = None
    max_model_len: int | None = None
    #: Only a llama-server in router mode has it.
    status: dict[str, msgspec.Raw] | None = None


class _OpenAiModels(Struct):
    data: list[_OpenAiModel]


class _VllmVersion(Struct):
    version: str


class _LlamaServerProperties(Struct):
    total_slots: int
    model_path: str = ""
    default_generation_settings: dict[str, msgspec.Raw] = {}


class _OllamaTag(Struct):
    name: str
    capabilities: list[str] | None = None
    remote_host: str | None = None


class _OllamaTags(Struct):
    models: list[_OllamaTag] | None


class _ComfyUiSystem(Struct):
    comfyui_version: str


class _ComfyUiStats(Struct):
    system: _ComfyUiSystem
    devices: list[dict[str, msgspec.Raw]]


_Answer = TypeVar("_Answer", bound=Struct)


async def discover(
    node_id: str, ports: Sequence[int], *, host: str = "127.0.0.1"
) -> tuple[DeploymentSpec, ...]:
    """Engines that listen on loopback now, as deployments that somebody else runs.

    They come in order of `ports`, then of what the engine lists; ids such as `vllm-8000` are unique.
    An engine that still loads, or wants an API key, is not found. Never raises; takes 5 s at most,
    and a few milliseconds where nothing listens.
    """
    async with httpx.AsyncClient(timeout=_REQUEST_TIMEOUT_S, trust_env=False) as client:
        found = await asyncio.gather(*(_look(client, node_id, host, port) for port in dict.fromkeys(ports)))
    return _with_unique_ids([spec for specs in found for spec in specs])


async def _look(client: httpx.AsyncClient, node_id: str, host: str, port: int) -> list[DeploymentSpec]:
    listener = _Listener(client, node_id, host, port)
    try:
        async with asyncio.timeout(_PORT_TIMEOUT_S):
            return await listener.deployments()
    except (TimeoutError, httpx.HTTPError, httpx.InvalidURL):
        return []


class _Listener:
    """Whatever listens on a port."""

    def __init__(self, client: httpx.AsyncClient, node_id: str, host: str, port: int) -> None:
        self._client = client
        self._node_id = node_id
        self._port = port
        self._base_url = f"http://{host}:{port}"

    async def deployments(self) -> list[DeploymentSpec]:
        """What it serves, if it is an engine that we know.

        1. Ollama says its name; it has OpenAI's routes as well, so it is asked first.
        2. ComfyUI has statistics like nobody else's.
        3. A server with OpenAI's list of models, told apart by who owns them and by further routes.

        Raises:
            httpx.HTTPError: nothing listens, or not HTTP.
        """
        root = await self._get("/")
        if root is not None and b"Ollama is running" in root[:64]:
            tags = await self._ask("/api/tags", _OllamaTags)
            return self._ollama(tags) if tags else []
        if await self._ask("/system_stats", _ComfyUiStats):
            return [self._comfyui()]
        models = await self._ask("/v1/models", _OpenAiModels)
        if models is None or not models.data:
            return []
        owners = {model.owned_by for model in models.data}
        if owners == {"llamacpp"} and all(model.status for model in models.data):
            return self._llama_router(models.data)
        if owners == {"vllm"} and await self._ask("/version", _VllmVersion):
            return [self._vllm(models.data)]
        properties = await self._ask("/props", _LlamaServerProperties)
        if properties is not None or owners == {"llamacpp"}:
            return self._llama_server(models.data, properties)
        if owners == {"me"}:
            return self._llama_cpp_python(models.data)
        # A control plane of ours would send us our own requests.
        return [] if "rung" in owners else self._openai_compatible(models.data)

    def _ollama(self, tags: _OllamaTags) -> list[DeploymentSpec]:
        # Models of Ollama's cloud look local but leave the machine, which nobody here agreed to.
        local = [
            tag
            for tag in tags.models or []
            if not tag.remote_host and not OllamaEngine(model=tag.name).leaves_node
        ]
        return [
            self._spec(
                f"ollama-{self._port}-{_slug(tag.name)}",
                tag.name,
                OllamaEngine(model=tag.name),
                residency_class=ResidencyClass.ON_DEMAND,
                capabilities=_ollama_capabilities(tag.capabilities),
            )
            for tag in local
        ]

    def _comfyui(self) -> DeploymentSpec:
        return self._spec(
            f"comfyui-{self._port}",
            _COMFYUI_MODEL,
            ComfyUiEngine(),
            residency_class=ResidencyClass.CACHE,
            capabilities=("image",),
            slots=1,
        )

    def _vllm(self, models: list[_OpenAiModel]) -> DeploymentSpec:
        # One model, under all its names; those with a parent are adapters on top of it.
        names = [model for model in models if not model.parent] or models
        first = names[0]
        return self._spec(
            f"vllm-{self._port}",
            first.id,
            VllmEngine(model=first.root or first.id, max_model_len_tokens=first.max_model_len or 0),
            aliases=tuple(model.id for model in names[1:]),
            context_tokens=first.max_model_len or 0,
        )

    def _llama_server(
        self, models: list[_OpenAiModel], properties: _LlamaServerProperties | None
    ) -> list[DeploymentSpec]:
        slots = max(properties.total_slots, 1) if properties else 1
        context_tokens = _context_tokens(properties)
        path = properties.model_path if properties else ""
        return [
            self._spec(
                self._nth_id("llamacpp", model, models),
                _model_name(model.id),
                LlamaCppEngine(
                    model_path=path or model.id,
                    server=LlamaCppServer.LLAMA_SERVER,
                    context_tokens=context_tokens,
                    parallel=slots,
                ),
                served_model_name=model.id,
                residency_class=_class_of_one_among(models),
                context_tokens=context_tokens,
                slots=slots,
            )
            for model in models
        ]

    def _llama_router(self, models: list[_OpenAiModel]) -> list[DeploymentSpec]:
        return [
            self._spec(
                self._nth_id("llamacpp", model, models),
                _model_name(model.id),
                LlamaCppEngine(router_model=model.id),
                residency_class=ResidencyClass.ON_DEMAND,
            )
            for model in models
        ]

    def _llama_cpp_python(self, models: list[_OpenAiModel]) -> list[DeploymentSpec]:
        return [
            self._spec(
                self._nth_id("llamacpp", model, models),
                _model_name(model.id),
                LlamaCppEngine(model_path=model.id, server=LlamaCppServer.LLAMA_CPP_PYTHON),
                served_model_name=model.id,
                residency_class=_class_of_one_among(models),
                # It answers one request at a time, and a second one cuts the first off.
                slots=1,
            )
            for model in models
        ]

    def _openai_compatible(self, models: list[_OpenAiModel]) -> list[DeploymentSpec]:
        return [
            self._spec(
                self._nth_id("openai", model, models),
                model.id,
                OpenAiCompatibleEngine(),
                residency_class=_class_of_one_among(models),
                context_tokens=model.max_model_len or 0,
            )
            for model in models
        ]

    def _spec(
        self,
        deployment_id: str,
        model: str,
        engine: Engine,
        *,
        residency_class: ResidencyClass = ResidencyClass.PINNED,
        aliases: tuple[str, ...] = (),
        served_model_name: str = "",
        capabilities: tuple[str, ...] = ("chat",),
        context_tokens: int = 0,
        slots: int = 16,
    ) -> DeploymentSpec:
        return DeploymentSpec(
            id=deployment_id,
            node_id=self._node_id,
            model=model,
            engine=EngineSpec(
                engine=engine, runtime=ExternalRuntime(base_url=self._base_url), port=self._port
            ),
            aliases=aliases,
            served_model_name="" if served_model_name == model else served_model_name,
            residency_class=residency_class,
            slots=slots,
            capabilities=capabilities,
            context_tokens=context_tokens,
        )

    def _nth_id(self, kind: str, model: _OpenAiModel, models: list[_OpenAiModel]) -> str:
        base = f"{kind}-{self._port}"
        return base if len(models) == 1 else f"{base}-{_slug(_model_name(model.id))}"

    async def _ask(self, path: str, kind: type[_Answer]) -> _Answer | None:
        """The answer to a question, if it is one that we understand."""
        body = await self._get(path)
        if body is None:
            return None
        try:
            return msgspec.json.decode(body, type=kind)
        except (msgspec.MsgspecError, UnicodeDecodeError):
            return None

    async def _get(self, path: str) -> bytes | None:
        """The body of a good answer of reasonable size, else None.

        Raises:
            httpx.HTTPError: nothing listens, or not HTTP.
        """
        async with self._client.stream("GET", self._base_url + path) as response:
            if response.status_code != httpx.codes.OK:
                return None
            body = bytearray()
            async for chunk in response.aiter_bytes():
                body += chunk
                if len(body) > _MAX_BODY_BYTES:
                    return None
            return bytes(body)


def _class_of_one_among(models: list[_OpenAiModel]) -> ResidencyClass:
    """An engine with one model holds it; one with several loads what is asked for."""
    return ResidencyClass.PINNED if len(models) == 1 else ResidencyClass.ON_DEMAND


def _context_tokens(properties: _LlamaServerProperties | None) -> int:
    raw = properties.default_generation_settings.get("n_ctx") if properties else None
    if raw is None:
        return 0
    try:
        return max(msgspec.json.decode(raw, type=int), 0)
    except msgspec.MsgspecError:
        return 0


def _ollama_capabilities(told: list[str] | None) -> tuple[str, ...]:
    """Ollama's words in ours. Old versions tell nothing, and then it is a model to chat with."""
    ours = {"completion": "chat", "tools": "tools", "vision": "vision", "embedding": "embedding"}
    return tuple(ours[word] for word in told or () if word in ours) or ("chat",)


def _model_name(served: str) -> str:
    """A name that a person would type: of a path to a GGUF file, the file's name alone."""
    return PurePath(served).stem if served.endswith(".gguf") else served


def _slug(name: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-") or "model"


def _with_unique_ids(specs: list[DeploymentSpec]) -> tuple[DeploymentSpec, ...]:
    """The same deployments; names that differ in punctuation alone are numbered apart."""
    taken: set[str] = set()
    unique = []
    for spec in specs:
        names = (spec.id if number == 1 else f"{spec.id}-{number}" for number in itertools.count(1))
        name = next(name for name in names if name not in taken)
        taken.add(name)
        unique.append(msgspec.structs.replace(spec, id=name))
    return tuple(unique)
