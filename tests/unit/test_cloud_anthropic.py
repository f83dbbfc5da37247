"""OpenAI's shapes to Anthropic's Messages and back, however the stream is cut."""

from __future__ import annotations

import itertools
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from controlplane.cloud import CloudModel, CloudUsage, ModelPrices, Thinking
from controlplane.cloud._anthropic_answer import AnthropicAnswer
from controlplane.cloud._anthropic_request import anthropic_body
from rung.errors import EngineProtocolError, InvalidRequestError, UnsuitableTargetError


def _model(thinking: Thinking = Thinking.OFF, drop: frozenset[str] = frozenset()) -> CloudModel:
    return CloudModel(
        id="anthropic/m",
        provider="anthropic",
        model="claude-m",
        aliases=(),
        capabilities=("chat",),
        context_tokens=0,
        max_output_tokens=4096,
        prices=ModelPrices(prompt_usd=1, completion_usd=1, cached_usd=1),
        drop_fields=drop,
        thinking=thinking,
    )


def _request(
    messages: list[Any] | None = None, model: CloudModel | None = None, **fields: Any
) -> dict[str, Any]:
    fields["messages"] = [{"role": "user", "content": "Hi"}] if messages is None else messages
    body = anthropic_body(fields, model or _model(), stream=True)
    found: dict[str, Any] = msgspec.json.decode(body)
    return found


# Requests ---------------------------------------------------------------------------------------------


def test_a_plain_request() -> None:
    assert _request(model=_model(), seed=1, logprobs=True, presence_penalty=0.5) == {
        "model": "claude-m",
        "max_tokens": 4096,
        "messages": [{"role": "user", "content": [{"type": "text", "text": "Hi"}]}],
        "stream": True,
    }


def test_systems_are_gathered_and_neighbours_become_one_turn() -> None:
    request = _request(
        [
            {"role": "system", "content": "One."},
            {"role": "user", "content": "a"},
            {"role": "developer", "content": [{"type": "text", "text": "Two."}]},
            {"role": "user", "content": [{"type": "text", "text": "b"}, {"type": "text", "text": ""}]},
            {"role": "assistant", "content": "", "reasoning_content": "hm"},
            {"role": "assistant", "content": "c"},
            {"role": "user", "content": "d"},
        ]
    )

    assert request["system"] == "One.\n\nTwo."
    assert request["messages"] == [
        {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
        {"role": "assistant", "content": [{"type": "text", "text": "c"}]},
        {"role": "user", "content": [{"type": "text", "text": "d"}]},
    ]


def test_an_answer_that_was_begun_ends_without_a_blank() -> None:
    begun = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "It is "}]
    blank = [{"role": "user", "content": "a"}, {"role": "assistant", "content": " "}]

    assert _request(begun)["messages"][-1]["content"] == [{"type": "text", "text": "It is"}]
    assert [turn["role"] for turn in _request(blank)["messages"]] == ["user"]


def test_calls_of_tools_and_their_results() -> None:
    calls = [
        {"id": "1", "type": "function", "function": {"name": "f", "arguments": '{"x":1}'}},
        {"id": "2", "type": "function", "function": {"name": "g", "arguments": ""}},
    ]
    request = _request(
        [
            {"role": "user", "content": "go"},
            {"role": "assistant", "content": "Looking.", "tool_calls": calls},
            {"role": "tool", "tool_call_id": "1", "content": "one"},
            {"role": "tool", "tool_call_id": "2", "content": [{"type": "text", "text": "two"}]},
            {"role": "user", "content": "and?"},
        ],
        tools=[{"type": "function", "function": {"name": "f", "description": "F."}}],
        tool_choice={"type": "function", "function": {"name": "f"}},
        parallel_tool_calls=False,
    )

    assert request["messages"][1]["content"] == [
        {"type": "text", "text": "Looking."},
        {"type": "tool_use", "id": "1", "name": "f", "input": {"x": 1}},
        {"type": "tool_use", "id": "2", "name": "g", "input": {}},
    ]
    assert request["messages"][2]["content"] == [
        {"type": "tool_result", "tool_use_id": "1", "content": "one"},
        {"type": "tool_result", "tool_use_id": "2", "content": [{"type": "text", "text": "two"}]},
        {"type": "text", "text": "and?"},
    ]
    schema = {"type": "object", "properties": {}}
    assert request["tools"] == [{"name": "f", "description": "F.", "input_schema": schema}]
    assert request["tool_choice"] == {"type": "tool", "name": "f", "disable_parallel_tool_use": True}


