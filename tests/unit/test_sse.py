"""Server-sent events, cut in any place."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rung.errors import EngineProtocolError
from rung.service import SseSplitter, event_data

EVENTS = [
    b'data: {"a":1}',
    b": ping",
    b'event: message\ndata: {"b":2}',
    b"data: one\ndata: two",
    b"data: [DONE]",
]


def _all_data(pieces: list[bytes]) -> list[bytes]:
    splitter = SseSplitter()
    whole = b"".join([*(splitter.feed(piece) for piece in pieces), splitter.rest()])
    found = [event_data(event) for event in whole.split(b"\n\n") if event]
    return [data for data in found if data is not None]


@given(
    st.lists(st.sampled_from(EVENTS), max_size=8),
    st.sampled_from([b"\n", b"\r\n"]),
    st.lists(st.integers(0, 400), max_size=20),
    st.booleans(),
)
def test_any_cut_of_a_stream_gives_the_same_events(
    events: list[bytes], line_end: bytes, cuts: list[int], last_blank_line: bool
) -> None:
    stream = b"".join(event.replace(b"\n", line_end) + line_end * 2 for event in events)
    if not last_blank_line:
        stream = stream.rstrip(b"\r\n")
    places = sorted({0, len(stream), *(cut for cut in cuts if cut <= len(stream))})
    pieces = [stream[start:end] for start, end in itertools.pairwise(places)]

    data = [found for event in events if (found := event_data(event)) is not None]

    assert _all_data(pieces) == data


def test_half_an_event_is_held_back() -> None:
    splitter = SseSplitter()

    assert splitter.feed(b"data: 1\n\ndata: 2") == b"data: 1\n\n"
    assert splitter.feed(b"3\n\n") == b"data: 23\n\n"
    assert splitter.rest() == b""


def test_an_event_without_an_end_is_refused() -> None:
    splitter = SseSplitter()

    splitter.feed(b"x" * 16 * 1024 * 1024)

    with pytest.raises(EngineProtocolError):
        splitter.feed(b"x")
