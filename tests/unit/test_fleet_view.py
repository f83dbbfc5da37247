"""The view is a pure function of what is configured and what is reported."""

from __future__ import annotations

import pytest
from msgspec.structs import replace

from controlplane.fleet import FleetView, build_view, models
from controlplane.fleet._view import replace_node
from rung.types import (
    ComfyUiEngine,
    Deployment,
    DeploymentSpec,
    EndpointScope,
    Engine,
    LlamaCppEngine,
    Node,
    NodeState,
    OllamaEngine,
    OpenAiCompatibleEngine,
    Residency,
    VllmEngine,
)
from tests.fakes.agent_server import a_deployment, a_spec, a_status

READY = NodeState.READY


def a_node(
    node_id: str = "box", state: NodeState = READY, *, host: str = "host-1", seen: float | None = 100.0
) -> Node:
    status = a_status(host) if seen is not None else None
    return Node(id=node_id, address="x", state=state, status=status, last_seen_time_s=seen, detail="")


def a_view(
    nodes: list[Node],
    configured: list[DeploymentSpec],
    reported: dict[str, list[Deployment]] | None = None,
    own: str = "host-1",
) -> FleetView:
    return build_view(
        {node.id: node for node in nodes},
        configured,
        {key: {found.spec.id: found for found in items} for key, items in (reported or {}).items()},
        own,
    )


@pytest.mark.parametrize(
    ("state", "seen", "residency", "said"),
    [
        (READY, 100.0, Residency.STOPPED, "not started"),
        (NodeState.DRAINING, 100.0, Residency.STOPPED, "not started"),
        (NodeState.CONNECTING, None, Residency.UNKNOWN, "box has not answered yet"),
        (NodeState.UNREACHABLE, 100.0, Residency.UNKNOWN, "not been heard since 1970-01-01 00:01:40Z"),
    ],
)
def test_configured_but_not_reported(
    state: NodeState, seen: float | None, residency: Residency, said: str
) -> None:
    shown = a_view([a_node(state=state, seen=seen)], [a_spec()]).deployments["chat-1"].deployment
    assert shown.residency is residency
    assert said in shown.detail


def test_deployments_of_a_node_that_measures_nothing_any_more_say_so() -> None:
    nodes = {name: a_node(name) for name in ("box", "other")}
    specs = [a_spec("chat-1"), a_spec("chat-2", node_id="other")]
    view = build_view(nodes, specs, {}, "host-1", old={"other"})
    assert {key: each.measurements_are_old for key, each in view.deployments.items()} == {
        "chat-1": False,
        "chat-2": True,
    }
    # A sample that tells nothing new leaves it so.
    view = replace_node(view, nodes["other"])
    assert view.deployments["chat-2"].measurements_are_old


def test_what_ran_on_a_node_that_is_not_heard_is_unknown_and_not_to_be_dialled() -> None:
    awake = a_deployment(a_spec(), Residency.AWAKE)
    view = a_view([a_node(state=NodeState.UNREACHABLE)], [a_spec()], {"box": [awake]}).deployments["chat-1"]
    assert view.deployment.residency is Residency.UNKNOWN
    assert view.deployment.residency_time_s == 100.0
    assert view.direct_url is None


@pytest.mark.parametrize(
    ("engine", "scope", "own", "url"),
    [
        (LlamaCppEngine(model_path="m"), EndpointScope.LOOPBACK, "host-1", "http://127.0.0.1:9"),
        (OpenAiCompatibleEngine(), EndpointScope.LOOPBACK, "host-1", "http://127.0.0.1:9"),
        (VllmEngine(model="m"), EndpointScope.LOOPBACK, "host-1", "http://127.0.0.1:9"),
        (OllamaEngine(model="m"), EndpointScope.LOOPBACK, "host-1", "http://127.0.0.1:9"),
        (LlamaCppEngine(model_path="m"), EndpointScope.LOOPBACK, "host-2", None),
        (LlamaCppEngine(model_path="m"), EndpointScope.LOOPBACK, "", None),
        (LlamaCppEngine(model_path="m"), EndpointScope.NETWORK, "host-2", "http://127.0.0.1:9"),
        (ComfyUiEngine(), EndpointScope.NETWORK, "host-1", None),
        (OpenAiCompatibleEngine(api_key_env="KEY"), EndpointScope.LOOPBACK, "host-1", None),
    ],
)
def test_direct_url(engine: Engine, scope: EndpointScope, own: str, url: str | None) -> None:
    spec = a_spec(engine=engine)
    awake = a_deployment(spec, Residency.AWAKE, scope=scope)
    assert a_view([a_node()], [spec], {"box": [awake]}, own).deployments["chat-1"].direct_url == url


