"""Engines, deployments and the events of their lifecycle."""

from __future__ import annotations

from google.protobuf.duration_pb2 import Duration

from rung import v1
from rung.codec._job import failure_reason_from_proto, failure_reason_to_proto
from rung.codec._values import (
    EnumCodec,
    duration_from_proto,
    duration_to_proto,
    timestamp_from_proto,
    timestamp_to_proto,
)
from rung.errors import InvalidRequestError
from rung.types import (
    ComfyUiEngine,
    Deployment,
    DeploymentSpec,
    DockerRuntime,
    Endpoint,
    EndpointScope,
    Engine,
    EngineSpec,
    ExternalRuntime,
    FailureReason,
    LifecycleDone,
    LifecycleEvent,
    LifecycleFailed,
    LifecyclePayload,
    LifecycleProgress,
    LlamaCppEngine,
    LlamaCppServer,
    Mount,
    OllamaEngine,
    OpenAiCompatibleEngine,
    ProcessRuntime,
    Residency,
    ResidencyClass,
    Runtime,
    ServiceEngine,
    TransitionTimes,
    VllmEngine,
    default_slots,
)

RESIDENCIES = EnumCodec(Residency, v1.Residency, prefix="RESIDENCY_", unknown=Residency.UNKNOWN)
# What may be done to a deployment of a class that we do not know is: nothing.
RESIDENCY_CLASSES = EnumCodec(
    ResidencyClass,
    v1.ResidencyClass,
    prefix="RESIDENCY_CLASS_",
    unknown=ResidencyClass.PINNED,
    unspecified=ResidencyClass.ON_DEMAND,
)
ENDPOINT_SCOPES = EnumCodec(
    EndpointScope, v1.EndpointScope, prefix="ENDPOINT_SCOPE_", unknown=EndpointScope.LOOPBACK
)
LLAMA_CPP_SERVERS = EnumCodec(
    LlamaCppServer, v1.LlamaCppServer, prefix="LLAMA_CPP_SERVER_", unknown=LlamaCppServer.LLAMA_SERVER
)

# What 0, "" and unset mean in a spec, as the protos say.
_DEFAULT_HEALTH_PATH = "/v1/models"
_DEFAULT_PARALLEL = 1
_DEFAULT_START_TIMEOUT_S = 600.0
_DEFAULT_STOP_GRACE_S = 10.0
_UNSEEN = TransitionTimes()


def endpoint_to_proto(value: Endpoint) -> v1.Endpoint:
    """Encode an endpoint."""
    return v1.Endpoint(base_url=value.base_url, scope=ENDPOINT_SCOPES.to_proto[value.scope])


def endpoint_from_proto(message: v1.Endpoint) -> Endpoint:
    """Decode an endpoint."""
    return Endpoint(message.base_url, ENDPOINT_SCOPES.from_proto(message.scope))


def _write_engine(value: Engine, message: v1.EngineSpec) -> None:
    match value:
        case LlamaCppEngine():
            message.llamacpp.CopyFrom(_llamacpp_to_proto(value))
        case OpenAiCompatibleEngine():
            message.openai_compatible.CopyFrom(
                v1.OpenAiCompatibleEngine(health_path=value.health_path, api_key_env=value.api_key_env)
            )
        case VllmEngine():
            message.vllm.CopyFrom(_vllm_to_proto(value))
        case OllamaEngine():
            message.ollama.CopyFrom(v1.OllamaEngine(model=value.model, pull=value.pull))
        case ComfyUiEngine():
            message.comfyui.CopyFrom(v1.ComfyUiEngine(reserve_vram_bytes=value.reserve_vram_bytes))
        case ServiceEngine():
            message.service.CopyFrom(v1.ServiceEngine(dialect=value.dialect))


def _read_engine(message: v1.EngineSpec) -> Engine:
    match message.WhichOneof("engine"):
        case "llamacpp":
            return _llamacpp_from_proto(message.llamacpp)
        case "openai_compatible":
            return OpenAiCompatibleEngine(
                health_path=message.openai_compatible.health_path or _DEFAULT_HEALTH_PATH,
                api_key_env=message.openai_compatible.api_key_env,
            )
        case "vllm":
            return _vllm_from_proto(message.vllm)
        case "ollama":
            pull = message.ollama.pull if message.ollama.HasField("pull") else None
            return OllamaEngine(model=message.ollama.model, pull=pull)
        case "comfyui":
            return ComfyUiEngine(reserve_vram_bytes=message.comfyui.reserve_vram_bytes)
        case "service":
            return ServiceEngine(dialect=message.service.dialect)
        case _:
            raise InvalidRequestError(
                "the engine spec names no engine that this version knows", field="engine.engine"
            )


