"""What is said to who asks for a model that there is not: what there is, or how to come by one."""

from __future__ import annotations

import pytest

from controlplane.fleet import DeploymentView
from controlplane.ladder import Circuits
from controlplane.pipelines import Slots
from controlplane.pipelines._router import Judged, Router
from controlplane.pipelines._wish import Wish
from rung.errors import UnknownModelError
from rung.types import JobKind
from tests.fakes.fleet_view import FakeFleet, deployment_view

NOTHING_DEPLOYED = (
    "nothing is deployed yet: start an engine (vLLM, llama.cpp, Ollama, ComfyUI), and `rung up` finds it, or "
    "describe one in rung.yaml, which `rung config init` writes"
)


def said(*views: DeploymentView, model: str = "", kind: JobKind = JobKind.CHAT) -> str:
    """Why a wish has no route."""
    router = Router(
        fleet=FakeFleet(*views),
        slots=Slots(),
        circuits=Circuits(jitter=lambda: 1.0),
        classify=lambda _: Judged(3),
    )
    with pytest.raises(UnknownModelError) as refused:
        router.route(Wish(kind=kind, model=model, body=b"{}"))
    assert refused.value.metadata == {"model": model}
    return refused.value.message


def test_names_are_told() -> None:
    views = [deployment_view(f"{name}-1", None, model=name) for name in "ba"]
    assert said(*views, model="x") == (
        "there is no model 'x'; there are a, b; rung/auto leaves the choice to Rung"
    )


def test_of_many_names_some_are_told_and_that_there_are_more() -> None:
    views = [deployment_view(f"{name}-1", None, model=name) for name in "abcdefghij"]
    assert said(*views, model="x") == (
        "there is no model 'x'; there are a, b, c, d, e, f, g, h and 2 more; "
        "rung/auto leaves the choice to Rung"
    )


def test_where_nothing_is_deployed_it_is_said_how_to_start_an_engine() -> None:
    assert said(model="x") == f"there is no model 'x'; {NOTHING_DEPLOYED}"
    assert said() == f"no deployment can do chat; {NOTHING_DEPLOYED}"


def test_where_others_are_deployed_it_is_said_how_to_see_them() -> None:
    talks = deployment_view("a-1", None, model="a")
    assert said(talks, kind=JobKind.MESH) == ("no deployment can do mesh; `rung models` lists what there is")
