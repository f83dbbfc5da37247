"""Errors over gRPC: `RungError` to a rich status and back.

A status carries `google.rpc.ErrorInfo` (reason, domain, metadata) in the `grpc-status-details-bin`
trailer, as every gRPC library with rich errors reads it.
"""

from __future__ import annotations

from typing import Any

import grpc
from google.protobuf import any_pb2
from google.rpc import error_details_pb2, status_pb2

from rung.errors import BY_REASON, BY_STATUS, RungError, Status, UnavailableError
from rung.transport._words import Peer, why_unreachable, words_of

#: `ErrorInfo.domain` of all our errors.
ERROR_DOMAIN = "rung"
#: Trailer defined by gRPC for `google.rpc.Status`.
DETAILS_TRAILER = "grpc-status-details-bin"
_SOMEBODY = Peer()


def status_trailer(error: RungError) -> tuple[tuple[str, bytes], ...]:
    """The trailing metadata that carries `error`."""
    detail = any_pb2.Any()
    detail.Pack(
        error_details_pb2.ErrorInfo(reason=error.reason, domain=ERROR_DOMAIN, metadata=error.metadata)
    )
    status = status_pb2.Status(code=_code(error).value[0], message=error.message, details=[detail])
    return ((DETAILS_TRAILER, status.SerializeToString()),)


def grpc_code(error: RungError) -> grpc.StatusCode:
    """The gRPC code of `error`."""
    return _code(error)


def error_from_rpc(failure: grpc.RpcError, peer: Peer = _SOMEBODY) -> RungError:
    """The error that a failed call to `peer` stands for. Its class never depends on the text of a message.

    Errors that did not come from our servers (a refused connection, a passed deadline) become the
    most general class of their code, and say in words what gRPC has to say. `metadata["why"]` of one
    that was not connected to is the reason in short, as in "connection refused".
    """
    code: grpc.StatusCode = failure.code()
    message: str = failure.details() or code.name
    trailer: Any = failure.trailing_metadata() or ()
    for key, value in trailer:
        if key == DETAILS_TRAILER and isinstance(value, bytes):
            status = status_pb2.Status.FromString(value)
            for detail in status.details:
                info = error_details_pb2.ErrorInfo()
                if detail.Unpack(info) and info.domain == ERROR_DOMAIN:
                    error_class = BY_REASON.get(info.reason) or _general(code)
                    return error_class(message, **dict(info.metadata))
    why = why_unreachable(failure)
    return _general(code)(words_of(failure, peer) or message, **({"why": why} if why else {}))


def _code(error: RungError) -> grpc.StatusCode:
    return grpc.StatusCode[error.status.value]


def _general(code: grpc.StatusCode) -> type[RungError]:
    try:
        return BY_STATUS[Status(code.name)]
    except (ValueError, KeyError):
        return UnavailableError if code is grpc.StatusCode.UNKNOWN else RungError