@pytest.mark.parametrize(
    ("choice", "told"),
    [(None, None), ("auto", {"type": "auto"}), ("none", {"type": "none"}), ("required", {"type": "any"})],
)
def test_who_chooses_a_tool(choice: str | None, told: dict[str, str] | None) -> None:
    tools = [{"type": "function", "function": {"name": "f"}}]

    assert _request(tools=tools, tool_choice=choice).get("tool_choice") == told
    assert "tool_choice" not in _request(tool_choice=choice)


def test_images_and_documents() -> None:
    parts = [
        {"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA", "detail": "high"}},
        {"type": "image_url", "image_url": {"url": "https://x.example/cat.jpg"}},
        {"type": "file", "file": {"file_data": "data:application/pdf;base64,BBBB", "filename": "a.pdf"}},
    ]

    assert _request([{"role": "user", "content": parts}])["messages"][0]["content"] == [
        {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": "AAAA"}},
        {"type": "image", "source": {"type": "url", "url": "https://x.example/cat.jpg"}},
        {
            "type": "document",
            "source": {"type": "base64", "media_type": "application/pdf", "data": "BBBB"},
            "title": "a.pdf",
        },
    ]


@pytest.mark.parametrize(
    ("fields", "told"),
    [
        ({"max_tokens": 9}, {"max_tokens": 9}),
        ({"max_tokens": 9, "max_completion_tokens": 8}, {"max_tokens": 8}),
        ({"max_tokens": 99_999}, {"max_tokens": 4096}),
        ({"temperature": 1.7}, {"temperature": 1.0}),
        ({"temperature": 0, "top_p": 0.5}, {"temperature": 0, "top_p": None}),
        ({"top_p": 0.5}, {"top_p": 0.5}),
        ({"stop": "END"}, {"stop_sequences": ["END"]}),
        ({"stop": ["a", "\n", "b"]}, {"stop_sequences": ["a", "b"]}),
        ({"stop": "\n"}, {"stop_sequences": None}),
        ({"user": "u-1"}, {"metadata": {"user_id": "u-1"}}),
        ({"n": 1, "reasoning_effort": "high"}, {"n": None, "thinking": None}),
    ],
)
def test_what_a_request_may_set(fields: dict[str, Any], told: dict[str, Any]) -> None:
    request = _request(**fields)

    assert {name: request.get(name) for name in told} == told


def test_a_wish_for_json_is_told_in_words() -> None:
    wanted = {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "object"}}}

    assert '{"type":"object"}' in _request(response_format=wanted)["system"]
    assert "JSON object" in _request(response_format={"type": "json_object"})["system"]
    assert "system" not in _request(response_format={"type": "text"})


def test_thinking_is_asked_for_where_it_can_be() -> None:
    budget, adaptive = _model(Thinking.BUDGET), _model(Thinking.ADAPTIVE)
    result = [
        {"role": "user", "content": "a"},
        {
            "role": "assistant",
            "tool_calls": [{"id": "1", "function": {"name": "f", "arguments": "{}"}}],
        },
        {"role": "tool", "tool_call_id": "1", "content": "x"},
    ]

    high = _request(model=budget, reasoning_effort="high", temperature=0.3, top_k=4)
    assert high["thinking"] == {"type": "enabled", "budget_tokens": 3584}
    assert not high.keys() & {"temperature", "top_k"}
    low = _request(model=adaptive, reasoning_effort="low")
    assert (low["thinking"], low["output_config"]) == ({"type": "adaptive"}, {"effort": "low"})
    for without in (
        _request(model=budget),
        _request(model=budget, reasoning_effort="none"),
        _request(model=budget, reasoning_effort="high", max_tokens=1500),
        _request(model=budget, reasoning_effort="high", tool_choice="required"),
        _request(result, model=budget, reasoning_effort="high"),
    ):
        assert "thinking" not in without


