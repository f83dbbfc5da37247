"""Channels: what is asked again by itself, and where a token may go."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from typing import TYPE_CHECKING, Any, TypeAlias

import grpc.aio
import pytest
from google.protobuf.descriptor_pool import Default
from prometheus_client import CollectorRegistry

from controlplane.api import SERVICE_NAMES
from rung import AsyncClient, TlsOptions, v1
from rung.cli import ExitCode, main
from rung.errors import DrainingError, InvalidRequestError
from rung.service import CallInterceptor, GrpcServer, ServerOptions, add_service
from rung.transport import ChannelOptions, open_channel

if TYPE_CHECKING:
    Context: TypeAlias = grpc.aio.ServicerContext[Any, Any]

#: What begins the name of a method that changes nothing.
READS = ("Get", "List", "Explain", "Plan", "Estimate")


# What is asked again.


def _retried() -> set[str]:
    configured = dict(ChannelOptions(address="").arguments())["grpc.service_config"]
    (config,) = json.loads(configured)["methodConfig"]
    return {f"{each['service']}/{each['method']}" for each in config["name"]}


def test_all_reads_of_the_control_plane_are_retried_and_no_mutation_but_one_that_may_be_repeated() -> None:
    reads = {
        f"{name}/{method.name}"
        for name in SERVICE_NAMES
        for method in Default().FindServiceByName(name).methods
        if method.name.startswith(READS) and not method.server_streaming
    }

    assert _retried() == reads | {"rung.v1.InferenceService/CancelJob"}


class SoonBack:
    """Says that it is away, once for each method."""

    def __init__(self) -> None:
        self.asked: list[str] = []

    async def ListWorkflows(  # noqa: N802 - as the API calls it
        self, request: v1.ListWorkflowsRequest, context: Context
    ) -> v1.ListWorkflowsResponse:
        self._ask("ListWorkflows")
        return v1.ListWorkflowsResponse()

    async def CreateJob(  # noqa: N802 - as the API calls it
        self, request: v1.CreateJobRequest, context: Context
    ) -> v1.CreateJobResponse:
        self._ask("CreateJob")
        return v1.CreateJobResponse()

    def _ask(self, method: str) -> None:
        self.asked.append(method)
        if self.asked.count(method) == 1:
            raise DrainingError("the control plane is shutting down")


@pytest.fixture
async def server() -> AsyncIterator[GrpcServer]:
    server = GrpcServer(
        ServerOptions(port=0),
        services=(),
        interceptors=[CallInterceptor(CollectorRegistry())],
        what="the test",
    )
    yield server
    await server.stop(0)


async def test_a_server_that_says_itself_that_it_is_away_is_asked_again_for_reads_alone(
    server: GrpcServer,
) -> None:
    servicer = SoonBack()
    add_service(server.server, Default().FindServiceByName("rung.v1.InferenceService"), servicer)
    await server.start()
    async with open_channel(ChannelOptions(address=f"127.0.0.1:{server.port}")) as channel:
        stub: Any = v1.InferenceServiceStub(channel)
        assert await stub.ListWorkflows(v1.ListWorkflowsRequest()) == v1.ListWorkflowsResponse()
        with pytest.raises(grpc.aio.AioRpcError, match="shutting down"):
            await stub.CreateJob(v1.CreateJobRequest())

    assert servicer.asked == ["ListWorkflows", "ListWorkflows", "CreateJob"]


# Where a token may go.

HERE = [
    "127.0.0.1:8151",
    "127.8.0.1:8151",
    "localhost:8151",
    "LOCALHOST",
    "[::1]:8151",
    "::1",
    "dns:localhost:8151",
    "dns:///localhost:8151",
    "dns://9.9.9.9/127.0.0.1:8151",
    "ipv4:127.0.0.1:8151,127.0.0.2:8151",
    "ipv6:[::1]:8151",
    "unix:/run/rung.sock",
    "unix-abstract:rung",
]
ELSEWHERE = [
    "spark:8151",
    "192.168.1.7:8151",
    "localhost.example.org:8151",
    "127.0.0.1.example.org:8151",
    "[fe80::1]:8151",
    "::",
    "",
    "dns:///spark:8151",
    "dns:spark:8151",
    "dns://127.0.0.1/spark:8151",
    "ipv4:127.0.0.1:8151,192.168.1.7:8151",
    "ipv6:[2001:db8::1]:8151",
    "xds:///localhost",
]


@pytest.mark.parametrize("address", HERE)
def test_a_token_may_go_to_this_machine_in_plain_text(address: str) -> None:
    assert ChannelOptions(address=address, token="s3cret").metadata()


@pytest.mark.parametrize("address", ELSEWHERE)
def test_a_token_goes_nowhere_else_without_tls(address: str) -> None:
    with pytest.raises(InvalidRequestError, match="in plain text") as refused:
        ChannelOptions(address=address, token="s3cret")

    assert "s3cret" not in refused.value.message
    assert ChannelOptions(address=address, token="s3cret", tls=TlsOptions()).metadata()
    assert ChannelOptions(address=address).metadata() == ()


def test_a_client_refuses_it_before_it_connects() -> None:
    with pytest.raises(InvalidRequestError, match="connect with TLS"):
        AsyncClient("spark:8151", token="s3cret")


def test_on_the_command_line_it_is_wrong_usage_and_said(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--address", "spark:8151", "--token", "s3cret", "models"]) == ExitCode.USAGE
    said = " ".join(capsys.readouterr().err.split())
    assert "the token would go to spark:8151 in plain text" in said
    assert "--tls-authority" in said
