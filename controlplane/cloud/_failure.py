"""What a cloud API means by an error, and when it wants to be asked again. Pure.

Providers agree on little: out of money is 402 (DeepSeek), 429 (OpenAI, Gemini) or 400 (Anthropic); a wrong
key is 401, 403 or 400 (Gemini); and when to come back stands in one of six places.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from datetime import datetime
from enum import StrEnum
from typing import Any

import msgspec
from msgspec import Struct

from rung.service import parse_duration, parse_retry_after, parse_seconds, seconds_until


class CloudFailureKind(StrEnum):
    """Whose fault it is, and so what is to be done."""

    #: The request is wrong: no other target would take it.
    CALLER = "caller"
    #: Our key is refused: nothing of this provider answers until somebody looks into it.
    KEY = "key"
    #: No money or quota is left.
    BALANCE = "balance"
    #: What is configured does not exist there: a model, or the whole URL.
    CONFIG = "config"
    #: Too much at once.
    RATE_LIMIT = "rate_limit"
    #: It has too much to do, is broken, or took too long.
    SERVER = "server"


class CloudFailure(Struct, frozen=True):
    """An error of a cloud API.

    Attributes:
        kind: whose fault it is.
        retry_after_s: how long it asked to be left alone; None if it did not say.
        message: in its own words; may be empty.
        code: its own name of the error; may be empty.
    """

    kind: CloudFailureKind
    retry_after_s: float | None
    message: str
    code: str


#: Names and words with which providers say that money or quota, and not patience, is what is missing.
_BALANCE_CODES = frozenset({"insufficient_quota", "billing_error", "billing_hard_limit_reached"})
_BALANCE_WORDS = re.compile(
    r"credit balance|insufficient balance|insufficient_quota|spend(?:ing)? limit|usage limits?\b.*regain"
    r"|limit: 0\b",
    re.IGNORECASE | re.DOTALL,
)
_KEY_WORDS = re.compile(r"API[ _]key (?:not valid|not found|expired|invalid)|API_KEY_INVALID", re.IGNORECASE)
_CALLER = frozenset({400, 406, 411, 412, 413, 415, 417, 422, 431})
_CONFIG = frozenset({404, 405, 410})

#: OpenAI writes `x-ratelimit-reset-requests: 6m0s`, Anthropic
#: `anthropic-ratelimit-requests-reset: 2026-11-21T18:49:37Z`, each with how much remains beside it.
_LIMITS = re.compile(r"x-ratelimit-reset-(.+)|anthropic-(?:priority-)?ratelimit-(.+)-reset")
_LARGEST_MESSAGE = 2000


def classify_failure(status: int, headers: Mapping[str, str], body: bytes, now_s: float) -> CloudFailure:
    """Read an error.

    Args:
        status: of HTTP; anything but 2xx.
        headers: those that speak of limits, by their names in lower case.
        body: as it came, possibly only its beginning.
        now_s: Unix time, for those that say when and not how long.
    """
    error = _error_object(body)
    message = _text(error, "message") or _text(error, "detail")
    if not message and not isinstance(error, dict):
        message = str(error or "")
    code = _text(error, "code") or _text(error, "type") or _text(error, "status")
    kind = _kind(status, error, message)
    return CloudFailure(kind, _retry_after_s(headers, error, now_s), message[:_LARGEST_MESSAGE], code)


def _kind(status: int, error: Any, message: str) -> CloudFailureKind:
    codes = {_text(error, "code"), _text(error, "type"), _text(error, "status")}
    if status == 402 or (
        status in (400, 403, 429) and (codes & _BALANCE_CODES or _BALANCE_WORDS.search(message))
    ):
        return CloudFailureKind.BALANCE
    if status in (401, 403, 407) or (status == 400 and _KEY_WORDS.search(message)):
        return CloudFailureKind.KEY
    if status in _CONFIG or 300 <= status < 400:
        return CloudFailureKind.CONFIG
    if status == 429:
        return CloudFailureKind.RATE_LIMIT
    if status in _CALLER:
        return CloudFailureKind.CALLER
    # 408, 409 and 425 are trouble of theirs, too; an unknown status is no proof against the caller.
    return CloudFailureKind.SERVER


def error_text(error: Any) -> str:
    """The words in the error of an answer or a stream, whichever way it was wrapped."""
    found = _unwrapped(error)
    return (_text(found, "message") or _text(found, "detail") or str(found))[:_LARGEST_MESSAGE]


def _error_object(body: bytes) -> Any:
    try:
        return _unwrapped(msgspec.json.decode(body))
    except msgspec.DecodeError:
        # A proxy's page is no message for a person.
        text = body[:500].decode("utf-8", "replace").strip()
        return "" if text.startswith("<") else text


def _unwrapped(found: Any) -> Any:
    """The error in `{"error": ...}`, which Gemini's compatible endpoint puts into an array."""
    while isinstance(found, list) and found:
        found = found[0]
    return found.get("error", found) if isinstance(found, dict) else found


def _text(error: Any, name: str) -> str:
    value = error.get(name) if isinstance(error, dict) else None
    return str(value) if isinstance(value, str | int) else ""


def _retry_after_s(headers: Mapping[str, str], error: Any, now_s: float) -> float | None:
    """The first that is there of: milliseconds, seconds or a date, Gemini's RetryInfo, a spent limit."""
    milliseconds = parse_seconds(headers.get("retry-after-ms", ""))
    if milliseconds is not None:
        return milliseconds / 1000.0
    seconds = parse_retry_after(headers.get("retry-after", ""), now_s)
    if seconds is not None:
        return seconds
    delays = [delay for delay in _retry_delays(error) if delay is not None]
    if delays:
        return max(delays)
    resets = [left for left in _spent_limits(headers, now_s) if left is not None]
    return max(resets) if resets else None


def _retry_delays(error: Any) -> Iterator[float | None]:
    details = error.get("details") if isinstance(error, dict) else None
    for detail in details if isinstance(details, list) else ():
        if isinstance(detail, dict) and isinstance(detail.get("retryDelay"), str):
            yield _duration(detail["retryDelay"])


def _spent_limits(headers: Mapping[str, str], now_s: float) -> Iterator[float | None]:
    for name, value in headers.items():
        match = _LIMITS.fullmatch(name)
        if match is None:
            continue
        openai = match[1]
        remaining = name.replace("-reset-", "-remaining-") if openai else name[: -len("reset")] + "remaining"
        if parse_seconds(headers.get(remaining, "")) != 0.0:
            continue
        yield _duration(value) if openai else seconds_until(_rfc3339(value), now_s)


def _duration(text: str) -> float | None:
    """Seconds from `46s`, `1m30s` or `250ms`."""
    try:
        value = parse_duration(text.strip())
    except ValueError:
        return parse_seconds(text)
    return float(value) if isinstance(value, float | int) and math.isfinite(value) else None


def _rfc3339(text: str) -> datetime | None:
    try:
        return datetime.fromisoformat(text.strip())
    except ValueError:
        return None
