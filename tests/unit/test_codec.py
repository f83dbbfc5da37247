"""Every value survives the trip to its message and back, also over the wire."""

from __future__ import annotations

import types
import typing
from collections.abc import Callable
from enum import StrEnum
from typing import Any

import msgspec
import pytest
from google.protobuf.message import Message
from hypothesis import given, settings
from hypothesis import strategies as st

import rung.types
from rung import codec, v1
from rung.codec import _deployment, _fleet, _job
from rung.codec._values import EnumCodec
from rung.errors import BY_REASON, InvalidRequestError, RungError
from rung.types import (
    Conversation,
    Deployment,
    DeploymentSpec,
    Embeddings,
    EventPayload,
    FailureReason,
    FleetSnapshot,
    Job,
    JobEvent,
    JobKind,
    JobState,
    LifecycleEvent,
    LifecycleFailed,
    LifecycleProgress,
    Model,
    Node,
    Policy,
    Priority,
    Residency,
    ResidencyClass,
    RouteExplanation,
    TokenDelta,
    Tool,
)

_JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**50), 2**50)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)

_BY_FIELD: dict[str, st.SearchStrategy[Any]] = {
    "slots": st.integers(1, 1000),  # 0 on the wire means the default
    "parallel": st.integers(1, 1000),
    "health_path": st.text(min_size=1, max_size=8),
    "gpu_layers": st.integers(-1, 200),
    # Empty, and 0, mean the default.
    "operation": st.text(min_size=1, max_size=8),
    "format": st.text(min_size=1, max_size=8),
    "content_type": st.text(min_size=1, max_size=8),
    "count": st.integers(1, 8),
    "speed": st.floats(0.25, 4),
    "vectors": st.lists(
        st.lists(st.floats(width=32, allow_nan=False), max_size=4).map(tuple), max_size=3
    ).map(tuple),
    "parameters": st.dictionaries(st.text(max_size=5), _JSON, max_size=3),
}


def _for_field(name: str, annotation: Any) -> st.SearchStrategy[Any]:
    if (name in _BY_FIELD and typing.get_origin(annotation) is not tuple) or name == "vectors":
        return _BY_FIELD[name]
    if annotation is float:
        if name.endswith("time_s"):
            return st.floats(1e8, 4e9)
        if name.endswith("_s"):
            # Fractions that both nine decimals and a float hold exactly.
            return st.integers(0, 10**9).map(lambda ticks: ticks / 512)
    if isinstance(annotation, types.UnionType):
        return st.one_of([_for_field(name, part) for part in typing.get_args(annotation)])
    return _for_type(annotation)


def _for_type(annotation: Any) -> st.SearchStrategy[Any]:
    scalars: dict[Any, st.SearchStrategy[Any]] = {
        str: st.text(max_size=8),
        bytes: st.binary(max_size=8),
        bool: st.booleans(),
        int: st.integers(0, 2**31 - 1),
        float: st.floats(allow_nan=False),
        type(None): st.none(),
    }
    if annotation in scalars:
        return scalars[annotation]
    if isinstance(annotation, types.UnionType):
        return st.one_of([_for_type(part) for part in typing.get_args(annotation)])
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is tuple:
        return st.lists(_for_type(arguments[0]), max_size=2).map(tuple)
    if origin is dict:
        return st.dictionaries(_for_type(arguments[0]), _for_type(arguments[1]), max_size=2)
    if issubclass(annotation, StrEnum):
        return st.sampled_from(list(annotation))
    assert issubclass(annotation, msgspec.Struct), annotation
    hints = typing.get_type_hints(annotation)
    fields = {
        field.name: _for_field(field.name, hints[field.name]) for field in msgspec.structs.fields(annotation)
    }
    return st.fixed_dictionaries(fields).map(lambda values: annotation(**values))


#: One value type for each public pair, by the name of the pair.
_PAIRS: dict[str, Any] = {
    "artifact_chunk": rung.types.ArtifactChunk,
    "conversation": Conversation,
    "deployment": Deployment,
    "deployment_spec": DeploymentSpec,
    "embeddings": Embeddings,
    "endpoint": rung.types.Endpoint,
    "engine_spec": rung.types.EngineSpec,
    "footprint": rung.types.Footprint,
    "fleet_snapshot": FleetSnapshot,
    "generation_event": codec.GenerationEvent,
    "gpu": rung.types.Gpu,
    "host_status": rung.types.HostStatus,
    "image_part": rung.types.ImagePart,
    "infeasible": rung.types.Infeasible,
    "reclaim_plan": rung.types.ReclaimPlan,
    "job": Job,
    "lease": rung.types.Lease,
    "job_event": JobEvent,
    "memory_alert": rung.types.MemoryAlert,
    "lifecycle_event": LifecycleEvent,
    "model": Model,
    "node": Node,
    "node_status": rung.types.NodeStatus,
    "phase_progress": rung.types.PhaseProgress,
    "policy": Policy,
    "predictions": rung.types.Predictions,
    "profile": rung.types.Profile,
    "profile_event": rung.types.ProfileEvent,
    "profile_list": rung.types.ProfileList,
    "route_explanation": RouteExplanation,
    "served": rung.types.Served,
    "usage": rung.types.Usage,
    "voice": rung.types.Voice,
    "workflow": rung.types.Workflow,
}


