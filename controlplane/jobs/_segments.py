"""How the events of a job are kept: many of one job together, without what is the same in all of them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import msgspec

from controlplane.jobs._live import without_data
from controlplane.store import StoredSegment
from rung.types import ArtifactChunk, EventPayload, JobEvent


class _StoredEvents(msgspec.Struct, array_like=True):
    create_time_s: float
    events: list[tuple[int, float, EventPayload]]


_encoder = msgspec.msgpack.Encoder()
_decoder = msgspec.msgpack.Decoder(_StoredEvents)


def pack(job_id: str, create_time_s: float, events: Sequence[JobEvent]) -> StoredSegment:
    """Events of one job, at least one, without the data of artifacts."""
    stored = [
        (
            event.sequence,
            event.elapsed_s,
            # Nearly all are text, and a call for each would take as long as their encoding.
            payload if type(payload := event.payload) is not ArtifactChunk else without_data(event).payload,
        )
        for event in events
    ]
    return StoredSegment(
        job_id=job_id,
        first_sequence=events[0].sequence,
        last_sequence=events[-1].sequence,
        events=_encoder.encode(_StoredEvents(create_time_s, stored)),
    )


def unpack(segment: StoredSegment, after_sequence: int) -> Iterator[JobEvent]:
    """Its events with a higher sequence."""
    stored = _decoder.decode(segment.events)
    for sequence, elapsed_s, payload in stored.events:
        if sequence > after_sequence:
            yield JobEvent(segment.job_id, sequence, stored.create_time_s + elapsed_s, elapsed_s, payload)
