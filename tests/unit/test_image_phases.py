"""The phases of a picture: in order, each of them, nothing twice."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from controlplane.pipelines.image import IMAGE_PHASES, PhaseOrder, Told
from rung.types import Phase


def told(*given: Told) -> list[Told]:
    order = PhaseOrder()
    return [each for one in given for each in order.tell(one)]


def test_what_comes_in_order_is_told_as_it_is() -> None:
    script = [Told(phase, f"about {phase}") for phase in IMAGE_PHASES]

    assert told(*script) == script


def test_what_was_just_told_is_not_told_again() -> None:
    health = Told(Phase.HEALTH_CHECK, "Checking comfyui")
    waiting = Told(Phase.VRAM_ACQUIRE, "putting reasoner to sleep")

    assert told(health, health, waiting, waiting) == [health, waiting]


def test_a_phase_that_is_left_out_is_told_as_skipped() -> None:
    found = told(Told(Phase.QUEUED, "Submitted"), Told(Phase.ENCODING, "saving"))

    assert [each.phase for each in found] == list(IMAGE_PHASES[:9])
    assert {each.detail for each in found if each.phase not in (Phase.QUEUED, Phase.ENCODING)} == {"Skipped"}


def test_what_comes_late_is_told_of_the_phase_that_is_under_way() -> None:
    found = told(Told(Phase.QUEUED, "Submitted"), Told(Phase.MODEL_SWAP, "loading flux1-dev-fp8.safetensors"))

    assert found[-1] == Told(Phase.QUEUED, "loading flux1-dev-fp8.safetensors")


def test_an_engine_that_is_started_belongs_to_the_memory_that_it_takes() -> None:
    found = told(Told(Phase.HEALTH_CHECK), Told(Phase.ENGINE_START, "comfyui is starting", percent=40.0))

    assert found[-1] == Told(Phase.VRAM_ACQUIRE, "comfyui is starting", percent=40.0)


@given(st.lists(st.builds(Told, st.sampled_from(Phase), st.sampled_from(["", "a", "b"]))))
def test_whatever_comes_the_phases_are_a_beginning_of_all_in_order(given: list[Told]) -> None:
    phases = [each.phase for each in told(*given)]

    seen = list(dict.fromkeys(phases))
    assert seen == list(IMAGE_PHASES[: len(seen)])
    assert phases == sorted(phases, key=IMAGE_PHASES.index)
