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


def sampling(*percents: float, detail: str = "") -> list[Told]:
    return [Told(Phase.SAMPLING, detail, percent=percent) for percent in percents]


def test_sampling_is_told_in_steps_of_ten_percent_and_never_goes_back() -> None:
    found = told(Told(Phase.QUEUED), *sampling(0.0, 3.0, 12.0, 7.0, 21.9, 22.0, 95.0, 100.0, 100.0, 40.0))

    assert [each.percent for each in found if each.phase is Phase.SAMPLING] == [0.0, 12.0, 22.0, 95.0, 100.0]


def test_a_second_sampler_is_told_without_taking_the_whole_back() -> None:
    second = [
        Told(Phase.SAMPLING, "sampler 2 of 2", step=step, percent=percent)
        for step, percent in ((0, 0.0), (2, 50.0))
    ]
    found = told(*sampling(0.0, 50.0, 100.0, detail="sampler 1 of 2"), *second)

    assert [(each.step, each.percent) for each in found][-2:] == [(0, None), (2, None)]
    assert [each.percent for each in found if each.detail == "sampler 1 of 2"] == [0.0, 50.0, 100.0]


def test_numbers_of_a_phase_that_is_over_are_not_told_of_another() -> None:
    saving = Told(Phase.ENCODING, "saving")

    assert told(saving, *sampling(75.0))[-1] == saving
