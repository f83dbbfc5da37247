"""Which deployments may share a port, what is kept free on a node, and how many requests run at once."""

from __future__ import annotations

from pathlib import Path

import pytest

from controlplane.config import Config, load_config
from rung.errors import ConfigError

GIB = 1 << 30


def loaded(tmp_path: Path, first: str, second: str, node: str = "") -> Config:
    path = tmp_path / "rung.yaml"
    path.write_text(f"""\
nodes:
  - {{id: box, address: "127.0.0.1:8152"{node}}}
  - {{id: other, address: "127.0.0.1:8153"}}
deployments:
  - id: deepseek
    node: box
    model: deepseek-r1-14b
    engine: {{kind: vllm, model: deepseek}}
    runtime: {{kind: process, executable: vllm}}
    {first}
  - id: gemma
    model: gemma-4
    engine: {{kind: vllm, model: gemma}}
    {second}
""")
    return load_config(path)


def refusal(tmp_path: Path, first: str, second: str, node: str = "") -> str:
    with pytest.raises(ConfigError) as refused:
        loaded(tmp_path, first, second, node)
    return refused.value.message


_SLOT = "port: 8176\n    swap_slot: reasoning"
_RUN = "node: box\n    runtime: {kind: process, executable: vllm}\n    "
_EXTERNAL = 'node: box\n    runtime: {kind: external, base_url: "http://127.0.0.1:8176"}\n    '


def test_two_deployments_share_a_port_if_they_take_turns_on_it(tmp_path: Path) -> None:
    specs = loaded(tmp_path, _SLOT, _RUN + _SLOT).deployment_specs()

    assert [(spec.swap_slot, spec.engine.port) for spec in specs] == [("reasoning", 8176)] * 2


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ("port: 8176", _RUN + "port: 8176"),
        (_SLOT, _RUN + "port: 8176"),
        (_SLOT, _RUN + "port: 8176\n    swap_slot: vision"),
    ],
)
def test_otherwise_they_do_not(tmp_path: Path, first: str, second: str) -> None:
    assert "deepseek has port 8176 on the same node" in refusal(tmp_path, first, second)


def test_a_slot_is_of_one_node(tmp_path: Path) -> None:
    elsewhere = "node: other\n    runtime: {kind: process, executable: vllm}\n    "

    assert len(loaded(tmp_path, _SLOT, elsewhere + _SLOT + "\n    residency_class: pinned").deployments) == 2


@pytest.mark.parametrize(
    ("first", "second", "said"),
    [
        (_SLOT + "\n    residency_class: pinned", _RUN + _SLOT, "deepseek shares swap_slot reasoning"),
        (_SLOT, _RUN + _SLOT + "\n    residency_class: pinned", "gemma shares swap_slot reasoning"),
        (_SLOT, _RUN + _SLOT + "\n    residency_class: cache", "cache deployments do not give way"),
        (_SLOT, _RUN + _SLOT + "\n    keep_running: true", "kept running does not give way"),
        (_SLOT, _EXTERNAL + _SLOT, "somebody else runs it"),
        (_SLOT, _RUN + _SLOT + '\n    gpus: ["1"]', "deepseek names other GPUs"),
    ],
)
def test_who_cannot_give_way_takes_no_turns(tmp_path: Path, first: str, second: str, said: str) -> None:
    assert said in refusal(tmp_path, first, second)


def test_alone_on_its_slot_a_deployment_may_be_kept_running(tmp_path: Path) -> None:
    assert len(loaded(tmp_path, _SLOT + "\n    keep_running: true", _RUN).deployments) == 2


def test_no_profile_wants_two_of_a_slot_awake(tmp_path: Path) -> None:
    both = """
profiles:
  - name: dev
    deployments:
      - {deployment: deepseek, residency: awake}
      - {deployment: gemma, residency: awake}
"""

    assert "one at a time" in refusal(tmp_path, _SLOT, _RUN + _SLOT + both)
    one = both.replace("gemma, residency: awake", "gemma, residency: stopped")
    assert len(loaded(tmp_path, _SLOT, _RUN + _SLOT + one).profiles) == 1


def test_what_is_kept_free_is_said_by_node(tmp_path: Path) -> None:
    reserved = ", vram_reserve: 2GiB, host_reserve: 8GiB"
    box, other = loaded(tmp_path, "", _RUN, reserved).nodes

    assert (box.reserve().vram_bytes, box.reserve().host_bytes) == (2 * GIB, 8 * GIB)
    assert (other.reserve().vram_bytes, other.reserve().host_bytes) == (GIB, 4 * GIB)


@pytest.mark.parametrize(
    ("node", "said"),
    [
        (", vram_reserve: -1GiB", "vram_reserve"),
        (", vram: 24GiB, vram_reserve: 24GiB", "nothing would ever be granted"),
        (", host_reserve: much", "host_reserve"),
    ],
)
def test_what_cannot_be_kept_free(tmp_path: Path, node: str, said: str) -> None:
    assert said in refusal(tmp_path, "", _RUN, node)


def test_what_is_warm_has_no_idle_timeout(tmp_path: Path) -> None:
    first, second = loaded(tmp_path, "restore: warm", _RUN).deployment_specs()

    assert (first.warm, second.warm) == (True, False)
    assert "comes up again at once" in refusal(tmp_path, "restore: warm\n    idle_timeout: 5m", _RUN)


def test_a_model_serves_sixteen_at_once_and_an_engine_of_images_one(tmp_path: Path) -> None:
    path = tmp_path / "images.yaml"
    path.write_text("""\
nodes:
  - {id: box, address: "127.0.0.1:8152"}
deployments:
  - {id: a, node: box, model: a, engine: {kind: vllm, model: a}, runtime: {kind: process, executable: x}}
  - {id: b, node: box, model: b, engine: {kind: comfyui}, runtime: {kind: process, executable: x}}
  - {id: c, node: box, model: c, engine: {kind: comfyui}, slots: 2, runtime: {kind: process, executable: x}}
""")

    assert [spec.slots for spec in load_config(path).deployment_specs()] == [16, 1, 2]
