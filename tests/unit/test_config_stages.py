"""The safety filter and the enhancement of prompts in a configuration file."""

from __future__ import annotations

from pathlib import Path

import pytest

from controlplane.config import Config, default_config, load_config
from controlplane.stages import (
    AUTO_MODEL,
    Blocked,
    EnhancementSettings,
    Moderation,
    SafetyPolicy,
    SafetySettings,
)
from rung.errors import ConfigError

BASE = """\
nodes:
  - {id: box, address: "127.0.0.1:8152"}
deployments:
  - {id: guard-1, node: box, model: guard, capabilities: [chat],
     engine: {kind: llamacpp, model_path: /m.gguf}, runtime: {kind: process, executable: llama-server}}
ladder: {chains: {small: [guard]}}
"""


def load(tmp_path: Path, text: str) -> Config:
    path = tmp_path / "rung.yaml"
    path.write_text(BASE + text)
    return load_config(path)


def test_nothing_is_filtered_and_pictures_of_slow_tiers_are_enhanced_if_nothing_is_said() -> None:
    assert default_config().safety.value() == SafetySettings()
    assert SafetySettings().policy is SafetyPolicy.UNRESTRICTED
    assert default_config().prompt_enhancement.value() == EnhancementSettings()
    assert EnhancementSettings().skip_tiers == ("lightning",)


def test_a_file_says_how_wishes_are_filtered_and_prompts_enhanced(tmp_path: Path) -> None:
    config = load(
        tmp_path,
        """\
safety:
  policy: strict
  blocked:
    brands: {words: ["acme*"], regexes: ["mega.{0,3}soft"]}
  allowed: [blood orange]
  moderation: {model: guard, timeout: 3s, on_failure: allow}
  timeout: 8s
prompt_enhancement: {model: rung/small, skip_tiers: [lightning, quality], timeout: 6s, options: {style: ink}}
""",
    )

    assert config.safety.value() == SafetySettings(
        policy=SafetyPolicy.STRICT,
        blocked={"brands": Blocked(words=("acme*",), regexes=("mega.{0,3}soft",))},
        allowed=("blood orange",),
        moderation=Moderation(model="guard", timeout_s=3.0, blocks_on_failure=False),
        timeout_s=8.0,
    )
    assert config.prompt_enhancement.value() == EnhancementSettings(
        model="rung/small", skip_tiers=("lightning", "quality"), timeout_s=6.0, options={"style": "ink"}
    )


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("safety: {policy: loose}", "7: safety.policy"),
        (
            "safety:\n  blocked:\n    mine:\n      words:\n        - fine\n        - '*'",
            "12: safety.blocked.mine.words[1]: '*': a * stands",
        ),
        (
            "safety:\n  blocked:\n    mine:\n      regexes: ['(a+)+']",
            "10: safety.blocked.mine.regexes[0]: '(a+)+' can match in more than 1000 ways",
        ),
        ("safety: {allowed: ['...']}", "safety.allowed[0]: '...' has no word"),
        ("safety: {moderation: {model: gaurd}}", "there is no model gaurd; there are: box/guard, guard"),
        ("safety: {moderation: {model: rung/smal}}", "there is no model rung/smal; there are: "),
        ("safety: {moderation: {model: guard, timeout: 20s}}", "leaves no time to go on without"),
        ("prompt_enhancement: {model: gaurd}", "prompt_enhancement.model: there is no model gaurd"),
        ("prompt_enhancement: {effort: 11}", "prompt_enhancement.effort"),
    ],
)
def test_a_problem_is_told_with_its_line_and_field(tmp_path: Path, text: str, problem: str) -> None:
    with pytest.raises(ConfigError) as refused:
        load(tmp_path, text)

    assert problem in refused.value.message


@pytest.mark.parametrize("model", [AUTO_MODEL, "rung/3", "rung/small", "guard", "guard-1", "box/guard"])
def test_a_stage_may_ask_whatever_a_request_may_name(tmp_path: Path, model: str) -> None:
    assert load(tmp_path, f"prompt_enhancement: {{model: {model}}}").prompt_enhancement.model == model
