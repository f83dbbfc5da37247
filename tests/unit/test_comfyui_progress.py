"""What ComfyUI's events say about a prompt, as phases; and which of its previews are whose."""

from __future__ import annotations

import struct
from collections.abc import Mapping
from typing import Any

import msgspec
import pytest

from nodeagent.engines._comfyui_classes import NodeClass, node_class_of
from nodeagent.engines._comfyui_progress import Preview, PromptProgress, preview_of
from nodeagent.simulators._comfyui_nodes import node_kinds
from rung.types import Phase, PhaseProgress
from tests.engines.comfyui_graphs import Graph, changed, node, painted, sampled, sampled_twice

CLASSES: Mapping[str, NodeClass] = {
    name: node_class_of(kind.told(name)) for name, kind in node_kinds(("a.safetensors",)).items()
}


def follows(graph: Graph) -> PromptProgress:
    return PromptProgress(graph, CLASSES)


def told(progress: PromptProgress, event: str, **data: Any) -> list[PhaseProgress]:
    return list(progress.on(event, data))


def steps_of(progress: PromptProgress, node_id: str, steps: int) -> list[tuple[int | None, float | None]]:
    found = told(progress, "executing", node=node_id)
    for step in range(1, steps + 1):
        found += told(progress, "progress", node=node_id, value=step, max=steps)
    return [(each.step, each.percent) for each in found]


def test_the_first_and_the_last_step_are_told_and_between_them_each_ten_percent() -> None:
    found = steps_of(follows(sampled("a.safetensors", seed=1, steps=200, side=64)), "3", 200)

    assert found == [(0, 0.0), (1, 0.5), *[(20 * tenth, 10.0 * tenth) for tenth in range(1, 11)]]


def test_progress_that_newer_versions_tell_of_all_nodes_counts_and_is_not_told_twice() -> None:
    progress = follows(sampled("a.safetensors", seed=1, steps=4, side=64))
    state = {
        "3": {"value": 1, "max": 4, "state": "running"},
        "4": {"value": 1, "max": 1, "state": "finished"},
    }

    assert [each.step for each in told(progress, "progress_state", nodes=state)] == [1]
    assert told(progress, "progress", node="3", value=1, max=4) == []
    # From now on the plain events are enough.
    assert told(progress, "progress_state", nodes={"3": {"value": 4, "max": 4}}) == []


def test_nodes_that_a_node_brought_with_it_stand_for_it() -> None:
    progress = follows(sampled("a.safetensors", seed=1, steps=4, side=64))
    state = {"3.0.0.1": {"value": 2, "max": 4, "state": "running", "display_node_id": "3"}}

    assert [each.step for each in told(progress, "progress_state", nodes=state)] == [2]


def test_samplers_whose_steps_are_known_are_told_of_as_one() -> None:
    graph = sampled_twice("a.safetensors", seed=1, steps=(3, 1), side=64)
    progress = follows(graph)

    first, second = steps_of(progress, "3", 3), steps_of(progress, "10", 1)
    assert [percent for _, percent in first + second] == [0.0, 25.0, 50.0, 75.0, 75.0, 100.0]


def test_where_the_steps_of_one_are_not_known_each_is_told_of_by_itself() -> None:
    graph = changed(sampled_twice("a.safetensors", seed=1, steps=(3, 1), side=64), "10", steps=["5", 0])
    progress = follows(graph)

    assert [percent for _, percent in steps_of(progress, "3", 2)] == [0.0, 50.0, 100.0]
    assert told(progress, "executing", node="10")[0].detail == "sampler 2 of 2"


def test_a_part_of_the_steps_is_what_an_advanced_sampler_takes() -> None:
    graph = sampled_twice("a.safetensors", seed=1, steps=(20, 20), side=64)
    advanced = {**graph["10"]["inputs"], "start_at_step": 16, "end_at_step": 10_000}
    graph["10"] = {"class_type": "KSamplerAdvanced", "inputs": advanced}
    progress = follows(graph)

    assert steps_of(progress, "3", 20)[-1] == (20, round(100 * 20 / 24, 1))
    assert steps_of(progress, "10", 4)[-1] == (4, 100.0)


