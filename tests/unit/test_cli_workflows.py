"""`rung workflow`: what is listed, shown and checked. The client is a fake; nothing listens."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from controlplane.workflows import Workflows
from rung.cli import ExitCode, main
from rung.cli._session import Connection
from rung.types import Workflow
from tests.fakes.client import FakeClient

GRAPH = {
    "3": {"class_type": "KSampler", "inputs": {"seed": "{{seed}}", "steps": 20, "model": ["4", 0]}},
    "4": {"class_type": "CheckpointLoaderSimple", "inputs": {"ckpt_name": "x.safetensors"}},
    "6": {"class_type": "CLIPTextEncode", "inputs": {"text": "{{prompt}}", "clip": ["4", 1]}},
}


class Client(FakeClient):
    async def list_workflows(self) -> tuple[Workflow, ...]:
        return Workflows().listed()


class Terminal:
    def __init__(self, capsys: pytest.CaptureFixture[str]) -> None:
        self.out = ""
        self.err = ""
        self._capsys = capsys

    def __call__(self, *arguments: str) -> int:
        code = main(arguments, opening=self._open)
        self.out, self.err = self._capsys.readouterr()
        return code

    def _open(self, _connection: Connection) -> FakeClient:
        return Client()


@pytest.fixture
def rung(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Terminal:
    monkeypatch.setenv("COLUMNS", "160")
    return Terminal(capsys)


class TestList:
    def test_says_what_each_starts_from(self, rung: Terminal) -> None:
        assert rung("workflow", "list") == ExitCode.OK
        lines = {line.split()[0]: " ".join(line.split()) for line in rung.out.splitlines()}
        assert lines["generate"] == "generate pictures words Draw from words."
        assert lines["inpaint"].startswith("inpaint pictures image, mask Draw the masked part")
        assert lines["video"].startswith("video video [image] A short film")

    def test_json_is_for_programs(self, rung: Terminal) -> None:
        assert rung("workflow", "list", "--json") == ExitCode.OK
        found = {each["name"]: each for each in json.loads(rung.out)}
        assert found["upscale"]["parameters"][0]["default_json"] == "2.0"


class TestShow:
    def test_has_every_parameter_with_range_and_default(self, rung: Terminal) -> None:
        assert rung("workflow", "show", "img2img") == ExitCode.OK
        lines = [" ".join(line.split()) for line in rung.out.splitlines()]
        assert "makes pictures from image" in lines
        assert "denoise number 0.6 0.05..1 How much of the picture is drawn anew; 1 is all." in lines
        assert "steps integer - 1..150 Steps of sampling; by default the tier's." in lines

    def test_a_name_that_is_nearly_right_is_put_right(self, rung: Terminal) -> None:
        assert rung("workflow", "show", "inpiant") == ExitCode.NOT_FOUND
        assert "there is no workflow 'inpiant'; did you mean inpaint?" in rung.err


class TestCheck:
    def test_shows_what_a_good_one_takes(self, rung: Terminal, tmp_path: Path) -> None:
        file = tmp_path / "sketch.json"
        file.write_text(json.dumps(GRAPH))
        (tmp_path / "sketch.yaml").write_text(
            "description: Ink.\nparameters:\n  - {name: strokes, node: '3', input: steps, maximum: 30}\n"
        )
        assert rung("workflow", "check", str(file)) == ExitCode.OK
        assert f"{file}: OK" in rung.out
        assert "Ink." in rung.out
        assert "strokes    integer  20       ..30" in rung.out
        assert "note:" not in rung.out

    def test_says_what_a_user_may_have_forgotten(self, rung: Terminal, tmp_path: Path) -> None:
        file = tmp_path / "fixed.json"
        file.write_text(json.dumps({"4": GRAPH["4"]}))
        assert rung("workflow", "check", str(file)) == ExitCode.OK
        assert "write {{prompt}} where one should" in rung.out
        assert "the seed is fixed" in rung.out

    def test_says_how_to_export_a_graph_of_the_editor(self, rung: Terminal, tmp_path: Path) -> None:
        good, bad = tmp_path / "good.json", tmp_path / "bad.json"
        good.write_text(json.dumps(GRAPH))
        bad.write_text('{"nodes": [], "links": []}')
        assert rung("workflow", "check", str(bad), str(good)) == ExitCode.FAILED
        assert f"{bad}: is in the format of ComfyUI's editor" in rung.err
        assert "Save (API Format)" in rung.err
        assert f"{good}: OK" in rung.out

    def test_the_check_of_the_configuration_finds_them(self, rung: Terminal, tmp_path: Path) -> None:
        config = tmp_path / "rung.yaml"
        config.write_text(f"images: {{workflows_dir: '{tmp_path}'}}\n")
        assert rung("config", "check", str(config)) == ExitCode.OK
        (tmp_path / "broken.json").write_text("{")
        assert rung("config", "check", str(config)) == ExitCode.FAILED
        assert f"{tmp_path / 'broken.json'}: is no JSON" in rung.err
