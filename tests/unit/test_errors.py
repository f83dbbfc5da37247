"""Every error keeps its class, reason, message and metadata on its way through a gRPC status."""

from __future__ import annotations

import grpc
import grpc.aio
import pytest

from rung import errors
from rung.errors import BY_REASON, BY_STATUS, RungError, Status
from rung.transport import error_from_rpc, grpc_code, status_trailer


def _all(base: type[RungError]) -> list[type[RungError]]:
    return [base, *(found for child in base.__subclasses__() for found in _all(child))]


CLASSES = [found for found in _all(RungError) if found.__module__ == errors.__name__]


def _failed(
    code: grpc.StatusCode, details: str, trailer: tuple[tuple[str, str | bytes], ...] = ()
) -> grpc.aio.AioRpcError:
    return grpc.aio.AioRpcError(code, grpc.aio.Metadata(), grpc.aio.Metadata(*trailer), details=details)


@pytest.mark.parametrize("error_class", CLASSES, ids=lambda found: found.__name__)
def test_a_class_survives_the_wire(error_class: type[RungError]) -> None:
    sent = error_class("what happened, and what to do", node="spark", engine_status="500")
    got = error_from_rpc(_failed(grpc_code(sent), sent.message, status_trailer(sent)))
    assert type(got) is error_class
    assert (got.message, got.metadata) == (sent.message, sent.metadata)
    assert (got.reason, got.status, got.http_status) == (sent.reason, sent.status, sent.http_status)


def test_reasons_are_unique_and_statuses_are_gRPC_codes() -> None:  # noqa: N802 - its name
    assert len({found.reason for found in CLASSES}) == len(CLASSES)
    assert all(BY_REASON[found.reason] is found for found in CLASSES)
    assert all(status.value in grpc.StatusCode.__members__ for status in Status)


@pytest.mark.parametrize("status", [status for status in Status if status in BY_STATUS])
def test_a_status_of_another_maker_becomes_the_general_class(status: Status) -> None:
    got = error_from_rpc(_failed(grpc.StatusCode[status.value], "text"))
    assert got.status is status
    assert got.message == "text"


def test_a_reason_of_a_later_version_becomes_the_general_class_of_its_code() -> None:
    class LaterError(errors.NotFoundError):
        reason = "FROM_A_LATER_VERSION"

    sent = LaterError("gone", thing="x")
    got = error_from_rpc(_failed(grpc_code(sent), sent.message, status_trailer(sent)))
    assert type(got) is errors.NotFoundError
    assert got.metadata == {"thing": "x"}


def test_a_connection_that_is_refused_is_unavailable() -> None:
    assert type(error_from_rpc(_failed(grpc.StatusCode.UNAVAILABLE, "refused"))) is errors.UnavailableError
    assert type(error_from_rpc(_failed(grpc.StatusCode.UNKNOWN, ""))) is errors.UnavailableError
