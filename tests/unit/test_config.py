"""Configuration files: what they mean, and what is said of those that are wrong."""

from __future__ import annotations

from pathlib import Path

import pytest

from controlplane.config import default_config, load_config
from nodeagent.config import AgentConfig, ExecutableConfig, load_agent_config
from rung._sizes import parse_size
from rung.errors import ConfigError
from rung.service._config_file import parse_duration
from rung.types import (
    DockerRuntime,
    ExternalRuntime,
    LlamaCppEngine,
    ProcessRuntime,
    ReclaimGrade,
    ResidencyClass,
)

ROOT = Path(__file__).parent.parent.parent


@pytest.mark.parametrize(
    ("text", "size_bytes"),
    [("12.5GiB", 13_421_772_800), ("20GB", 20 * 10**9), ("500MB", 500 * 10**6), ("1k", 1000), ("42", 42)],
)
def test_sizes(text: str, size_bytes: int) -> None:
    assert parse_size(text) == size_bytes


@pytest.mark.parametrize(
    ("text", "seconds"), [("15m", 900.0), ("1h30m", 5400.0), ("250ms", 0.25), ("7d", 604_800.0), ("2s", 2.0)]
)
def test_durations(text: str, seconds: float) -> None:
    assert parse_duration(text) == seconds


@pytest.mark.parametrize("text", ["much", "12XB", "-1GB"])
def test_what_is_no_size(text: str) -> None:
    with pytest.raises(ValueError, match="is not a size"):
        parse_size(text)


@pytest.mark.parametrize("text", ["15", "m", "1h 3x"])
def test_what_is_no_duration(text: str) -> None:
    with pytest.raises(ValueError, match="is not a duration"):
        parse_duration(text)


BASE = """\
nodes:
  - {id: box, address: "127.0.0.1:8152"}
deployments:
  - id: chat
    node: box
    model: m
    engine: {kind: llamacpp, model_path: /m.gguf}
    runtime: {kind: process, executable: llama-server}
"""
ROUTED = BASE.replace("model_path: /m.gguf", "router_model: m").replace(
    "{kind: process, executable: llama-server}", "{kind: external, base_url: http://127.0.0.1:8080}"
)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (
            "server: {grpc_prt: 1}\n",
            "rung.yaml:1: server.grpc_prt: there is no such field; did you mean grpc_port?",
        ),
        ("server:\n  http_port: many\n", "rung.yaml:2: server.http_port: "),
        ("server: {host: 0.0.0.0}\n", "listens on loopback only"),
        ("server:\n  drain: soon\n", "rung.yaml:2: server.drain: 'soon' is not a duration"),
        ("a: 1\na: 2\n", "rung.yaml:2: a: is here twice; first on line 1"),
        ("nodes: [\n", "rung.yaml:2: not valid YAML"),
        ("server: {state_dir: '${env:RUNG_NO_SUCH_VARIABLE}'}\n", "no variable RUNG_NO_SUCH_VARIABLE"),
        (BASE.replace("node: box", "node: bxo"), "rung.yaml:5: deployments[0].node: there is no node bxo"),
        (BASE.replace("model_path", "model"), "rung.yaml:7: deployments[0].engine.model_path: is missing"),
        (
            BASE + "    residency_class: pinned\n    idle_timeout: 5m\n",
            "rung.yaml:10: deployments[0].idle_timeout: ",
        ),
        (
            BASE.replace("llamacpp, model_path: /m.gguf", "vllm, model: m")
            + "    capabilities: [chat, tools]\n",
            "rung.yaml:7: deployments[0].engine.tool_call_parser: is missing: without one vLLM refuses",
        ),
        (
            BASE.replace("llamacpp, model_path: /m.gguf", "ollama, model: kimi:cloud"),
            "rung.yaml:7: deployments[0].engine.model: kimi:cloud runs on Ollama's servers, not on this node",
        ),
        (
            BASE.replace("llamacpp, model_path: /m.gguf", "ollama, model: qwen3:8b"),
            "deployments[0].context_tokens: is missing: Ollama cuts a prompt that is longer than its context",
        ),
        (
            BASE + "    shrinkable: true\n",
            "rung.yaml:9: deployments[0].shrinkable: llamacpp cannot give up its KV cache alone",
        ),
        (
            BASE.replace("llamacpp, model_path: /m.gguf", "vllm, model: m") + "    shrinkable: true\n",
            "rung.yaml:9: deployments[0].shrinkable: vLLM shrinks only with engine.sleep_mode: true",
        ),
        (
            BASE.replace("llamacpp, model_path: /m.gguf", "vllm, model: m, sleep_mode: true").replace(
                "{kind: process, executable: llama-server}", "{kind: external, base_url: http://127.0.0.1}"
            )
            + "    shrinkable: true\n",
            "deployments[0].shrinkable: an engine that somebody else runs is never shrunk",
        ),
        (
            BASE.replace(", model_path: /m.gguf", ""),
            "deployments[0].engine.model_path: is missing; or name a router's model as router_model",
        ),
        (
            ROUTED.replace("router_model: m", "router_model: m, parallel: 2"),
            "deployments[0].engine.parallel: is for the router to say",
        ),
        (
            ROUTED.replace("router_model: m", "router_model: m, server: llama-cpp-python"),
            "deployments[0].engine.server: llama-cpp-python has no router mode",
        ),
        (
            BASE.replace("model_path: /m.gguf", "router_model: m"),
            "rung.yaml:8: deployments[0].runtime: a router is run by somebody else",
        ),
        (
            ROUTED + "    served_model_name: other\n",
            "deployments[0].served_model_name: the router knows the model as m only",
        ),
        (BASE + BASE.split("deployments:\n")[1], "rung.yaml:9: deployments[1].id: chat is used twice"),
        (
            BASE.replace(
                "{kind: process, executable: llama-server}", "{kind: external, base_url: http://10.0.0.1}"
            ),
            "engines are reached over loopback only",
        ),
    ],
)
def test_what_is_wrong_is_said_with_its_place(tmp_path: Path, text: str, said: str) -> None:
    path = tmp_path / "rung.yaml"
    path.write_text(text)

    with pytest.raises(ConfigError) as raised:
        load_config(path)

    assert said in raised.value.message