def _llamacpp_to_proto(value: LlamaCppEngine) -> v1.LlamaCppEngine:
    return v1.LlamaCppEngine(
        server=LLAMA_CPP_SERVERS.to_proto[value.server],
        model_path=value.model_path,
        context_tokens=value.context_tokens,
        gpu_layers=value.gpu_layers,
        parallel=value.parallel,
        embedding=value.embedding,
        projector_path=value.projector_path,
        chat_template=value.chat_template,
        kv_cache_type=value.kv_cache_type,
        router_model=value.router_model,
        projector_on_gpu=value.projector_on_gpu,
    )


def _llamacpp_from_proto(message: v1.LlamaCppEngine) -> LlamaCppEngine:
    return LlamaCppEngine(
        server=LLAMA_CPP_SERVERS.from_proto(message.server),
        model_path=message.model_path,
        context_tokens=message.context_tokens,
        gpu_layers=message.gpu_layers,
        parallel=message.parallel or _DEFAULT_PARALLEL,
        embedding=message.embedding,
        projector_path=message.projector_path,
        chat_template=message.chat_template,
        kv_cache_type=message.kv_cache_type,
        router_model=message.router_model,
        projector_on_gpu=message.projector_on_gpu,
    )


def _vllm_to_proto(value: VllmEngine) -> v1.VllmEngine:
    return v1.VllmEngine(
        model=value.model,
        gpu_memory_utilization=value.gpu_memory_utilization,
        max_model_len_tokens=value.max_model_len_tokens,
        max_num_seqs=value.max_num_seqs,
        kv_cache_dtype=value.kv_cache_dtype,
        sleep_mode=value.sleep_mode,
        kv_cache_memory_bytes=value.kv_cache_memory_bytes,
        tool_call_parser=value.tool_call_parser,
        reasoning_parser=value.reasoning_parser,
    )


def _vllm_from_proto(message: v1.VllmEngine) -> VllmEngine:
    return VllmEngine(
        model=message.model,
        gpu_memory_utilization=message.gpu_memory_utilization,
        max_model_len_tokens=message.max_model_len_tokens,
        max_num_seqs=message.max_num_seqs,
        kv_cache_dtype=message.kv_cache_dtype,
        sleep_mode=message.sleep_mode,
        kv_cache_memory_bytes=message.kv_cache_memory_bytes,
        tool_call_parser=message.tool_call_parser,
        reasoning_parser=message.reasoning_parser,
    )


def _write_runtime(value: Runtime, message: v1.EngineSpec) -> None:
    match value:
        case DockerRuntime():
            message.docker.CopyFrom(_docker_to_proto(value))
        case ProcessRuntime():
            message.process.CopyFrom(
                v1.ProcessRuntime(
                    executable=value.executable, arguments=value.arguments, environment=value.environment
                )
            )
        case ExternalRuntime():
            message.external.CopyFrom(v1.ExternalRuntime(base_url=value.base_url))


def _read_runtime(message: v1.EngineSpec) -> Runtime:
    match message.WhichOneof("runtime"):
        case "docker":
            return _docker_from_proto(message.docker)
        case "process":
            return ProcessRuntime(
                executable=message.process.executable,
                arguments=tuple(message.process.arguments),
                environment=dict(message.process.environment),
            )
        case "external":
            return ExternalRuntime(base_url=message.external.base_url)
        case _:
            raise InvalidRequestError(
                "the engine spec names no runtime that this version knows", field="engine.runtime"
            )


def _docker_to_proto(value: DockerRuntime) -> v1.DockerRuntime:
    return v1.DockerRuntime(
        image=value.image,
        command=value.command,
        mounts=[
            v1.Mount(source=mount.source, target=mount.target, writable=mount.writable)
            for mount in value.mounts
        ],
        container_port=value.container_port,
        shared_memory_bytes=value.shared_memory_bytes,
        environment=value.environment,
    )


def _docker_from_proto(message: v1.DockerRuntime) -> DockerRuntime:
    return DockerRuntime(
        image=message.image,
        command=tuple(message.command),
        mounts=tuple(
            Mount(source=mount.source, target=mount.target, writable=mount.writable)
            for mount in message.mounts
        ),
        container_port=message.container_port,
        shared_memory_bytes=message.shared_memory_bytes,
        environment=dict(message.environment),
    )


