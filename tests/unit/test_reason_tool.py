"""The `reason` tool: offered beside the caller's own, and its calls told from theirs."""

from __future__ import annotations

import json
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from controlplane.pipelines._reason_tool import ReasonCall, ReasonFilter, ReasonTalk, reasoner_body

USER = {"role": "user", "content": "Why?"}
LOOK = {"type": "function", "function": {"name": "look", "parameters": {}}}
DONE = b"data: [DONE]\n\n"


def frame(delta: dict[str, Any] | None = None, finish: str | None = None, **fields: Any) -> bytes:
    choices = [] if delta is None else [{"index": 0, "delta": delta, "finish_reason": finish}]
    answer = {"id": "c1", "model": "m", "choices": choices} | fields
    return b"data: " + json.dumps(answer).encode() + b"\n\n"


def call(index: int, name: str = "", arguments: str = "", call_id: str = "") -> dict[str, Any]:
    function: dict[str, str] = {"arguments": arguments}
    if name:
        function["name"] = name
    return {"index": index, "function": function} | ({"id": call_id} if call_id else {})


def usage(prompt: int, completion: int) -> bytes:
    counts = {
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "total_tokens": prompt + completion,
    }
    return frame(usage=counts)


def events(stream: bytes) -> list[dict[str, Any]]:
    return [json.loads(event[6:]) for event in stream.split(b"\n\n") if event.startswith(b"data: {")]


def deltas(stream: bytes) -> list[dict[str, Any]]:
    return [choice["delta"] for event in events(stream) for choice in event["choices"]]


def talk(**fields: Any) -> ReasonTalk:
    return ReasonTalk(json.dumps({"model": "rung/8", "messages": [USER]} | fields).encode())


def test_the_tool_is_offered_beside_the_callers_own() -> None:
    body = json.loads(talk(tools=[LOOK], temperature=0.2).body(offer=True))

    assert [tool["function"]["name"] for tool in body["tools"]] == ["look", "reason"]
    assert body["temperature"] == 0.2
    assert body["messages"] == [USER]


def test_it_is_not_offered_when_it_may_not_be_called_again() -> None:
    assert "tools" not in json.loads(talk().body(offer=False))


def test_a_callers_tool_of_the_same_name_keeps_it() -> None:
    own = {"type": "function", "function": {"name": "reason"}}
    asked = talk(tools=[own])

    assert asked.tool_name == "rung_reason"
    assert [tool["function"]["name"] for tool in json.loads(asked.body(offer=True))["tools"]] == [
        "reason",
        "rung_reason",
    ]


@pytest.mark.parametrize(
    ("fields", "may"),
    [
        ({}, True),
        ({"n": 1, "tool_choice": "auto"}, True),
        ({"tool_choice": "required"}, True),
        ({"tool_choice": "none"}, False),
        ({"tool_choice": {"type": "function", "function": {"name": "look"}}}, False),
        ({"n": 2}, False),
    ],
)
def test_a_caller_who_leaves_no_room_for_the_tool_is_not_given_it(fields: dict[str, Any], may: bool) -> None:
    assert talk(**fields).may_call is may


def test_a_call_and_its_result_are_part_of_the_conversation() -> None:
    asked = talk()

    asked.add("Let me think.", [ReasonCall("r1", '{"problem": "2+2"}')], ["4"])

    messages = json.loads(asked.body(offer=False))["messages"]
    assert [message["role"] for message in messages] == ["user", "assistant", "tool"]
    assert messages[1]["content"] == "Let me think."
    assert messages[1]["tool_calls"][0]["function"]["name"] == "reason"
    assert messages[2] == {"role": "tool", "tool_call_id": "r1", "content": "4"}


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        ('{"problem": "2+2"}', "2+2"),
        ('{"problem": "2+2", "expected": "a number"}', "2+2\n\nExpected: a number"),
        ("2+2", "2+2"),
        ('{"question": "2+2"}', '{"question": "2+2"}'),
        ("[1]", "[1]"),
    ],
)
def test_the_problem_of_a_call(arguments: str, problem: str) -> None:
    assert ReasonCall("r", arguments).problem == problem
    assert json.loads(reasoner_body(problem))["messages"] == [{"role": "user", "content": problem}]


def test_an_answer_without_a_call_passes() -> None:
    filtered = ReasonFilter("reason")
    stream = (
        frame({"role": "assistant", "content": ""}) + frame({"content": "Hi"}, "stop") + usage(3, 1) + DONE
    )

    passed = filtered.feed(stream) + filtered.rest()

    assert events(passed) == events(stream)
    assert passed.endswith(DONE)
    assert filtered.calls == []


def test_a_call_of_ours_is_taken_out_with_the_end_of_its_answer() -> None:
    filtered = ReasonFilter("reason")
    stream = [
        frame({"role": "assistant", "content": "Let me think. "}),
        frame({"tool_calls": [call(0, "reason", call_id="r1")]}),
        frame({"tool_calls": [call(0, arguments='{"problem":')]}),
        frame({"tool_calls": [call(0, arguments='"2+2"}')]}),
        frame({}, "tool_calls"),
        usage(10, 5),
        DONE,
    ]

    passed = b"".join(filtered.feed(piece) for piece in stream) + filtered.rest()

    assert deltas(passed) == [{"role": "assistant", "content": "Let me think. "}]
    assert filtered.calls == [ReasonCall("r1", '{"problem":"2+2"}')]
    assert filtered.content == "Let me think. "


