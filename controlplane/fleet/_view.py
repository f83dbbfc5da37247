"""The fleet as the request path sees it: an immutable value, replaced when something changes.

Everything here is pure.
"""

from __future__ import annotations

from collections.abc import Container, Mapping, Sequence
from datetime import UTC, datetime

from msgspec import Struct
from msgspec.structs import replace

from controlplane.fleet._division import Division
from rung.types import (
    Deployment,
    DeploymentSpec,
    EndpointScope,
    ExternalRuntime,
    LlamaCppEngine,
    Model,
    Node,
    NodeState,
    OllamaEngine,
    OpenAiCompatibleEngine,
    Residency,
    VllmEngine,
)

#: Dialects with OpenAI's routes: what a gateway may relay to without an adapter.
_OPENAI_SHAPED = (LlamaCppEngine, OpenAiCompatibleEngine, VllmEngine, OllamaEngine)
#: States in which the agent's word is current.
_HEARD = frozenset({NodeState.READY, NodeState.DRAINING, NodeState.DRAINED})
_UNDIVIDED = Division()


class DeploymentView(Struct, frozen=True):
    """A deployment, its node, and how to talk to its engine.

    `direct_url` is the engine's base URL if this process may talk to the engine itself, else None.
    `agent_id` is the id by which the node's agent knows the deployment. `hold` says why it is not to be
    made awake; empty if it may be. `measurements_are_old`: its node is heard, and has measured nothing for
    a while, so that how it is now is not known for sure.
    """

    deployment: Deployment
    node: Node
    direct_url: str | None
    agent_id: str
    hold: str = ""
    measurements_are_old: bool = False


class FleetView(Struct, frozen=True):
    """Nodes and deployments by id; `by_model` has models, aliases and deployment ids.

    `profile` is the one that was applied and verified; empty if none. Where several deployments share a
    name, configured ones come first, in the order of the configuration.
    """

    nodes: dict[str, Node] = {}
    deployments: dict[str, DeploymentView] = {}
    by_model: dict[str, tuple[DeploymentView, ...]] = {}
    profile: str = ""


def build_view(
    nodes: Mapping[str, Node],
    configured: Sequence[DeploymentSpec],
    reported: Mapping[str, Mapping[str, Deployment]],
    own_host_id: str,
    division: Division = _UNDIVIDED,
    old: Container[str] = (),
) -> FleetView:
    """Put together what is configured and what the agents report.

    1. A configured deployment is shown as its agent reports it; not reported, it is STOPPED; UNKNOWN
       while its node is not heard.
    2. What an agent reports and nobody configured is shown as adopted. Its id is the agent's own on a
       fleet of one node, and `node/id` on a larger one, where two agents may find the same id.

    Args:
        nodes: by id, in the order of the configuration.
        configured: deployments of these nodes, with unique ids.
        reported: by node, what its agent last said, by the agent's ids.
        own_host_id: host id of this process; empty if no engine is to be reached directly.
        division: what a profile asks.
        old: nodes that are heard, and whose measurements are too old to tell how they are now.
    """
    views: dict[str, DeploymentView] = {}
    names: dict[str, list[DeploymentView]] = {}
    taken: set[tuple[str, str]] = set()

    def add(deployment: Deployment, node: Node, agent_id: str) -> None:
        shown = deployment if node.state in _HEARD else _unknown(deployment, node)
        hold = division.holds.get(shown.spec.id, "")
        url = direct_url(deployment, node, own_host_id)
        view = DeploymentView(shown, node, url, agent_id, hold, node.id in old)
        views[shown.spec.id] = view
        for name in dict.fromkeys((shown.spec.model, *shown.spec.aliases, shown.spec.id, agent_id)):
            if name:
                names.setdefault(name, []).append(view)

    for spec in configured:
        node = nodes[spec.node_id]
        found = reported.get(spec.node_id, {}).get(spec.id)
        taken.add((spec.node_id, spec.id))
        add(_configured(spec, found), node, spec.id)
    for node_id, node in nodes.items():
        for agent_id, found in sorted(reported.get(node_id, {}).items()):
            if (node_id, agent_id) not in taken:
                view_id = agent_id if len(nodes) == 1 else f"{node_id}/{agent_id}"
                spec = replace(found.spec, id=view_id, node_id=node_id)
                add(replace(found, spec=spec, adopted=True), node, agent_id)
    by_model = {name: tuple(found) for name, found in names.items()}
    return FleetView(dict(nodes), views, by_model, division.profile)


