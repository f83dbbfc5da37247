"""The pacing of streams."""

from __future__ import annotations

from contextlib import ExitStack

import pytest

from rung.service import StreamPacer


def test_streams_wait_only_when_there_are_many_and_longer_the_more_there_are() -> None:
    pacer = StreamPacer(unpaced_streams=2, interval_per_stream_s=0.01)
    with ExitStack() as stack:
        intervals_s = []
        for _ in range(4):
            stack.enter_context(pacer)
            intervals_s.append(pacer.interval_s())

    assert intervals_s == pytest.approx([0.0, 0.0, 0.03, 0.04])
    assert pacer.interval_s() == 0.0


def test_a_stream_that_fails_counts_no_more() -> None:
    pacer = StreamPacer(unpaced_streams=0, interval_per_stream_s=0.01)

    with pytest.raises(OSError, match="gone"), pacer:
        raise OSError("gone")

    assert pacer.interval_s() == 0.0