def test_several_answers_become_one() -> None:
    filtered = ReasonFilter("reason")
    filtered.feed(frame({"tool_calls": [call(0, "reason", "{}", "r1")]}) + usage(10, 5))
    filtered.begin()

    passed = filtered.feed(frame({"content": "4"}, "stop", id="c2", model="other") + usage(20, 7) + DONE)

    answer, counts = events(passed)
    assert (answer["id"], answer["model"]) == ("c1", "m")
    assert counts["usage"] == {"prompt_tokens": 30, "completion_tokens": 12, "total_tokens": 42}
    assert filtered.calls == []


def test_the_callers_calls_pass_as_they_come() -> None:
    filtered = ReasonFilter("reason")
    stream = (
        frame({"tool_calls": [call(0, "look", call_id="a")]})
        + frame({"tool_calls": [call(0, arguments="{}")]})
        + frame({}, "tool_calls")
    )

    assert events(filtered.feed(stream)) == events(stream)


def test_a_call_of_ours_after_one_of_the_callers_is_dropped() -> None:
    filtered = ReasonFilter("reason")

    passed = filtered.feed(
        frame({"tool_calls": [call(0, "look", call_id="a")]})
        + frame({"tool_calls": [call(1, "reason", call_id="r")]})
        + frame({"tool_calls": [call(1, arguments="{}")]})
        + frame({"tool_calls": [call(2, "look", call_id="b")]})
        + frame({}, "tool_calls")
    )

    assert [found["id"] for delta in deltas(passed) for found in delta.get("tool_calls", ())] == ["a", "b"]
    assert [found["index"] for delta in deltas(passed) for found in delta.get("tool_calls", ())] == [0, 1]
    assert events(passed)[-1]["choices"][0]["finish_reason"] == "tool_calls"
    assert filtered.calls == []


def test_the_callers_calls_after_one_of_ours_wait_for_its_result() -> None:
    filtered = ReasonFilter("reason")

    passed = filtered.feed(
        frame({"tool_calls": [call(0, "reason", "{}", "r")]})
        + frame({"tool_calls": [call(1, "look", "{}", "a")]})
        + frame({}, "tool_calls")
    )

    assert passed == b""
    assert [found.id for found in filtered.calls] == ["r"]


def test_errors_and_comments_pass() -> None:
    filtered = ReasonFilter("reason")
    stream = b": loading\n\n" + b'data: {"error": {"message": "out of memory"}}\n\n' + b"data: {broken\n\n"

    assert filtered.feed(stream) == stream


def test_a_whole_answer_is_looked_through_too() -> None:
    filtered = ReasonFilter("reason")
    made = {"id": "r", "type": "function", "function": {"name": "reason", "arguments": '{"problem":"x"}'}}
    message = {"role": "assistant", "content": None, "tool_calls": [made]}

    filtered.whole(json.dumps({"choices": [{"message": message, "finish_reason": "tool_calls"}]}).encode())
    assert filtered.calls == [ReasonCall("r", '{"problem":"x"}')]

    filtered.begin()
    said = {"choices": [{"message": {"role": "assistant", "content": "4"}, "finish_reason": "stop"}]}
    assert json.loads(filtered.whole(json.dumps(said).encode())) == said
    assert filtered.calls == []


def _deltas_of(said: list[str]) -> list[dict[str, Any]]:
    """Deltas with these texts, and calls of these tools, each with an index of its own."""
    return [
        {"tool_calls": [call(place, text[1:], "{}", f"id{place}")]} if text[0] == "!" else {"content": text}
        for place, text in enumerate(said)
    ]


_SAID = st.lists(
    st.one_of(st.text(alphabet="ab\n", min_size=1, max_size=5), st.sampled_from(["!look", "!reason"])),
    max_size=8,
).map(_deltas_of)


@given(said=_SAID, cuts=st.lists(st.integers(0, 2000), max_size=6))
def test_how_a_stream_is_cut_makes_no_difference(said: list[dict[str, Any]], cuts: list[int]) -> None:
    stream = b"".join(frame(delta) for delta in said) + frame({}, "stop") + usage(1, 1) + DONE
    at_once, in_pieces = ReasonFilter("reason"), ReasonFilter("reason")
    places = [0, *sorted(min(cut, len(stream)) for cut in cuts), len(stream)]

    whole = at_once.feed(stream) + at_once.rest()
    pieces = [in_pieces.feed(stream[start:end]) for start, end in pairwise(places)]

    assert b"".join(pieces) + in_pieces.rest() == whole
    assert in_pieces.calls == at_once.calls
    # Text is never lost, and ours is never seen.
    assert "".join(delta.get("content", "") for delta in deltas(whole)) == "".join(
        delta.get("content", "") for delta in said
    )
    assert b'"reason"' not in whole
