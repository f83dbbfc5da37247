"""`images:` of the configuration."""

from __future__ import annotations

from pathlib import Path

import pytest

from controlplane.config import Config, load_config
from controlplane.workflows import DEFAULT_TIERS
from rung.errors import ConfigError
from rung.types import ReclaimGrade

GIB = 1024**3


def load(folder: Path, text: str) -> Config:
    file = folder / "rung.yaml"
    file.write_text(text)
    return load_config(file)


def test_without_a_word_the_tiers_are_those_that_come_with_rung(tmp_path: Path) -> None:
    images = load(tmp_path, "nodes: []\n").images
    assert images.tier_values() == DEFAULT_TIERS
    assert images.workflows().problems == ()


def test_a_tier_is_changed_in_what_is_said_and_in_nothing_else(tmp_path: Path) -> None:
    tiers = load(
        tmp_path,
        """
        images:
          tiers:
            lightning: {steps: 8, vram: 7GiB, grade: standard, models: {controlnet: mine.safetensors}}
            quality:
              operations:
                inpaint: {checkpoint: inpainting.safetensors, steps: 20}
                upscale: {models: {upscale_model: ""}}
        """,
    ).images.tier_values()
    lightning, default = tiers["lightning"], DEFAULT_TIERS["lightning"]
    assert (lightning.steps, lightning.vram_bytes, lightning.grade) == (8, 7 * GIB, ReclaimGrade.STANDARD)
    assert (lightning.checkpoint, lightning.sampler) == (default.checkpoint, default.sampler)
    assert lightning.models == default.models | {"controlnet": "mine.safetensors"}
    quality = tiers["quality"]
    assert (quality.of("inpaint").checkpoint, quality.of("inpaint").steps) == ("inpainting.safetensors", 20)
    assert quality.of("generate").steps == 28
    upscale = quality.of("upscale")
    assert (upscale.models["upscale_model"], upscale.vram_bytes) == ("", 4 * GIB)
    assert tiers["ultra"] == DEFAULT_TIERS["ultra"]


def test_a_tier_of_one_s_own_needs_a_model_its_family_and_its_memory(tmp_path: Path) -> None:
    tiers = load(
        tmp_path, "images: {tiers: {pony: {checkpoint: pony.safetensors, family: sd15, vram: 5GiB}}}\n"
    ).images.tier_values()
    assert list(tiers) == ["lightning", "quality", "ultra", "pony"]
    pony = tiers["pony"]
    assert (pony.name, pony.checkpoint, pony.family, pony.vram_bytes) == (
        "pony",
        "pony.safetensors",
        "sd15",
        5 * GIB,
    )
    # A ControlNet of SDXL would not fit.
    assert pony.models == {}
    assert pony.of("video").family == "ltx"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (
            "tiers: {pony: {checkpoint: a, family: sd15}}",
            "images.tiers.pony.vram: is missing; tiers that come",
        ),
        ("tiers: {lightning: {steps: 0}}", "images.tiers.lightning.steps: "),
        (
            "tiers: {lightning: {width_pixels: 1000, height_pixels: 1001}}",
            "images.tiers.lightning.height_pixels: ",
        ),
        ("tiers: {lightning: {step: 4}}", "there is no such field; did you mean steps?"),
        ("tiers: {lightning: {grade: huge}}", "images.tiers.lightning.grade: "),
        ("tiers: {Mine: {steps: 4}}", "images.tiers.Mine"),
        (
            "tiers: {lightning: {operations: {inpaint: {vram: 0}}}}",
            "tiers.lightning.operations.inpaint.vram: ",
        ),
    ],
)
def test_what_is_wrong_is_said_with_its_place(tmp_path: Path, text: str, words: str) -> None:
    with pytest.raises(ConfigError) as error:
        load(tmp_path, f"images:\n  {text}\n")
    assert words in error.value.message
    assert ":2: " in error.value.message


def test_workflows_that_cannot_be_used_do_not_keep_a_configuration_from_loading(tmp_path: Path) -> None:
    (tmp_path / "mine.json").write_text("{")
    images = load(tmp_path, f"images: {{workflows_dir: '{tmp_path}'}}\n").images
    assert [Path(problem.file).name for problem in images.workflows().problems] == ["mine.json"]


def test_home_is_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    images = load(tmp_path, "images: {workflows_dir: ~/flows}\n").images
    assert images.workflows_dir == tmp_path / "flows"