def test_adopted_keep_their_id_on_one_node_and_are_qualified_on_more() -> None:
    found = a_deployment(a_spec("vllm-8000", model="qwen"), Residency.AWAKE)
    one = a_view([a_node()], [], {"box": [found]})
    assert list(one.deployments) == ["vllm-8000"]
    assert one.deployments["vllm-8000"].deployment.adopted

    both = a_view([a_node("a"), a_node("b")], [], {"a": [found], "b": [found]})
    assert list(both.deployments) == ["a/vllm-8000", "b/vllm-8000"]
    assert [view.deployment.spec.node_id for view in both.by_model["qwen"]] == ["a", "b"]
    assert [view.agent_id for view in both.by_model["vllm-8000"]] == ["vllm-8000", "vllm-8000"]
    assert [view.deployment.spec.id for view in both.by_model["b/vllm-8000"]] == ["b/vllm-8000"]


def test_an_adopted_id_never_takes_the_place_of_a_configured_one() -> None:
    elsewhere = a_deployment(a_spec(model="other"), Residency.AWAKE)
    view = a_view([a_node("box"), a_node("b")], [a_spec()], {"b": [elsewhere]})
    assert view.deployments["chat-1"].deployment.residency is Residency.STOPPED
    assert view.deployments["b/chat-1"].deployment.spec.model == "other"


def test_names_resolve_to_models_aliases_and_ids_without_repeats() -> None:
    first = a_spec("tiny", model="tiny", aliases=("small",))
    second = a_spec("tiny-2", model="tiny")
    view = a_view([a_node()], [first, second])
    names = {name: [found.deployment.spec.id for found in views] for name, views in view.by_model.items()}
    assert names == {"tiny": ["tiny", "tiny-2"], "small": ["tiny"], "tiny-2": ["tiny-2"]}


def test_a_running_engine_is_described_by_what_it_was_started_with() -> None:
    old = replace(a_spec(model="old-name"), engine=a_spec(engine=LlamaCppEngine(model_path="/old")).engine)
    new = a_spec(aliases=("fresh",))
    running = a_view([a_node()], [new], {"box": [a_deployment(old, Residency.AWAKE)]})
    spec = running.deployments["chat-1"].deployment.spec
    assert spec.engine == old.engine
    assert spec.engine_model_name == "old-name"
    assert (spec.model, spec.aliases) == ("tiny", ("fresh",))

    stopped = a_view([a_node()], [new], {"box": [a_deployment(old, Residency.STOPPED)]})
    assert stopped.deployments["chat-1"].deployment.spec == new


def test_newer_measurements_leave_other_nodes_alone_and_equal_a_full_build() -> None:
    configured = [a_spec("x", node_id="a"), a_spec("y", node_id="b")]
    before = a_view([a_node("a"), a_node("b")], configured)
    newer = replace(a_node("a"), status=a_status(sample_time_s=2.0))
    after = replace_node(before, newer)
    assert after == a_view([newer, a_node("b")], configured)
    assert after.deployments["y"] is before.deployments["y"]
    assert after.deployments["x"].node is newer
    assert after.by_model["tiny"][0].node is newer


def test_models_are_names_to_ask_for_and_say_whether_one_is_ready() -> None:
    configured = [a_spec("x", aliases=("chatty",)), a_spec("y")]
    awake = a_deployment(configured[1], Residency.AWAKE)
    found = models(a_view([a_node()], configured, {"box": [awake]}))
    assert [(each.id, each.deployments, each.ready) for each in found] == [
        ("chatty", ("x",), False),
        ("tiny", ("x", "y"), True),
    ]
