"""Bytes that are no request, on real gRPC: the caller is told so, and our log has no defect."""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator, Iterator
from typing import TYPE_CHECKING, Any, TypeAlias

import grpc
import grpc.aio
import pytest
import structlog.testing
from google.protobuf.descriptor_pool import Default
from prometheus_client import CollectorRegistry

from nodeagent.api import Drain, Runs
from rung import v1
from rung.errors import InvalidRequestError
from rung.service import CallInterceptor, GrpcServer, ServerOptions, add_service
from rung.transport import error_from_rpc
from tests.fakes.api_server import an_api_server
from tests.fakes.runs import a_run, instructed

if TYPE_CHECKING:
    Context: TypeAlias = grpc.aio.ServicerContext[Any, Any]

#: Field 1, of five bytes, of which one is there.
CUT = b"\x0a\x05x"


@pytest.fixture
def complaints(caplog: pytest.LogCaptureFixture) -> Iterator[list[str]]:
    """What goes wrong while a test runs, as gRPC's log and ours say it."""
    said: list[str] = []
    with structlog.testing.capture_logs() as ours:
        yield said
    said += [record.getMessage() for record in caplog.records if record.levelname in ("WARNING", "ERROR")]
    said += [str(entry) for entry in ours if entry["log_level"] in ("warning", "error")]
    assert said == []


def _said(failure: pytest.ExceptionInfo[grpc.aio.AioRpcError]) -> str:
    assert failure.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    error = error_from_rpc(failure.value)
    assert type(error) is InvalidRequestError
    return error.message


@pytest.mark.usefixtures("complaints")
@pytest.mark.parametrize("data", [CUT, b"\x0a\x02\xff\xfe"], ids=["cut short", "no text"])
async def test_a_request_that_cannot_be_read_is_an_invalid_argument(data: bytes) -> None:
    async with an_api_server() as plane:
        get_job: Any = plane.channel.unary_unary("/rung.v1.InferenceService/GetJob")
        with pytest.raises(grpc.aio.AioRpcError) as failure:
            await get_job(data)
        assert _said(failure) == (
            "the request of GetJob is no rung.v1.GetJobRequest: its bytes cannot be read"
        )


@pytest.mark.usefixtures("complaints")
async def test_a_request_of_many_answers_too() -> None:
    async with an_api_server() as plane:
        generate: Any = plane.channel.unary_stream("/rung.v1.InferenceService/Generate")
        with pytest.raises(grpc.aio.AioRpcError) as failure:
            await generate(CUT).read()
        assert "no rung.v1.GenerateRequest" in _said(failure)
        assert plane.pipelines.wishes == []


async def _rest(call: Any) -> None:
    while await call.read():
        pass


class OneRun:
    """An agent that begins what it is told."""

    def __init__(self) -> None:
        self.begun = 0

    def Run(  # noqa: N802 - as the API calls it
        self, request: AsyncIterator[v1.RunRequest], context: Context
    ) -> AsyncIterator[v1.RunResponse]:
        return Runs(self._answers, pause_s=lambda: 0.0, drain=Drain("box")).responses(request)

    async def _answers(self, begin: v1.RunBegin) -> AsyncGenerator[v1.RunHead | bytes, None]:
        self.begun += 1
        yield v1.RunHead(status_code=200, content_type="text/event-stream")


@pytest.mark.usefixtures("complaints")
async def test_a_stream_of_requests_ends_with_the_first_that_cannot_be_read() -> None:
    agent = OneRun()
    service = Default().FindServiceByName("rung.v1.NodeAgentService")
    server = GrpcServer(
        ServerOptions(port=0),
        services=[service],
        interceptors=[CallInterceptor(CollectorRegistry())],
        what="the test",
    )
    add_service(server.server, service, agent)
    await server.start()
    begins = instructed(v1.RunInstruction(run_id=1, begin=a_run())).SerializeToString()
    try:
        async with grpc.aio.insecure_channel(f"127.0.0.1:{server.port}") as channel:
            call: Any = channel.stream_stream("/rung.v1.NodeAgentService/Run")()
            await call.write(begins)
            assert await call.read()
            await call.write(CUT)
            with pytest.raises(grpc.aio.AioRpcError) as failure:
                await _rest(call)
    finally:
        await server.stop(0)
    assert _said(failure) == ("the request of Run is no rung.v1.RunRequest: its bytes cannot be read")
    assert agent.begun == 1
