"""Profiles in a configuration: what they mean, and what is said of those that are wrong."""

from __future__ import annotations

from pathlib import Path

import pytest

from controlplane.config import load_config
from rung.errors import ConfigError
from rung.types import Profile, ProfileEntry, Residency

ROOT = Path(__file__).parent.parent.parent
AWAKE, ASLEEP, STOPPED = Residency.AWAKE, Residency.ASLEEP, Residency.STOPPED

BASE = """\
nodes:
  - {id: box, address: "127.0.0.1:8152"}
  - {id: spark, address: "127.0.0.1:8153"}
deployments:
  - id: pinned
    node: box
    model: p
    residency_class: pinned
    engine: {kind: vllm, model: p, gpu_memory_utilization: 0.3}
    runtime: {kind: process, executable: vllm}
  - id: sleeper
    node: box
    model: s
    residency_class: sleepable
    engine: {kind: vllm, model: s, gpu_memory_utilization: 0.4, sleep_mode: true}
    runtime: {kind: process, executable: vllm}
  - id: burst
    node: box
    model: b
    vram: 12GiB
    engine: {kind: llamacpp, model_path: /b.gguf}
    runtime: {kind: process, executable: llama-server}
  - id: theirs
    node: box
    model: t
    engine: {kind: openai_compatible}
    runtime: {kind: external, base_url: "http://127.0.0.1:8209"}
  - id: far
    node: spark
    model: f
    engine: {kind: llamacpp, model_path: /f.gguf}
    runtime: {kind: process, executable: llama-server}
profiles:
  - name: one
    deployments:
"""


def load(tmp_path: Path, text: str) -> tuple[Profile, ...]:
    path = tmp_path / "rung.yaml"
    path.write_text(text)
    return load_config(path).profile_values()


def test_a_profile_means_what_it_names(tmp_path: Path) -> None:
    entries = """\
      - {deployment: sleeper, residency: awake, gpu_memory_utilization: 0.6}
      - {deployment: burst, residency: stopped}
    hold: true
"""
    assert load(tmp_path, BASE + entries) == (
        Profile(
            name="one",
            entries=(ProfileEntry("sleeper", AWAKE, 0.6), ProfileEntry("burst", STOPPED)),
            hold=True,
        ),
    )


def test_the_others_are_stopped_but_for_pinned_ones_other_peoples_and_other_nodes(tmp_path: Path) -> None:
    text = BASE + "      - {deployment: burst, residency: awake}\n    others: stopped\n"
    (profile,) = load(tmp_path, text)
    assert profile.entries == (ProfileEntry("burst", AWAKE), ProfileEntry("sleeper", STOPPED))


@pytest.mark.parametrize(
    ("entry", "said"),
    [
        (
            "{deployment: sleepr, residency: awake}",
            "].deployment: there is no deployment sleepr; deployments",
        ),
        ("{deployment: burst, residency: asleep}", "].residency: burst cannot sleep: only vLLM with"),
        ("{deployment: pinned, residency: stopped}", "].residency: pinned is pinned: no profile puts it to"),
        ("{deployment: theirs, residency: stopped}", "].residency: theirs is run by somebody else"),
        ("{deployment: burst, residency: awake, gpu_memory_utilization: 0.2}", "burst is not run by vLLM"),
        ("{deployment: pinned, residency: awake, gpu_memory_utilization: 0.9}", "and it is pinned"),
        ("{deployment: sleeper, residency: waking}", "].residency: "),
        ("{deployment: sleeper, residency: awake, gpu_memory_utilization: 1.2}", "gpu_memory_utilization: "),
        # No size of the card is known, and 120 % is too much of any.
        (
            "{deployment: sleeper, residency: awake, gpu_memory_utilization: 0.9}",
            "profile one does not fit: pinned 30% + sleeper 90% = 120% of a GPU",
        ),
    ],
)
def test_what_is_wrong_is_said_with_its_place(tmp_path: Path, entry: str, said: str) -> None:
    with pytest.raises(ConfigError) as raised:
        load(tmp_path, f"{BASE}      - {entry}\n")

    line = len(BASE.splitlines()) + 1
    places = (
        f"rung.yaml:{line}: profiles[0].deployments[0]",
        f"rung.yaml:{line - 1}: profiles[0].deployments:",
    )
    assert raised.value.message.split("/")[-1].startswith(places)
    assert said in raised.value.message


def test_an_entry_that_is_there_twice_is_refused(tmp_path: Path) -> None:
    entries = (
        "      - {deployment: burst, residency: awake}\n      - {deployment: burst, residency: stopped}\n"
    )
    with pytest.raises(
        ConfigError, match=r"profiles\[0\]\.deployments\[1\]\.deployment: burst is here twice"
    ):
        load(tmp_path, BASE + entries)


def test_a_name_that_is_there_twice_is_refused(tmp_path: Path) -> None:
    entry = "      - {deployment: burst, residency: awake}\n"
    text = BASE + entry + "  - name: one\n    deployments:\n" + entry
    with pytest.raises(ConfigError, match=r"profiles\[1\]\.name: one is used twice"):
        load(tmp_path, text)


def test_a_sum_that_does_not_fit_the_card_is_refused_with_the_sum(tmp_path: Path) -> None:
    # The pinned one is not named, and is there all the same.
    entries = (
        "      - {deployment: sleeper, residency: awake}\n      - {deployment: burst, residency: awake}\n"
    )
    sized = BASE.replace('{id: box, address: "127.0.0.1:8152"}', '{id: box, address: "a:1", vram: 32GiB}')
    with pytest.raises(ConfigError) as raised:
        load(tmp_path, sized + entries)

    assert "pinned 9.6 GiB (30%) + sleeper 12.8 GiB (40%) + burst 12.0 GiB" in raised.value.message
    assert "35.4 GiB (111%) of 32.0 GiB, 3.4 GiB too much" in raised.value.message
    # Asleep it fits.
    assert load(tmp_path, sized + entries.replace("sleeper, residency: awake", "sleeper, residency: asleep"))


def test_the_workstations_profiles_are_the_four_that_people_know() -> None:
    config = load_config(ROOT / "deploy" / "rung.workstation.yaml")
    found = {profile.name: profile for profile in config.profile_values()}
    wanted = {
        name: {entry.deployment_id: entry.residency for entry in profile.entries}
        for name, profile in found.items()
    }

    assert list(found) == ["dev", "production", "creative", "gaming"]
    assert wanted["dev"]["reasoner"] is AWAKE
    assert ProfileEntry("orchestrator-wide", AWAKE, 0.55) in found["production"].entries
    assert wanted["creative"]["comfyui"] is AWAKE
    assert {name for name, residency in wanted["gaming"].items() if residency is AWAKE} == {"orchestrator"}
    assert [found[name].hold for name in found] == [False, True, True, True]
    # Each says something of whatever is not pinned, so that the order of switches does not matter.
    everything = {spec.id for spec in config.deployment_specs()}
    assert all(set(wanted[name]) == everything for name in ("production", "creative", "gaming"))
