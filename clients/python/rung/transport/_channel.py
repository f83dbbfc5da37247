"""How our gRPC channels are opened. The numbers of both sides live here, since they must agree."""

from __future__ import annotations

import ipaddress
import json
from dataclasses import dataclass
from typing import Any

import grpc
import grpc.aio

from rung.errors import InvalidRequestError

#: Largest request that a server takes by default: 16 MiB.
DEFAULT_MAX_REQUEST_BYTES = 16 * 1024 * 1024
#: Largest message of a channel, either way: 64 MiB.
MAX_MESSAGE_BYTES = 64 * 1024 * 1024
#: Largest request that a server can be set to take. What goes with it to an agent needs room as well.
LARGEST_REQUEST_BYTES = MAX_MESSAGE_BYTES - 1024 * 1024
#: A client pings an idle connection this often, also without a call, so that a vanished peer is noticed.
KEEPALIVE_TIME_S = 20.0
#: Time for the answer to a ping.
KEEPALIVE_TIMEOUT_S = 10.0
#: Least time between pings that a server accepts. It must stay below KEEPALIVE_TIME_S: gRPC ends a
#: connection with "Too many pings" otherwise.
SERVER_MIN_PING_INTERVAL_S = 10.0

_RETRIED_METHODS = {
    "rung.v1.InferenceService": (
        "GetJob",
        "ListJobs",
        "ListModels",
        "ListWorkflows",
        "ExplainRoute",
        "CancelJob",
    ),
    "rung.v1.FleetService": ("ListNodes", "GetNode", "ListDeployments", "GetDeployment", "ListProfiles"),
    "rung.v1.VramService": ("ListLeases", "PlanReclaim", "EstimateFootprint"),
    "rung.v1.BurstService": ("ListBurstProfiles", "ListOffers", "ListInstances", "GetBudget"),
}

# Only methods that may be carried out twice: UNAVAILABLE is what gRPC says of a server not reached, or
# lost on the way, and what a server says itself of what it needs and lacks for now.
_SERVICE_CONFIG = json.dumps(
    {
        "methodConfig": [
            {
                "name": [
                    {"service": service, "method": method}
                    for service, methods in _RETRIED_METHODS.items()
                    for method in methods
                ],
                "retryPolicy": {
                    "maxAttempts": 4,
                    "initialBackoff": "0.1s",
                    "maxBackoff": "2s",
                    "backoffMultiplier": 2,
                    "retryableStatusCodes": ["UNAVAILABLE"],
                },
            }
        ]
    }
)


@dataclass(frozen=True, slots=True, kw_only=True)
class TlsOptions:
    """Files in PEM: the authority to trust, and the client's own certificate for mutual TLS.

    Raises:
        InvalidRequestError: a certificate comes without its private key, or the other way round.
    """

    authority_file: str | None = None
    certificate_file: str | None = None
    private_key_file: str | None = None

    def __post_init__(self) -> None:
        # gRPC ends the whole process over half of a pair.
        if (self.certificate_file is None) != (self.private_key_file is None):
            raise InvalidRequestError(
                "a TLS certificate and its private key go together: give both, or neither"
            )

    def credentials(self) -> grpc.ChannelCredentials:
        """Read the files.

        Raises:
            OSError: one cannot be read.
            InvalidRequestError: one is not PEM.
        """
        return grpc.ssl_channel_credentials(
            root_certificates=_read(self.authority_file),
            private_key=_read(self.private_key_file),
            certificate_chain=_read(self.certificate_file),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class ChannelOptions:
    """How to reach a server.

    Args:
        address: `host:port`, or another name that gRPC resolves.
        tls: None connects in plain text.
        token: sent with every call as a bearer token. Without TLS only to this machine (loopback, or a socket
            in its file system), since whoever sees it on the way could use it.
        max_message_bytes: largest message, either way.

    Raises:
        InvalidRequestError: a token would leave this machine in plain text.
    """

    address: str
    tls: TlsOptions | None = None
    token: str | None = None
    max_message_bytes: int = MAX_MESSAGE_BYTES

    def __post_init__(self) -> None:
        if self.token and self.tls is None and not _stays_here(self.address):
            raise InvalidRequestError(
                f"the token would go to {self.address} in plain text, for anybody on the way to read and to "
                "use: connect with TLS (TlsOptions; --tls-authority of the command), go through an SSH "
                "tunnel to 127.0.0.1, or give no token"
            )

    def arguments(self) -> list[tuple[str, Any]]:
        """Channel arguments, by the names that gRPC gives them."""
        return [
            ("grpc.keepalive_time_ms", int(KEEPALIVE_TIME_S * 1000)),
            ("grpc.keepalive_timeout_ms", int(KEEPALIVE_TIMEOUT_S * 1000)),
            ("grpc.keepalive_permit_without_calls", 1),
            ("grpc.http2.max_pings_without_data", 0),
            ("grpc.max_receive_message_length", self.max_message_bytes),
            ("grpc.max_send_message_length", self.max_message_bytes),
            ("grpc.initial_reconnect_backoff_ms", 200),
            ("grpc.max_reconnect_backoff_ms", 5000),
            ("grpc.enable_retries", 1),
            ("grpc.service_config", _SERVICE_CONFIG),
            # A channel of its own: two clients in one process do not share a connection.
            ("grpc.use_local_subchannel_pool", 1),
        ]

    def metadata(self) -> tuple[tuple[str, str], ...]:
        """Metadata to send with every call."""
        return (("authorization", f"Bearer {self.token}"),) if self.token else ()


def open_channel(options: ChannelOptions) -> grpc.aio.Channel:
    """An asynchronous channel; it connects with its first call."""
    if options.tls is None:
        return grpc.aio.insecure_channel(options.address, options=options.arguments())
    return grpc.aio.secure_channel(options.address, options.tls.credentials(), options=options.arguments())


def open_sync_channel(options: ChannelOptions) -> grpc.Channel:
    """A blocking channel; it connects with its first call."""
    if options.tls is None:
        return grpc.insecure_channel(options.address, options=options.arguments())
    return grpc.secure_channel(options.address, options.tls.credentials(), options=options.arguments())


def _stays_here(address: str) -> bool:
    """Whether what is sent to an address, as gRPC writes them, does not leave this machine."""
    scheme, _, rest = address.partition(":")
    if scheme in ("unix", "unix-abstract"):
        return True
    if scheme == "dns":
        address = rest
        # What stands between the slashes is the server that is to resolve the name.
        address = address[2:].partition("/")[2] if address.startswith("//") else address
    elif scheme in ("ipv4", "ipv6"):
        return all(_is_loopback(each) for each in rest.split(","))
    return _is_loopback(address)


def _is_loopback(address: str) -> bool:
    """Of `host:port`, `host`, `[IPv6]:port` or `IPv6`. A name other than localhost could be anywhere."""
    if address.startswith("["):
        host = address[1:].partition("]")[0]
    elif address.count(":") == 1:
        host = address.partition(":")[0]
    else:
        host = address
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host.lower() == "localhost"


def _read(path: str | None) -> bytes | None:
    if path is None:
        return None
    with open(path, "rb") as file:
        data = file.read()
    # gRPC would say no more than that the server cannot be reached.
    if b"-----BEGIN " not in data:
        raise InvalidRequestError(f"{path} is not PEM: nothing in it begins with -----BEGIN")
    return data