def test_a_model_of_a_router_may_sleep_and_is_known_by_its_name_there(tmp_path: Path) -> None:
    path = tmp_path / "rung.yaml"
    path.write_text(
        ROUTED.replace("router_model: m", "router_model: qwen3") + "    residency_class: sleepable\n"
    )

    (spec,) = load_config(path).deployment_specs()

    assert spec.engine.engine == LlamaCppEngine(router_model="qwen3")
    assert (spec.model, spec.engine_model_name) == ("m", "qwen3")
    assert spec.residency_class is ResidencyClass.SLEEPABLE


def test_a_picture_of_the_household_is_looked_at_in_what_is_free_by_the_cpu() -> None:
    config = load_config(ROOT / "deploy" / "rung.household.yaml")
    [engine] = [each.engine.engine for each in config.deployment_specs() if each.id == "vision"]

    assert isinstance(engine, LlamaCppEngine)
    assert (bool(engine.projector_path), engine.projector_on_gpu) == (True, False)
    assert config.deployment_grades() == {"vision": ReclaimGrade.QUICK}


def test_a_projector_that_is_not_there_is_not_on_the_gpu(tmp_path: Path) -> None:
    path = tmp_path / "rung.yaml"
    wrong = "model_path: /m, projector_on_gpu: true"
    path.write_text(ROUTED.replace("router_model: m", wrong))

    with pytest.raises(ConfigError, match="projector_on_gpu: is for a projector"):
        load_config(path)


def test_all_that_is_wrong_is_said_at_once(tmp_path: Path) -> None:
    path = tmp_path / "rung.yaml"
    path.write_text("server: {grpc_port: x, http_port: y}\nnodes: 3\n")

    with pytest.raises(ConfigError) as raised:
        load_config(path)

    assert len(raised.value.message.splitlines()) == 3


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be read"):
        load_config(tmp_path / "none.yaml")