def test_a_sampler_that_is_cached_counts_as_done() -> None:
    progress = follows(sampled_twice("a.safetensors", seed=1, steps=(3, 1), side=64))

    assert told(progress, "execution_cached", nodes=["3", "4"]) == []
    assert steps_of(progress, "10", 1) == [(0, 75.0), (1, 100.0)]


def test_a_run_without_sampling_says_that_it_was_cached() -> None:
    progress = follows(sampled("a.safetensors", seed=1, steps=4, side=64))

    (found,) = told(progress, "execution_cached", nodes=["3", "4", "5", "6", "7", "8", "9"])
    assert (found.phase, found.detail, found.percent) == (Phase.SAMPLING, "taken from ComfyUI's cache", 100.0)


def test_loading_names_what_is_loaded_and_files_end_it() -> None:
    progress = follows(sampled("a.safetensors", seed=1, steps=4, side=64))
    found = [each for name in ("4", "6", "8", "9") for each in told(progress, "executing", node=name)]

    assert [(each.phase, each.detail) for each in found] == [
        (Phase.MODEL_SWAP, "loading a.safetensors"),
        (Phase.ENCODING, "decoding (VAEDecode)"),
        (Phase.ENCODING, "saving (SaveImage)"),
    ]


def test_steps_of_what_is_no_sampler_are_told_by_its_class() -> None:
    graph = {**painted(), "3": node("ImageUpscaleWithModel", image=["1", 0], upscale_model=["4", 0])}
    progress = follows(graph)

    (found,) = told(progress, "progress", node="3", value=1, max=2)
    assert (found.phase, found.detail, found.percent) == (Phase.GENERATING, "ImageUpscaleWithModel", 50.0)


@pytest.mark.parametrize("node_id", [None, "77", ""])
def test_events_of_nodes_that_are_not_in_the_graph_say_nothing(node_id: str | None) -> None:
    progress = follows(painted())

    assert told(progress, "executing", node=node_id) == []
    assert told(progress, "progress", node=node_id, value=1, max=2) == []
    assert told(progress, "progress_state", nodes={"77": None}) == []


def test_a_place_in_the_queue_is_told_once() -> None:
    progress = follows(painted())

    assert [progress.queued(ahead) is not None for ahead in (2, 2, 1, 0)] == [True, False, True, True]


# Previews.


def with_metadata(prompt_id: str) -> bytes:
    told_of = msgspec.json.encode({"prompt_id": prompt_id, "image_type": "image/png"})
    return struct.pack(">II", 4, len(told_of)) + told_of + b"picture"


def test_a_preview_that_says_whose_it_is_is_taken_by_that_prompt_only() -> None:
    mine = preview_of(with_metadata("mine"), "mine", ours_runs=False)

    assert mine == Preview("image/png", b"picture")
    assert preview_of(with_metadata("other"), "mine", ours_runs=True) is None


def test_an_old_preview_is_that_of_the_prompt_that_runs() -> None:
    frame = struct.pack(">II", 1, 1) + b"picture"

    assert preview_of(frame, "mine", ours_runs=True) == Preview("image/jpeg", b"picture")
    assert preview_of(frame, "mine", ours_runs=False) is None


@pytest.mark.parametrize(
    "frame",
    [
        b"",
        b"\0\0\0\1",
        struct.pack(">II", 1, 9),
        struct.pack(">II", 3, 2) + b"12text",
        struct.pack(">II", 4, 99),
    ],
)
def test_frames_that_are_no_previews_are_passed_over(frame: bytes) -> None:
    assert preview_of(frame, "mine", ours_runs=True) is None
