"""What a node's scheduler needs of the world, and what it may be told to do differently.

Times are those of the event loop's clock, in seconds.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

import msgspec
from msgspec import Struct

from controlplane.vram._ledger import GIB, Ledger
from controlplane.vram._queue import QueueRules
from rung.types import ReclaimGrade, ReclaimStep


class Measurement(Struct, frozen=True, kw_only=True):
    """A pool as it was measured.

    Attributes:
        ledger: without reservations: those are the scheduler's own.
        measured_s: a moment no later than the measuring.
        taken_bytes: what holders that are no deployments were measured to hold, by lease, where that is
            known.
    """

    ledger: Ledger
    measured_s: float
    taken_bytes: Mapping[str, int] = msgspec.field(default_factory=dict)


class Measured(Struct, frozen=True, kw_only=True):
    """What a step freed, and what was free after it, as whoever carried it out measured."""

    freed_bytes: int
    free_bytes: int


class PlacedDeployment(Struct, frozen=True, kw_only=True):
    """A deployment and how it is to be kept.

    Attributes:
        awake_bytes: what it holds of its pool when awake.
        warm: to be raised again by itself once there is room.
        idle_timeout_s: stopped after so long without requests, if it is `on_demand`; None for never.
        swap_slot: those of a node with the same one take turns; empty for none.
        pulls: a start may first fetch the model, which takes as long as it takes.
        max_grade: the most that others may be disturbed to raise it.
    """

    deployment_id: str
    pool_id: str
    awake_bytes: int
    warm: bool = False
    idle_timeout_s: float | None = None
    swap_slot: str = ""
    pulls: bool = False
    max_grade: ReclaimGrade = ReclaimGrade.FULL


class Pools(Protocol):
    """The node's pools, as they are measured."""

    async def measure(self, pool_id: str) -> Measurement:
        """The newest measurement of a pool; an old one if there is no newer.

        Its ledger has an entry for each of the pool's `deployments`, stopped ones too.

        Raises:
            NotFoundError: the node has no such pool.
            UnavailableError: there is none.
        """
        ...

    def deployments(self) -> Sequence[PlacedDeployment]:
        """The deployments of the node that may be raised."""
        ...


def placed_deployment(pools: Pools, deployment_id: str) -> PlacedDeployment | None:
    """A deployment of the node by its id, or None."""
    return next((each for each in pools.deployments() if each.deployment_id == deployment_id), None)


class Executor(Protocol):
    """Carries out what was decided. Both are cancelled when they take too long."""

    async def carry_out(self, pool_id: str, step: ReclaimStep) -> Measured:
        """Take a step: drain the deployment if the step says so, change it, measure.

        Raises:
            RungError: it did not work.
        """
        ...

    async def bring_up(self, pool_id: str, deployment_id: str) -> None:
        """Start or wake a deployment; returns when it is awake.

        Raises:
            RungError: it did not become awake.
        """
        ...


class Swap(Struct, frozen=True, kw_only=True):
    """A turn on a swap slot that changes hands.

    Attributes:
        displaced: the deployment that was awake before.
        taker: the one that is to be.
    """

    slot: str
    displaced: str
    taker: str


class SwapJournal(Protocol):
    """Keeps the swaps that are under way over the death of this process."""

    async def read(self) -> Sequence[Swap]:
        """What was kept.

        Raises:
            RungError: it cannot be read now.
        """
        ...

    async def write(self, swap: Swap) -> None:
        """Keep a swap, in place of another one of its slot.

        Raises:
            RungError: it was not kept.
        """
        ...

    async def erase(self, slot: str) -> None:
        """Forget the swap of a slot.

        Raises:
            RungError: it is still kept.
        """
        ...


class NoJournal:
    """Keeps nothing: for where nothing outlives this process."""

    async def read(self) -> Sequence[Swap]:
        """Nothing was kept."""
        return ()

    async def write(self, swap: Swap) -> None:
        """Do nothing."""

    async def erase(self, slot: str) -> None:
        """Do nothing."""


class VramAlert(Struct, frozen=True, kw_only=True):
    """Free memory of a pool fell below the limit (`low`), or has recovered."""

    pool_id: str
    low: bool
    free_bytes: int
    limit_bytes: int


class SchedulerOptions(Struct, frozen=True, kw_only=True):
    """How a scheduler behaves.

    Attributes:
        queue: order and patience.
        heartbeat_s: whoever waits hears something at least so often.
        measurement_age_s: an older measurement counts as none.
        measurement_wait_s: a pool that was not measured for so long fails the demands for it.
        measurement_retry_s: how often a pool is asked for a newer measurement.
        patience: a step or a raise may take so many times as long as expected,
        margin_s: and so much longer.
        pull_patience_s: the start of what may fetch its model first, so much longer still. A pull that stands
            still is ended by its agent, long before this.
        backoff_s: a deployment that failed to give way, or to come up, is left alone for so long. An action
            that was carried out is not repeated for so long unless the deployment was used since.
        settle_s: a deployment that was raised is left alone for so long, so that those who waited for it come
            to use it.
        patrol_s: how often all pools are looked at even though nothing happens.
        low_free_bytes: free memory below this raises an alert,
        low_free_hysteresis_bytes: which ends so far above.
    """

    queue: QueueRules = QueueRules()
    heartbeat_s: float = 0.9
    measurement_age_s: float = 3.0
    measurement_wait_s: float = 10.0
    measurement_retry_s: float = 0.25
    patience: float = 3.0
    margin_s: float = 20.0
    pull_patience_s: float = 24 * 3600.0
    backoff_s: float = 60.0
    settle_s: float = 2.0
    patrol_s: float = 5.0
    low_free_bytes: int = 2 * GIB
    low_free_hysteresis_bytes: int = GIB // 2

    def deadline_s(self, expected_s: float) -> float:
        """How long something may take that is expected to take so long."""
        return expected_s * self.patience + self.margin_s
