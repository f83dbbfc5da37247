"""How our gRPC servers are built: limits, keepalive, health, reflection, and only on loopback."""

from __future__ import annotations

import errno
import ipaddress
import os
import socket
from collections.abc import Sequence
from dataclasses import dataclass

import grpc.aio
from google.protobuf.descriptor import ServiceDescriptor
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from rung.errors import LoopbackOnlyError
from rung.transport import (
    DEFAULT_MAX_REQUEST_BYTES,
    KEEPALIVE_TIME_S,
    KEEPALIVE_TIMEOUT_S,
    SERVER_MIN_PING_INTERVAL_S,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerOptions:
    """Where a server listens (`port` 0 picks a free one) and what it takes."""

    host: str = "127.0.0.1"
    port: int
    max_request_bytes: int = DEFAULT_MAX_REQUEST_BYTES

    def arguments(self) -> list[tuple[str, int]]:
        """Channel arguments, by the names that gRPC gives them."""
        return [
            ("grpc.keepalive_time_ms", int(KEEPALIVE_TIME_S * 1000)),
            ("grpc.keepalive_timeout_ms", int(KEEPALIVE_TIMEOUT_S * 1000)),
            ("grpc.keepalive_permit_without_calls", 1),
            ("grpc.http2.max_pings_without_data", 0),
            ("grpc.http2.min_ping_interval_without_data_ms", int(SERVER_MIN_PING_INTERVAL_S * 1000)),
            ("grpc.http2.max_ping_strikes", 2),
            # The framing of a request is ours, not the caller's: leave it a little room.
            ("grpc.max_receive_message_length", self.max_request_bytes + 64 * 1024),
            ("grpc.max_send_message_length", 4 * DEFAULT_MAX_REQUEST_BYTES),
            # A port that is taken is an error, not a second listener that gets half of the calls.
            ("grpc.so_reuseport", 0),
        ]


def require_loopback(host: str, what: str) -> None:
    """Refuse an interface other than loopback.

    Ports carry no authentication until mutual TLS exists, so none may be reachable from a network.

    Raises:
        LoopbackOnlyError: `host` is not a loopback address.
    """
    if host == "localhost":
        return
    try:
        loopback = ipaddress.ip_address(host).is_loopback
    except ValueError:
        loopback = False
    if not loopback:
        raise LoopbackOnlyError(
            f"{what} is set to listen on {host}, but this version has no TLS and listens on loopback only; "
            "use 127.0.0.1, and an SSH tunnel to reach it from another machine",
            host=host,
        )


def cannot_listen(what: str, host: str, port: int, error: OSError) -> OSError:
    """Why `what` cannot listen there, and what to do; asyncio's own text says only the first."""
    # An error without a number, such as of a name that nobody knows, has its words in its text.
    why = os.strerror(error.errno) if error.errno and error.errno > 0 else str(error)
    taken = error.errno == errno.EADDRINUSE
    advice = "stop what listens there, or choose another port" if taken else "choose another port"
    return OSError(f"{what} cannot listen on {_address(host, port)}: {why}; {advice}")


def _address(host: str, port: int) -> str:
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


class GrpcServer:
    """A gRPC server with health and reflection, from the first bind to a graceful stop.

    Services are added through `server` before `start`. `services` are their descriptors: health is
    reported for each, and reflection lists them.
    """

    def __init__(
        self,
        options: ServerOptions,
        *,
        services: Sequence[ServiceDescriptor],
        interceptors: Sequence[grpc.aio.ServerInterceptor],
        what: str,
    ) -> None:
        require_loopback(options.host, what)
        self._options = options
        self._what = what
        self._names = [service.full_name for service in services]
        self._health = health.aio.HealthServicer()
        self.server = grpc.aio.server(interceptors=list(interceptors), options=options.arguments())
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self.server)
        reflection.enable_server_reflection(
            [*self._names, health.SERVICE_NAME, reflection.SERVICE_NAME], self.server
        )
        self.port = 0

    async def start(self) -> None:
        """Bind and serve; `port` is then the bound one. Raises OSError if the port is taken."""
        host, port = self._options.host, self._options.port
        self._require_free_port()
        address = _address(host, port)
        try:
            self.port = self.server.add_insecure_port(address)
        except RuntimeError as error:
            raise OSError(f"{self._what} cannot listen on {address}: {error}") from error
        await self.server.start()
        for name in ("", *self._names):
            await self._health.set(name, health_pb2.HealthCheckResponse.SERVING)

    def _require_free_port(self) -> None:
        """Refuse a port that is taken: gRPC says that in its own log alone. Raises OSError."""
        host, port = self._options.host, self._options.port
        family, kind, protocol, _, place = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind, protocol) as probe:
            # As gRPC does it: connections that have just ended do not hold the port.
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind(place)
            except OSError as error:
                raise cannot_listen(self._what, host, port, error) from error

    async def drain(self) -> None:
        """Report NOT_SERVING, so that nobody sends more; calls go on, and new ones are still taken."""
        await self._health.enter_graceful_shutdown()

    async def stop(self, grace_s: float) -> None:
        """Report NOT_SERVING, let calls finish for `grace_s`, then cancel them."""
        await self.drain()
        await self.server.stop(grace_s)
