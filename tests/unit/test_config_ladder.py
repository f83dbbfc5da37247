"""The ladder in a configuration file."""

from __future__ import annotations

from pathlib import Path

import pytest

from controlplane.config import load_config
from controlplane.ladder import Modality
from rung.errors import ConfigError

BASE = """\
nodes:
  - {id: box, address: "127.0.0.1:8152"}
deployments:
  - {id: chat, node: box, model: small, aliases: [tiny], capabilities: [chat, tools],
     engine: {kind: llamacpp, model_path: /m.gguf}, runtime: {kind: process, executable: llama-server}}
  - {id: thinker, node: box, model: deep,
     engine: {kind: llamacpp, model_path: /m.gguf}, runtime: {kind: process, executable: llama-server}}
"""

LADDER = """\
ladder:
  chains:
    quick: [chat, "@reasoning"]
    reasoning: [box/deep, tiny, burst/reasoning]
  rungs:
    - {name: easy, effort: 1-6, chain: quick}
    - {name: hard, effort: [7, 9], chain: quick, reason: reasoning}
    - name: hardest
      effort: 10
      chain: reasoning
      reason: reasoning
    - {name: eyes, modality: vision, chain: quick}
"""


def load(tmp_path: Path, ladder: str) -> str:
    """The file's errors; empty if it has none."""
    path = tmp_path / "rung.yaml"
    path.write_text(BASE + ladder)
    try:
        load_config(path)
    except ConfigError as error:
        return error.message.replace(f"{path}:", "")
    return ""


def test_a_ladder_is_read_with_efforts_in_each_of_their_forms(tmp_path: Path) -> None:
    path = tmp_path / "rung.yaml"
    path.write_text(BASE + LADDER)
    config = load_config(path)
    assert config.ladder is not None
    ladder = config.ladder.value()
    spans = [(rung.name, rung.min_effort, rung.max_effort) for rung in ladder.rungs]
    assert spans == [("easy", 1, 6), ("hard", 7, 9), ("hardest", 10, 10), ("eyes", 1, 10)]
    hard = ladder.rung(Modality.CHAT, 7)
    assert hard is not None
    assert hard.chain == ("chat", "box/deep", "tiny", "burst/reasoning")
    assert hard.reason_chain == ("box/deep", "tiny", "burst/reasoning")
    assert config.ladder.classifier == "heuristic"


def test_no_ladder_is_none(tmp_path: Path) -> None:
    path = tmp_path / "rung.yaml"
    path.write_text(BASE)
    assert load_config(path).ladder is None


def test_spaces_around_an_effort_are_none_of_its_business(tmp_path: Path) -> None:
    assert load(tmp_path, LADDER.replace("1-6", "1 - 6")) == ""


@pytest.mark.parametrize(
    ("was", "now", "said"),
    [
        ("effort: 1-6", "effort: 1-5", "ladder.rungs: no rung of chat has effort 6"),
        (
            "effort: 1-6",
            "effort: 1-7",
            "ladder.rungs[1].effort: effort 7 of chat is on two rungs, easy and hard",
        ),
        ("effort: 1-6", "effort: 0-6", "ladder.rungs[0].effort: is 0; an effort is 1 to 10"),
        ("effort: 10", "effort: 11", "ladder.rungs[2].effort: is 11; an effort is 1 to 10"),
        ("effort: 1-6", "effort: 6-1", "ladder.rungs[0].effort: begins at 6 and ends at 1, before it"),
        ("effort: 1-6", "effort: low", "ladder.rungs[0].effort[0]: Input should be a valid integer"),
        (
            "chain: quick}\n    - {name: hard",
            "chain: fast}\n    - {name: hard",
            "ladder.rungs[0].chain: there is no chain 'fast'; chains are: quick, reasoning",
        ),
        ("chain: quick}\n    - {name: hard", 'chain: ""}\n    - {name: hard', "there is no chain ''"),
        (
            "reason: reasoning\n",
            "reason: thinking\n",
            "ladder.rungs[2].reason: there is no chain 'thinking'; chains are: quick, reasoning",
        ),
        (
            "{name: easy, effort: 1-6, chain: quick}",
            "{name: easy, effort: 1-6, chain: quick, reason: reasoning}",
            "ladder.rungs[0].reason: the reason tool is offered from effort 7 on, and this rung begins at 1",
        ),
        ("name: hardest", "name: hard", "ladder.rungs[2].name: hard is used twice"),
        ("modality: vision", "modality: smell", "ladder.rungs[3].modality: Input should be 'chat', 'vision'"),
        ("quick: [chat,", "quick: [chat, chat,", "ladder.chains.quick[1]: chat is in the chain twice"),
        ("quick: [chat,", "Quick: [chat,", "ladder.chains.Quick"),
        (
            "[box/deep,",
            '["@quick", box/deep,',
            "ladder.chains.reasoning[0]: the chains go round in a circle: quick → reasoning → quick",
        ),
        ("[box/deep, tiny, burst/reasoning]", "[]", "ladder.chains.reasoning: has no targets"),
        ("[box/deep,", "[box/depp,", "ladder.chains.reasoning[0]: there is no target box/depp; there are: "),
        (
            "{name: eyes, modality: vision,",
            "{name: eyes, modality: vision, capabilities: [vision],",
            "ladder.rungs[3].capabilities: chat in the chain of eyes cannot do vision",
        ),
        ("modality: vision,", "modalities: vision,", "did you mean modality?"),
    ],
)
def test_what_cannot_be_meant_is_refused_with_its_place(
    tmp_path: Path, was: str, now: str, said: str
) -> None:
    assert LADDER.count(was) == 1
    changed = LADDER.replace(was, now)
    error = load(tmp_path, changed)
    assert said in error
    line = int(error.partition(":")[0])
    assert line > BASE.count("\n"), "the line is one of the ladder's"
