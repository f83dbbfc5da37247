"""What gRPC says of a connection, in words for a person.

gRPC's own text names addresses as it resolved them and errors as the system has them. It is looked at
for these words alone: no class of an error, and nothing that is done about one, depends on it.
"""

from __future__ import annotations

import logging
import re
from dataclasses import dataclass

import grpc

_log = logging.getLogger("rung.transport")

#: gRPC's words for a connection that was never made.
_NOT_MADE = ("failed to connect to", "errors resolving", "dns resolution failed")
_TOO_LARGE = re.compile(r"message larger than max \((\d+) vs\. (\d+)\)", re.IGNORECASE)
_START = "start"
_CHECK = "is the machine on, and is that its address?"
#: What its text has, what that means, and what to do next. The first that is found counts.
_CAUSES: tuple[tuple[tuple[str, ...], str, str], ...] = (
    (("connection refused",), "connection refused", _START),
    (("no such file or directory",), "there is no such socket", _START),
    (
        ("domain name not found", "name or service not known", "errors resolving", "dns resolution failed"),
        "name not found",
        "is the address right?",
    ),
    (("no route to host", "network is unreachable"), "no route leads there", _CHECK),
    # Something took the connection, and then said nothing.
    (("before receiving settings frame",), "connected, but it says nothing", "is that the right port?"),
    (("timed out", "timeout occurred", "deadline exceeded"), "timed out", _CHECK),
    (
        ("http1.x server", "failed parsing http/2", "received http2 header with status"),
        "what answers there does not speak gRPC",
        "is that the right port, or is a proxy between?",
    ),
    (
        ("certificate", "handshake failed"),
        "TLS could not be agreed on",
        "do both sides use it, and with the same authority?",
    ),
    (("socket closed", "connection reset", "broken pipe", "goaway"), "it closed the connection", ""),
    (("ping timeout", "keepalive"), "it no longer answers", ""),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Peer:
    """Who is called, for messages.

    Args:
        name: as in "the control plane".
        address: where it is called.
        start: what to do if nothing listens there.
    """

    name: str = "the server"
    address: str = ""
    start: str = "is it running?"


def why_unreachable(failure: grpc.RpcError) -> str:
    """Why a connection was not made, as in "connection refused"; "" if it was, or nothing is known."""
    text = (failure.details() or "").lower()
    found = _cause(text)
    return found[0] if found is not None and text.startswith(_NOT_MADE) else ""


def words_of(failure: grpc.RpcError, peer: Peer) -> str | None:
    """What happened to a call that gRPC itself ended, and what to do next; None if that is not known.

    gRPC's own text goes to the log, at level debug.
    """
    raw = failure.details() or ""
    at = f" at {peer.address}" if peer.address else ""
    _log.debug("%s%s: %s: %s", peer.name, at, failure.code().name, raw)
    return _words(failure.code(), raw, peer, at)


def _words(code: grpc.StatusCode, raw: str, peer: Peer, at: str) -> str | None:
    """1. A message too large. 2. A connection never made. 3. No answer. 4. A connection that broke."""
    too_large = _TOO_LARGE.search(raw)
    if too_large is not None:
        size, most = (int(number) for number in too_large.groups())
        return f"a message of {size:,} bytes is more than the {most:,} that go to or from {peer.name} at once"
    text = raw.lower()
    found = _cause(text)
    not_made = text.startswith(_NOT_MADE) or "received http2 header with status" in text
    if not_made:
        why, then = found or ("no connection", _CHECK)
        then = peer.start if then is _START else then
        return f"{peer.name} cannot be reached{at}: {why}" + (f"; {then}" if then else "")
    if code is grpc.StatusCode.DEADLINE_EXCEEDED and text in ("", "deadline exceeded"):
        return f"{peer.name}{at} did not answer in time"
    if code in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.INTERNAL) and found is not None:
        return f"the connection to {peer.name}{at} broke: {found[0]}"
    return None


def _cause(text: str) -> tuple[str, str] | None:
    for marks, why, then in _CAUSES:
        if any(mark in text for mark in marks):
            return why, then
    return None