def test_variables_are_filled_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RUNG_TEST_FOLDER", str(tmp_path))
    path = tmp_path / "rung.yaml"
    path.write_text("server: {state_dir: '${env:RUNG_TEST_FOLDER}/state'}\n")

    assert load_config(path).server.state_dir == tmp_path / "state"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("- a\n", "rung.yaml:1: is to have fields: write them below it as `name: value`"),
        ("server:\n", "rung.yaml:1: server: is empty; write what it is, or leave it out"),
        ("nodes: {a: 1}\n", "rung.yaml:1: nodes: is to be a list: begin each of its entries with `- `"),
        (
            "nodes:\n  - {id: 12, address: a:1}\n",
            "rung.yaml:2: nodes[0].id: is to be a text: put it in quotes",
        ),
        (
            "nodes:\n  - {id: 2026-13-41}\n",
            "rung.yaml:2: nodes[0].id: '2026-13-41' is no timestamp; put it in",
        ),
        ("server: {http_port: !!int many}\n", "rung.yaml:1: server.http_port: 'many' is no int"),
        ("nodes: !mine []\n", "rung.yaml:1: nodes: the tag !mine means nothing here"),
        ("nodes: &all [*all]\n", "rung.yaml:1: nodes[0]: is a part of itself, by an alias"),
        ("nodes:\n  - {<<: 3, id: box}\n", "rung.yaml:2: nodes[0]: << takes in fields, and there are none"),
        ("? [a]\n: 1\n", "rung.yaml:1: the name of a field is a text"),
        ("nodes: []\nserver: \x01\n", "rung.yaml:2: not valid YAML: special characters are not allowed"),
        (BASE.replace("kind: llamacpp, ", ""), "rung.yaml:7: deployments[0].engine.kind: is missing"),
        (BASE.replace("kind: llamacpp", "kind: lamacpp"), "did you mean llamacpp?"),
    ],
)
def test_what_is_no_configuration_at_all_is_said_in_words_of_yaml(
    tmp_path: Path, text: str, said: str
) -> None:
    path = tmp_path / "rung.yaml"
    path.write_text(text)

    with pytest.raises(ConfigError) as refused:
        load_config(path)

    assert said in refused.value.message
    assert "Input should" not in refused.value.message


def test_a_file_that_is_no_text_is_refused_with_its_line(tmp_path: Path) -> None:
    path = tmp_path / "rung.yaml"
    path.write_bytes(b"nodes: []\nserver: \xff\n")

    with pytest.raises(ConfigError, match=r"rung.yaml:2: cannot be read: it is not UTF-8"):
        load_config(path)
    with pytest.raises(ConfigError, match=r"none.yaml: cannot be read: No such file or directory"):
        load_config(tmp_path / "none.yaml")


def test_entries_may_take_in_the_fields_of_others(tmp_path: Path) -> None:
    path = tmp_path / "rung.yaml"
    path.write_text("nodes:\n  - &first {id: a, address: box:1, vram: 8GiB}\n  - {<<: *first, id: b}\n")

    first, second = load_config(path).nodes

    assert (first.id, second.id) == ("a", "b")
    assert (second.address, second.vram_bytes) == ("box:1", 8 * 1024**3)


def test_the_example_says_what_it_means() -> None:
    orchestrator, reasoner, embedder = load_config(ROOT / "deploy" / "rung.example.yaml").deployment_specs()

    assert orchestrator.residency_class is ResidencyClass.PINNED
    assert orchestrator.vram_bytes == int(12.8 * 1024**3)
    assert isinstance(orchestrator.engine.engine, LlamaCppEngine)
    assert isinstance(orchestrator.engine.runtime, ProcessRuntime)
    assert isinstance(reasoner.engine.runtime, DockerRuntime)
    assert reasoner.engine.runtime.mounts[0].source == "/models"
    assert embedder.engine.runtime == ExternalRuntime(base_url="http://127.0.0.1:8209")


def test_the_agents_example_names_every_setting_that_an_owner_has() -> None:
    path = ROOT / "deploy" / "agent.example.yaml"
    example = load_agent_config(path)

    allowed = example.allow_list().executables
    assert allowed["comfyui"].arguments_prefix == ("/opt/comfyui/main.py",)
    assert example.mount_folders == (Path("/models"),)
    assert example.drain_timeout_s == AgentConfig().drain_timeout_s == 30.0
    # What is simulated is for tests, and the host can be loopback only.
    for name, field in AgentConfig.model_fields.items():
        if name not in ("host", "simulated_gpus"):
            assert f"{field.alias or name}:" in path.read_text(), name
    for name in ExecutableConfig.model_fields:
        assert f"{name}:" in path.read_text(), name


def test_without_a_file_everything_has_a_default() -> None:
    assert (default_config().server.grpc_port, default_config().server.http_port) == (8151, 8150)
