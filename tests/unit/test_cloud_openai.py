"""OpenAI's dialect: what each provider is sent, and what is read of an answer that passes."""

from __future__ import annotations

import itertools
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from controlplane.cloud import CloudModel, CloudUsage, ModelPrices
from controlplane.cloud._openai import OpenAiAnswer, openai_body, quirks_of, request_fields
from rung.errors import EngineProtocolError, InvalidRequestError

FIELDS = {
    "model": "rung/auto",
    "messages": [
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Yes", "reasoning_content": "Hm."},
        {"role": "user", "content": "And?"},
    ],
    "temperature": 0.5,
    "effort": 9,
    "min_p": 0.1,
    "max_tokens": 100,
    "reasoning_effort": "low",
    "stream_options": {"include_usage": False},
}


def _sent(provider: str, *, reasons: bool = True, stream: bool = True, **changes: Any) -> dict[str, Any]:
    model = CloudModel(
        id=f"{provider}/m",
        provider=provider,
        model="the-model",
        aliases=(),
        capabilities=("chat", "reasoning") if reasons else ("chat",),
        context_tokens=0,
        max_output_tokens=500,
        prices=ModelPrices(prompt_usd=1, completion_usd=1, cached_usd=1),
        drop_fields=frozenset(changes.pop("drop", ())),
    )
    body = openai_body({**FIELDS, **changes}, model, stream=stream, quirks=quirks_of(provider))
    found: dict[str, Any] = msgspec.json.decode(body)
    return found


@pytest.mark.parametrize(
    ("provider", "limit", "thoughts", "left_out"),
    [
        ("openai", "max_completion_tokens", False, {"effort", "min_p", "max_tokens"}),
        ("deepseek", "max_tokens", True, {"effort", "min_p", "reasoning_effort", "max_completion_tokens"}),
        ("google", "max_tokens", False, {"effort", "min_p", "max_completion_tokens"}),
        ("elsewhere", "max_tokens", True, {"effort", "max_completion_tokens"}),
    ],
)
def test_each_provider_gets_what_it_takes(
    provider: str, limit: str, thoughts: bool, left_out: set[str]
) -> None:
    sent = _sent(provider)

    assert (sent["model"], sent["stream"], sent[limit]) == ("the-model", True, 100)
    assert sent["stream_options"] == {"include_usage": True}
    assert ("reasoning_content" in sent["messages"][1]) is thoughts
    assert not sent.keys() & left_out
    assert (FIELDS.keys() - left_out - {"stream_options"}) <= sent.keys() | {"max_tokens"}


def test_a_limit_is_always_sent_and_never_above_the_models() -> None:
    assert _sent("deepseek", max_tokens=None)["max_tokens"] == 500
    assert _sent("deepseek", max_tokens=10_000)["max_tokens"] == 500
    assert _sent("openai", max_completion_tokens=7)["max_completion_tokens"] == 7
    assert _sent("elsewhere", max_completion_tokens=7)["max_completion_tokens"] == 7


def test_only_who_reasons_is_told_how_hard() -> None:
    assert _sent("openai")["reasoning_effort"] == "low"
    assert "reasoning_effort" not in _sent("openai", reasons=False)


def test_fields_that_a_model_refuses_are_left_out() -> None:
    assert "temperature" not in _sent("openai", drop=["temperature"])
    assert "reasoning_content" not in _sent("deepseek", drop=["reasoning_content"])["messages"][1]


def test_an_answer_in_one_piece_is_not_asked_for_stream_options() -> None:
    sent = _sent("openai", stream=False)

    assert (sent["stream"], "stream_options" in sent) == (False, False)


@pytest.mark.parametrize("body", [b"", b"[]", b"{", b"{}", b'{"messages":[]}', b'{"messages":"x"}'])
def test_what_is_no_request_is_refused(body: bytes) -> None:
    with pytest.raises(InvalidRequestError):
        request_fields(body)


def _event(**fields: Any) -> bytes:
    return b"data: " + msgspec.json.encode(fields) + b"\n\n"


STREAM = [
    b": keep-alive\n\n",
    b"\n",
    _event(choices=[{"index": 0, "delta": {"role": "assistant", "reasoning_content": "Hm"}}]),
    _event(choices=[{"index": 0, "delta": {"content": "Grü\u00dfe"}}]),
    _event(choices=[{"index": 0, "delta": {"tool_calls": [{"index": 0, "function": {"arguments": "{}"}}]}}]),
    _event(choices=[{"index": 0, "delta": {}, "finish_reason": "stop"}]),
    _event(choices=[], usage={"prompt_tokens": 9, "completion_tokens": 4, "prompt_cache_hit_tokens": 6}),
    b"data: [DONE]\n\n",
]


@given(st.lists(st.integers(0, 10**6), max_size=30))
def test_any_cut_of_a_stream_passes_on_and_is_counted_the_same(cuts: list[int]) -> None:
    stream = b"".join(STREAM)
    places = sorted({0, len(stream), *(cut % (len(stream) + 1) for cut in cuts)})
    answer = OpenAiAnswer("p/m")

    told = b"".join(answer.feed(stream[start:end]) for start, end in itertools.pairwise(places))

    assert told + answer.finish() == stream
    assert (answer.usage, answer.final) == (CloudUsage(9, 4, 6), True)
    assert answer.delivered_bytes == len("HmGrüße{}".encode())


def test_an_error_in_an_array_is_told_as_others_tell_it() -> None:
    answer = OpenAiAnswer("p/m")

    told = answer.feed(STREAM[3] + b'data: [{"error":{"code":503,"message":"busy"}}]\n\n')

    assert told == STREAM[3] + b'data: {"error":{"message":"busy","type":"provider_error"}}\n\n'
    with pytest.raises(EngineProtocolError, match="busy"):
        answer.whole(b'[{"error":{"code":503,"message":"busy"}}]')


@pytest.mark.parametrize(
    ("usage", "counted"),
    [
        ({"prompt_tokens": 9, "completion_tokens": 4, "total_tokens": 30}, CloudUsage(9, 21)),
        ({"prompt_tokens": 9, "prompt_tokens_details": {"cached_tokens": 3}}, CloudUsage(9, 0, 3)),
        ({"prompt_tokens": 9, "prompt_tokens_details": None, "total_tokens": 9}, CloudUsage(9)),
    ],
)
def test_usage_is_what_is_billed(usage: dict[str, Any], counted: CloudUsage) -> None:
    answer = OpenAiAnswer("google/m")
    body = msgspec.json.encode({"choices": [{"message": {"content": "x"}}], "usage": usage})

    assert answer.whole(b"\n\n" + body + b"\n") == body
    assert answer.usage == counted


@given(st.lists(st.binary(max_size=60) | st.sampled_from(STREAM), max_size=12))
def test_whatever_comes_is_passed_on_without_harm(pieces: list[bytes]) -> None:
    answer = OpenAiAnswer("p/m")

    for piece in pieces:
        answer.feed(piece)
    answer.finish()


@pytest.mark.parametrize("body", [b"", b"\n\n", b'{"choices":'])
def test_what_is_no_json_is_an_error(body: bytes) -> None:
    with pytest.raises(EngineProtocolError, match="p/m sent an answer that is not JSON"):
        OpenAiAnswer("p/m").whole(body)