def test_fields_that_a_model_refuses_are_left_out() -> None:
    assert "temperature" not in _request(model=_model(drop=frozenset({"temperature"})), temperature=0.5)


@pytest.mark.parametrize(
    ("messages", "fields", "said"),
    [
        ([{"role": "system", "content": "x"}], {}, "nothing to answer"),
        (["x"], {}, r"messages\[0\] is not an object"),
        ([{"role": "robot", "content": "x"}], {}, "role is 'robot'"),
        ([{"role": "user", "content": [{"type": "smell"}]}], {}, r"content\[0\].type is 'smell'"),
        ([{"role": "user", "content": 3}], {}, "neither a text nor a list"),
        (
            [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "file:///etc"}}]}],
            {},
            "neither",
        ),
        ([{"role": "tool", "content": "x"}], {}, "tool_call_id is missing"),
        (
            [{"role": "assistant", "tool_calls": [{"id": "1", "function": {"name": "f", "arguments": "{"}}]}],
            {},
            "not a JSON object",
        ),
        (None, {"tools": [{}]}, r"tools\[0\] has no function"),
        (None, {"tools": [{"function": {"name": "f"}}], "tool_choice": "maybe"}, "tool_choice is 'maybe'"),
    ],
)
def test_what_is_wrong_with_a_request_is_said(
    messages: list[Any] | None, fields: dict[str, Any], said: str
) -> None:
    with pytest.raises(InvalidRequestError, match=said):
        _request(messages, **fields)


@pytest.mark.parametrize(
    ("part", "fields"),
    [
        ({"type": "input_audio", "input_audio": {}}, {}),
        ({"type": "file", "file": {"file_id": "f"}}, {}),
        ({"type": "file", "file": {"file_data": "data:text/csv;base64,AA"}}, {}),
        ({"type": "text", "text": "x"}, {"n": 2}),
    ],
)
def test_what_another_target_could_do_is_no_fault_of_the_caller(
    part: dict[str, Any], fields: dict[str, Any]
) -> None:
    with pytest.raises(UnsuitableTargetError):
        _request([{"role": "user", "content": [part]}], **fields)


# Answers ----------------------------------------------------------------------------------------------


def _event(kind: str, **fields: Any) -> bytes:
    return b"event: %b\ndata: %b\n\n" % (kind.encode(), msgspec.json.encode({"type": kind, **fields}))


USAGE = {
    "input_tokens": 10,
    "cache_read_input_tokens": 30,
    "cache_creation_input_tokens": 2,
    "output_tokens": 1,
}
START = _event("message_start", message={"id": "msg_1", "model": "claude-m-2", "content": [], "usage": USAGE})
STREAM = [
    START,
    _event("ping"),
    _event("content_block_start", index=0, content_block={"type": "thinking", "thinking": ""}),
    _event("content_block_delta", index=0, delta={"type": "thinking_delta", "thinking": "Hm, "}),
    _event("content_block_delta", index=0, delta={"type": "thinking_delta", "thinking": "so."}),
    _event("content_block_delta", index=0, delta={"type": "signature_delta", "signature": "c2ln"}),
    _event("content_block_stop", index=0),
    _event("content_block_start", index=1, content_block={"type": "text", "text": ""}),
    _event("content_block_delta", index=1, delta={"type": "text_delta", "text": "Grü\u00dfe "}),
    _event("something_new", index=1, delta={"type": "text_delta", "text": "no"}),
    _event("content_block_delta", index=1, delta={"type": "novel_delta", "text": "no"}),
    _event("content_block_delta", index=1, delta={"type": "text_delta", "text": "\U0001f600"}),
    _event("content_block_stop", index=1),
    _event(
        "content_block_start",
        index=2,
        content_block={"type": "tool_use", "id": "t1", "name": "f", "input": {}},
    ),
    _event("content_block_delta", index=2, delta={"type": "input_json_delta", "partial_json": ""}),
    _event("content_block_delta", index=2, delta={"type": "input_json_delta", "partial_json": '{"x'}),
    _event("content_block_delta", index=2, delta={"type": "input_json_delta", "partial_json": '":1}'}),
    _event("content_block_stop", index=2),
    _event(
        "content_block_start",
        index=3,
        content_block={"type": "tool_use", "id": "t2", "name": "g", "input": {}},
    ),
    _event("content_block_stop", index=3),
    _event("message_delta", delta={"stop_reason": "tool_use"}, usage={"output_tokens": 25}),
    _event("message_stop"),
]


