"""What every gRPC server of ours gives, whatever its services: health, reflection, and loopback only."""

from __future__ import annotations

import socket

import grpc.aio
import pytest
from google.protobuf.descriptor_pb2 import FileDescriptorProto
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from rung.errors import LoopbackOnlyError
from rung.service import GrpcServer, ServerOptions, require_loopback
from tests.fakes.api_server import an_api_server

ALL = ("Burst", "Fleet", "Inference", "Vram")


def _bare(host: str = "127.0.0.1", port: int = 0) -> GrpcServer:
    return GrpcServer(ServerOptions(host=host, port=port), services=(), interceptors=(), what="the agent")


async def _reflected(
    channel: grpc.aio.Channel, request: reflection_pb2.ServerReflectionRequest
) -> reflection_pb2.ServerReflectionResponse:
    call = reflection_pb2_grpc.ServerReflectionStub(channel).ServerReflectionInfo(iter([request]))
    return await anext(aiter(call))


async def test_each_service_is_healthy_until_the_server_drains() -> None:
    async with an_api_server() as plane:
        health = health_pb2_grpc.HealthStub(plane.channel)
        for name in ("", *(f"rung.v1.{each}Service" for each in ALL)):
            found = await health.Check(health_pb2.HealthCheckRequest(service=name))
            assert found.status == health_pb2.HealthCheckResponse.SERVING, name
        watching = aiter(health.Watch(health_pb2.HealthCheckRequest(service="rung.v1.InferenceService")))
        assert (await anext(watching)).status == health_pb2.HealthCheckResponse.SERVING

        await plane.server.drain()

        assert (await anext(watching)).status == health_pb2.HealthCheckResponse.NOT_SERVING
        overall = await health.Check(health_pb2.HealthCheckRequest())
        assert overall.status == health_pb2.HealthCheckResponse.NOT_SERVING


async def test_a_tool_without_our_protos_can_ask_what_there_is() -> None:
    async with an_api_server() as plane:
        listed = await _reflected(plane.channel, reflection_pb2.ServerReflectionRequest(list_services=""))
        described = await _reflected(
            plane.channel,
            reflection_pb2.ServerReflectionRequest(file_containing_symbol="rung.v1.InferenceService"),
        )

    names = {each.name for each in listed.list_services_response.service}
    assert names >= {f"rung.v1.{each}Service" for each in ALL} | {"grpc.health.v1.Health"}
    files = [
        FileDescriptorProto.FromString(each)
        for each in described.file_descriptor_response.file_descriptor_proto
    ]
    (service,) = [each for file in files for each in file.service if each.name == "InferenceService"]
    assert "Generate" in {method.name for method in service.method}


@pytest.mark.parametrize("host", ["127.0.0.1", "127.8.0.1", "::1", "localhost"])
def test_loopback_is_taken(host: str) -> None:
    require_loopback(host, "the agent")


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "", "192.168.1.7", "fe80::1", "box.example.org"])
def test_any_other_interface_is_refused_before_anything_is_bound(host: str) -> None:
    with pytest.raises(LoopbackOnlyError) as refused:
        _bare(host)

    assert refused.value.message == (
        f"the agent is set to listen on {host}, but this version has no TLS and listens on loopback only; "
        "use 127.0.0.1, and an SSH tunnel to reach it from another machine"
    )


async def test_loopback_has_an_address_of_version_6_too() -> None:
    try:
        with socket.socket(socket.AF_INET6) as probe:
            probe.bind(("::1", 0))
    except OSError as error:
        pytest.skip(f"this machine has no IPv6: {error}")
    server = _bare("::1")
    await server.start()
    try:
        async with grpc.aio.insecure_channel(f"[::1]:{server.port}") as channel:
            await health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest())
    finally:
        await server.stop(0)


async def test_a_port_that_is_taken_is_said_with_what_to_do() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        server = _bare(port=port)
        with pytest.raises(OSError, match="the agent cannot listen") as refused:
            await server.start()
        await server.stop(0)

    assert str(refused.value) == (
        f"the agent cannot listen on 127.0.0.1:{port}: Address already in use; "
        "stop what listens there, or choose another port"
    )
