"""What an engine's answer says, and which bytes of it are passed on."""

from __future__ import annotations

import json

import pytest

from controlplane.jobs import LiveJob
from controlplane.pipelines._openai import AnswerReader, check_status, engine_body, read_embeddings, read_head
from rung.errors import (
    EngineFailedError,
    EngineProtocolError,
    EngineRejectedError,
    InvalidRequestError,
    RungError,
)
from rung.types import JobKind, Policy, TokenDelta, ToolCallDelta, Usage, UsageReported


def _job() -> LiveJob:
    return LiveJob(
        job_id="job-1", kind=JobKind.CHAT, model="m", policy=Policy(), request_id="", on_change=lambda _: None
    )


def _frame(**fields: object) -> bytes:
    return b"data: " + json.dumps(fields).encode() + b"\n\n"


def _texts(job: LiveJob) -> list[TokenDelta]:
    return [event.payload for event in job.unstored() if isinstance(event.payload, TokenDelta)]


def _delta(finish: str | None = None, **delta: object) -> bytes:
    return _frame(choices=[{"index": 0, "delta": delta, "finish_reason": finish}])


USAGE = _frame(
    choices=[],
    usage={"prompt_tokens": 3, "completion_tokens": 2, "prompt_tokens_details": {"cached_tokens": 1}},
)
DONE = b"data: [DONE]\n\n"


@pytest.mark.parametrize("keep_usage", [True, False])
def test_a_stream_is_read_and_passed_on(keep_usage: bool) -> None:
    job = _job()
    reader = AnswerReader(job, "engine", keep_usage=keep_usage)
    chunks = [
        _delta(role="assistant", content=""),
        _delta(content="Hel"),
        _delta(content="lo", finish="stop"),
    ]

    passed_on = b"".join(
        [*(reader.feed(chunk) for chunk in chunks), reader.feed(USAGE + DONE), reader.finish()]
    )

    assert passed_on == b"".join(chunks) + (USAGE if keep_usage else b"")
    assert reader.finish_reason == "stop"
    payloads = [event.payload for event in job.unstored()]
    assert [each for each in payloads if isinstance(each, TokenDelta)] == [
        TokenDelta("Hel"),
        TokenDelta("lo"),
    ]
    assert UsageReported(Usage(3, 2, 1)) in payloads
    assert job.delivered_characters == 5


def test_reasoning_comes_under_either_name() -> None:
    job = _job()
    reader = AnswerReader(job, "engine", keep_usage=False)

    for delta in (_delta(reasoning_content="a"), _delta(reasoning="b"), _delta(content="c")):
        reader.feed(delta)

    assert _texts(job) == [TokenDelta("", "a"), TokenDelta("", "b"), TokenDelta("c")]


def test_text_that_comes_together_is_one_event() -> None:
    job = _job()
    reader = AnswerReader(job, "engine", keep_usage=False)

    reader.feed(_delta(reasoning="a") + _delta(reasoning="b") + _delta(content="c") + _delta(content="d"))
    reader.feed(_delta(content="e") + _delta(reasoning="f") + _delta(content="g", finish="stop") + USAGE)
    reader.finish()

    assert _texts(job) == [TokenDelta("cd", "ab"), TokenDelta("e"), TokenDelta("g", "f")]
    assert job.delivered_characters == 4
    assert isinstance(job.unstored()[-1].payload, UsageReported)


def test_text_of_several_choices_is_kept_apart() -> None:
    job = _job()
    reader = AnswerReader(job, "engine", keep_usage=False)
    other = _frame(choices=[{"index": 1, "delta": {"content": "x"}}])

    reader.feed(_delta(content="a") + other + other + _delta(content="b"))

    assert _texts(job) == [TokenDelta("a"), TokenDelta("xx", choice=1), TokenDelta("b")]


def test_text_before_a_tool_call_stands_before_it() -> None:
    job = _job()
    reader = AnswerReader(job, "engine", keep_usage=False)
    call = {"index": 0, "id": "call", "function": {"name": "look", "arguments": "{}"}}

    reader.feed(_delta(content="Let me ") + _delta(content="see", tool_calls=[call]) + _delta(content="!"))

    payloads = [event.payload for event in job.unstored()][1:]
    assert payloads == [
        TokenDelta("Let me see"),
        ToolCallDelta(index=0, id="call", name="look", arguments="{}"),
        TokenDelta("!"),
    ]


def test_two_chunks_in_one_event_are_not_understood() -> None:
    job = _job()
    reader = AnswerReader(job, "engine", keep_usage=False)
    two = _delta(content="a").removesuffix(b"\n\n") + b"," + _delta(content="b").removeprefix(b"data: ")

    reader.feed(two)

    assert reader.failed
    assert _texts(job) == []


