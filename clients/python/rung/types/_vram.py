"""VRAM: what giving way costs, plans for making room, and what a model needs.

Sizes are in bytes, durations in seconds.
"""

from __future__ import annotations

from enum import StrEnum

from msgspec import Struct

from rung.types._job import Priority


class ReclaimGrade(StrEnum):
    """How much others are disturbed."""

    QUICK = "quick"
    STANDARD = "standard"
    FULL = "full"


class ReclaimAction(StrEnum):
    """What a step does."""

    SLEEP = "sleep"
    STOP = "stop"
    FREE = "free"
    SHRINK = "shrink"


class ReclaimStep(Struct, frozen=True, kw_only=True):
    """One change of one deployment.

    Attributes:
        level: of a sleep, 1 (weights to host RAM) or 2 (weights dropped); otherwise 0.
        expected_bytes: what the pool should get back; measured before it is believed.
        expected_s: how long it should take, the drain included.
        drain: the deployment is busy: its requests end before anything else is done to it.
        drain_expected_s: how long that should take.
    """

    deployment_id: str
    action: ReclaimAction
    level: int = 0
    expected_bytes: int
    expected_s: float
    drain: bool = False
    drain_expected_s: float = 0.0


class ReclaimPlan(Struct, frozen=True, kw_only=True, tag="plan", tag_field="outcome"):
    """How a demand is met.

    Attributes:
        grade: how much others are disturbed.
        steps: in the order in which they are taken, one after the other: quick ones first, drains last.
        expected_free_bytes: what the pool should measure as free after the last step.
        expected_s: how long all steps should take.
        harm_s: the waiting that this is expected to cause others.
    """

    grade: ReclaimGrade
    steps: tuple[ReclaimStep, ...] = ()
    expected_free_bytes: int
    expected_s: float = 0.0
    harm_s: float = 0.0


class Infeasible(Struct, frozen=True, kw_only=True, tag="infeasible", tag_field="outcome"):
    """Why a demand cannot be met now.

    Attributes:
        detail: one line for a person.
        missing_bytes: what is missing at the demand's highest grade.
        missing_at_full_bytes: what would be missing at FULL; 0 if it would fit.
        largest_fit_bytes: the greatest demand that would fit at that grade.
        remedies: who holds what, and what would make it fit; one line each.
        retry_when: events that, once they have all come, make it fit; none if waiting does not help.
    """

    detail: str
    missing_bytes: int
    missing_at_full_bytes: int
    largest_fit_bytes: int
    remedies: tuple[str, ...] = ()
    retry_when: tuple[str, ...] = ()


class Footprint(Struct, frozen=True, kw_only=True):
    """What a model needs, in parts."""

    weights_bytes: int
    kv_cache_bytes: int
    overhead_bytes: int
    kv_bytes_per_token: int

    @property
    def total_bytes(self) -> int:
        """All of it."""
        return self.weights_bytes + self.kv_cache_bytes + self.overhead_bytes

    def tokens_that_fit(self, cache_bytes: int) -> int:
        """Tokens that a KV cache of a size holds; 0 for a model without a cache."""
        return max(0, cache_bytes) // self.kv_bytes_per_token if self.kv_bytes_per_token else 0

    def tokens_beside_weights(self, vram_bytes: int) -> int:
        """Tokens that fit into what weights and overhead leave of an amount of memory."""
        return self.tokens_that_fit(vram_bytes - self.weights_bytes - self.overhead_bytes)


class Lease(Struct, frozen=True, kw_only=True):
    """A time-limited grant of memory of a GPU. Times are Unix seconds.

    Attributes:
        gpu: `node/index`.
        holder: one line for a person about who has it.
        deployment_id: the deployment whose engine takes the memory; empty if another program does.
        grade: how much others were disturbed.
        expire_time_s: when it ends unless it is renewed.
    """

    id: str
    gpu: str
    vram_bytes: int
    grade: ReclaimGrade
    grant_time_s: float
    expire_time_s: float
    holder: str = ""
    priority: Priority = Priority.AGENT
    deployment_id: str = ""
