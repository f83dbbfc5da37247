"""The files of the demo can be used by the programs that read them."""

from __future__ import annotations

import io
import re
import subprocess
import sys
from pathlib import Path

import msgspec
import pytest
from rich.console import Console

from controlplane.cloud._keys import ApiKey, read_key
from controlplane.config import load_config
from controlplane.demo._ladder_layout import CLOUD_KEY
from controlplane.demo._layout import (
    COMFYUI,
    MOST_TOKENS,
    ORCHESTRATOR,
    REASONER,
    SPARK,
    THINKER,
    WORKSTATION,
    DemoOptions,
    Layout,
    LocalLlamaCpp,
    find_llama_cpp,
)
from controlplane.demo._screen import Screen
from controlplane.demo._story import fold_tokens, open_story
from controlplane.demo._sweeper import MARK
from nodeagent.config import load_agent_config
from rung.errors import FailedPreconditionError
from rung.types import (
    EventPayload,
    JobDone,
    JobEvent,
    LlamaCppEngine,
    LlamaCppServer,
    ProcessRuntime,
    ResidencyClass,
    TokenDelta,
)

PORTS = {WORKSTATION: 41, SPARK: 42}


def test_simulated(tmp_path: Path) -> None:
    layout = Layout(folder=tmp_path, agent_ports=PORTS, cloud_port=43)
    layout.write()
    config = load_config(layout.config_path)
    assert config.server.grpc_port == config.server.http_port == 0
    assert [(node.id, node.address) for node in config.nodes] == [
        (WORKSTATION, "127.0.0.1:41"),
        (SPARK, "127.0.0.1:42"),
    ]
    specs = {spec.id: spec for spec in config.deployment_specs()}
    assert set(specs) == {ORCHESTRATOR, REASONER, COMFYUI, THINKER}
    assert specs[ORCHESTRATOR].residency_class is ResidencyClass.PINNED
    assert specs[ORCHESTRATOR].shrinkable
    assert specs[REASONER].residency_class is ResidencyClass.SLEEPABLE
    assert specs[COMFYUI].residency_class is ResidencyClass.CACHE
    # The requests of the story name what the engines serve.
    assert specs[ORCHESTRATOR].engine_model_name == layout.orchestrator_model
    assert specs[REASONER].engine_model_name == layout.reasoner_model
    for spec in specs.values():
        runtime = spec.engine.runtime
        assert isinstance(runtime, ProcessRuntime)
        # What the sweeper knows an engine by, and what its agent lets it have.
        assert runtime.environment[MARK] == str(tmp_path)
        allowed = load_agent_config(layout.agent_config_path(spec.node_id)).allow_list().executables
        assert allowed[runtime.executable].allow_environment
        assert not allowed[runtime.executable].allow_arguments


def test_its_ladder_leads_from_the_spark_to_the_workstation_to_a_simulated_cloud_api(tmp_path: Path) -> None:
    layout = Layout(folder=tmp_path, agent_ports=PORTS, cloud_port=43)
    layout.write()
    config = load_config(layout.config_path)
    assert config.ladder is not None
    little, much = config.ladder.value().rungs
    assert (little.name, little.chain, little.reason_chain) == ("chat", (ORCHESTRATOR,), ())
    assert (much.name, much.chain) == ("reasoning", (ORCHESTRATOR,))
    assert much.reason_chain == ("spark/qwen3-32b", "workstation/deepseek-r1-14b", "deepseek/reasoner")
    (provider,) = config.cloud_providers()
    # Nobody's own key, and nobody's own API.
    assert (provider.base_url, provider.api_key_env) == ("http://127.0.0.1:43", "")
    assert provider.api_key_file == tmp_path / "cloud.key"
    assert provider.api_key_file.stat().st_mode & 0o077 == 0
    key = read_key(provider, {})
    assert isinstance(key, ApiKey)
    assert key.value == CLOUD_KEY


