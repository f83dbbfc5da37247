"""`rung config`, and which configuration the servers take."""

from __future__ import annotations

from pathlib import Path

import pytest

from controlplane.commands import find_config
from controlplane.config import default_config, load_config
from controlplane.local import STARTER_CONFIG, UpOptions, with_overrides
from controlplane.local._up import _plan, _serve_command
from rung.cli import ExitCode, main
from rung.errors import ConfigError


@pytest.fixture(autouse=True)
def _empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "xdg"))
    monkeypatch.delenv("RUNG_CONFIG", raising=False)


class TestCheck:
    def test_ok(self, capsys: pytest.CaptureFixture[str]) -> None:
        Path("rung.yaml").write_text("nodes:\n  - {id: box, address: '127.0.0.1:8152'}\n")
        assert main(["config", "check"]) == ExitCode.OK
        assert capsys.readouterr().out == "rung.yaml: OK: 1 node, 0 deployments; gRPC 8151, HTTP 8150\n"

    def test_errors_name_file_line_and_field(self, capsys: pytest.CaptureFixture[str]) -> None:
        Path("x.yaml").write_text("server:\n  grpc_port: 99999\nnodes:\n  - {id: box}\n")
        assert main(["config", "check", "x.yaml"]) == ExitCode.FAILED
        lines = capsys.readouterr().err.splitlines()
        assert lines[0].startswith("x.yaml:2: server.grpc_port: ")
        assert lines[1].startswith("x.yaml:4: nodes[0].address: ")

    def test_no_file(self, capsys: pytest.CaptureFixture[str]) -> None:
        assert main(["config", "check"]) == ExitCode.FAILED
        assert "rung config init" in capsys.readouterr().err


class TestInit:
    def test_what_it_writes_can_be_used(self, capsys: pytest.CaptureFixture[str]) -> None:
        assert main(["config", "init"]) == ExitCode.OK
        assert main(["config", "check"]) == ExitCode.OK
        assert "1 node, 0 deployments" in capsys.readouterr().out

    def test_its_examples_can_be_used(self) -> None:
        head, _, examples = STARTER_CONFIG.partition("deployments: []\n")
        lines = [line.removeprefix("#") for line in examples.splitlines() if line.startswith("#   ")]
        Path("rung.yaml").write_text("\n".join([head, "deployments:", *lines, ""]))
        assert [spec.id for spec in load_config(Path("rung.yaml")).deployment_specs()] == [
            "orchestrator",
            "writer",
        ]

    def test_a_file_that_is_there_is_kept(self) -> None:
        Path("rung.yaml").write_text("# mine\n")
        assert main(["config", "init"]) == ExitCode.FAILED
        assert Path("rung.yaml").read_text() == "# mine\n"
        assert main(["config", "init", "--force"]) == ExitCode.OK


def test_search_order(tmp_path: Path) -> None:
    theirs = tmp_path / "xdg" / "rung" / "rung.yaml"
    theirs.parent.mkdir(parents=True)
    theirs.touch()
    assert find_config() == theirs
    Path("rung.yaml").touch()
    assert find_config() == Path("rung.yaml")


class TestOverrides:
    def test_only_what_is_given_changes(self) -> None:
        config = default_config()
        assert with_overrides(config) == config
        assert with_overrides(config, state_dir=Path("here")).server.state_dir == Path("here")
        changed = with_overrides(config, grpc_port=1, http_port=2, log_level="debug")
        assert (changed.server.grpc_port, changed.server.http_port) == (1, 2)
        assert changed.server.log.level == "debug"
        assert changed.server.state_dir == config.server.state_dir

    def test_both_ports_the_same(self) -> None:
        with pytest.raises(ConfigError, match="both have port 8150"):
            with_overrides(default_config(), grpc_port=8150)
        with_overrides(default_config(), grpc_port=0, http_port=0)


def test_serve_with_a_bad_file(capsys: pytest.CaptureFixture[str]) -> None:
    Path("rung.yaml").write_text("servr: {}\n")
    assert main(["serve"]) == ExitCode.FAILED
    assert capsys.readouterr().err.startswith("error: rung.yaml:1: servr: ")


class TestStateOfUp:
    def test_what_is_given_goes_before_the_configurations(self, tmp_path: Path) -> None:
        file = Path("rung.yaml")
        file.write_text("server: {state_dir: /theirs}\nnodes: [{id: box, address: '127.0.0.1:8152'}]\n")
        for given, expected in ((tmp_path / "given", tmp_path / "given"), (None, Path("/theirs"))):
            options = UpOptions(state_dir=tmp_path, server_state_dir=given, config=file)
            plan = _plan(options)
            assert plan.server_state_dir == expected
            # The control plane is told, and so looks nowhere else, whatever RUNG_STATE_DIR says.
            command = _serve_command(options, plan)
            assert command[command.index("--state-dir") + 1] == str(expected)