def test_tool_calls_are_noted_by_index() -> None:
    job = _job()
    reader = AnswerReader(job, "engine", keep_usage=False)
    first = {"index": 1, "id": "call", "type": "function", "function": {"name": "look", "arguments": ""}}
    second = {"index": 1, "function": {"arguments": "{}"}}

    reader.feed(_delta(tool_calls=[first]) + _delta(tool_calls=[second]) + _delta(finish="tool_calls"))
    reader.finish()

    calls = [event.payload for event in job.unstored() if isinstance(event.payload, ToolCallDelta)]
    assert calls == [
        ToolCallDelta(index=1, id="call", name="look"),
        ToolCallDelta(index=1, arguments="{}"),
    ]
    assert reader.finish_reason == "tool_calls"


def test_an_error_frame_fails_the_answer_and_is_not_passed_on() -> None:
    reader = AnswerReader(_job(), "engine", keep_usage=False)
    good = _delta(content="x")

    passed_on = reader.feed(good + _frame(error={"message": "out of memory", "code": 500}) + DONE)

    assert passed_on == good
    with pytest.raises(EngineFailedError, match="out of memory"):
        reader.finish()


@pytest.mark.parametrize("end", [b"", DONE], ids=["cut", "done without finish reason"])
def test_an_answer_without_a_finish_reason_is_cut(end: bytes) -> None:
    reader = AnswerReader(_job(), "engine", keep_usage=False)
    reader.feed(_delta(content="x") + end)

    with pytest.raises(EngineProtocolError, match="mid-answer"):
        reader.finish()


def test_what_is_not_json_is_refused() -> None:
    reader = AnswerReader(_job(), "engine", keep_usage=False)

    reader.feed(b'data: {"choices": [\n\n')

    assert reader.failed
    with pytest.raises(EngineProtocolError, match="not JSON"):
        reader.finish()


def test_json_of_another_shape_is_passed_on() -> None:
    reader = AnswerReader(_job(), "engine", keep_usage=False)
    strange = _frame(choices="many")

    assert reader.feed(strange) == strange


def test_a_whole_answer_is_read() -> None:
    job = _job()
    reader = AnswerReader(job, "engine", keep_usage=True)
    message = {"role": "assistant", "content": "hi", "tool_calls": [{"id": "a", "function": {"name": "f"}}]}

    reader.whole(json.dumps({"choices": [{"message": message, "finish_reason": "stop"}]}).encode())
    reader.finish()

    payloads = [event.payload for event in job.unstored()]
    assert TokenDelta("hi") in payloads
    assert ToolCallDelta(index=0, id="a", name="f") in payloads


def test_only_what_must_change_of_a_body_changes() -> None:
    kept = b'"messages":[{"role":"user","content":"\\u00e9 1.0"}],"temperature":1.0,"x":[1e2]'
    body = b'{"model":"rung/auto",' + kept + b"}"

    sent = engine_body(body, model="served", stream=True)

    assert kept in sent
    assert json.loads(sent) == json.loads(body) | {
        "model": "served",
        "stream": True,
        "stream_options": {"include_usage": True},
    }


def test_a_whole_answer_is_asked_for_without_stream_options() -> None:
    sent = engine_body(b'{"model":"m","stream_options":{"include_usage":true}}', model="m", stream=False)

    assert json.loads(sent) == {"model": "m", "stream": False}


@pytest.mark.parametrize("body", [b"", b"[]", b"{", b'{"model": 3}', b'{"stream": "yes"}'])
def test_a_malformed_request_is_refused(body: bytes) -> None:
    with pytest.raises(InvalidRequestError):
        read_head(body)


@pytest.mark.parametrize(
    ("status", "body", "error", "text"),
    [
        (400, b'{"error":{"message":"too long","type":"BadRequestError"}}', EngineRejectedError, "too long"),
        (400, b'{"object":"error","message":"old shape"}', EngineRejectedError, "old shape"),
        (404, b'{"error":"model \'x\' not found"}', EngineRejectedError, "not found"),
        (422, b'{"detail":"no"}', EngineRejectedError, "no"),
        (429, b"", EngineFailedError, "HTTP 429"),
        (401, b'{"error":"Unauthorized"}', EngineFailedError, "Unauthorized"),
        (500, b"<html>oops</html>", EngineFailedError, "oops"),
        (503, b'{"error":{"message":"Loading model"}}', EngineFailedError, "Loading model"),
    ],
)
def test_a_status_says_whose_fault_it_is(status: int, body: bytes, error: type[RungError], text: str) -> None:
    with pytest.raises(error, match=text) as raised:
        check_status(status, body, "7", "engine")

    assert raised.value.metadata["engine_status"] == str(status)
    assert raised.value.metadata["retry_after"] == "7"


def test_embeddings_come_in_the_order_of_the_inputs() -> None:
    rows = [{"index": 1, "embedding": [2.0]}, {"index": 0, "embedding": [1.0]}]

    vectors, usage = read_embeddings(
        json.dumps({"data": rows, "usage": {"prompt_tokens": 4}}).encode(), "engine"
    )

    assert vectors == ((1.0,), (2.0,))
    assert usage == Usage(prompt_tokens=4)


def test_embeddings_that_are_none_are_refused() -> None:
    with pytest.raises(EngineProtocolError):
        read_embeddings(b'{"data": "none"}', "engine")
