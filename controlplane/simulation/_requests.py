"""What is asked of the node and when, drawn from a trace and a seed. Pure."""

from __future__ import annotations

import random
from collections.abc import Iterator

import msgspec
from msgspec import Struct

from controlplane.simulation._trace import Trace, TraceProcess
from rung.types import Priority


class Request(Struct, frozen=True, kw_only=True):
    """One request.

    Attributes:
        number: by arrival, from 1.
        at_s: when it comes, since the beginning.
        kind: under which it is reported.
        checkpoint: what its image engine must have loaded; empty for other engines.
        service_s: how long it takes once it runs.
    """

    number: int
    at_s: float
    kind: str
    deployment: str
    checkpoint: str
    priority: Priority
    service_s: float


def draw_requests(trace: Trace, seed: int) -> list[Request]:
    """All requests of a trace by arrival; equal seeds give equal requests.

    Each process draws from a source of its own: what one of them asks for does not change the others.
    """
    found = [
        Request(
            number=0,
            at_s=each.at_s,
            kind=each.kind,
            deployment=each.deployment,
            checkpoint=each.checkpoint,
            priority=each.priority,
            service_s=each.service_s,
        )
        for each in trace.requests
    ]
    for place, process in enumerate(trace.processes):
        rng = random.Random(f"{seed}/{place}/{process.kind}")  # noqa: S311 - a workload, not a secret
        found += _draw(process, trace.duration_s, rng)
    found.sort(key=lambda each: each.at_s)
    return [msgspec.structs.replace(each, number=number) for number, each in enumerate(found, 1)]


def _draw(process: TraceProcess, duration_s: float, rng: random.Random) -> Iterator[Request]:
    until_s = min(duration_s, process.until_s or duration_s)
    burst_s = process.from_s
    while True:
        burst_s += rng.expovariate(1 / process.every_s)
        if burst_s >= until_s:
            return
        at_s = burst_s
        for place in range(rng.randint(*process.burst)):
            if place:
                at_s += rng.uniform(*process.gap_s)
            yield Request(
                number=0,
                at_s=at_s,
                kind=process.kind,
                deployment=process.deployment,
                checkpoint=process.checkpoint,
                priority=process.priority,
                service_s=rng.uniform(*process.service_s),
            )
