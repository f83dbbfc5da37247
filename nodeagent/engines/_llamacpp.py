"""llama.cpp: its own `llama-server`, and the server of the llama-cpp-python package."""

from __future__ import annotations

from contextlib import AbstractAsyncContextManager

import msgspec
from msgspec import Struct

from nodeagent.engines._base import (
    CommandLine,
    EngineHealth,
    EngineStream,
    LoadProgress,
    Probe,
    RunKind,
)
from nodeagent.engines._loading import LLAMA_CPP, recognise
from nodeagent.engines._mounts import seen_by_engine
from nodeagent.engines._openai_relay import ask, guarded, parse_models, relay
from rung.errors import InvalidRequestError
from rung.service import EngineClient
from rung.types import DeploymentSpec, LlamaCppEngine, LlamaCppServer

#: "All layers" that every build of llama-server understands; newer ones also know `all`.
_ALL_LAYERS = 999
#: ggml's numbers of the data types, which llama-cpp-python wants instead of names.
_GGML_TYPES = {"f16": 1, "q4_0": 2, "q4_1": 3, "q5_0": 6, "q5_1": 7, "q8_0": 8, "bf16": 30}
#: A route of llama-cpp-python that does not take its lock. `/v1/models` does: it would wait for the
#: running generation and, with the server's default settings, cut it short.
_LOCK_FREE_PATH = "/openapi.json"


class ErrorBody(Struct):
    """What stands in an error of llama-server."""

    message: str = ""
    type: str = ""


class _Error(Struct):
    error: ErrorBody = msgspec.field(default_factory=ErrorBody)


class _GenerationSettings(Struct):
    n_ctx: int = 0


class _Props(Struct):
    default_generation_settings: _GenerationSettings = msgspec.field(default_factory=_GenerationSettings)


class LlamaCppAdapter:
    """Speaks to either server of llama.cpp, whichever the spec names.

    Command lines hold options only. That a llama-cpp-python server is `python -m llama_cpp.server` is
    for the agent's allow-list, or the image's entry point, to say: a bare `python` that takes
    arguments from elsewhere would run anything.
    """

    def __init__(self, client: EngineClient) -> None:
        self._client = client

    def command_line(self, spec: DeploymentSpec, *, listen_host: str, listen_port: int) -> CommandLine:
        """Options for the spec's server. In a container, paths are as the spec's mounts show them.

        Raises:
            InvalidRequestError: the spec is not for llama.cpp, or asks for what the server cannot do.
        """
        engine = _engine(spec)
        if not engine.model_path:
            raise InvalidRequestError(f"{spec.id}: llama.cpp needs a model_path", deployment=spec.id)
        if engine.kv_cache_type and engine.kv_cache_type not in _GGML_TYPES:
            known = ", ".join(sorted(_GGML_TYPES))
            raise InvalidRequestError(
                f"{spec.id}: kv_cache_type {engine.kv_cache_type!r} is not one of {known}", deployment=spec.id
            )
        if engine.server is LlamaCppServer.LLAMA_CPP_PYTHON:
            return _llama_cpp_python(spec, engine, listen_host, listen_port)
        return _llama_server(spec, engine, listen_host, listen_port)

    async def probe(self, base_url: str, spec: DeploymentSpec) -> Probe:
        """See `EngineAdapter.probe`."""
        if _engine(spec).server is LlamaCppServer.LLAMA_CPP_PYTHON:
            return await guarded(self._probe_llama_cpp_python(base_url, spec))
        return await guarded(self._probe_llama_server(base_url, spec))

    def load_progress(self, line: str) -> LoadProgress | None:
        """See `EngineAdapter.load_progress`. llama.cpp prints no percentage, so there is none."""
        return recognise(LLAMA_CPP, line.strip())

    def run(
        self, base_url: str, spec: DeploymentSpec, kind: RunKind, body: bytes, *, idle_timeout_s: float
    ) -> AbstractAsyncContextManager[EngineStream]:
        """See `EngineAdapter.run`."""
        return relay(self._client, base_url, kind, body, what=spec.id, idle_timeout_s=idle_timeout_s)

    async def _probe_llama_server(self, base_url: str, spec: DeploymentSpec) -> Probe:
        answer = await ask(self._client, base_url, "/health", what=spec.id)
        if answer.status == 503:
            error = decode_error(answer.body)
            if error.type == "unavailable_error":
                return Probe(health=EngineHealth.LOADING, detail=error.message)
        if answer.status != 200:
            return Probe(health=EngineHealth.UNWELL, detail=f"/health answers {answer.status}")
        models = await ask(self._client, base_url, "/v1/models", what=spec.id)
        props = await ask(self._client, base_url, "/props", what=spec.id)
        return Probe(
            health=EngineHealth.READY,
            models=tuple(row.id for row in parse_models(models.body) or ()),
            context_tokens=context_tokens_of(props.body),
        )

    async def _probe_llama_cpp_python(self, base_url: str, spec: DeploymentSpec) -> Probe:
        # The port opens only after the model is loaded, so any answer of the application means ready.
        answer = await ask(self._client, base_url, _LOCK_FREE_PATH, what=spec.id)
        if answer.status != 200:
            return Probe(health=EngineHealth.UNWELL, detail=f"{_LOCK_FREE_PATH} answers {answer.status}")
        return Probe(health=EngineHealth.READY)


