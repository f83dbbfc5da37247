"""A fleet whose view a test writes."""

from __future__ import annotations

from collections.abc import AsyncIterator

from controlplane.fleet import DeploymentView, Fleet, FleetView
from rung.errors import EngineStartFailedError
from rung.types import (
    Deployment,
    DeploymentSpec,
    EngineSpec,
    ExternalRuntime,
    LifecycleProgress,
    Node,
    NodeState,
    OpenAiCompatibleEngine,
    ProcessRuntime,
    Residency,
)

NODE = Node(id="workstation", address="127.0.0.1:1", state=NodeState.READY)


def deployment_view(
    name: str,
    url: str | None,
    *,
    model: str = "tiny",
    residency: Residency = Residency.AWAKE,
    slots: int = 16,
    node: Node = NODE,
    external: bool = False,
    capabilities: tuple[str, ...] = ("chat", "embedding"),
) -> DeploymentView:
    """A deployment as the request path sees it."""
    runtime = ExternalRuntime(base_url=url or "") if external else ProcessRuntime(executable="engine")
    spec = DeploymentSpec(
        id=name,
        node_id=node.id,
        model=model,
        served_model_name=f"{model}-served",
        slots=slots,
        capabilities=capabilities,
        engine=EngineSpec(engine=OpenAiCompatibleEngine(), runtime=runtime),
    )
    return DeploymentView(Deployment(spec=spec, residency=residency), node, url, name)


class FakeFleet(Fleet):
    """A fleet without nodes to dial: its view is what the test sets, and waking is a script."""

    def __init__(self, *views: DeploymentView) -> None:
        super().__init__(nodes=[], deployments=[], epoch=1)
        self.steps: list[LifecycleProgress] = []
        self.refuse_start = ""
        self.awake_view: DeploymentView | None = None
        self.show(*views)

    def show(self, *views: DeploymentView) -> None:
        """Replace the view, and tell who waits for that."""
        by_model: dict[str, tuple[DeploymentView, ...]] = {}
        for view in views:
            spec = view.deployment.spec
            for name in (spec.model, spec.id):
                by_model[name] = (*by_model.get(name, ()), view)
        self._view = FleetView({NODE.id: NODE}, {view.deployment.spec.id: view for view in views}, by_model)
        self._changed.fire()

    async def ensure_awake(self, deployment_id: str) -> AsyncIterator[LifecycleProgress]:  # type: ignore[override]  # a script needs no generator's `send`
        for step in self.steps:
            yield step
        if self.refuse_start:
            raise EngineStartFailedError(self.refuse_start, deployment=deployment_id)
        if self.awake_view is not None:
            self.show(self.awake_view)
