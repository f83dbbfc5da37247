"""How often a stream is passed on while many run at once."""

from __future__ import annotations


class StreamPacer:
    """Counts the streams that run, and says how long each collects what comes before it passes it on.

    Passing a piece on costs more than what is in it. With few streams every piece goes at once; with
    many, one waits so long for each stream there is, so that the cost stays bounded however many run.

    Args:
        unpaced_streams: up to so many, nothing waits.
        interval_per_stream_s: what each stream adds to the time between two pieces of one.
    """

    __slots__ = ("_interval_per_stream_s", "_streams", "_unpaced_streams")

    def __init__(self, *, unpaced_streams: int, interval_per_stream_s: float) -> None:
        self._unpaced_streams = unpaced_streams
        self._interval_per_stream_s = interval_per_stream_s
        self._streams = 0

    def __enter__(self) -> None:
        """A stream begins."""
        self._streams += 1

    def __exit__(self, *exc_info: object) -> None:
        """A stream has ended."""
        self._streams -= 1

    def interval_s(self) -> float:
        """The least time between two pieces of a stream now; 0 for none."""
        return self._streams * self._interval_per_stream_s if self._streams > self._unpaced_streams else 0.0