def test_a_real_llama_cpp(tmp_path: Path) -> None:
    gguf = tmp_path / "smollm-135m.gguf"
    found = LocalLlamaCpp(server=LlamaCppServer.LLAMA_SERVER, path="/usr/bin/llama-server")
    layout = Layout(folder=tmp_path, agent_ports=PORTS, cloud_port=43, gguf=gguf, llama_cpp=found)
    layout.write()
    spec = load_config(layout.config_path).deployment_specs()[0]
    assert spec.model == "smollm-135m"
    assert isinstance(spec.engine.engine, LlamaCppEngine)
    assert spec.engine.engine.model_path == str(gguf)
    assert not spec.shrinkable
    allowed = load_agent_config(layout.agent_config_path(WORKSTATION)).allow_list().executables
    assert allowed["llama-server"].path == "/usr/bin/llama-server"
    assert layout.orchestrator_server == "llama-server"


def test_the_server_of_the_python_package_is_called_by_its_own_name(tmp_path: Path) -> None:
    found = LocalLlamaCpp(
        server=LlamaCppServer.LLAMA_CPP_PYTHON,
        path="/usr/bin/python3",
        arguments_prefix=("-m", "llama_cpp.server"),
    )
    layout = Layout(
        folder=tmp_path, agent_ports=PORTS, cloud_port=43, gguf=tmp_path / "tiny.gguf", llama_cpp=found
    )
    layout.write()
    runtime = load_config(layout.config_path).deployment_specs()[0].engine.runtime
    assert isinstance(runtime, ProcessRuntime)
    assert runtime.executable == "llama-cpp-python"
    allowed = load_agent_config(layout.agent_config_path(WORKSTATION)).allow_list().executables
    assert allowed["llama-cpp-python"].arguments_prefix == ("-m", "llama_cpp.server")
    assert layout.orchestrator_server == "llama-cpp-python"


class TestFindLlamaCpp:
    def test_llama_server_comes_first(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        program = tmp_path / "llama-server"
        program.write_text("#!/bin/sh\n")
        program.chmod(0o755)
        monkeypatch.setenv("PATH", str(tmp_path))
        assert find_llama_cpp() == LocalLlamaCpp(server=LlamaCppServer.LLAMA_SERVER, path=str(program))

    def test_none(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("PATH", str(tmp_path))
        monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
        with pytest.raises(FailedPreconditionError, match="put llama-server on PATH"):
            find_llama_cpp()


def test_runs_of_tokens_are_folded() -> None:
    payloads: list[EventPayload] = [
        TokenDelta("a"),
        TokenDelta("b"),
        TokenDelta("c"),
        JobDone("stop"),
        TokenDelta("d"),
        JobDone(),
    ]
    log = [JobEvent("job", place, 0.0, 0.0, payload) for place, payload in enumerate(payloads, 1)]
    lines = [line.plain.split("s  ")[-1].strip() for line in fold_tokens(log)]
    assert lines == [
        "token     'a'",
        "2 more of these",
        "done      stop",
        "token     'd'",
        "done      complete",
    ]


def test_a_real_model_on_a_cpu_is_not_let_go_on_for_long(tmp_path: Path) -> None:
    simulated = Layout(folder=tmp_path, agent_ports=PORTS, cloud_port=43)
    found = LocalLlamaCpp(server=LlamaCppServer.LLAMA_SERVER, path="/usr/bin/llama-server")
    real = msgspec.structs.replace(simulated, gguf=tmp_path / "tiny.gguf", llama_cpp=found)
    assert real.most_tokens < simulated.most_tokens == MOST_TOKENS


def test_what_it_says_of_the_speed_is_what_its_engines_are_told(tmp_path: Path) -> None:
    layout = Layout(folder=tmp_path, agent_ports=PORTS, cloud_port=43)
    layout.write()
    console = Console(record=True, width=200, file=io.StringIO())
    open_story(Screen(console), DemoOptions())
    said = re.search(r"work (\d+) times as fast", " ".join(console.export_text().split()))
    assert said is not None
    for spec in load_config(layout.config_path).deployment_specs():
        runtime = spec.engine.runtime
        assert isinstance(runtime, ProcessRuntime)
        assert runtime.environment["RUNG_SIM_SPEED"] == said[1]


def test_its_viewer_does_not_wait_for_the_control_plane_to_be_imported() -> None:
    heavy = "('controlplane.config', 'controlplane.app', 'sqlalchemy', 'pydantic')"
    program = f"import sys, controlplane.demo; print([name for name in {heavy} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True)
    assert done.stdout.strip() == "[]"
