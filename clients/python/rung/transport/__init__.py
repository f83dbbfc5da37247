"""gRPC, in one place: channels, and errors on the wire."""

from rung.transport._channel import (
    DEFAULT_MAX_REQUEST_BYTES,
    KEEPALIVE_TIME_S,
    KEEPALIVE_TIMEOUT_S,
    LARGEST_REQUEST_BYTES,
    MAX_MESSAGE_BYTES,
    SERVER_MIN_PING_INTERVAL_S,
    ChannelOptions,
    TlsOptions,
    open_channel,
    open_sync_channel,
)
from rung.transport._status import DETAILS_TRAILER, ERROR_DOMAIN, error_from_rpc, grpc_code, status_trailer
from rung.transport._words import Peer, why_unreachable, words_of

__all__ = [
    "DEFAULT_MAX_REQUEST_BYTES",
    "DETAILS_TRAILER",
    "ERROR_DOMAIN",
    "KEEPALIVE_TIMEOUT_S",
    "KEEPALIVE_TIME_S",
    "LARGEST_REQUEST_BYTES",
    "MAX_MESSAGE_BYTES",
    "SERVER_MIN_PING_INTERVAL_S",
    "ChannelOptions",
    "Peer",
    "TlsOptions",
    "error_from_rpc",
    "grpc_code",
    "open_channel",
    "open_sync_channel",
    "status_trailer",
    "why_unreachable",
    "words_of",
]
