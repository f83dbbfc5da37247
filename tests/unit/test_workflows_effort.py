"""How much effort a picture deserves."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from controlplane.workflows import image_effort, tier_of_effort
from rung.types import ImageInput


def effort(prompt: str, **more: Any) -> int:
    return image_effort(ImageInput(prompt=prompt, **more))[0]


@pytest.mark.parametrize(
    ("prompt", "tier"),
    [
        ("draw me a cat", "lightning"),
        ("a red bicycle leaning against a wall", "lightning"),
        ("quick sketch of a house", "lightning"),
        ("a simple icon of a rocket", "lightning"),
        ('"a cat on a mat"', "lightning"),
        ("a girl reading a book", "lightning"),
        ("a photorealistic cat", "quality"),
        ("an oil painting of a ship in a storm", "quality"),
        ("a detailed dragon", "quality"),
        ("ein Plakat mit einem Vogel", "quality"),
        ("a cinematic portrait of an old fisherman", "quality"),
        ("a shop sign that says OPEN", "ultra"),
        ('a mug with "hello" on it', "ultra"),
        ("ein Schild mit der Aufschrift Vorsicht", "ultra"),
        (
            "an intricate, photorealistic movie poster of two people dancing in the rain at night, cinematic "
            "lighting, highly detailed reflections on wet cobblestones",
            "ultra",
        ),
    ],
)
def test_simple_prompts_get_the_fast_tier(prompt: str, tier: str) -> None:
    assert tier_of_effort(effort(prompt)) == tier


def test_a_cat_is_effort_2() -> None:
    assert image_effort(ImageInput(prompt="draw me a cat")) == (2, "short and plain")


def test_it_says_why_heaviest_first() -> None:
    found = image_effort(
        ImageInput(
            prompt="a 4k poster of a crowd", width_pixels=2048, height_pixels=1024, negative_prompt="fog"
        )
    )
    assert found == (
        10,
        "asks for detail (4k, poster); excludes something; is large (2048x1024); "
        "shows what is hard to draw (crowd)",
    )


def test_size_operation_and_negative_prompt_count() -> None:
    cat = "draw me a cat"
    assert effort(cat, width_pixels=512, height_pixels=512) == 1
    assert effort(cat, width_pixels=1536, height_pixels=1536) == 4
    assert effort(cat, operation="inpaint") == 4
    assert effort(cat, negative_prompt="dogs") == 4


def test_length_counts_in_steps() -> None:
    assert [effort(" ".join(["leaf"] * count)) for count in (12, 13, 26, 51)] == [2, 3, 4, 5]


@given(st.text(max_size=300), st.integers(0, 5000), st.integers(0, 5000))
def test_it_is_always_within_bounds_and_never_raises(prompt: str, width: int, height: int) -> None:
    found, why = image_effort(ImageInput(prompt=prompt, width_pixels=width, height_pixels=height))
    assert 1 <= found <= 10
    assert why
