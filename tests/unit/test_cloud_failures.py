"""What cloud APIs mean by their errors, and when they want to be asked again."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from controlplane.cloud import CloudFailureKind, classify_failure

#: 2026-11-21 18:49:37 UTC.
NOW_S = 1_795_286_977.0


def _error(**fields: Any) -> bytes:
    return msgspec.json.encode({"error": fields})


@pytest.mark.parametrize(
    ("status", "body", "kind"),
    [
        (400, _error(message="no", type="invalid_request_error"), "caller"),
        (413, b"", "caller"),
        (422, _error(message="no"), "caller"),
        (401, _error(message="no", code="invalid_api_key"), "key"),
        (403, _error(message="no", type="permission_error"), "key"),
        (400, _error(message="API key not valid. Please pass a valid API key."), "key"),
        (402, _error(message="Insufficient Balance"), "balance"),
        (429, _error(message="x", type="insufficient_quota", code="insufficient_quota"), "balance"),
        (400, _error(message="Your credit balance is too low to access the API."), "balance"),
        (
            400,
            _error(message="You have reached your specified API usage limits. You will regain access"),
            "balance",
        ),
        (
            429,
            _error(message="Quota exceeded for metric: x, limit: 0", status="RESOURCE_EXHAUSTED"),
            "balance",
        ),
        (400, _error(message="the usage limits of this field are 0 to 1"), "caller"),
        (429, _error(message="Rate limit reached, limit: 500"), "rate_limit"),
        (404, _error(message="no such model", code="model_not_found"), "config"),
        (405, b"", "config"),
        (301, b"<html>moved</html>", "config"),
        (408, b"", "server"),
        (409, b"", "server"),
        (500, b"", "server"),
        (503, b"<html>busy</html>", "server"),
        (504, b"", "server"),
        (529, _error(message="Overloaded", type="overloaded_error"), "server"),
    ],
)
def test_whose_fault_it_is(status: int, body: bytes, kind: str) -> None:
    assert classify_failure(status, {}, body, NOW_S).kind == CloudFailureKind(kind)


@pytest.mark.parametrize(
    ("headers", "body", "retry_after_s"),
    [
        ({}, b"", None),
        ({"retry-after": "7"}, b"", 7.0),
        ({"retry-after": "0.5"}, b"", 0.5),
        ({"retry-after": "-3"}, b"", 0.0),
        ({"retry-after": "Sat, 21 Nov 2026 18:49:57 GMT"}, b"", 20.0),
        ({"retry-after": "Sat, 21 Nov 2026 18:49:07 GMT"}, b"", 0.0),
        ({"retry-after": "soon"}, b"", None),
        ({"retry-after": "nan"}, b"", None),
        ({"retry-after-ms": "1500", "retry-after": "2"}, b"", 1.5),
        ({"retry-after": ""}, _error(details=[{"@type": "x"}, {"retryDelay": "46s"}]), 46.0),
        ({}, msgspec.json.encode([{"error": {"details": [{"retryDelay": "1.5s"}]}}]), 1.5),
        ({"x-ratelimit-reset-requests": "6m0s", "x-ratelimit-remaining-requests": "0"}, b"", 360.0),
        ({"x-ratelimit-reset-requests": "6m0s", "x-ratelimit-remaining-requests": "1"}, b"", None),
        ({"x-ratelimit-reset-tokens": "20ms", "x-ratelimit-remaining-tokens": "0"}, b"", 0.02),
        (
            {
                "anthropic-ratelimit-requests-reset": "2026-11-21T18:50:37Z",
                "anthropic-ratelimit-requests-remaining": "0",
                "anthropic-ratelimit-tokens-reset": "2026-11-21T19:50:37Z",
                "anthropic-ratelimit-tokens-remaining": "50",
            },
            b"",
            60.0,
        ),
    ],
)
def test_when_to_come_back(headers: dict[str, str], body: bytes, retry_after_s: float | None) -> None:
    assert classify_failure(429, headers, body, NOW_S).retry_after_s == retry_after_s


@pytest.mark.parametrize(
    ("body", "message", "code"),
    [
        (
            _error(message="too long", type="invalid_request_error", code=None),
            "too long",
            "invalid_request_error",
        ),
        (msgspec.json.encode([{"error": {"code": 400, "message": "m", "status": "S"}}]), "m", "400"),
        (msgspec.json.encode({"type": "error", "error": {"type": "t", "message": "m"}}), "m", "t"),
        (msgspec.json.encode({"error": "plain"}), "plain", ""),
        (msgspec.json.encode({"detail": "Not Found"}), "Not Found", ""),
        (b"  upstream went away \n", "upstream went away", ""),
        (b"<!doctype html><title>502</title>", "", ""),
        (b"", "", ""),
        (b"[]", "", ""),
    ],
)
def test_its_own_words(body: bytes, message: str, code: str) -> None:
    failure = classify_failure(400, {}, body, NOW_S)

    assert (failure.message, failure.code) == (message, code)


_json = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=8),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(["error", "message", "type", "code", "details", "retryDelay", "status"]),
            inner,
            max_size=4,
        )
    ),
    max_leaves=12,
)


@given(
    st.integers(300, 599),
    st.dictionaries(
        st.sampled_from(
            [
                "retry-after",
                "retry-after-ms",
                "x-ratelimit-reset-tokens",
                "x-ratelimit-remaining-tokens",
                "anthropic-ratelimit-requests-reset",
                "anthropic-ratelimit-requests-remaining",
            ]
        ),
        st.text(max_size=24) | st.sampled_from(["0", "1e400", "9" * 40, "Sat, 99 Nov 2026 18:49:57 GMT"]),
    ),
    _json.map(msgspec.json.encode) | st.binary(max_size=64),
)
def test_whatever_comes_is_classified(status: int, headers: dict[str, str], body: bytes) -> None:
    failure = classify_failure(status, headers, body, NOW_S)

    assert failure.retry_after_s is None or 0.0 <= failure.retry_after_s < float("inf")
    assert (failure.kind is CloudFailureKind.CALLER) <= (400 <= status < 500)
