"""Deployments on their way up: one at a time in a pool, each with a promise of the memory that it takes."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from controlplane.vram._gauge import Gauge
from controlplane.vram._leases import LeaseBook
from controlplane.vram._ledger import Ledger, LedgerEntry
from controlplane.vram._ports import Executor, PlacedDeployment, SchedulerOptions
from controlplane.vram._upkeep import missing_bytes, raise_expected_s
from rung.errors import RungError
from rung.types import Residency


class Raises:
    """Raises deployments, and believes that one is awake when it was measured so.

    Args:
        book: keeps the promises.
        gauge: measures.
        executor: starts and wakes.
        options: deadlines.
        ended: told which deployment's raise is over and why it failed; empty if it did not.
    """

    def __init__(
        self,
        *,
        book: LeaseBook,
        gauge: Gauge,
        executor: Executor,
        options: SchedulerOptions,
        ended: Callable[[str, str], None],
    ) -> None:
        self._book = book
        self._gauge = gauge
        self._executor = executor
        self._options = options
        self._ended = ended
        self._rising: dict[str, tuple[str, float]] = {}
        self._settles_s: dict[str, float] = {}

    def of(self, pool_id: str) -> str:
        """The deployment on its way up in a pool; empty if none is."""
        return self._rising.get(pool_id, ("", 0.0))[0]

    def left_s(self, pool_id: str) -> float:
        """How much longer that should take."""
        return max(0.0, self._rising.get(pool_id, ("", 0.0))[1] - _now_s())

    def next_settled_s(self) -> float | None:
        """When the next deployment that came up may be touched again."""
        now_s = _now_s()
        self._settles_s = {name: until_s for name, until_s in self._settles_s.items() if until_s > now_s}
        return min(self._settles_s.values(), default=None)

    def is_rising(self, deployment_id: str) -> bool:
        """Whether a deployment is on its way up."""
        return any(name == deployment_id for name, _ in self._rising.values())

    def settles(self, deployment_id: str) -> bool:
        """Whether a deployment has come up a moment ago."""
        return self._settles_s.get(deployment_id, 0.0) > _now_s()

    def begin(
        self, entry: LedgerEntry, placed: PlacedDeployment, ledger: Ledger, tasks: asyncio.TaskGroup
    ) -> None:
        """Promise the memory, and let the deployment come up by itself."""
        expected_s = raise_expected_s(entry)
        self._book.promise_raise(placed.deployment_id, missing_bytes(placed, entry), ledger)
        self._rising[placed.pool_id] = placed.deployment_id, _now_s() + expected_s
        limit_s = self._options.deadline_s(expected_s)
        if placed.pulls and entry.residency is not Residency.ASLEEP:
            limit_s += self._options.pull_patience_s
        tasks.create_task(self._bring_up(placed, limit_s))

    async def _bring_up(self, placed: PlacedDeployment, limit_s: float) -> None:
        deployment_id, failure = placed.deployment_id, ""
        try:
            async with asyncio.timeout(limit_s):
                await self._executor.bring_up(placed.pool_id, deployment_id)
        except TimeoutError:
            failure = f"{deployment_id} was not awake after {limit_s:.0f} s"
        except RungError as error:
            failure = error.message
        ended_s = _now_s()
        self._book.end_raise(deployment_id, ended_s)
        failure = failure or await self._verify(placed, ended_s)
        del self._rising[placed.pool_id]
        if not failure:
            self._settles_s[deployment_id] = _now_s() + self._options.settle_s
        self._ended(deployment_id, failure)

    async def _verify(self, placed: PlacedDeployment, ended_s: float) -> str:
        """Why it cannot be said that the deployment is awake; empty if it was measured so."""
        try:
            measurement = await self._gauge.measured(placed.pool_id, not_before_s=ended_s)
        except RungError as error:
            return error.message
        entry = measurement.ledger.entry(placed.deployment_id)
        if entry is not None and entry.residency is Residency.AWAKE:
            return ""
        return f"{placed.deployment_id} is {entry.residency if entry else 'gone'} after it came up"


def _now_s() -> float:
    return asyncio.get_running_loop().time()