def engine_spec_to_proto(value: EngineSpec) -> v1.EngineSpec:
    """Encode how to run an engine."""
    message = v1.EngineSpec(
        port=value.port,
        gpus=value.gpus,
        start_timeout=duration_to_proto(value.start_timeout_s),
        stop_grace=duration_to_proto(value.stop_grace_s),
    )
    _write_engine(value.engine, message)
    _write_runtime(value.runtime, message)
    return message


def engine_spec_from_proto(message: v1.EngineSpec) -> EngineSpec:
    """Decode how to run an engine.

    Raises:
        InvalidRequestError: it has no engine or no runtime, or one that this version does not know.
    """
    return EngineSpec(
        engine=_read_engine(message),
        runtime=_read_runtime(message),
        port=message.port,
        gpus=tuple(message.gpus),
        start_timeout_s=duration_from_proto(message.start_timeout)
        if message.HasField("start_timeout")
        else _DEFAULT_START_TIMEOUT_S,
        stop_grace_s=duration_from_proto(message.stop_grace)
        if message.HasField("stop_grace")
        else _DEFAULT_STOP_GRACE_S,
    )


def deployment_spec_to_proto(value: DeploymentSpec) -> v1.DeploymentSpec:
    """Encode a deployment as configured."""
    return v1.DeploymentSpec(
        id=value.id,
        node_id=value.node_id,
        model=value.model,
        aliases=value.aliases,
        served_model_name=value.served_model_name,
        residency_class=RESIDENCY_CLASSES.to_proto[value.residency_class],
        engine=engine_spec_to_proto(value.engine),
        slots=value.slots,
        vram_bytes=value.vram_bytes,
        keep_running=value.keep_running,
        idle_timeout=None if value.idle_timeout_s is None else duration_to_proto(value.idle_timeout_s),
        shrinkable=value.shrinkable,
        capabilities=value.capabilities,
        context_tokens=value.context_tokens,
        swap_slot=value.swap_slot,
        warm=value.warm,
    )


def deployment_spec_from_proto(message: v1.DeploymentSpec) -> DeploymentSpec:
    """Decode a deployment as configured. Raises as `engine_spec_from_proto`."""
    engine = engine_spec_from_proto(message.engine)
    return DeploymentSpec(
        id=message.id,
        node_id=message.node_id,
        model=message.model,
        aliases=tuple(message.aliases),
        served_model_name=message.served_model_name,
        residency_class=RESIDENCY_CLASSES.from_proto(message.residency_class),
        engine=engine,
        slots=message.slots or default_slots(engine.engine),
        vram_bytes=message.vram_bytes,
        keep_running=message.keep_running,
        idle_timeout_s=duration_from_proto(message.idle_timeout)
        if message.HasField("idle_timeout")
        else None,
        shrinkable=message.shrinkable,
        capabilities=tuple(message.capabilities),
        context_tokens=message.context_tokens,
        swap_slot=message.swap_slot,
        warm=message.warm,
    )


def deployment_to_proto(value: Deployment) -> v1.Deployment:
    """Encode a deployment."""
    return v1.Deployment(
        spec=deployment_spec_to_proto(value.spec),
        residency=RESIDENCIES.to_proto[value.residency],
        detail=value.detail,
        endpoint=endpoint_to_proto(value.endpoint) if value.endpoint else None,
        vram_bytes=value.vram_bytes,
        active_requests=value.active_requests,
        queued_requests=value.queued_requests,
        load_percent=value.load_percent,
        residency_time=timestamp_to_proto(value.residency_time_s) if value.residency_time_s else None,
        failure_reason=failure_reason_to_proto(value.failure_reason),
        generation=value.generation,
        adopted=value.adopted,
        pid=value.pid,
        container_id=value.container_id,
        asleep_level=value.asleep_level,
        shrunk=value.shrunk,
        kv_cache_bytes=value.kv_cache_bytes,
        awake_expected=_duration(value.awake_expected_s),
        usual_times=_transition_times_to_proto(value.usual_times) if value.usual_times != _UNSEEN else None,
    )


