"""Users' own templates: graphs with places, sidecars, and what is wrong with them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from controlplane.workflows import DEFAULT_TIERS, ParameterType, Workflows, build, read_file
from rung.errors import InvalidRequestError
from rung.types import ImageInput, ImagePart

QUALITY = DEFAULT_TIERS["quality"]
PICTURE = ImagePart(content_type="image/jpeg", data=b"\xff\xd8\xff")


def a_graph() -> dict[str, Any]:
    return {
        "3": {
            "class_type": "KSampler",
            "inputs": {
                "seed": "{{seed}}",
                "steps": "{{ steps }}",
                "denoise": 0.4,
                "tiled": False,
                "model": ["4", 0],
            },
        },
        "4": {"class_type": "CheckpointLoaderSimple", "inputs": {"ckpt_name": "{{checkpoint}}"}},
        "6": {
            "class_type": "CLIPTextEncode",
            "inputs": {"text": "ink of {{prompt}}, {{style}}", "clip": ["4", 1]},
        },
        "9": {"class_type": "SaveImage", "inputs": {"images": ["3", 0], "filename_prefix": "x", "rows": 3}},
    }


def write(folder: Path, graph: object, sidecar: str | None = None, name: str = "ink") -> Path:
    file = folder / f"{name}.json"
    file.write_text(graph if isinstance(graph, str) else json.dumps(graph))
    if sidecar is not None:
        (folder / f"{name}.yaml").write_text(sidecar)
    return file


def refused(folder: Path, graph: object, sidecar: str | None = None, name: str = "ink") -> str:
    with pytest.raises(ValueError) as error:  # noqa: PT011 - the text is what matters, and is compared
        read_file(write(folder, graph, sidecar, name))
    return str(error.value)


def built(file: Path, **wanted: Any) -> dict[str, Any]:
    template = read_file(file)
    asked = ImageInput(**({"prompt": "a cat", "operation": template.name} | wanted))
    graph: dict[str, Any] = json.loads(build(template, asked, QUALITY, 7).graph_json)
    return {node_id: node["inputs"] for node_id, node in graph.items()}


class TestPlaces:
    def test_known_names_have_their_types_and_others_are_texts(self, tmp_path: Path) -> None:
        template = read_file(write(tmp_path, a_graph()))
        found = {parameter.name: parameter for parameter in template.parameters}
        assert found.keys() == {"steps", "style"}
        assert (found["steps"].type, found["steps"].maximum) == (ParameterType.INTEGER, 150)
        assert found["style"].type is ParameterType.TEXT
        assert found["style"].listed().default_json == ""

    def test_are_filled_in_as_what_they_are(self, tmp_path: Path) -> None:
        graph = built(write(tmp_path, a_graph()), parameters={"style": "dense"})
        assert graph["3"] == {"seed": 7, "steps": 28, "denoise": 0.4, "tiled": False, "model": ["4", 0]}
        assert graph["4"]["ckpt_name"] == QUALITY.checkpoint
        assert graph["6"]["text"] == "ink of a cat, dense"

    def test_what_has_no_default_has_to_be_given(self, tmp_path: Path) -> None:
        file = write(tmp_path, a_graph())
        with pytest.raises(InvalidRequestError, match="style is missing; ink needs it"):
            built(file)

    def test_a_place_for_a_picture_wants_one(self, tmp_path: Path) -> None:
        graph = a_graph() | {"1": {"class_type": "LoadImage", "inputs": {"image": "{{image}}"}}}
        file = write(tmp_path, graph)
        assert read_file(file).images == ("image",)
        with pytest.raises(InvalidRequestError, match="images lacks the image"):
            built(file, parameters={"style": "x"})
        found = built(file, parameters={"style": "x"}, images=(PICTURE,))
        assert found["1"]["image"] == "@file:image.jpg"


class TestSidecars:
    def test_give_types_ranges_and_defaults(self, tmp_path: Path) -> None:
        file = write(
            tmp_path,
            a_graph(),
            """
            description: Pen and ink.
            families: [sdxl]
            loras: "4"
            parameters:
              - {name: strength, node: "3", input: denoise, minimum: 0, maximum: 1, description: How much.}
              - {name: tiled, node: "3", input: tiled}
              - {name: rows, node: "9", input: rows, maximum: 4}
              - {name: style, choices: [dense, loose], default: loose}
            """,
        )
        template = read_file(file)
        assert template.description == "Pen and ink."
        listed = {each.name: each for each in template.listed().parameters}
        assert list(listed) == ["strength", "tiled", "rows", "style", "steps", "loras"]
        assert {name: (each.type, each.default_json) for name, each in listed.items()} == {
            "strength": ("number", "0.4"),
            "tiled": ("boolean", "false"),
            "rows": ("integer", "3"),
            "style": ("choice", '"loose"'),
            "steps": ("integer", "null"),
            "loras": ("loras", "[]"),
        }
        graph = built(file, parameters={"strength": 1, "loras": [{"name": "a.st"}]})
        assert (graph["3"]["denoise"], graph["3"]["tiled"], graph["9"]["rows"]) == (1, False, 3)
        assert graph["3"]["model"] == ["4_lora_0", 0]
        assert graph["6"]["text"] == "ink of a cat, loose"
        with pytest.raises(InvalidRequestError, match="style is 'wet'; it must be one of dense, loose"):
            built(file, parameters={"style": "wet"})

    def test_say_where_prompt_and_pictures_go(self, tmp_path: Path) -> None:
        graph = {
            "1": {"class_type": "LoadImage", "inputs": {"image": "old.png"}},
            "2": {"class_type": "LoadImage", "inputs": {"image": "older.png"}},
            "6": {"class_type": "CLIPTextEncode", "inputs": {"text": "a dog"}},
        }
        file = write(
            tmp_path,
            graph,
            """
            video: true
            images: [{name: face, node: "2", input: image}, {name: scene, node: "1", input: image}]
            parameters: [{name: prompt, node: "6", input: text}]
            """,
        )
        template = read_file(file)
        assert (template.images, template.video, template.parameters) == (("face", "scene"), True, ())
        found = built(file, images=(PICTURE, PICTURE))
        assert found == {
            "1": {"image": "@file:scene.jpg"},
            "2": {"image": "@file:face.jpg"},
            "6": {"text": "a cat"},
        }

    @pytest.mark.parametrize(
        ("sidecar", "words"),
        [
            (
                "parameters: [{name: a, node: '77', input: x}]",
                "parameters: a: there is no node '77'; nodes are: 3, 4",
            ),
            (
                "parameters: [{name: a, node: '3', input: x}]",
                "parameters: a: node '3' (KSampler) has no input 'x'; it has: seed, steps,",
            ),
            (
                "parameters: [{name: a, node: '3', input: model}]",
                "parameters: a: model of node '3' comes from another node, and cannot be filled in",
            ),
            ("parameters: [{name: a}]", "parameters: a goes nowhere; name node and input, or write {{a}}"),
            ("parameters: [{name: style, type: colour}]", "Invalid enum value 'colour'"),
            ("parameters: [{name: style, type: choice}]", "parameters: style is a choice without choices"),
            (
                "parameters: [{name: d, node: '3', input: denoise, minimum: 0.5}]",
                "parameters: the default of d is 0.4; it must be a number from 0.5",
            ),
            ("parameters: [{name: style, minimum: 2, maximum: 1}]", "style: minimum is above maximum"),
            ("parameters: [{name: style, nodes: '3'}]", "Object contains unknown field `nodes`"),
            ("parameters: [{name: Style}]", "'Style' is no name of a parameter"),
            ("parameters: [{name: style}, {name: style}]", "style is there twice"),
            (
                "images: [{name: image, node: '3', input: nope}]",
                "images: image: node '3' (KSampler) has no input",
            ),
            ("loras: '5'", "loras: there is no node '5'"),
            ("famlies: [sdxl]", "Object contains unknown field `famlies`"),
            ("a: [", "ink.yaml is no YAML: while parsing"),
            ("- x", "Expected `object`, got `array`"),
        ],
    )
    def test_problems_name_the_place(self, tmp_path: Path, sidecar: str, words: str) -> None:
        assert words in refused(tmp_path, a_graph(), sidecar)


class TestGraphs:
    @pytest.mark.parametrize(
        ("graph", "words"),
        [
            ("{", "is no JSON: Expecting property name"),
            ("[1]", "is no graph: a JSON object of nodes by id is wanted"),
            ("{}", "has no nodes"),
            ({"nodes": [], "links": [], "version": 0.4}, 'export it with "Save (API Format)"'),
            ({"prompt": {"3": {}}}, "node 'prompt' has no class_type"),
            ({"3": {"class_type": "KSampler"}}, "node '3' (KSampler) has no inputs"),
            (
                {"3": {"class_type": "KSampler", "inputs": {"model": ["9", 0]}}},
                "node '3': model comes from node '9', which is not there",
            ),
        ],
    )
    def test_what_cannot_be_run_is_refused(self, tmp_path: Path, graph: object, words: str) -> None:
        assert words in refused(tmp_path, graph)

    def test_a_name_that_no_request_could_have(self, tmp_path: Path) -> None:
        assert "its name must be of lower-case letters" in refused(tmp_path, a_graph(), name="My Ink")

    def test_what_is_no_text(self, tmp_path: Path) -> None:
        (tmp_path / "ink.json").write_bytes(b"\xff\xfe\x00")
        with pytest.raises(ValueError, match="is no text in UTF-8"):
            read_file(tmp_path / "ink.json")


class TestFolder:
    def test_good_ones_are_there_beside_the_built_in_ones_and_bad_ones_are_told(self, tmp_path: Path) -> None:
        write(tmp_path, a_graph())
        write(tmp_path, "{", name="broken")
        (tmp_path / "README.md").write_text("mine")
        workflows = Workflows.of_folder(tmp_path)
        assert workflows.get("ink").name == "ink"
        assert workflows.get("generate").loras == "4"
        assert "ink" in [each.name for each in workflows.listed()]
        (problem,) = workflows.problems
        assert str(problem).startswith(f"{tmp_path / 'broken.json'}: is no JSON")

    def test_one_s_own_takes_the_place_of_a_built_in_one(self, tmp_path: Path) -> None:
        write(tmp_path, a_graph(), name="generate")
        assert Workflows.of_folder(tmp_path).get("generate").description == "Of your own."

    def test_a_folder_that_is_not_there_is_a_problem_and_no_failure(self, tmp_path: Path) -> None:
        workflows = Workflows.of_folder(tmp_path / "gone")
        assert [str(each) for each in workflows.problems] == [
            f"{tmp_path / 'gone'}: cannot be read: No such file or directory"
        ]
        assert workflows.get("generate").name == "generate"

    def test_no_folder_is_no_problem(self) -> None:
        assert Workflows.of_folder(None).problems == ()
