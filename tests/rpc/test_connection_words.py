"""What gRPC says of a connection is told in words: who, where, why, and what to do next."""

from __future__ import annotations

import logging
import socket

import grpc
import grpc.aio
import pytest

from controlplane.fleet import AgentClient
from rung import AsyncClient
from rung.errors import NodeUnreachableError, RequestTooLargeError, UnavailableError
from rung.transport import Peer, error_from_rpc

PLANE = Peer(name="the control plane", address="box:8151", start="is it running? (`rung serve`)")
NOT_MADE = "failed to connect to all addresses; last error: "
CHECK = "is the machine on, and is that its address?"


def failed(details: str, code: grpc.StatusCode = grpc.StatusCode.UNAVAILABLE) -> grpc.aio.AioRpcError:
    return grpc.aio.AioRpcError(code, grpc.aio.Metadata(), grpc.aio.Metadata(), details=details)


@pytest.mark.parametrize(
    ("raw", "why", "then"),
    [
        (
            f"{NOT_MADE}UNKNOWN: ipv4:127.0.0.1:9: Failed to connect to remote host: Connection refused",
            "connection refused",
            "; is it running? (`rung serve`)",
        ),
        (
            f"{NOT_MADE}FAILED_PRECONDITION: unix:/a.sock: connect failed: addr: unix:/a.sock error: "
            "No such file or directory",
            "there is no such socket",
            "; is it running? (`rung serve`)",
        ),
        (
            "errors resolving box:1: [field:hostname lookup error:address lookup failed for box:1: "
            "Domain name not found]",
            "name not found",
            "; is the address right?",
        ),
        (
            "DNS resolution failed for box:1: C-ares status is not ARES_SUCCESS qtype=A name=box",
            "name not found",
            "; is the address right?",
        ),
        (
            f"{NOT_MADE}UNKNOWN: ipv4:10.0.0.9:1: Failed to connect to remote host: "
            "connect: No route to host (113)",
            "no route leads there",
            f"; {CHECK}",
        ),
        (
            f"{NOT_MADE}UNKNOWN: ipv4:10.0.0.9:1: Failed to connect to remote host: "
            "Timeout occurred: FD Shutdown",
            "timed out",
            f"; {CHECK}",
        ),
        (
            f"{NOT_MADE}UNKNOWN: ipv4:127.0.0.1:9: connection attempt timed out "
            "before receiving SETTINGS frame",
            "connected, but it says nothing",
            "; is that the right port?",
        ),
        (
            f"{NOT_MADE}INTERNAL: ipv4:127.0.0.1:9: Failed parsing HTTP/2 (Expected SETTINGS frame as the "
            "first frame, got frame type 80) (Trying to connect an http1.x server (HTTP status 400))",
            "what answers there does not speak gRPC",
            "; is that the right port, or is a proxy between?",
        ),
        (
            f"{NOT_MADE}UNKNOWN: ipv4:127.0.0.1:9: Ssl handshake failed (TSI_PROTOCOL_FAILURE)",
            "TLS could not be agreed on",
            "; do both sides use it, and with the same authority?",
        ),
        (f"{NOT_MADE}UNAVAILABLE: ipv4:127.0.0.1:9: Socket closed", "it closed the connection", ""),
    ],
)
def test_why_a_connection_was_not_made(raw: str, why: str, then: str) -> None:
    error = error_from_rpc(failed(raw), PLANE)
    assert type(error) is UnavailableError
    assert error.message == f"the control plane cannot be reached at box:8151: {why}{then}"
    assert error.metadata == {"why": why}


def test_one_that_is_not_understood_still_says_nothing_raw() -> None:
    error = error_from_rpc(failed(f"{NOT_MADE}WEIRD: ipv4:1.2.3.4:5: flux"), PLANE)
    assert error.message == f"the control plane cannot be reached at box:8151: no connection; {CHECK}"


@pytest.mark.parametrize(
    ("raw", "code", "said"),
    [
        (
            "Socket closed",
            grpc.StatusCode.UNAVAILABLE,
            "the connection to the control plane at box:8151 broke: it closed the connection",
        ),
        (
            "recvmsg:Connection reset by peer (104)",
            grpc.StatusCode.UNAVAILABLE,
            "the connection to the control plane at box:8151 broke: it closed the connection",
        ),
        (
            "Deadline Exceeded",
            grpc.StatusCode.DEADLINE_EXCEEDED,
            "the control plane at box:8151 did not answer in time",
        ),
        (
            "Received http2 header with status: 404",
            grpc.StatusCode.UNIMPLEMENTED,
            "the control plane cannot be reached at box:8151: what answers there does not speak gRPC; "
            "is that the right port, or is a proxy between?",
        ),
    ],
)
def test_what_befell_a_call(raw: str, code: grpc.StatusCode, said: str) -> None:
    error = error_from_rpc(failed(raw, code), PLANE)
    assert (error.message, error.metadata) == (said, {})


def test_a_message_that_is_too_large_is_told_with_both_sizes() -> None:
    raw = "SERVER: Received message larger than max (20971600 vs. 16842752)"
    error = error_from_rpc(failed(raw, grpc.StatusCode.RESOURCE_EXHAUSTED), PLANE)
    assert isinstance(error, RequestTooLargeError)
    assert error.message == (
        "a message of 20,971,600 bytes is more than the 16,842,752 that go to or from "
        "the control plane at once"
    )


def test_the_words_of_another_maker_stay(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.DEBUG, "rung.transport"):
        assert error_from_rpc(failed("back at noon"), PLANE).message == "back at noon"
    assert caplog.messages == ["the control plane at box:8151: UNAVAILABLE: back at noon"]


@pytest.fixture
def refusing() -> str:
    """An address where nothing listens."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return f"127.0.0.1:{listener.getsockname()[1]}"


async def test_a_client_says_that_no_control_plane_runs(refusing: str) -> None:
    async with AsyncClient(refusing) as client:
        with pytest.raises(UnavailableError) as refused:
            await client.get_deployment("chat-1")
    assert refused.value.message == (
        f"the control plane cannot be reached at {refusing}: connection refused; "
        "is it running? (`rung serve`)"
    )


async def test_a_control_plane_says_that_no_agent_runs(refusing: str) -> None:
    agent = AgentClient("spark", refusing)
    with pytest.raises(NodeUnreachableError) as refused:
        await anext(agent.watch(1))
    await agent.aclose()
    assert refused.value.metadata == {"node": "spark"}
    assert refused.value.message == (
        f"the agent of spark cannot be reached at {refusing}: connection refused; "
        "is it running? (`rung agent run`)"
    )