def _pair(name: str) -> tuple[Callable[[Any], Message], Callable[[Message], Any]]:
    return getattr(codec, f"{name}_to_proto"), getattr(codec, f"{name}_from_proto")


@pytest.mark.parametrize("name", _PAIRS)
@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_round_trip(name: str, data: st.DataObject) -> None:
    encode, decode = _pair(name)
    value = data.draw(_for_type(_PAIRS[name]))
    message = encode(value)
    assert decode(type(message).FromString(message.SerializeToString())) == value


@settings(max_examples=80, deadline=None)
@given(value=_for_type(rung.types.GenerationInput))
def test_what_a_caller_asks_for(value: rung.types.GenerationInput) -> None:
    message = v1.GenerateRequest()
    codec.write_generation_input(value, message)
    assert codec.read_generation_input(v1.GenerateRequest.FromString(message.SerializeToString())) == value


@settings(max_examples=80, deadline=None)
@given(value=_for_type(rung.types.EngineInput))
def test_what_an_engine_is_asked_for(value: rung.types.EngineInput) -> None:
    message = v1.RunGenerationRequest()
    codec.write_generation_input(value, message)
    assert codec.read_engine_input(v1.RunGenerationRequest.FromString(message.SerializeToString())) == value


@settings(max_examples=80, deadline=None)
@given(value=_for_type(rung.types.PredictionTask))
def test_what_is_to_be_predicted(value: rung.types.PredictionTask) -> None:
    request = v1.PredictRequest()
    codec.write_prediction_task(value, request)
    assert codec.read_prediction_task(v1.PredictRequest.FromString(request.SerializeToString())) == value


def test_a_request_without_a_task_has_none() -> None:
    assert codec.read_prediction_task(v1.PredictRequest()) is None


def test_a_graph_is_for_an_engine_only() -> None:
    graph = rung.types.WorkflowInput(graph_json=b"{}")
    with pytest.raises(TypeError, match="for an engine"):
        codec.write_generation_input(graph, v1.GenerateRequest())


@pytest.mark.parametrize("error_class", BY_REASON.values(), ids=lambda found: found.reason)
def test_an_error_of_a_run_is_the_same_on_the_other_side(error_class: type[RungError]) -> None:
    error = codec.run_error_from_proto(codec.run_error_to_proto(error_class("it broke", engine="chat-1")))
    assert type(error) is error_class
    assert (error.message, error.metadata) == ("it broke", {"engine": "chat-1"})


def test_an_error_of_a_run_that_is_not_known_is_an_error_all_the_same() -> None:
    error = codec.run_error_from_proto(v1.RunError(reason="OF_A_LATER_VERSION", message="it broke"))
    assert (type(error), error.message) == (RungError, "it broke")


def test_every_public_pair_is_tested() -> None:
    # These have tests of their own.
    scalars = {"timestamp", "duration", "failure_reason", "run_error"}
    encoders = {name.removesuffix("_to_proto") for name in codec.__all__ if name.endswith("_to_proto")}
    decoders = {name.removesuffix("_from_proto") for name in codec.__all__ if name.endswith("_from_proto")}
    assert encoders == decoders == set(_PAIRS) | scalars
    assert all(hasattr(codec, name) for name in codec.__all__)


@pytest.mark.parametrize("payload", typing.get_args(EventPayload), ids=lambda kind: kind.__name__)
@settings(max_examples=15, deadline=None)
@given(data=st.data())
def test_each_kind_of_job_event(payload: type, data: st.DataObject) -> None:
    value = JobEvent("j", 1, 1.7e9, 0.5, data.draw(_for_type(payload)))
    message = codec.job_event_to_proto(value)
    assert codec.job_event_from_proto(v1.JobEvent.FromString(message.SerializeToString())) == value


def test_an_empty_token_is_still_a_token() -> None:
    message = codec.job_event_to_proto(JobEvent("j", 1, 1.7e9, 0.0, TokenDelta()))
    assert message.WhichOneof("event") == "token"


def test_write_job_event_fills_the_message_of_a_response() -> None:
    value = JobEvent("j", 7, 1.7e9, 0.0, TokenDelta("hi"))
    response = v1.GenerateResponse()
    codec.write_job_event(value, response.event)
    assert codec.job_event_from_proto(response.event) == value


def test_an_event_of_a_later_version_is_skipped() -> None:
    assert codec.job_event_from_proto(v1.JobEvent(job_id="j", sequence=3)) is None


