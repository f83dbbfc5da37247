"""The published schemas of both configurations, and which file is whose."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel

from controlplane.config import Config, config_schema, load_config
from controlplane.config._model import _AGENT_FILE
from nodeagent.config import _CONTROL_PLANE_FILE, AgentConfig, agent_schema, load_agent_config
from rung.cli import ExitCode, main
from rung.errors import ConfigError
from rung.service import OtherFile

ROOT = Path(__file__).parent.parent.parent
DEPLOY = ROOT / "deploy"

BOTH = pytest.mark.parametrize(
    ("schema", "file", "command"),
    [
        (config_schema, ROOT / "controlplane" / "config" / "rung.schema.json", "config"),
        (agent_schema, ROOT / "nodeagent" / "agent.schema.json", "agent"),
    ],
    ids=["control plane", "agent"],
)


def _sections(schema: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    yield "the file", schema
    yield from schema["$defs"].items()


@BOTH
def test_the_published_one_is_up_to_date(
    schema: Callable[[], dict[str, Any]], file: Path, command: str, capsys: pytest.CaptureFixture[str]
) -> None:
    text = file.read_text()
    assert main([command, "schema"]) == ExitCode.OK
    assert str(Path.home()) not in text, "it is the same for everybody"
    assert text == capsys.readouterr().out, f"run `rung {command} schema > {file.relative_to(ROOT)}`"


@BOTH
def test_an_editor_can_explain_each_section_and_each_field(
    schema: Callable[[], dict[str, Any]], file: Path, command: str
) -> None:
    found = schema()
    assert found["$schema"] == "https://json-schema.org/draft/2020-12/schema"
    assert found["$id"] == f"urn:rung:{command}"
    for section, part in _sections(found):
        assert part.get("description"), section
        for name, field in part.get("properties", {}).items():
            said = field.get("description", "")
            assert re.fullmatch(r"\S.*[.)]", said), f"{section}.{name}: {said!r} is no sentence of one line"


@BOTH
def test_each_field_that_is_measured_says_in_what(
    schema: Callable[[], dict[str, Any]], file: Path, command: str
) -> None:
    for section, part in _sections(schema()):
        for name, field in part.get("properties", {}).items():
            # A size or a duration: something that is written as a number or with a unit.
            if "string" in field.get("type", ()) and "examples" in field:
                assert re.search(r"\d+ ?(s|m|h|days|minutes|[GM]i?B)\b", field["description"]), (
                    f"{section}.{name}: {field['description']}"
                )


@pytest.mark.parametrize("file", sorted(DEPLOY.glob("*.yaml")), ids=lambda file: file.name)
def test_each_example_names_its_schema(file: Path) -> None:
    named = re.match(r"# yaml-language-server: \$schema=(\S+)\n", file.read_text())
    assert named
    published = json.loads((file.parent / named[1]).read_text())
    whose = "agent" if file.name.startswith("agent") else "config"
    assert published["$id"] == f"urn:rung:{whose}"


class TestWhoseFileItIs:
    @pytest.mark.parametrize("file", sorted(DEPLOY.glob("rung.*.yaml")), ids=lambda file: file.name)
    def test_an_agent_is_told_that_a_file_is_the_control_planes(self, file: Path) -> None:
        with pytest.raises(ConfigError) as refused:
            load_agent_config(file)
        assert refused.value.message == (
            f"{file}:1: this is a control plane's configuration: use `rung config check`, and "
            "`rung serve --config` to run it"
        )

    def test_a_control_plane_is_told_that_a_file_is_an_agents(
        self, capsys: pytest.CaptureFixture[str]
    ) -> None:
        file = DEPLOY / "agent.example.yaml"
        assert main(["config", "check", str(file)]) == ExitCode.FAILED
        assert capsys.readouterr().err == (
            f"{file}:1: this is an agent's configuration: use `rung agent check`, and "
            "`rung agent run --config` to run it\n"
        )

    def test_a_field_or_two_in_the_wrong_file_are_still_said_by_their_lines(self, tmp_path: Path) -> None:
        file = tmp_path / "rung.yaml"
        file.write_text("nodes: []\nnode_id: box\n")
        with pytest.raises(ConfigError, match=r"rung.yaml:2: node_id: there is no such field"):
            load_config(file)

    @pytest.mark.parametrize(("other", "model"), [(_AGENT_FILE, AgentConfig), (_CONTROL_PLANE_FILE, Config)])
    def test_each_knows_only_what_the_other_has(self, other: OtherFile, model: type[BaseModel]) -> None:
        assert other.fields <= model.model_fields.keys()


class TestAgentCheck:
    def test_what_may_be_run_is_said(self, capsys: pytest.CaptureFixture[str]) -> None:
        file = DEPLOY / "agent.example.yaml"
        assert main(["agent", "check", str(file)]) == ExitCode.OK
        assert capsys.readouterr().out == (
            f"{file}: OK: node workstation, gRPC 8152; may run comfyui, llama-server, vllm, "
            "images: ghcr.io/ggml-org/llama.cpp:*, vllm/vllm-openai:*\n"
        )

    def test_errors_name_file_line_and_field(
        self, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        file = tmp_path / "agent.yaml"
        file.write_text("node_id: box\nexecutabels: {}\nport: 99999\n")
        assert main(["agent", "check", str(file)]) == ExitCode.FAILED
        lines = capsys.readouterr().err.splitlines()
        assert lines[0].startswith(f"{file}:3: port: ")
        assert lines[1] == f"{file}:2: executabels: there is no such field; did you mean executables?"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("nodes: [{id: a, address: '127.0.0.1:99999'}]", "nodes[0].address: 99999 is not a port"),
        ("nodes: [{id: a, address: '127.0.0.1:0'}]", "nodes[0].address: 0 is not a port"),
        (
            "nodes: [{id: a, address: 'box:1'}]\ndeployments: [{id: m, node: a, model: m, "
            "engine: {kind: openai_compatible}, "
            "runtime: {kind: external, base_url: 'http://127.0.0.1:99999'}}]",
            "deployments[0].runtime.base_url: 127.0.0.1:99999 has no port from 1 to 65535",
        ),
        (
            "cloud: [{id: x, base_url: 'https://host:0/v1', api_key_env: K, models: [{id: m, "
            "capabilities: [image], images: {usd_per_image: 1}}]}]",
            "cloud[0].base_url: host:0 has no port from 1 to 65535",
        ),
    ],
)
def test_a_port_that_there_cannot_be_is_refused(tmp_path: Path, text: str, said: str) -> None:
    file = tmp_path / "rung.yaml"
    file.write_text(text + "\n")
    with pytest.raises(ConfigError) as refused:
        load_config(file)
    assert said in refused.value.message
