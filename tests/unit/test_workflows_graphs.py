"""Every graph that the built-in templates give, held to the definitions of ComfyUI's own nodes.

`tests/data/comfyui_nodes.json` has what the classes of ComfyUI 0.3.64 and of AnimateDiff-Evolved (d8d163c)
say of their inputs and outputs. Lists of files are empty there: any name will do.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from controlplane.workflows import DEFAULT_TIERS, Tier, Workflows, build
from nodeagent.engines._comfyui_check import look_at
from nodeagent.engines._comfyui_classes import node_class_of
from nodeagent.simulators._comfyui_nodes import node_kinds
from rung.types import FILE_PREFIX, ImageInput, ImagePart

NODES: dict[str, Any] = json.loads(
    (Path(__file__).parents[1] / "data" / "comfyui_nodes.json").read_text(encoding="utf-8")
)
#: Required since 2026 (ComfyUI issue 11428); earlier versions pass over an input that they do not know.
NEWER_INPUTS = {("ImageScaleToTotalPixels", "resolution_steps")}
#: The head of a PNG with an alpha channel.
PNG = b"\x89PNG\r\n\x1a\n" + bytes(17) + b"\x06" + bytes(10)
PICTURE = ImagePart(content_type="image/png", data=PNG)
SINGLE = ("animate", "upscale", "video")
LORAS = [{"name": "a.safetensors", "strength": 0.5}, {"name": "b.safetensors"}]
#: Parameters that each operation is tried with.
TRIED: dict[str, list[dict[str, Any]]] = {
    "animate": [{}, {"loras": LORAS}],
    "controlnet": [{}, {"edges": True}, {"edges": True, "loras": LORAS}],
    "generate": [{}, {"loras": LORAS}, {"steps": 12, "cfg": 3, "sampler": "ddim", "scheduler": "beta"}],
    "img2img": [{}, {"denoise": 1}, {"loras": LORAS}],
    "inpaint": [{}, {"loras": LORAS}],
    "outpaint": [{"left": 64}, {"top": 8, "bottom": 1024, "loras": LORAS}],
    "upscale": [{}, {"upscale_model": ""}, {"scale": 8}, {"scale": 0.25}],
    "video": [{}, {"frames": 9}],
}


def problems(graph: dict[str, Any]) -> Iterator[str]:
    """What ComfyUI would refuse in a graph."""
    for node_id, node in graph.items():
        kind = NODES.get(node["class_type"])
        if kind is None:
            yield f"{node_id}: there is no class {node['class_type']}"
            continue
        where = f"{node_id} ({node['class_type']})"
        known = {name.removesuffix("?"): takes for name, takes in kind["inputs"].items()}
        for name in kind["inputs"]:
            if not name.endswith("?") and name not in node["inputs"]:
                yield f"{where}: {name} is missing"
        for name, value in node["inputs"].items():
            if name in known:
                yield from problems_of(graph, f"{where}: {name}", known[name], value)
            elif (node["class_type"], name) not in NEWER_INPUTS:
                yield f"{where}: there is no input {name}"
    if not any(NODES[node["class_type"]]["is_output"] for node in graph.values()):
        yield "there is no output"


def problems_of(graph: dict[str, Any], where: str, takes: list[Any], value: object) -> Iterator[str]:
    match takes, value:
        case _, [str(source), int(slot)]:
            outputs = NODES[graph[source]["class_type"]]["outputs"] if source in graph else []
            if slot >= len(outputs) or outputs[slot] != takes[0]:
                yield f"{where}: takes {takes[0]}, and {value} is not"
        case ["INT", least, most], _:
            if type(value) is not int or not least <= value <= most:
                yield f"{where}: {value!r} is no INT within {least} and {most}"
        case ["FLOAT", least, most], _:
            if type(value) not in (int, float) or not least <= value <= most:
                yield f"{where}: {value!r} is no FLOAT within {least} and {most}"
        case ["CHOICE", *choices], _:
            if not isinstance(value, str) or (choices and value not in choices):
                yield f"{where}: {value!r} is no choice"
        case ["STRING"], _:
            if not isinstance(value, str):
                yield f"{where}: {value!r} is no STRING"
        case ["BOOLEAN"], _:
            if not isinstance(value, bool):
                yield f"{where}: {value!r} is no BOOLEAN"
        case _:
            yield f"{where}: takes {takes[0]} from another node"


def needed(graph: dict[str, Any]) -> set[str]:
    """The outputs, and all that they depend on."""
    found: set[str] = set()
    pending = [node_id for node_id, node in graph.items() if NODES[node["class_type"]]["is_output"]]
    while pending:
        node_id = pending.pop()
        if node_id not in found:
            found.add(node_id)
            pending += [each[0] for each in graph[node_id]["inputs"].values() if isinstance(each, list)]
    return found


def graph_of(operation: str, tier: Tier, parameters: dict[str, Any], pictures: int) -> dict[str, Any]:
    wanted = ImageInput(
        prompt="a cat",
        operation=operation,
        images=(PICTURE,) * pictures,
        parameters=parameters,
        count=1 if operation in SINGLE else 3,
    )
    built = build(Workflows().get(operation), wanted, tier, 2**40)
    graph: dict[str, Any] = json.loads(built.graph_json)
    return graph


def all_graphs() -> Iterator[tuple[str, dict[str, Any]]]:
    for operation, tries in TRIED.items():
        template = Workflows().get(operation)
        most = len(template.images)
        for tier in DEFAULT_TIERS.values():
            for parameters in tries:
                for pictures in {most - template.optional_images, most}:
                    graph = graph_of(operation, tier, parameters, pictures)
                    yield f"{operation} {tier.name} {parameters} {pictures}", graph


def test_every_built_in_template_is_tried() -> None:
    assert TRIED.keys() == {workflow.name for workflow in Workflows().listed()}


def test_comfyui_would_take_every_graph() -> None:
    graphs = list(all_graphs())
    assert len(graphs) > 60
    found = {name: what for name, graph in graphs if (what := list(problems(graph)))}
    assert found == {}


def test_no_graph_has_a_node_that_no_output_needs() -> None:
    found = {name: graph.keys() - needed(graph) for name, graph in all_graphs()}
    assert {name: left for name, left in found.items() if left} == {}


def test_every_variant_and_every_class_in_the_data_is_used() -> None:
    used = {node["class_type"] for _, graph in all_graphs() for node in graph.values()}
    assert used == NODES.keys()


def test_the_agent_s_own_check_takes_every_graph_as_the_simulated_comfyui_tells_of_its_nodes() -> None:
    checkpoints, models = [], ["a.safetensors", "b.safetensors"]
    for tier in DEFAULT_TIERS.values():
        for each in (tier, *(tier.of(operation) for operation in tier.operations)):
            checkpoints.append(each.checkpoint)
            models += each.models.values()
    kinds = node_kinds(tuple(checkpoints), tuple(models))
    classes = {name: node_class_of(kind.told(name)) for name, kind in kinds.items()}
    for name, graph in all_graphs():
        findings = [finding.what for finding in look_at(graph, classes)]
        if name.startswith("animate"):
            # The simulated one has no custom nodes, and says so.
            assert len(findings) == 4, name
            assert all("ComfyUI has no class 'ADE_" in what for what in findings)
        else:
            assert findings == [], name


@pytest.mark.parametrize(
    ("change", "what"),
    [
        ({"steps": None}, "3 (KSampler): steps is missing"),
        ({"steps": 4.5}, "3 (KSampler): steps: 4.5 is no INT within 1 and 10000"),
        ({"cfg": 101.0}, "3 (KSampler): cfg: 101.0 is no FLOAT within 0.0 and 100.0"),
        ({"sampler_name": "eular"}, "3 (KSampler): sampler_name: 'eular' is no choice"),
        ({"model": ["4", 1]}, "3 (KSampler): model: takes MODEL, and ['4', 1] is not"),
        ({"stepz": 1}, "3 (KSampler): there is no input stepz"),
    ],
)
def test_the_check_itself_finds_what_is_wrong(change: dict[str, Any], what: str) -> None:
    graph = graph_of("generate", DEFAULT_TIERS["quality"], {}, 0)
    graph["3"]["inputs"] |= change
    graph["3"]["inputs"] = {name: each for name, each in graph["3"]["inputs"].items() if each is not None}
    assert list(problems(graph)) == [what]


def test_pictures_are_named_as_their_files() -> None:
    wanted = ImageInput(prompt="a cat", operation="inpaint", images=(PICTURE, PICTURE))
    built = build(Workflows().get("inpaint"), wanted, DEFAULT_TIERS["quality"], 1)
    graph = json.loads(built.graph_json)
    assert [file.name for file in built.files] == ["image.png", "mask.png"]
    assert graph["11"]["inputs"]["image"] == f"{FILE_PREFIX}image.png"
    assert graph["20"]["inputs"]["image"] == f"{FILE_PREFIX}mask.png"