def test_a_lifecycle_event_of_a_later_version_is_progress_of_something_unknown() -> None:
    event = codec.lifecycle_event_from_proto(v1.LifecycleEvent(operation_id="o", sequence=2))
    assert event.payload == LifecycleProgress(Residency.UNKNOWN)


def test_an_event_of_a_switch_of_a_later_version_is_a_step_of_nothing() -> None:
    event = codec.profile_event_from_proto(v1.ProfileEvent(operation_id="o", sequence=2))
    assert event.payload == rung.types.ProfileStep("", Residency.UNKNOWN)


@pytest.mark.parametrize(
    ("table", "default_of_zero", "default_of_unknown"),
    [
        (_job.JOB_STATES, JobState.PENDING, JobState.PENDING),
        (_job.JOB_KINDS, JobKind.CHAT, JobKind.CHAT),
        (_job.PRIORITIES, Priority.AGENT, Priority.AGENT),
        (_job.FAILURE_REASONS, FailureReason.INTERNAL, FailureReason.INTERNAL),
        (_deployment.RESIDENCIES, Residency.UNKNOWN, Residency.UNKNOWN),
        (_deployment.RESIDENCY_CLASSES, ResidencyClass.ON_DEMAND, ResidencyClass.PINNED),
        (_fleet.NODE_STATES, rung.types.NodeState.UNREACHABLE, rung.types.NodeState.UNREACHABLE),
        (_fleet.NODE_OWNERSHIPS, rung.types.NodeOwnership.OWNED, rung.types.NodeOwnership.OWNED),
    ],
)
def test_unknown_enum_values_become_something_safe(
    table: EnumCodec[Any, Any], default_of_zero: StrEnum, default_of_unknown: StrEnum
) -> None:
    assert table.from_proto(0) is default_of_zero
    assert table.from_proto(9999) is default_of_unknown


def test_a_failure_without_a_reason_is_internal() -> None:
    event = codec.lifecycle_event_from_proto(v1.LifecycleEvent(failed=v1.LifecycleFailed(detail="x")))
    assert event.payload == LifecycleFailed(FailureReason.INTERNAL, "x")
    assert codec.failure_reason_from_proto(0) is None
    assert codec.failure_reason_from_proto(codec.failure_reason_to_proto(None)) is None


@given(st.floats(1e8, 4e9))
def test_timestamps_are_exact(unix_s: float) -> None:
    message = codec.timestamp_to_proto(unix_s)
    assert 0 <= message.nanos < 10**9
    assert codec.timestamp_from_proto(message) == unix_s


@given(st.floats(-1e6, 1e6))
def test_durations_are_good_to_a_nanosecond(seconds: float) -> None:
    message = codec.duration_to_proto(seconds)
    assert abs(message.nanos) < 10**9
    assert message.seconds * message.nanos >= 0
    assert codec.duration_from_proto(message) == pytest.approx(seconds, abs=1e-9)


def test_a_fraction_that_rounds_up_carries_into_the_seconds() -> None:
    assert codec.timestamp_to_proto(5 - 1e-12).seconds == 5
    assert codec.duration_to_proto(5 - 1e-12).seconds == 5
    assert codec.duration_to_proto(-5 + 1e-12).seconds == -5


@pytest.mark.parametrize(
    ("spec", "field"),
    [
        (v1.EngineSpec(external=v1.ExternalRuntime(base_url="http://127.0.0.1:1")), "engine.engine"),
        (v1.EngineSpec(ollama=v1.OllamaEngine(model="m")), "engine.runtime"),
    ],
)
def test_a_spec_without_engine_or_runtime_is_refused(spec: v1.EngineSpec, field: str) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        codec.engine_spec_from_proto(spec)
    assert caught.value.metadata["field"] == field


def test_what_a_spec_leaves_out_gets_the_documented_default() -> None:
    spec = codec.deployment_spec_from_proto(
        v1.DeploymentSpec(
            id="d",
            engine=v1.EngineSpec(
                openai_compatible=v1.OpenAiCompatibleEngine(), process=v1.ProcessRuntime(executable="x")
            ),
        )
    )
    assert spec.slots == 16
    assert spec.residency_class is ResidencyClass.ON_DEMAND
    assert spec.engine.start_timeout_s == 600.0
    assert spec.engine.stop_grace_s == 10.0
    assert spec.engine.engine == rung.types.OpenAiCompatibleEngine(health_path="/v1/models")
    assert spec.idle_timeout_s is None


def test_whole_numbers_in_the_schema_of_a_tool_stay_whole() -> None:
    tool = Tool(name="t", parameters={"type": "array", "minItems": 2, "items": {"maximum": 0.5}})
    back = codec.conversation_from_proto(
        codec.conversation_to_proto(Conversation(messages=(), tools=(tool,)))
    )
    sent, got = (msgspec.json.encode(each.parameters, order="sorted") for each in (tool, back.tools[0]))
    assert got == sent