def _answer() -> AnthropicAnswer:
    return AnthropicAnswer("anthropic/m", "claude-m", created_s=5)


def _chunks(stream: bytes) -> list[Any]:
    events = [event.removeprefix(b"data: ") for event in stream.split(b"\n\n") if event]
    return [event if event == b"[DONE]" else msgspec.json.decode(event) for event in events]


def _told(pieces: list[bytes], answer: AnthropicAnswer | None = None) -> bytes:
    answer = answer or _answer()
    return b"".join([*(answer.feed(piece) for piece in pieces), answer.finish()])


def _cut(stream: bytes, cuts: list[int]) -> list[bytes]:
    places = sorted({0, len(stream), *(cut % (len(stream) + 1) for cut in cuts)})
    return [stream[start:end] for start, end in itertools.pairwise(places)]


def test_a_stream_in_openais_shape() -> None:
    answer = _answer()
    chunks = _chunks(_told(STREAM, answer))

    assert chunks[-1] == b"[DONE]"
    assert all(chunk["id"] == "chatcmpl-1" and chunk["created"] == 5 for chunk in chunks[:-1])
    assert all(chunk["model"] == "claude-m-2" for chunk in chunks[:-1])
    assert chunks[-2]["choices"] == []
    assert chunks[-2]["usage"] == {
        "prompt_tokens": 42,
        "completion_tokens": 25,
        "total_tokens": 67,
        "prompt_tokens_details": {"cached_tokens": 30},
    }
    choices = [chunk["choices"][0] for chunk in chunks[:-2]]
    assert [choice["finish_reason"] for choice in choices] == [None] * (len(choices) - 1) + ["tool_calls"]
    assert [choice["delta"] for choice in choices] == [
        {"role": "assistant", "content": ""},
        {"reasoning_content": "Hm, "},
        {"reasoning_content": "so."},
        {"content": "Grü\u00dfe "},
        {"content": "\U0001f600"},
        {
            "tool_calls": [
                {"index": 0, "id": "t1", "type": "function", "function": {"name": "f", "arguments": ""}}
            ]
        },
        {"tool_calls": [{"index": 0, "function": {"arguments": '{"x'}}]},
        {"tool_calls": [{"index": 0, "function": {"arguments": '":1}'}}]},
        {
            "tool_calls": [
                {"index": 1, "id": "t2", "type": "function", "function": {"name": "g", "arguments": ""}}
            ]
        },
        {"tool_calls": [{"index": 1, "function": {"arguments": "{}"}}]},
        {},
    ]
    assert (answer.usage, answer.final) == (CloudUsage(42, 25, 30), True)
    assert answer.delivered_bytes == len("Hm, so.Grüße \U0001f600".encode()) + len('{"x":1}{}')


@given(st.lists(st.integers(0, 10**6), max_size=40), st.booleans(), st.booleans())
def test_any_cut_of_a_stream_gives_the_same_bytes(cuts: list[int], crlf: bool, last_blank_line: bool) -> None:
    stream = b"".join(STREAM)
    if crlf:
        stream = stream.replace(b"\n", b"\r\n")
    if not last_blank_line:
        stream = stream.rstrip(b"\r\n")

    assert _told(_cut(stream, cuts)) == _told(STREAM)


