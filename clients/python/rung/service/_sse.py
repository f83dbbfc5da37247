"""Server-sent events, read piece by piece without taking the bytes apart more than needed."""

from __future__ import annotations

from rung.errors import EngineProtocolError

#: An engine's event is a token; one of this size is not a stream that we understand.
_MAX_EVENT_BYTES = 16 * 1024 * 1024


class SseSplitter:
    """Cuts a byte stream into whole events.

    Engines end events with two line feeds, or two pairs of carriage return and line feed
    (sse-starlette). A piece that ends with an event, which is the usual case, is not copied.
    """

    __slots__ = ("_tail",)

    def __init__(self) -> None:
        self._tail = b""

    def feed(self, chunk: bytes) -> bytes:
        """All whole events that are there now, line ends made single; the rest is kept.

        Raises:
            EngineProtocolError: an event grows without end.
        """
        buffer = self._tail + chunk if self._tail else chunk
        if b"\r" in buffer:
            # A pair may be cut between its two bytes: the carriage return waits for its line feed.
            held = b"\r" if buffer.endswith(b"\r") else b""
            buffer = buffer[: len(buffer) - len(held)].replace(b"\r\n", b"\n")
        else:
            held = b""
        if not held and buffer.endswith(b"\n\n"):
            self._tail = b""
            return buffer
        end = buffer.rfind(b"\n\n") + 2
        if end == 1:
            end = 0
        self._tail = buffer[end:] + held
        if len(self._tail) > _MAX_EVENT_BYTES:
            raise EngineProtocolError("the engine sent an event without an end")
        return buffer[:end]

    def rest(self) -> bytes:
        """What is left when the stream has ended, as a whole event: some servers omit the last blank line."""
        tail, self._tail = self._tail, b""
        return tail.rstrip() + b"\n\n" if tail.strip() else b""


def event_data(event: bytes) -> bytes | None:
    """The data of one event (without its blank line), or None for a comment or an event without data."""
    if event.startswith(b"data:") and b"\n" not in event:
        return event[5:].strip()
    lines = [line[5:].removeprefix(b" ") for line in event.split(b"\n") if line.startswith(b"data:")]
    return b"\n".join(lines).strip() if lines else None
