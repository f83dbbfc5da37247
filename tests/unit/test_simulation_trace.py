"""Traces: what can be used, and what cannot is refused by file, line and field."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from controlplane.simulation import SimulationReport, draw_requests, load_trace, simulate
from rung.cli import ExitCode, main
from rung.errors import ConfigError

GOOD = """\
title: small
duration: 1h
node: {vram: 32GiB}
deployments:
  - {id: orchestrator, residency_class: pinned, vram: 9GiB}
  - {id: reasoning, residency_class: sleepable, vram: 12GiB, held_asleep: 1GiB}
  - id: comfyui
    residency_class: cache
    vram: 400MiB
    checkpoints:
      - {id: lightning, vram: 6GB, kept: 5GB, load: 4s}
processes:
  - kind: image
    deployment: comfyui
    checkpoint: lightning
    every: 5m
    burst: [1, 3]
    service: [2s, 4s]
requests:
  - {at: 10s, kind: chat, deployment: orchestrator, service: 3s}
"""


def test_a_trace_is_read_with_its_units(tmp_path: Path) -> None:
    trace = load_trace(_file(tmp_path, GOOD))

    assert trace.duration_s == 3600.0
    assert trace.deployment("comfyui").checkpoints[0].vram_bytes == 6 * 10**9
    requests = draw_requests(trace, seed=1)
    assert [each.number for each in requests] == list(range(1, len(requests) + 1))
    assert [each.at_s for each in requests] == sorted(each.at_s for each in requests)
    images = [each for each in requests if each.kind == "image"]
    assert 8 < len(images) < 60
    assert all(2.0 <= each.service_s <= 4.0 for each in images)
    assert requests != draw_requests(trace, seed=2)


def test_what_one_process_asks_for_does_not_change_another(tmp_path: Path) -> None:
    more = GOOD.replace(
        "requests:\n",
        "  - {kind: chat, deployment: orchestrator, every: 1m, service: [1s, 2s]}\nrequests:\n",
    )
    before, after = (draw_requests(load_trace(_file(tmp_path, text)), 1) for text in (GOOD, more))
    assert len(after) > len(before)
    assert [each.at_s for each in before if each.kind == "image"] == [
        each.at_s for each in after if each.kind == "image"
    ]


def test_json_lines_are_the_same_trace(tmp_path: Path) -> None:
    head = {
        "title": "small",
        "duration": "1h",
        "node": {"vram": "32GiB"},
        "deployments": [{"id": "orchestrator", "residency_class": "pinned", "vram": "9GiB"}],
    }
    rows = [
        {"at": "10s", "kind": "chat", "deployment": "orchestrator", "service": 3},
        {"at": 20.5, "kind": "chat", "deployment": "orchestrator", "service": "4s"},
    ]
    lines = [json.dumps(each) for each in (head, *rows)]

    trace = load_trace(_file(tmp_path, "\n".join(lines), "trace.jsonl"))

    assert [(each.at_s, each.service_s) for each in trace.requests] == [(10.0, 3.0), (20.5, 4.0)]


@pytest.mark.parametrize(
    ("old", "new", "complaint"),
    [
        ("every: 5m", "every: soon", "trace.yaml:16: processes[0].every: 'soon' is not a duration"),
        ("every: 5m", "evry: 5m", "trace.yaml:16: processes[0].evry: there is no such field; did you mean"),
        ("burst: [1, 3]", "burst: [3, 1]", "trace.yaml:17: processes[0].burst: the least is more than"),
        ("    checkpoint: lightning\n", "", "processes[0].checkpoint: is missing; comfyui has lightning"),
        (
            "checkpoint: lightning",
            "checkpoint: thunder",
            "trace.yaml:15: processes[0].checkpoint: there is no 'thunder'; comfyui has lightning",
        ),
        (
            "deployment: orchestrator",
            "deployment: conductor",
            "trace.yaml:20: requests[0].deployment: there is no 'conductor'; there are orchestrator",
        ),
        (
            "kept: 5GB",
            "kept: 7GB",
            "trace.yaml:11: deployments[2].checkpoints[0].kept: is more than its vram",
        ),
        ("class: sleepable", "class: sleepy", "trace.yaml:6: deployments[1].residency_class: "),
        ("held_asleep: 1GiB", "held_asleep: 13GiB", "trace.yaml:6: deployments[1].held_asleep: is more"),
        (
            "id: reasoning",
            "id: orchestrator",
            "trace.yaml:6: deployments[1].id: 'orchestrator' is here twice",
        ),
        ("vram: 12GiB", "vram: 24GiB", "trace.yaml:6: deployments[1].vram: what is up at the beginning"),
        ("vram: 32GiB", "vram: 0", "trace.yaml:3: node.vram: "),
        ("duration: 1h\n", "", "trace.yaml:1: duration: is missing"),
        ("pinned, vram", "pinned, residency: asleep, vram", "trace.yaml:5: deployments[0].residency: only"),
        ("title: small", "title: [", "not valid YAML"),
    ],
)
def test_a_bad_trace_is_refused_by_line_and_field(old: str, new: str, complaint: str, tmp_path: Path) -> None:
    assert old in GOOD
    with pytest.raises(ConfigError) as refused:
        load_trace(_file(tmp_path, GOOD.replace(old, new, 1)))
    assert complaint in refused.value.message


@pytest.mark.parametrize(
    ("lines", "complaint"),
    [
        (["{}", "{"], "trace.jsonl:2: not valid JSON"),
        (["[]"], "trace.jsonl:1: the first line is an object without requests"),
        ([], "trace.jsonl:1: title: is missing"),
        (
            ['{"title": "x"}', "", '{"at": 1, "kind": "chat"}'],
            "trace.jsonl:3: requests[0].service: is missing",
        ),
        (
            ['{"title": "x", "node": {"vram": 1, "ram": 2}}'],
            "trace.jsonl:1: node.ram: there is no such field",
        ),
    ],
)
def test_a_bad_line_is_named(lines: list[str], complaint: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as refused:
        load_trace(_file(tmp_path, "\n".join(lines), "trace.jsonl"))
    assert complaint in refused.value.message


def test_a_trace_in_which_nothing_is_asked_for_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="nothing is ever asked for"):
        load_trace(_file(tmp_path, GOOD.split("processes:", 1)[0]))


# The command.


def test_the_table_has_a_line_for_each_policy(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "160")
    path = _file(tmp_path, GOOD)
    assert main(["simulate", str(path), "--policy", "rung", "--policy", "lru"]) == ExitCode.OK
    told = capsys.readouterr()
    assert "÷ rung" in told.out
    assert [line.split()[0] for line in told.out.splitlines()[2:4]] == ["rung", "lru"]
    assert "all-or-nothing" not in told.out
    # Progress is no part of the result.
    assert "requests have ended" in told.err


def test_json_is_the_report(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = _file(tmp_path, GOOD)
    assert main(["simulate", str(path), "--seed", "3", "--policy", "lru", "--json"]) == ExitCode.OK
    found = json.loads(capsys.readouterr().out)
    report: SimulationReport = simulate(str(path), load_trace(path), policies=["lru"], seed=3)
    assert found["seed"] == 3
    assert found["policies"][0]["waits"]["total_s"] == report.policies[0].waits.total_s


def test_the_shipped_traces_are_listed_and_can_be_printed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["simulate", "--list"]) == ExitCode.OK
    listed = capsys.readouterr().out
    for name in ("solo-developer", "family-of-five", "busy-team"):
        assert name in listed
        assert main(["simulate", name, "--print"]) == ExitCode.OK
        assert load_trace(_file(tmp_path, capsys.readouterr().out)).processes


@pytest.mark.parametrize(
    ("line", "code", "complaint"),
    [
        ("simulate", ExitCode.USAGE, "rung simulate --list"),
        ("simulate nobody", ExitCode.NOT_FOUND, "family-of-five"),
        ("simulate solo-developer --policy luck", ExitCode.NOT_FOUND, "there is no policy 'luck'"),
    ],
)
def test_what_is_not_there_is_said(
    line: str, code: ExitCode, complaint: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(line.split()) == code
    assert complaint in capsys.readouterr().err


def _file(folder: Path, text: str, name: str = "trace.yaml") -> Path:
    path = folder / name
    path.write_text(text)
    return path
