"""What is asked of a GPU for a picture, given what ComfyUI holds already."""

from __future__ import annotations

import pytest

from controlplane.pipelines.image._memory import Flush, Loaded, Need, need_of, wanted_bytes
from controlplane.workflows import DEFAULT_TIERS, Tier

GB, GIB = 10**9, 1 << 30
EMPTY = GB // 2
LIGHTNING, QUALITY, ULTRA = (DEFAULT_TIERS[name] for name in ("lightning", "quality", "ultra"))


def loaded(tier: Tier, *, generation: int = 1, others_bytes: int | None = EMPTY) -> Loaded:
    return Loaded(
        generation=generation, checkpoint=tier.checkpoint, family=tier.family, others_bytes=others_bytes
    )


def need(tier: Tier, measured_bytes: int | None, was: Loaded | None, *, generation: int = 1) -> Need:
    return need_of(tier, tier.vram_bytes, generation=generation, measured_bytes=measured_bytes, loaded=was)


def test_the_whole_is_asked_for_where_nothing_is_loaded() -> None:
    assert need(QUALITY, EMPTY, None) == Need(vram_bytes=12 * GB)


def test_only_what_is_missing_is_asked_for_where_the_checkpoint_is_loaded() -> None:
    found = need(QUALITY, EMPTY + 11 * GB, loaded(QUALITY))

    assert (found.vram_bytes, found.held_bytes, found.flush) == (GB, 11 * GB, Flush.NO)
    assert found.is_loaded


def test_there_is_a_lease_even_if_nothing_is_missing() -> None:
    found = need(LIGHTNING, EMPTY + 7 * GB, loaded(LIGHTNING))

    assert 0 < found.vram_bytes < GB


def test_what_others_hold_in_the_same_comfyui_is_not_counted_as_the_checkpoint() -> None:
    beside = loaded(QUALITY, others_bytes=EMPTY + 6 * GB)

    assert need(QUALITY, EMPTY + 17 * GB, beside).held_bytes == 11 * GB


def test_another_family_is_flushed_first() -> None:
    found = need(ULTRA, EMPTY + 11 * GB, loaded(QUALITY))

    assert found == Need(vram_bytes=20 * GB, flush=Flush.YES)


def test_a_family_of_which_nothing_is_left_needs_no_flush() -> None:
    assert need(ULTRA, EMPTY, loaded(QUALITY)).flush is Flush.NO


def test_another_checkpoint_of_the_family_is_flushed_only_before_others_give_way() -> None:
    found = need(QUALITY, EMPTY + 6 * GB, loaded(LIGHTNING))

    assert found == Need(vram_bytes=12 * GB, flush=Flush.BEFORE_OTHERS)


@pytest.mark.parametrize(
    ("measured_bytes", "was"),
    [
        (EMPTY + 11 * GB, None),
        (EMPTY + 11 * GB, loaded(QUALITY, generation=2)),
        (EMPTY + 11 * GB, loaded(QUALITY, others_bytes=None)),
        (None, loaded(QUALITY)),
    ],
    ids=["after a restart of ours", "after one of its own", "never measured", "not measured now"],
)
def test_the_whole_is_asked_for_where_nobody_knows_what_is_loaded(
    measured_bytes: int | None, was: Loaded | None
) -> None:
    assert need(QUALITY, measured_bytes, was) == Need(vram_bytes=12 * GB, flush=Flush.BEFORE_OTHERS)


def test_a_checkpoint_that_others_flushed_is_not_loaded() -> None:
    assert need(QUALITY, EMPTY, loaded(QUALITY)) == Need(vram_bytes=12 * GB)


def test_what_loads_no_checkpoint_flushes_nobody_for_its_family() -> None:
    upscale = QUALITY.of("upscale")

    assert need(upscale, EMPTY + 11 * GB, loaded(ULTRA)).flush is Flush.BEFORE_OTHERS


def test_larger_pictures_and_more_of_them_need_more() -> None:
    assert wanted_bytes(QUALITY, 512, 512, 1) == QUALITY.vram_bytes
    assert wanted_bytes(QUALITY, 1024, 1024, 3) == QUALITY.vram_bytes + 2 * GIB
    assert wanted_bytes(QUALITY, 2048, 1024, 1) == QUALITY.vram_bytes + GIB
