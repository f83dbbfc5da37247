"""Errors as OpenAI's clients expect them."""

from __future__ import annotations

from collections.abc import Mapping

import msgspec
from aiohttp import web

from rung.errors import EngineRejectedError, EngineUnreachableError, RequestTooLargeError, RungError, Status

#: OpenAI's error types by our canonical codes; its clients choose their exception by HTTP status.
_TYPES = {
    Status.INVALID_ARGUMENT: "invalid_request_error",
    Status.NOT_FOUND: "invalid_request_error",
    Status.FAILED_PRECONDITION: "invalid_request_error",
    Status.ALREADY_EXISTS: "invalid_request_error",
    Status.OUT_OF_RANGE: "invalid_request_error",
    Status.UNAUTHENTICATED: "authentication_error",
    Status.PERMISSION_DENIED: "permission_error",
    Status.RESOURCE_EXHAUSTED: "rate_limit_error",
    Status.UNAVAILABLE: "service_unavailable_error",
    Status.DEADLINE_EXCEEDED: "timeout_error",
}
_SERVER_ERROR = "server_error"
_BAD_GATEWAY = 502
_CODES = {"UNKNOWN_MODEL": "model_not_found"}


def error_body(error: RungError) -> bytes:
    """OpenAI's error object, with our reason and facts beside it under `rung`."""
    reason = error.reason
    return msgspec.json.encode(
        {
            "error": {
                "message": error.message,
                "type": _type(error),
                "param": "model" if reason == "UNKNOWN_MODEL" else error.metadata.get("param"),
                "code": error.metadata.get("engine_code") or _CODES.get(reason) or reason.lower(),
                "rung": {"reason": reason, **error.metadata},
            }
        }
    )


def _type(error: RungError) -> str:
    if isinstance(error, RequestTooLargeError):
        return "invalid_request_error"
    if error.http_status == _BAD_GATEWAY:
        # An engine failed: OpenAI's own name for that. What is only full or away for now has another.
        return _SERVER_ERROR
    return _TYPES.get(error.status, _SERVER_ERROR)


def http_status(error: RungError) -> int:
    """The HTTP status of an error; an engine's own for what the engine blamed on the request."""
    if isinstance(error, EngineRejectedError):
        return int(error.metadata.get("engine_status", "400"))
    return error.http_status


def error_response(error: RungError, headers: Mapping[str, str] | None = None) -> web.Response:
    """A response for an error that came before any other byte."""
    response = web.Response(
        status=http_status(error), body=error_body(error), content_type="application/json", headers=headers
    )
    retry_after = error.metadata.get("retry_after")
    if retry_after is None and (response.status in (429, 503) or isinstance(error, EngineUnreachableError)):
        # An engine that cannot be reached has mostly ended, and is started by whoever asks next.
        retry_after = "1"
    if retry_after:
        response.headers["Retry-After"] = retry_after
    return response