@given(st.integers(0, len(b"".join(STREAM)) - 1), st.lists(st.integers(0, 10**6), max_size=8))
def test_a_stream_that_is_cut_off_is_a_beginning_of_the_whole_and_never_done(
    length: int, cuts: list[int]
) -> None:
    stream = b"".join(STREAM)[:length]
    answer = _answer()

    told = _told(_cut(stream, cuts), answer)

    complete = length >= len(b"".join(STREAM).rstrip())
    error = told.rpartition(b'data: {"error":')
    assert _told(STREAM).startswith(error[0] if error[1] else told)
    assert (b"[DONE]" in told) == complete


@pytest.mark.parametrize(
    ("event", "said"),
    [
        (_event("error", error={"type": "overloaded_error", "message": "Overloaded"}), "Overloaded"),
        (b"event: x\ndata: {not json\n\n", "an event that is not understood"),
        (b'data: {"type": 3}\n\n', "an event that is not understood"),
    ],
)
def test_after_an_error_nothing_comes(event: bytes, said: str) -> None:
    chunks = _chunks(_told([START, event, *STREAM]))

    assert len(chunks) == 2
    assert said in chunks[1]["error"]["message"]


@given(st.lists(st.binary(max_size=60) | st.sampled_from(STREAM), max_size=12))
def test_whatever_comes_only_whole_events_of_json_go_out(pieces: list[bytes]) -> None:
    for chunk in _chunks(_told(pieces)):
        assert chunk == b"[DONE]" or chunk.keys() & {"choices", "error"}


@pytest.mark.parametrize(
    ("stop_reason", "finish_reason"),
    [
        ("end_turn", "stop"),
        ("stop_sequence", "stop"),
        ("max_tokens", "length"),
        ("tool_use", "tool_calls"),
        ("refusal", "content_filter"),
        ("pause_turn", "stop"),
        ("thought_of_later", "stop"),
    ],
)
def test_why_an_answer_ends(stop_reason: str, finish_reason: str) -> None:
    end = _event("message_delta", delta={"stop_reason": stop_reason}, usage={"output_tokens": 2})
    whole = {"type": "message", "id": "msg_1", "content": [], "stop_reason": stop_reason, "usage": USAGE}

    assert _chunks(_told([START, end]))[-1]["choices"][0]["finish_reason"] == finish_reason
    answered = msgspec.json.decode(_answer().whole(msgspec.json.encode(whole)))
    assert answered["choices"][0]["finish_reason"] == finish_reason


def test_an_answer_in_one_piece() -> None:
    answer = _answer()
    blocks = [
        {"type": "thinking", "thinking": "Hm.", "signature": "x"},
        {"type": "text", "text": "Looking"},
        {"type": "server_tool_use", "id": "s", "name": "web_search", "input": {}},
        {"type": "text", "text": "."},
        {"type": "tool_use", "id": "t1", "name": "f", "input": {"x": [1, "a"]}},
    ]
    body = {"type": "message", "id": "msg_1", "model": "m2", "content": blocks, "stop_reason": "tool_use"}

    found = msgspec.json.decode(answer.whole(msgspec.json.encode({**body, "usage": USAGE})))

    assert (found["id"], found["object"], found["model"]) == ("chatcmpl-1", "chat.completion", "m2")
    assert found["choices"][0]["message"] == {
        "role": "assistant",
        "content": "Looking.",
        "reasoning_content": "Hm.",
        "tool_calls": [
            {"id": "t1", "type": "function", "function": {"name": "f", "arguments": '{"x":[1,"a"]}'}}
        ],
    }
    assert found["usage"]["prompt_tokens"] == 42
    assert (answer.usage, answer.final) == (CloudUsage(42, 1, 30), True)


@pytest.mark.parametrize(
    "body", [b"", b"\n\n", b'{"type":"message"', b'{"type":"error","error":{"message":"no"}}']
)
def test_what_is_no_answer_is_an_error(body: bytes) -> None:
    with pytest.raises(EngineProtocolError, match="anthropic/m sent"):
        _answer().whole(body)
