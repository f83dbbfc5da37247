"""What a simulation found. Sizes are in bytes, durations in seconds, shares from 0 to 1."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from msgspec import Struct

from controlplane.simulation._requests import Request
from controlplane.vram import GRADES


class Outcome(Struct, frozen=True, kw_only=True):
    """What came of a request.

    Attributes:
        wait_s: from its arrival until it ran, or was refused.
        refusal: the reason; empty if it was served.
    """

    request: Request
    wait_s: float
    swapped: bool = False
    grade: str
    refusal: str = ""


class Waits(Struct, frozen=True, kw_only=True):
    """Waits of requests; percentiles are those of the served ones, the total is of all."""

    requests: int
    p50_s: float
    p95_s: float
    p99_s: float
    max_s: float
    total_s: float
    no_swap_share: float


class PolicyReport(Struct, frozen=True, kw_only=True):
    """What came of a trace under one policy.

    Attributes:
        no_swap_share: of the requests, those for which nothing had to give way, and nothing had to be
            loaded, woken or started.
        swaps: how often weights were brought into the GPU: wakes, starts and loads of a checkpoint.
        grades: how many requests had others disturbed how much.
        refusals: how many were refused, by reason.
        busy_share: of the time, that in which at least one request ran.
        vram_share: how full the GPU was on average.
        peak_bytes: the most that was ever in use.
        duration_s: until the last request had ended.
    """

    policy: str
    waits: Waits
    kinds: dict[str, Waits]
    no_swap_share: float
    swaps: int
    grades: dict[str, int]
    refusals: dict[str, int]
    busy_share: float
    vram_share: float
    peak_bytes: int
    duration_s: float


class SimulationReport(Struct, frozen=True, kw_only=True):
    """What came of a trace under each policy."""

    trace: str
    title: str
    seed: int
    requests: int
    policies: tuple[PolicyReport, ...]

    def policy(self, name: str) -> PolicyReport:
        """What came of it under a policy. Raises KeyError."""
        for each in self.policies:
            if each.policy == name:
                return each
        raise KeyError(name)


def summarise(outcomes: Sequence[Outcome]) -> Waits:
    """The waits of some requests."""
    served = sorted(each.wait_s for each in outcomes if not each.refusal)
    unswapped = sum(not (each.swapped or each.refusal) for each in outcomes)
    return Waits(
        requests=len(outcomes),
        p50_s=_percentile(served, 50),
        p95_s=_percentile(served, 95),
        p99_s=_percentile(served, 99),
        max_s=served[-1] if served else 0.0,
        total_s=sum(each.wait_s for each in outcomes),
        no_swap_share=unswapped / len(outcomes) if outcomes else 1.0,
    )


def count_grades(outcomes: Sequence[Outcome]) -> dict[str, int]:
    """Served requests by grade, from the least."""
    counted = Counter(each.grade for each in outcomes if not each.refusal)
    return {grade.value: counted[grade.value] for grade in GRADES}


def _percentile(ordered: Sequence[float], percent: int) -> float:
    """The nearest rank; 0 of nothing."""
    return ordered[max(0, -(-len(ordered) * percent // 100) - 1)] if ordered else 0.0