def _engine(spec: DeploymentSpec) -> LlamaCppEngine:
    engine = spec.engine.engine
    if not isinstance(engine, LlamaCppEngine):
        raise InvalidRequestError(f"{spec.id} is not a llama.cpp deployment", deployment=spec.id)
    return engine


def _llama_server(spec: DeploymentSpec, engine: LlamaCppEngine, host: str, port: int) -> CommandLine:
    runtime = spec.engine.runtime
    layers = _ALL_LAYERS if engine.gpu_layers < 0 else engine.gpu_layers
    arguments = ["--model", seen_by_engine(engine.model_path, runtime)]
    arguments += ["--alias", spec.engine_model_name, "--host", host, "--port", str(port)]
    arguments += ["--ctx-size", str(engine.context_tokens), "--n-gpu-layers", str(layers)]
    arguments += ["--parallel", str(max(engine.parallel, 1)), "--jinja", "--metrics"]
    if engine.embedding:
        arguments.append("--embedding")
    if engine.projector_path:
        arguments += ["--mmproj", seen_by_engine(engine.projector_path, runtime)]
        if not engine.projector_on_gpu:
            arguments.append("--no-mmproj-offload")
    if engine.chat_template:
        arguments += ["--chat-template", engine.chat_template]
    if engine.kv_cache_type:
        arguments += ["--cache-type-k", engine.kv_cache_type, "--cache-type-v", engine.kv_cache_type]
    return CommandLine(arguments=tuple(arguments))


def _llama_cpp_python(spec: DeploymentSpec, engine: LlamaCppEngine, host: str, port: int) -> CommandLine:
    if engine.parallel > 1:
        raise InvalidRequestError(
            f"{spec.id}: llama-cpp-python serves one request at a time; use llama-server for parallel > 1",
            deployment=spec.id,
        )
    runtime = spec.engine.runtime
    layers = -1 if engine.gpu_layers < 0 else engine.gpu_layers
    arguments = ["--model", seen_by_engine(engine.model_path, runtime)]
    arguments += ["--model_alias", spec.engine_model_name, "--host", host, "--port", str(port)]
    arguments += ["--n_ctx", str(engine.context_tokens), "--n_gpu_layers", str(layers)]
    # Its default lets every new request cut the running one short, without a word to its caller.
    arguments += ["--interrupt_requests", "false"]
    if engine.embedding:
        arguments += ["--embedding", "true"]
    if engine.projector_path:
        arguments += ["--clip_model_path", seen_by_engine(engine.projector_path, runtime)]
    if engine.chat_template:
        arguments += ["--chat_format", engine.chat_template]
    if engine.kv_cache_type:
        number = str(_GGML_TYPES[engine.kv_cache_type])
        # llama.cpp quantizes the values of the cache only under flash attention.
        arguments += ["--type_k", number, "--type_v", number, "--flash_attn", "true"]
    # Its server reads HOST and PORT in preference to its options. And without PYTHONUNBUFFERED its
    # output, which tells how far loading is, would come when it is too late.
    environment = {"HOST": host, "PORT": str(port), "PYTHONUNBUFFERED": "1"}
    return CommandLine(arguments=tuple(arguments), environment=environment)


def decode_error(body: bytes) -> ErrorBody:
    """What llama-server says went wrong; empty if `body` is no such error."""
    try:
        return msgspec.json.decode(body, type=_Error).error
    except msgspec.DecodeError:
        return ErrorBody()


def context_tokens_of(props: bytes) -> int:
    """The context of one slot, as `/props` has it, in tokens; 0 if it does not tell."""
    try:
        return msgspec.json.decode(props, type=_Props).default_generation_settings.n_ctx
    except msgspec.DecodeError:
        return 0