def replace_node(view: FleetView, node: Node) -> FleetView:
    """The view with newer measurements of one node; whatever is not of this node is shared.

    Only for a node that was heard before and is heard now, on the same host: anything else changes
    deployments too.
    """
    changed = {
        key: replace(found, node=node) for key, found in view.deployments.items() if found.node.id == node.id
    }
    by_model = view.by_model
    if changed:
        by_model = {
            name: tuple(changed.get(found.deployment.spec.id, found) for found in views)
            for name, views in by_model.items()
        }
    return FleetView(view.nodes | {node.id: node}, view.deployments | changed, by_model, view.profile)


def models(view: FleetView) -> tuple[Model, ...]:
    """What a request may ask for by name: models and their aliases, in the order of their names."""
    found: dict[str, list[DeploymentView]] = {}
    for name, views in view.by_model.items():
        for candidate in views:
            spec = candidate.deployment.spec
            if name == spec.model or name in spec.aliases:
                found.setdefault(name, []).append(candidate)
    return tuple(
        Model(
            id=name,
            deployments=tuple(each.deployment.spec.id for each in views),
            ready=any(
                each.deployment.residency is Residency.AWAKE and each.node.state is NodeState.READY
                for each in views
            ),
            context_tokens=max(each.deployment.spec.context_tokens for each in views),
            capabilities=tuple(
                sorted({what for each in views for what in each.deployment.spec.capabilities})
            ),
        )
        for name, views in sorted(found.items())
    )


def direct_url(deployment: Deployment, node: Node, own_host_id: str) -> str | None:
    """Base URL of the engine if a process on the host `own_host_id` may talk to it itself.

    It may when the node is heard, the engine speaks OpenAI's routes without a key that only the agent
    has, and its endpoint is on our own loopback interface or declared reachable from the network.
    """
    endpoint = deployment.endpoint
    engine = deployment.spec.engine.engine
    if endpoint is None or node.state not in _HEARD or not isinstance(engine, _OPENAI_SHAPED):
        return None
    if isinstance(engine, OpenAiCompatibleEngine) and engine.api_key_env:
        return None
    if endpoint.scope is EndpointScope.NETWORK:
        return endpoint.base_url
    same_host = node.status is not None and own_host_id != "" and node.status.host_id == own_host_id
    return endpoint.base_url if same_host else None


def _configured(spec: DeploymentSpec, found: Deployment | None) -> Deployment:
    """A configured deployment as it is, from what the agent says about it, if anything."""
    if found is None:
        external = isinstance(spec.engine.runtime, ExternalRuntime)
        detail = "its node's agent has not been told of it yet" if external else "not started yet"
        return Deployment(spec=spec, residency=Residency.STOPPED, detail=detail)
    if found.residency in (Residency.STOPPED, Residency.FAILED):
        return replace(found, spec=spec, adopted=False)
    # An engine that runs is described by what it was started with, until it is started again.
    running = replace(
        spec,
        engine=found.spec.engine,
        served_model_name=found.spec.engine_model_name,
        shrinkable=spec.shrinkable and found.spec.shrinkable,
    )
    if running.engine_model_name == spec.engine_model_name:
        running = replace(running, served_model_name=spec.served_model_name)
    return replace(found, spec=running, adopted=False)


def _unknown(deployment: Deployment, node: Node) -> Deployment:
    """A deployment of a node that is not heard: what ran there may still run."""
    if node.last_seen_time_s is None:
        detail = f"{node.id} has not answered yet"
    else:
        since = datetime.fromtimestamp(node.last_seen_time_s, UTC).strftime("%Y-%m-%d %H:%M:%SZ")
        detail = f"{node.id} has not been heard since {since}"
    if node.detail:
        detail = f"{detail}: {node.detail}"
    return replace(
        deployment,
        residency=Residency.UNKNOWN,
        detail=detail,
        residency_time_s=node.last_seen_time_s or 0.0,
        load_percent=None,
        failure_reason=None,
    )
