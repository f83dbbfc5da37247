"""The orchestrator as judge of an effort: what it is asked, and what is read from its answer."""

from __future__ import annotations

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from controlplane.ladder._classifier import ClassifiedRequest
from controlplane.ladder._judge import judge_request, read_judgement


def answer(content: str | None) -> bytes:
    """A chat answer with a content."""
    return msgspec.json.encode({"choices": [{"message": {"role": "assistant", "content": content}}]})


@pytest.mark.parametrize(
    ("content", "effort"),
    [
        ('{"effort": 7}', 7),
        ('{"effort":10}', 10),
        ('{"effort": "6"}', 6),
        ('{"effort": 8.0}', 8),
        ('```json\n{"effort": 3}\n```', 3),
        ('<think>{"effort": 9}? No.</think>{"effort": 4}', 4),
        ('{"effort": 0}', None),
        ('{"effort": 11}', None),
        ('{"effort": 100}', None),
        ('{"effort": 7.5}', None),
        ('{"effort": -3}', None),
        ('{"effort": true}', None),
        ('{"effort": "hard"}', None),
        ("I would say 7.", None),
        ("", None),
        (None, None),
    ],
)
def test_an_effort_is_read_from_an_answer_and_nothing_else_is(
    content: str | None, effort: int | None
) -> None:
    assert read_judgement(answer(content)) == effort


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"not json",
        b"null",
        b"[]",
        b"{}",
        b'{"choices": []}',
        b'{"choices": [{}]}',
        b'{"choices": [{"message": {"content": [1]}}]}',
        b'{"error": {"message": "busy"}}',
        b'{"choices": [{"message": {"content": "\xff"}}]}',
        b"[" * 100_000,
    ],
)
def test_a_broken_answer_leaves_the_effort_to_the_classifier(body: bytes) -> None:
    assert read_judgement(body) is None


@given(st.binary() | st.text().map(answer))
def test_no_answer_makes_the_reader_raise(body: bytes) -> None:
    assert read_judgement(body) in {None, *range(1, 11)}


def test_the_judge_sees_the_ends_of_a_long_request_as_data_and_answers_briefly() -> None:
    text = "first words " + "x" * 100_000 + ' last "words"'
    body = msgspec.json.decode(judge_request(ClassifiedRequest(text=text, tools=True), model="small"))
    assert body["model"] == "small"
    assert body["temperature"] == 0
    assert body["stream"] is False
    assert body["max_tokens"] <= 64
    assert [message["role"] for message in body["messages"]] == ["system", "user"]
    shown = msgspec.json.decode(body["messages"][1]["content"])
    assert shown["request"].startswith("first words ")
    assert shown["request"].endswith(' last "words"')
    assert len(shown["request"]) < 4100
    assert shown["tools_offered"] is True


def test_a_request_that_is_no_unicode_can_still_be_judged() -> None:
    body = msgspec.json.decode(judge_request(ClassifiedRequest(text="half \ud800"), model="small"))
    assert "half ?" in body["messages"][1]["content"]