def deployment_from_proto(message: v1.Deployment) -> Deployment:
    """Decode a deployment. Raises as `engine_spec_from_proto`."""
    has = message.HasField
    return Deployment(
        spec=deployment_spec_from_proto(message.spec),
        residency=RESIDENCIES.from_proto(message.residency),
        detail=message.detail,
        endpoint=endpoint_from_proto(message.endpoint) if has("endpoint") else None,
        vram_bytes=message.vram_bytes if has("vram_bytes") else None,
        active_requests=message.active_requests,
        queued_requests=message.queued_requests,
        load_percent=message.load_percent if has("load_percent") else None,
        residency_time_s=timestamp_from_proto(message.residency_time),
        failure_reason=failure_reason_from_proto(message.failure_reason),
        generation=message.generation,
        adopted=message.adopted,
        pid=message.pid,
        container_id=message.container_id,
        asleep_level=message.asleep_level,
        shrunk=message.shrunk,
        kv_cache_bytes=message.kv_cache_bytes if has("kv_cache_bytes") else None,
        awake_expected_s=duration_from_proto(message.awake_expected) if has("awake_expected") else None,
        usual_times=_transition_times_from_proto(message.usual_times) if has("usual_times") else _UNSEEN,
    )


def _transition_times_to_proto(value: TransitionTimes) -> v1.TransitionTimes:
    return v1.TransitionTimes(
        start=_duration(value.start_s),
        sleep=_duration(value.sleep_s),
        wake=_duration(value.wake_s),
        discard=_duration(value.discard_s),
        reload=_duration(value.reload_s),
        shrink=_duration(value.shrink_s),
        grow=_duration(value.grow_s),
    )


def _transition_times_from_proto(message: v1.TransitionTimes) -> TransitionTimes:
    has = message.HasField
    return TransitionTimes(
        start_s=duration_from_proto(message.start) if has("start") else None,
        sleep_s=duration_from_proto(message.sleep) if has("sleep") else None,
        wake_s=duration_from_proto(message.wake) if has("wake") else None,
        discard_s=duration_from_proto(message.discard) if has("discard") else None,
        reload_s=duration_from_proto(message.reload) if has("reload") else None,
        shrink_s=duration_from_proto(message.shrink) if has("shrink") else None,
        grow_s=duration_from_proto(message.grow) if has("grow") else None,
    )


def _duration(seconds: float | None) -> Duration | None:
    return None if seconds is None else duration_to_proto(seconds)


def lifecycle_event_to_proto(value: LifecycleEvent) -> v1.LifecycleEvent:
    """Encode a step of an operation."""
    message = v1.LifecycleEvent(
        operation_id=value.operation_id,
        sequence=value.sequence,
        elapsed=duration_to_proto(value.elapsed_s),
    )
    match value.payload:
        case LifecycleProgress() as progress:
            message.progress.CopyFrom(_lifecycle_progress_to_proto(progress))
        case LifecycleDone() as done:
            message.done.CopyFrom(
                v1.LifecycleDone(
                    deployment=deployment_to_proto(done.deployment), freed_bytes=done.freed_bytes
                )
            )
        case LifecycleFailed() as failed:
            message.failed.reason = failure_reason_to_proto(failed.reason)
            message.failed.detail = failed.detail
    return message


def lifecycle_event_from_proto(message: v1.LifecycleEvent) -> LifecycleEvent:
    """Decode a step of an operation.

    A kind that this version does not know reads as progress of which nothing is known.
    """
    payload: LifecyclePayload
    match message.WhichOneof("event"):
        case "progress":
            payload = _lifecycle_progress_from_proto(message.progress)
        case "done":
            payload = LifecycleDone(
                deployment_from_proto(message.done.deployment),
                message.done.freed_bytes if message.done.HasField("freed_bytes") else None,
            )
        case "failed":
            reason = failure_reason_from_proto(message.failed.reason) or FailureReason.INTERNAL
            payload = LifecycleFailed(reason, message.failed.detail)
        case _:
            payload = LifecycleProgress(Residency.UNKNOWN)
    return LifecycleEvent(
        message.operation_id, message.sequence, duration_from_proto(message.elapsed), payload
    )


def _lifecycle_progress_to_proto(value: LifecycleProgress) -> v1.LifecycleProgress:
    return v1.LifecycleProgress(
        residency=RESIDENCIES.to_proto[value.residency],
        detail=value.detail,
        percent=value.percent,
        remaining=None if value.remaining_s is None else duration_to_proto(value.remaining_s),
    )


def _lifecycle_progress_from_proto(message: v1.LifecycleProgress) -> LifecycleProgress:
    return LifecycleProgress(
        residency=RESIDENCIES.from_proto(message.residency),
        detail=message.detail,
        percent=message.percent if message.HasField("percent") else None,
        remaining_s=duration_from_proto(message.remaining) if message.HasField("remaining") else None,
    )
