"""Graphs: what is read out of them, what is wrong with them, and what is said of refusals and failures."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from nodeagent.engines._comfyui_check import Finding, look_at, told
from nodeagent.engines._comfyui_classes import InputKind, NodeClass, node_class_of
from nodeagent.engines._comfyui_failures import failure, partial_refusal, refusal
from nodeagent.engines._comfyui_graph import files_read, graph_of, needed_by, with_files
from nodeagent.engines._comfyui_http import StoredFile
from nodeagent.engines._comfyui_results import content_type_of, files_of
from nodeagent.simulators._comfyui_graph import validate
from nodeagent.simulators._comfyui_nodes import node_kinds
from rung.errors import (
    EngineFailedError,
    EngineProtocolError,
    EngineRejectedError,
    InvalidRequestError,
    VramInfeasibleError,
)
from tests.engines.comfyui_graphs import changed, node, painted, sampled

KINDS = node_kinds(tuple(f"sd_xl_{number}.safetensors" for number in range(12)))
CLASSES = {name: node_class_of(kind.told(name)) for name, kind in KINDS.items()}
GOOD = sampled("sd_xl_1.safetensors", seed=1, steps=4, side=64)


# Reading.


@pytest.mark.parametrize(
    ("graph_json", "words"),
    [
        (b"oops", "no JSON"),
        (b"[]", "no nodes"),
        (b"{}", "no nodes"),
        (b'{"nodes": [], "links": []}', "Export"),
        (b'{"1": {"inputs": {}}}', "node 1 .* no class_type"),
        (b'{"1": {"class_type": "A", "inputs": []}}', r"inputs of node 1 \(A\)"),
    ],
)
def test_what_is_no_graph_is_refused(graph_json: bytes, words: str) -> None:
    with pytest.raises(InvalidRequestError, match=words):
        graph_of(graph_json)


def test_a_node_without_inputs_has_none() -> None:
    assert graph_of(b'{"1": {"class_type": "A"}}') == {"1": {"class_type": "A", "inputs": {}}}


def test_files_are_put_wherever_the_graph_names_them_and_nowhere_else() -> None:
    graph = {"1": node("A", image="@file:a", more=["@file:b", {"deep": "@file:a"}], text="an @file:c")}

    assert files_read(graph) == ["a", "b"]
    places = {"a": "rung/1.png", "b": "rung/2.png"}
    assert with_files(graph, places)["1"]["inputs"] == {
        "image": "rung/1.png",
        "more": ["rung/2.png", {"deep": "rung/1.png"}],
        "text": "an @file:c",
    }


def test_a_graph_may_be_a_long_chain() -> None:
    graph = {str(each): node("ImageInvert", image=[str(each + 1), 0]) for each in range(20_000)}
    graph["20000"] = node("EmptyImage")

    assert needed_by(graph, ("0",)) == [str(each) for each in range(20_000, -1, -1)]


# Looking.


def test_a_good_graph_has_no_findings() -> None:
    assert look_at(GOOD, CLASSES) == ()
    assert look_at(changed(GOOD, "3", seed=2**64 - 1, cfg="7.5"), CLASSES) == ()


def test_nodes_that_no_output_needs_are_not_looked_at() -> None:
    assert look_at({**GOOD, "99": node("KSampler")}, CLASSES) == ()


@pytest.mark.parametrize(
    ("graph", "words"),
    [
        (changed(GOOD, "4", ckpt_name="SDXL_1.safetensors"), "close to it are sd_xl_1.safetensors"),
        (changed(GOOD, "3", steps=0), "steps is 0; it takes an integer from 1 to 10000"),
        (changed(GOOD, "3", cfg=100.5), "cfg is 100.5; it takes a number from 0.0 to 100.0"),
        (changed(GOOD, "3", seed=2**64), "from 0 to 18446744073709551615"),
        (changed(GOOD, "3", scheduler="fast"), "there are simple, sgm_uniform, karras, normal, beta"),
    ],
)
def test_values_that_a_class_may_allow_are_found_but_not_sure(graph: dict[str, Any], words: str) -> None:
    (finding,) = look_at(graph, CLASSES)

    assert words in finding.what
    assert not finding.sure


def test_a_long_value_is_cut() -> None:
    (finding,) = look_at(changed(GOOD, "3", scheduler="x" * 1000), CLASSES)

    assert len(finding.what) < 300


def test_what_we_do_not_know_of_is_not_found_wanting() -> None:
    classes = {
        **CLASSES,
        "New": NodeClass(
            inputs={
                "grows": InputKind(type="COMFY_AUTOGROW_V3", required=True),
                "any": InputKind(type="*", required=True),
                "image": InputKind(type="IMAGE,MASK", required=True),
                "widget": InputKind(type="COMBO", required=True),
            },
            is_output=True,
        ),
    }
    graph = {"1": painted()["1"], "5": node("New", any=[1, 2, 3], image=["1", 0], widget={"a": 1})}

    assert look_at(graph, classes) == ()


def test_choices_are_read_in_both_of_their_shapes() -> None:
    told_of = {
        "input": {
            "required": {
                "old": [["a", "b"], {}],
                "new": ["COMBO", {"options": ["a", "b"]}],
                "file": [["a.png"], {"image_upload": True}],
                "remote": ["COMBO", {"remote": {"route": "/x"}}],
                "bare": ["IMAGE"],
            },
            "optional": {"number": ["FLOAT", {"min": -1, "max": 1.5}]},
        },
        "output": ["IMAGE", ["a", "b"]],
    }
    found = node_class_of(told_of)

    assert [found.inputs[name].choices for name in ("old", "new", "file", "remote")] == [
        ("a", "b"),
        ("a", "b"),
        None,
        None,
    ]
    assert (found.inputs["number"].minimum, found.inputs["number"].required) == (-1, False)
    assert found.outputs == ("IMAGE", "COMBO")
    assert node_class_of({}) == NodeClass()


@given(
    st.dictionaries(
        st.sampled_from(["3", "4", "5", "8", "9"]),
        st.dictionaries(
            st.sampled_from(
                ["steps", "cfg", "model", "samples", "images", "ckpt_name", "width", "latent_image"]
            ),
            st.one_of(
                st.none(),
                st.integers(-5, 20_000),
                st.text(max_size=5),
                st.tuples(st.sampled_from(["3", "4", "77"]), st.integers(-1, 4)).map(list),
            ),
            max_size=3,
        ),
        max_size=3,
    )
)
def test_of_a_graph_that_is_taken_only_what_fails_when_it_runs_is_found(
    changes: dict[str, dict[str, Any]],
) -> None:
    graph = GOOD
    for node_id, inputs in changes.items():
        graph = changed(graph, node_id, **inputs)
    findings = look_at(graph, CLASSES)
    taken = validate(graph, KINDS)

    if taken.error is None:
        # Nobody looks at values where links belong, nor at inputs that a class does not have.
        fails_later = ("a link to", "needs this node itself")
        assert all(any(mark in finding.what for mark in fails_later) for finding in findings)
    else:
        assert findings


# Refusals and failures.


def test_many_findings_are_counted() -> None:
    findings = [Finding(node_id=str(each), what=f"node {each}") for each in range(14)]

    assert told(findings).endswith("node 9; and 4 more")
    assert told([*findings[:2], findings[0]]) == "node 0; node 1"


def test_a_refusal_says_what_we_found_rather_than_what_comfyui_says() -> None:
    error = {
        "type": "value_not_in_list",
        "message": "Value not in list",
        "details": "ckpt_name: (list of length 99)",
    }
    extra = {"input_name": "ckpt_name"}
    other = {
        "type": "custom",
        "message": "Custom validation failed",
        "details": "text - too long",
        "extra_info": {},
    }
    body = {
        "error": {"type": "prompt_outputs_failed_validation", "message": "failed", "details": ""},
        "node_errors": {
            "4": {"errors": [{**error, "extra_info": extra}], "class_type": "CheckpointLoaderSimple"},
            "6": {"errors": [other], "class_type": "CLIPTextEncode"},
        },
    }
    ours = Finding(node_id="4", input_name="ckpt_name", what="our words")
    found = refusal("d1", 400, msgspec.json.encode(body), graph=GOOD, findings=(ours,))

    assert isinstance(found, EngineRejectedError)
    assert found.message == (
        "d1: ComfyUI refuses the workflow: our words; "
        "node 6 (CLIPTextEncode): Custom validation failed: text - too long"
    )


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ({"error": "no prompt", "node_errors": []}, "no prompt"),
        ({"error": {"type": "prompt_no_outputs"}, "node_errors": {}}, "prompt_no_outputs"),
        ({"error": {"message": "M", "details": "D"}}, "M: D"),
        ({"node_errors": {"3": {"errors": ["odd"]}}}, r"node 3 \(KSampler\): odd"),
        ({"node_errors": {"3": None}}, "None"),
    ],
)
def test_refusals_of_any_shape_are_read(body: object, words: str) -> None:
    found = refusal("d1", 400, msgspec.json.encode(body), graph=GOOD)

    assert isinstance(found, EngineRejectedError)
    with pytest.raises(EngineRejectedError, match=words):
        raise found


def test_a_server_error_is_not_the_callers_fault() -> None:
    assert isinstance(refusal("d1", 500, b"500 Internal", graph=GOOD), EngineFailedError)
    assert isinstance(refusal("d1", 403, b"", graph=GOOD), EngineProtocolError)


@pytest.mark.parametrize("nothing", [None, {}, []])
def test_no_errors_are_no_refusal(nothing: object) -> None:
    assert partial_refusal("d1", nothing, graph=GOOD, findings=()) is None


def test_too_little_memory_is_said_so() -> None:
    data = {
        "node_id": "3",
        "exception_type": "torch.OutOfMemoryError",
        "exception_message": "Allocation\n\nTIPS",
    }
    found = failure("d1", GOOD, [["execution_start", {}], ["execution_error", data]])

    assert isinstance(found, VramInfeasibleError)
    assert "ran out of GPU memory at node 3 (KSampler)" in found.message


def test_a_node_that_fails_otherwise_has_not_run_out_of_memory() -> None:
    data = {"node_id": "3", "exception_type": "ValueError", "exception_message": "a cat is no tensor"}
    found = failure("d1", GOOD, [["execution_error", data]])

    assert isinstance(found, EngineFailedError)
    assert found.message == "d1: node 3 (KSampler) failed: ValueError: a cat is no tensor"


def test_a_failure_of_which_nothing_is_known_says_that() -> None:
    assert "does not say why" in failure("d1", GOOD, [None, ["execution_start"], 3]).message


# Results.


def test_files_are_those_that_were_saved_in_the_order_of_nodes() -> None:
    row = {"filename": "a.png", "subfolder": "", "type": "output"}
    outputs = {
        "12": {"gifs": [{**row, "filename": "c.mp4", "format": "video/h264-mp4"}]},
        "9": {"images": [row, {**row, "filename": "b.png"}, row], "animated": [True]},
        "10": {"images": [{**row, "type": "temp"}], "text": ["hello"]},
        "11": None,
    }

    assert [file.filename for file in files_of(outputs)] == ["a.png", "b.png", "c.mp4"]
    assert files_of({"10": outputs["10"]}) == [StoredFile(filename="a.png", type="temp")]
    assert files_of({"10": {"text": ["hello"], "a": 3}}) == []


@pytest.mark.parametrize(
    ("filename", "start", "told_of", "wanted"),
    [
        ("a.bin", b"\x89PNG\r\n\x1a\n", "text/plain", "image/png"),
        ("a.png", b"\xff\xd8\xff\xe0", "image/png", "image/jpeg"),
        ("a.webp", b"RIFF\0\0\0\0WEBPVP8 ", "", "image/webp"),
        ("a.mp4", b"\0\0\0\x18ftypisom", "", "video/mp4"),
        ("a.mov", b"\0\0\0\x18ftypqt  ", "", "video/quicktime"),
        ("a.webm", b"\x1aE\xdf\xa3", "", "video/webm"),
        ("a.mkv", b"\x1aE\xdf\xa3", "", "video/x-matroska"),
        ("a.glb", b"glTF", "", "model/gltf-binary"),
        ("a.wav", b"RIFF\0\0\0\0WAVEfmt ", "", "audio/wav"),
        ("a.txt", b"hello", "", "text/plain"),
        ("a", b"hello", "application/x-own", "application/x-own"),
        ("a", b"hello", "", "application/octet-stream"),
    ],
)
def test_a_file_is_what_it_begins_like(filename: str, start: bytes, told_of: str, wanted: str) -> None:
    assert content_type_of(filename, start, told_of) == wanted
