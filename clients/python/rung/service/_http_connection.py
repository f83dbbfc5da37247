"""One HTTP/1.1 connection to an engine: a request out, an answer in, as it comes.

Written here, on the parser that uvicorn uses, because a relay lives by it: with aiohttp's client Rung
carried 0.55 to 0.68 of the requests of a bare relay, with this 1.05 to 1.2 (tests/benchmarks).
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from types import MappingProxyType
from typing import cast

import httptools

from rung.errors import EngineProtocolError, EngineTimeoutError, EngineUnreachableError, RungError

#: An answer that its reader does not take is held up to this size; then the engine is made to wait.
_HELD_BYTES = 256 * 1024
#: Most bytes of an answer before its body.
_LARGEST_HEAD_BYTES = 64 * 1024
_NO_LIMITS: Mapping[str, str] = MappingProxyType({})


class HttpConnection(asyncio.Protocol):
    """Carries one exchange at a time: `send`, `head`, then `take` until it gives None.

    Not thread-safe. After each exchange, `reusable` says whether another may follow.
    """

    __slots__ = (
        "_body",
        "_bounds_all",
        "_complete",
        "_failure",
        "_framed",
        "_has_head",
        "_head_bytes",
        "_held_bytes",
        "_last_heard_s",
        "_loop",
        "_parser",
        "_paused",
        "_quiet",
        "_timeout_s",
        "_timer",
        "_transport",
        "_waiter",
        "_what",
        "content_type",
        "idle_since_s",
        "limits",
        "retry_after",
        "reusable",
        "status",
    )

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._parser = httptools.HttpResponseParser(self)
        self._transport: asyncio.Transport | None = None
        self._waiter: asyncio.Future[None] | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._body: list[bytes] = []
        self._what = "the engine"
        self._timeout_s = 0.0
        self._bounds_all = False
        self._last_heard_s = 0.0
        self.idle_since_s = 0.0
        self.reusable = True
        self._clear()
        self._complete = True

    def _clear(self) -> None:
        self.status = 0
        self.content_type = "application/json"
        self.retry_after = ""
        self.limits: Mapping[str, str] = _NO_LIMITS
        self._body.clear()
        self._held_bytes = 0
        self._head_bytes = 0
        self._has_head = False
        self._framed = False
        self._complete = False
        self._paused = False
        self._quiet = False
        self._failure: RungError | None = None

    @property
    def heard(self) -> bool:
        """Whether anything has come since the request was sent."""
        return self._has_head or self._head_bytes > 0

    # What its user calls ---------------------------------------------------------------------------

    def send(self, request: bytes, *, what: str, timeout_s: float, bounds_all: bool) -> None:
        """Send a whole request and expect its answer.

        Args:
            request: head and body.
            what: name of the engine, for messages.
            timeout_s: longest silence of the engine; a reader that does not take is none.
            bounds_all: `timeout_s` is the time for all of the answer instead.
        """
        self._clear()
        self._what = what
        self._timeout_s = timeout_s
        self._bounds_all = bounds_all
        self._last_heard_s = self._loop.time()
        self.reusable = False
        if self._transport is None:
            # It was closed as soon as it was made.
            self._failure = self._broken("it was closed")
            return
        self._timer = self._loop.call_later(timeout_s, self._look_at_clock)
        self._transport.write(request)

    async def head(self) -> None:
        """Return once `status`, `content_type` and `retry_after` are those of the answer.

        Raises:
            EngineUnreachableError: the connection broke before.
            EngineTimeoutError: nothing came for the idle timeout.
            EngineProtocolError: what came is not HTTP.
        """
        while not self._has_head:
            if self._failure is not None:
                raise self._failure
            await self._heard()

    async def take(self, not_before_s: float = 0.0) -> bytes | None:
        """What has come of the body since the last call; waits for more; None at its end.

        Args:
            not_before_s: the loop's time until which pieces are collected; the end of the body is not
                waited for any longer than it takes to come.

        Raises:
            EngineTimeoutError: nothing came for the idle timeout.
            EngineProtocolError: the connection broke in mid-body, or this is not HTTP.
        """
        if not_before_s > self._loop.time():
            await self._collect(not_before_s)
        while not self._body:
            if self._failure is not None:
                raise self._failure
            if self._complete:
                return None
            await self._heard()
        return self.take_ready()

    async def _collect(self, until_s: float) -> None:
        """Wait, without being woken by each piece, until a time, the end of the body, or too much of it."""
        if self._complete or self._failure is not None or self._paused:
            return
        self._quiet = True
        timer = self._loop.call_at(until_s, self._wake)
        try:
            await self._heard()
        finally:
            timer.cancel()
            self._quiet = False

    def take_ready(self) -> bytes:
        """What has come of the body since the last call, without waiting; may be empty."""
        body = self._body
        if not body:
            return b""
        data = body[0] if len(body) == 1 else b"".join(body)
        body.clear()
        self._held_bytes = 0
        if not self._bounds_all:
            self._last_heard_s = self._loop.time()
        if self._paused and self._transport is not None:
            self._paused = False
            self._transport.resume_reading()
        return data

    def finish(self) -> bool:
        """End the exchange; whether another may follow. Before the end of the body this aborts it."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if self.reusable and self._complete and not self._body:
            self.idle_since_s = self._loop.time()
            return True
        self.abort()
        return False

    def abort(self) -> None:
        """Drop the connection, at once."""
        self.reusable = False
        if self._transport is not None:
            self._transport.abort()

    async def _heard(self) -> None:
        waiter = self._waiter = self._loop.create_future()
        try:
            await waiter
        finally:
            self._waiter = None

    def _ended(self) -> bool:
        # Asked by a call, since the parser changes it behind the back of the type checker.
        return self._complete

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    def _look_at_clock(self) -> None:
        silent_s = self._loop.time() - self._last_heard_s
        if self._body and not self._bounds_all:
            # It waits for its reader.
            silent_s = 0.0
        if silent_s < self._timeout_s:
            self._timer = self._loop.call_later(self._timeout_s - silent_s, self._look_at_clock)
            return
        self._timer = None
        if self._has_head:
            self._fail(EngineTimeoutError(f"{self._what} stopped sending in mid-answer", engine=self._what))
        else:
            self._fail(
                EngineTimeoutError(
                    f"{self._what} did not answer for {self._timeout_s:g} s", engine=self._what
                )
            )

    def _fail(self, error: RungError) -> None:
        if not self._complete and self._failure is None:
            self._failure = error
        self.abort()
        self._wake()

    def _broken(self, why: str) -> RungError:
        if self._has_head:
            return EngineProtocolError(
                f"the connection to {self._what} broke in mid-answer: {why}", engine=self._what
            )
        return EngineUnreachableError(f"{self._what} cannot be reached: {why}", engine=self._what)

    # What the event loop calls ---------------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Called by the loop."""
        # Not checked: uvloop's is none by class.
        self._transport = cast("asyncio.Transport", transport)
        # uvloop sends what is written when it has been round, unless that is over the mark: of many requests
        # that begin together, the first would wait for the last.
        self._transport.set_write_buffer_limits(high=0)

    def data_received(self, data: bytes) -> None:
        """Called by the loop."""
        if self._complete:
            # Nobody asked: whatever it is, the next answer must not begin with it.
            self.abort()
            return
        try:
            self._parser.feed_data(data)
        except (httptools.HttpParserError, httptools.HttpParserUpgrade) as error:
            self._fail(
                EngineProtocolError(
                    f"{self._what} sent something that is not HTTP: {error}", engine=self._what
                )
            )
            return
        if not self._bounds_all:
            self._last_heard_s = self._loop.time()
        if not self._has_head:
            self._head_bytes += len(data)
            if self._head_bytes > _LARGEST_HEAD_BYTES:
                self._fail(EngineProtocolError(f"{self._what} sent headers without end", engine=self._what))
        elif self._held_bytes > _HELD_BYTES and not self._paused and self._transport is not None:
            self._paused = True
            self._transport.pause_reading()
        if not self._quiet or self._ended() or self._paused:
            self._wake()

    def connection_lost(self, exc: Exception | None) -> None:
        """Called by the loop."""
        self._transport = None
        self.reusable = False
        if not self._complete and self._failure is None:
            if self._has_head and not self._framed and exc is None:
                # A body without a length ends with its connection.
                self._complete = True
            else:
                self._failure = self._broken(str(exc or "it was closed"))
        self._wake()

    # What the parser calls -------------------------------------------------------------------------

    def on_message_begin(self) -> None:
        """Called by the parser."""
        if self._complete:
            raise ValueError("a second answer to one request")

    def on_header(self, name: bytes, value: bytes) -> None:
        """Called by the parser, for each header."""
        lowered = name.lower()
        if lowered == b"content-type":
            self.content_type = value.decode("latin-1")
        elif lowered in (b"content-length", b"transfer-encoding"):
            self._framed = True
        elif lowered == b"retry-after":
            self.retry_after = value.decode("latin-1")
        elif b"ratelimit" in lowered or lowered == b"retry-after-ms":
            self.limits = {**self.limits, lowered.decode("latin-1"): value.decode("latin-1")}

    def on_headers_complete(self) -> None:
        """Called by the parser."""
        self.status = self._parser.get_status_code()
        # An informational answer (100, 103) is followed by the real one.
        self._has_head = self.status >= 200

    def on_body(self, body: bytes) -> None:
        """Called by the parser, with each piece of the body, unchunked."""
        self._body.append(body)
        self._held_bytes += len(body)

    def on_message_complete(self) -> None:
        """Called by the parser."""
        if self._has_head:
            self._complete = True
            self.reusable = self._parser.should_keep_alive()
