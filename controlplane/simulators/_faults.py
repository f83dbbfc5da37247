"""What a simulated cloud API can be told to do wrong, and how the real ones say it."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping
from datetime import UTC, datetime
from email.utils import format_datetime
from enum import StrEnum
from typing import Any

from msgspec import Struct

#: How long the simulator asks to be left alone.
RETRY_AFTER_S = 7
#: Frames before what goes wrong in mid-stream.
FRAMES_BEFORE_FAULT = 4


class CloudFault(StrEnum):
    """One way in which cloud APIs fail."""

    #: 429, and when to come back, in each of its forms; the last says nothing.
    RATE_LIMIT_SECONDS = "rate_limit_seconds"
    RATE_LIMIT_DATE = "rate_limit_date"
    RATE_LIMIT_MILLISECONDS = "rate_limit_milliseconds"
    RATE_LIMIT_RETRY_INFO = "rate_limit_retry_info"
    RATE_LIMIT_RESET = "rate_limit_reset"
    RATE_LIMIT = "rate_limit"
    #: Out of money, as DeepSeek says it (but quoting the key), and as OpenAI (429) and Anthropic (400) do.
    BALANCE = "balance"
    QUOTA = "quota"
    #: 529 of Anthropic, 503 of others.
    OVERLOADED = "overloaded"
    HTTP_500 = "http_500"
    #: The request is refused as wrong.
    REFUSED = "refused"
    #: The same in the array that Gemini's compatible endpoint puts around it.
    REFUSED_ARRAY = "refused_array"
    UNKNOWN_MODEL = "unknown_model"
    #: The key is not the right one, whatever it is; quotes it, as no real one does.
    WRONG_KEY = "wrong_key"
    #: Drop the connection in the middle of a frame.
    CUT_MID_STREAM = "cut_mid_stream"
    #: End the body in order, but in the middle of the answer.
    ENDED_MID_STREAM = "ended_mid_stream"
    #: Send a frame that is no JSON.
    MALFORMED = "malformed"
    #: Say in mid-stream that it failed, under a status of 200.
    ERROR_MID_STREAM = "error_mid_stream"
    #: Wait before the head of the answer.
    SLOW_FIRST_BYTE = "slow_first_byte"
    #: Accept a request and send nothing, ever.
    HANG = "hang"
    #: Comments in a stream and blank lines before an answer, as DeepSeek under load.
    KEEP_ALIVE = "keep_alive"
    #: Answer a stream with something else.
    NOT_A_STREAM = "not_a_stream"
    #: Of pictures: refused for what they show; not base64; no pictures; links in place of them.
    MODERATION = "moderation"
    BROKEN_BASE64 = "broken_base64"
    NO_PICTURE = "no_picture"
    LINKS = "links"


class Refusal(Struct, frozen=True):
    """An error with its head."""

    status: int
    body: Any
    headers: Mapping[str, str] = {}


def parse_faults(names: Iterable[str]) -> frozenset[CloudFault]:
    """Faults by their names; blanks are skipped. Raises ValueError: there is no such fault."""
    try:
        return frozenset(CloudFault(name.strip()) for name in names if name.strip())
    except ValueError as error:
        raise ValueError(f"{error}; there are {', '.join(CloudFault)}") from None


def refusal_of(faults: frozenset[CloudFault], *, anthropic: bool, key: str) -> Refusal | None:
    """The error that the faults amount to before an answer begins, if any."""
    for fault in sorted(faults):
        if (found := _refusal(fault, anthropic=anthropic, key=key)) is not None:
            return found
    return None


def error_body(anthropic: bool, kind: str, message: str) -> dict[str, Any]:
    """An error in the dialect's shape."""
    if anthropic:
        return {"type": "error", "error": {"type": kind, "message": message}, "request_id": "req_simulated"}
    return {"error": {"message": message, "type": kind, "param": None, "code": kind}}


def _refusal(fault: CloudFault, *, anthropic: bool, key: str) -> Refusal | None:
    now = time.time()
    limited = error_body(anthropic, "rate_limit_error" if anthropic else "rate_limit_exceeded", "Slow down.")
    reset = datetime.fromtimestamp(now + RETRY_AFTER_S + 1, UTC)
    match fault:
        case CloudFault.RATE_LIMIT:
            return Refusal(429, limited)
        case CloudFault.RATE_LIMIT_SECONDS:
            return Refusal(429, limited, {"Retry-After": str(RETRY_AFTER_S)})
        case CloudFault.RATE_LIMIT_DATE:
            return Refusal(429, limited, {"Retry-After": format_datetime(reset, usegmt=True)})
        case CloudFault.RATE_LIMIT_MILLISECONDS:
            return Refusal(429, limited, {"Retry-After-Ms": str(RETRY_AFTER_S * 1000), "Retry-After": "8"})
        case CloudFault.RATE_LIMIT_RETRY_INFO:
            return Refusal(429, [_gemini_limit()])
        case CloudFault.RATE_LIMIT_RESET if anthropic:
            return Refusal(
                429,
                limited,
                {
                    "anthropic-ratelimit-requests-remaining": "12",
                    "anthropic-ratelimit-requests-reset": "2099-01-01T00:00:00Z",
                    "anthropic-ratelimit-output-tokens-remaining": "0",
                    "anthropic-ratelimit-output-tokens-reset": reset.isoformat(timespec="seconds"),
                },
            )
        case CloudFault.RATE_LIMIT_RESET:
            return Refusal(
                429,
                limited,
                {
                    "x-ratelimit-remaining-requests": "12",
                    "x-ratelimit-reset-requests": "6m0s",
                    "x-ratelimit-remaining-tokens": "0",
                    "x-ratelimit-reset-tokens": f"{RETRY_AFTER_S}s",
                },
            )
        case CloudFault.BALANCE:
            message = f"Insufficient Balance of {key}"
            return Refusal(402, error_body(anthropic, "billing_error", message))
        case CloudFault.QUOTA if anthropic:
            message = "Your credit balance is too low to access the Anthropic API."
            return Refusal(400, error_body(True, "invalid_request_error", message))
        case CloudFault.QUOTA:
            return Refusal(429, error_body(False, "insufficient_quota", "You exceeded your current quota."))
        case CloudFault.OVERLOADED:
            return Refusal(529 if anthropic else 503, error_body(anthropic, "overloaded_error", "Overloaded"))
        case CloudFault.HTTP_500:
            return Refusal(500, error_body(anthropic, "api_error", "Internal server error"))
        case CloudFault.REFUSED:
            return Refusal(400, error_body(anthropic, "invalid_request_error", "The request is wrong."))
        case CloudFault.REFUSED_ARRAY:
            error = {"code": 400, "message": "The request is wrong.", "status": "INVALID_ARGUMENT"}
            return Refusal(400, [{"error": error}])
        case CloudFault.UNKNOWN_MODEL:
            return Refusal(404, error_body(anthropic, "not_found_error", "The model does not exist."))
        case CloudFault.WRONG_KEY:
            message = f"Incorrect API key provided: {key}."
            return Refusal(401, error_body(anthropic, "authentication_error", message))
    return None


def _gemini_limit() -> dict[str, Any]:
    info = "type.googleapis.com/google.rpc.RetryInfo"
    return {
        "error": {
            "code": 429,
            "message": "Resource has been exhausted.",
            "status": "RESOURCE_EXHAUSTED",
            "details": [
                {"@type": "type.googleapis.com/google.rpc.QuotaFailure", "violations": []},
                {"@type": info, "retryDelay": f"{RETRY_AFTER_S}s"},
            ],
        }
    }
