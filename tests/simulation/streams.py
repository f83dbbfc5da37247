"""The streams of a job, read strictly: every form of them back to events, and what must be true of those."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from itertools import pairwise
from typing import Any

import msgspec
from msgspec import Struct

from controlplane.pipelines.image import IMAGE_PHASES
from rung import codec, v1
from rung.types import (
    TERMINAL_EVENTS,
    ArtifactChunk,
    EventPayload,
    JobDone,
    JobEvent,
    Phase,
    PhaseProgress,
)
from tests.fakes.simulated_pool import BrokenInvariantError

#: Whoever watches hears something at least so often.
LONGEST_GAP_S = 1.0
#: What a disk may add to that, where a line waits for it.
SLACK_S = 0.05

_PLACES = {phase.value: place for place, phase in enumerate(IMAGE_PHASES)}
_SHORT_ENDS = {"done", "failed", "cancelled"}
_SHORT_FIELDS = {"phase", "elapsed_s", "detail", "step", "total", "percent", "remaining_s", "job_remaining_s"}
_SHORT_FIELDS |= {"preview", "images", "reason", "by"}


class Line(Struct, frozen=True):
    """An event as a reader had it, and when; short ones of `/generate/stream` have no payload."""

    at_s: float
    sequence: int
    elapsed_s: float
    payload: EventPayload | None
    fields: dict[str, Any] = {}

    @property
    def phase(self) -> str:
        """Which one it tells of; empty if of none."""
        if self.payload is None:
            return str(self.fields["phase"])
        return self.payload.phase.value if isinstance(self.payload, PhaseProgress) else ""


def broken(what: str) -> None:
    """Raises BrokenInvariantError."""
    raise BrokenInvariantError(what)


# Reading.


def of_proto(at_s: float, event: JobEvent) -> Line:
    """An event that went over gRPC."""
    wire = codec.job_event_to_proto(event).SerializeToString(deterministic=True)
    back = codec.job_event_from_proto(v1.JobEvent.FromString(wire))
    if back is None or back.job_id != event.job_id:
        broken(f"{event} is not what is read over gRPC")
    assert back is not None
    return Line(at_s, back.sequence, back.elapsed_s, back.payload)


def of_ndjson(at_s: float, line: bytes) -> Line:
    """A line of `/v1/jobs/{id}/events`."""
    if not line.endswith(b"\n") or line.count(b"\n") != 1:
        broken(f"not one line: {line!r}")
    fields = json.loads(line)
    payload = msgspec.json.decode(line, type=EventPayload)
    if isinstance(payload, ArtifactChunk) and not payload.preview:
        if fields.get("url") != f"/v1/artifacts/{payload.artifact_id}":
            broken(f"no URL of its artifact: {fields}")
        if payload.data:
            broken("data of an artifact that nobody asked for")
    return Line(at_s, fields["sequence"], fields["elapsed_s"], payload)


def of_sse(at_s: float, text: bytes) -> Line:
    """A server-sent event of `/v1/jobs/{id}/events`."""
    head, _, rest = text.rpartition(b"data: ")
    if not rest.endswith(b"\n\n"):
        broken(f"not one event: {text!r}")
    line = of_ndjson(at_s, rest[:-1])
    if head != (f"id: {line.sequence}\n".encode() if line.sequence else b""):
        broken(f"its id is {head!r}, and it has the sequence {line.sequence}")
    return line


def of_short(at_s: float, text: bytes) -> Line:
    """A line of `/generate/stream`."""
    if not text.endswith(b"\n") or text.count(b"\n") != 1:
        broken(f"not one line: {text!r}")
    fields = json.loads(text)
    if not fields.keys() <= _SHORT_FIELDS or not isinstance(fields["elapsed_s"], int | float):
        broken(f"not a line of /generate/stream: {fields}")
    return Line(at_s, 0, fields["elapsed_s"], None, fields)


# What must be true.


def check_stream(lines: Sequence[Line], begun_s: float, *, after: int = 0, is_timely: bool = True) -> None:
    """Hold a full stream to what every one promises: to its end, in order, without a gap or a silence.

    Args:
        lines: the stream.
        begun_s: when its reader began.
        after: the last sequence that its reader had.
        is_timely: it was read as it came.
    """
    sequences = [line.sequence for line in lines if line.sequence]
    if sequences != list(range(after + 1, after + 1 + len(sequences))):
        broken(f"sequences after {after}: {sequences}")
    terminals = [place for place, line in enumerate(lines) if isinstance(line.payload, TERMINAL_EVENTS)]
    if terminals != [len(lines) - 1]:
        broken(f"terminal events at {terminals} of {len(lines)}")
    _check_common(lines, begun_s, is_timely=is_timely)


def check_short(lines: Sequence[Line], begun_s: float) -> None:
    """The same of `/generate/stream`."""
    terminals = [place for place, line in enumerate(lines) if line.phase in _SHORT_ENDS]
    if terminals != [len(lines) - 1]:
        broken(f"terminal lines at {terminals} of {len(lines)}")
    for line in lines:
        if line.phase == "done" and not line.fields["images"]:
            broken("done without a picture")
    _check_common(lines, begun_s, is_timely=True)


def _check_common(lines: Sequence[Line], begun_s: float, *, is_timely: bool) -> None:
    for before, line in pairwise(lines):
        # A heartbeat is of now, and an event of when it came.
        if line.elapsed_s < before.elapsed_s - 1e-9:
            broken(f"time goes back: {before} {line}")
    if is_timely:
        _check_gaps([begun_s, *(line.at_s for line in lines)])
    _check_phases(lines)
    _check_sampling(lines)
    for line in lines:
        fields = line.fields if line.payload is None else msgspec.structs.asdict(line.payload)
        for name in ("remaining_s", "job_remaining_s"):
            if (fields.get(name) or 0.0) < 0.0:
                broken(f"less than nothing remains: {line}")


def _check_gaps(times_s: Iterable[float]) -> None:
    for before, now in pairwise(times_s):
        if now - before > LONGEST_GAP_S + SLACK_S:
            broken(f"nothing was heard for {now - before:.2f} s, from {before:.2f}")


def _check_phases(lines: Sequence[Line]) -> None:
    """In order within an attempt; a `route` begins the next."""
    place = -1
    for line in lines:
        phase = line.phase
        if not phase or phase in ("failed", "cancelled"):
            continue
        if phase == Phase.ROUTE.value:
            place = -1
            continue
        if phase not in _PLACES:
            broken(f"{phase} is no phase of a picture")
        if _PLACES[phase] < place:
            broken(f"{phase} comes after {IMAGE_PHASES[place]}")
        place = _PLACES[phase]


def _check_sampling(lines: Sequence[Line]) -> None:
    """Within an attempt it never goes back, and moves in steps of ten percent, but for its end."""
    told = -10.0
    for line in lines:
        if line.phase == Phase.ROUTE.value:
            told = -10.0
        if line.phase != Phase.SAMPLING.value:
            continue
        percent = line.fields.get("percent") if line.payload is None else getattr(line.payload, "percent", 0)
        if percent is None:
            continue
        if percent < told:
            broken(f"sampling goes back from {told} % to {percent} %")
        if line.sequence and percent - told < 10.0 and percent < 100.0:
            broken(f"sampling is told at {told} % and {percent} %")
        told = max(told, percent)


def check_log(lines: Sequence[Line]) -> None:
    """Of a whole log: what was delivered is whole and delivered once, and a result has all phases."""
    pieces: dict[str, list[ArtifactChunk]] = {}
    delivered = False
    for line in lines:
        if line.phase == Phase.ROUTE.value and delivered:
            broken("another attempt after a part of the result was delivered")
        if isinstance(line.payload, ArtifactChunk) and not line.payload.preview:
            delivered = True
            pieces.setdefault(line.payload.artifact_id, []).append(line.payload)
    is_done = isinstance(lines[-1].payload, JobDone)
    for artifact_id, chunks in pieces.items():
        end = 0
        for chunk in chunks:
            if chunk.offset_bytes != end:
                broken(f"{artifact_id} goes on at {chunk.offset_bytes} after {end}")
            end += chunk.length_bytes
        hashes = [place for place, chunk in enumerate(chunks) if chunk.sha256]
        if hashes not in ([], [len(chunks) - 1]) or (hashes and end != chunks[-1].size_bytes):
            broken(f"{artifact_id} is ended at {hashes} of {len(chunks)} pieces, with {end} bytes")
        if is_done and not hashes:
            broken(f"done, and {artifact_id} is not whole")
    whole = [chunks[-1].sha256 for chunks in pieces.values() if chunks[-1].sha256]
    if len(whole) != len(set(whole)):
        broken("a picture was delivered twice")
    if is_done:
        last_attempt = [line.phase for line in lines if line.phase and line.sequence]
        if Phase.ROUTE.value in last_attempt:
            place = len(last_attempt) - last_attempt[::-1].index(Phase.ROUTE.value)
            last_attempt = last_attempt[place:]
        if list(dict.fromkeys(last_attempt)) != [phase.value for phase in IMAGE_PHASES]:
            broken(f"done with the phases {list(dict.fromkeys(last_attempt))}")


def log_of(lines: Iterable[Line]) -> list[tuple[int, float, dict[str, Any]]]:
    """What is in the log, the same however it was read: without heartbeats, data, and beyond milliseconds."""
    found = []
    for line in lines:
        if not line.sequence:
            continue
        fields = msgspec.to_builtins(line.payload)
        fields.pop("data", None)
        if "phase_elapsed_s" in fields:
            # A duration of gRPC is not the same number to the last bit.
            fields["phase_elapsed_s"] = round(fields["phase_elapsed_s"], 3)
        found.append((line.sequence, round(line.elapsed_s, 3), fields))
    return found
