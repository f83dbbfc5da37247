"""Keeping running what the configuration wants running."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Collection, Mapping
from typing import Protocol

import structlog
from msgspec import Struct

from controlplane.fleet._view import FleetView
from rung.errors import RungError
from rung.types import Deployment, ExternalRuntime, LifecycleDone, LifecycleEvent, NodeState, Residency

_log = structlog.get_logger("rung.fleet")

#: Wait after the first failed start; it doubles with each further one.
FIRST_RETRY_S = 10.0
LONGEST_RETRY_S = 300.0
#: A start counts as good once the engine has run this long: one that crashes in a circle is backed off.
GOOD_RUN_S = 60.0
_IDLE_LOOK_S = 30.0
_STARTABLE = frozenset({Residency.STOPPED, Residency.FAILED})


class StartRecord(Struct, frozen=True, kw_only=True):
    """The newest start of a deployment: how it ended, when, and how many before it were no good."""

    succeeded: bool
    ended_s: float
    failures: int

    @property
    def earliest_next_s(self) -> float:
        """When the deployment may be started again."""
        if self.failures == 0:
            return self.ended_s
        return self.ended_s + min(LONGEST_RETRY_S, FIRST_RETRY_S * 2.0 ** min(self.failures - 1, 16))


class Decision(Struct, frozen=True):
    """What to start now, and when to look again even if nothing changes (None: not needed)."""

    start: tuple[str, ...] = ()
    next_look_s: float | None = None


def after_start(before: StartRecord | None, *, succeeded: bool, now_s: float) -> StartRecord:
    """The record after a start that ended now."""
    if before is None or (before.succeeded and now_s - before.ended_s >= GOOD_RUN_S):
        failures = 0
    else:
        # The engine that was started before did not live long, although its start went well.
        failures = before.failures + (1 if before.succeeded else 0)
    return StartRecord(succeeded=succeeded, ended_s=now_s, failures=failures if succeeded else failures + 1)


def decide(
    view: FleetView,
    records: Mapping[str, StartRecord],
    busy: Collection[str],
    held: Collection[str],
    now_s: float,
) -> Decision:
    """Which deployments to start.

    1. Only those with `keep_running` that are STOPPED or FAILED on a READY node; a node that drains or
       is not heard gets nothing started. Nothing is ever stopped.
    2. An engine that somebody else runs is never started: its agent is told of it once (STOPPED means
       that the agent does not know it), and looks after it from then on.
    3. Not what an operator stopped (`held`) or a profile wants down, or what has an operation under way
       (`busy`).
    4. Not before the backoff after a failed start, or after a crash soon after a good one, is over.

    Args:
        view: the fleet.
        records: newest start by deployment.
        busy: deployments with an operation under way.
        held: deployments that an operator stopped.
        now_s: the clock of the records.
    """
    start: list[str] = []
    later: list[float] = []
    for deployment_id, found in view.deployments.items():
        if not _is_wanted(found.deployment) or found.node.state is not NodeState.READY:
            continue
        if found.hold or deployment_id in held or deployment_id in busy:
            continue
        record = records.get(deployment_id)
        if record is None or record.earliest_next_s <= now_s:
            start.append(deployment_id)
        else:
            later.append(record.earliest_next_s)
    return Decision(tuple(start), min(later, default=None))


def _is_wanted(deployment: Deployment) -> bool:
    if isinstance(deployment.spec.engine.runtime, ExternalRuntime):
        return deployment.residency is Residency.STOPPED
    return deployment.spec.keep_running and deployment.residency in _STARTABLE


class ReconciledFleet(Protocol):
    """What reconciling needs of the fleet."""

    @property
    def view(self) -> FleetView:
        """The fleet now."""
        ...

    @property
    def held(self) -> Collection[str]:
        """Deployments that an operator stopped."""
        ...

    @property
    def busy(self) -> Collection[str]:
        """Deployments with an operation under way."""
        ...

    async def wait_changed(self, timeout_s: float) -> bool:
        """Wait for the next change of the fleet."""
        ...

    def start_kept(self, deployment_id: str) -> AsyncGenerator[LifecycleEvent, None]:
        """Start a deployment."""
        ...


class Reconciler:
    """Starts, one operation each, what `decide` says, whenever the fleet changes."""

    def __init__(self, fleet: ReconciledFleet) -> None:
        self._fleet = fleet
        self._records: dict[str, StartRecord] = {}
        self._starts: dict[str, asyncio.Task[None]] = {}

    async def run(self) -> None:
        """Reconcile, for ever; on cancellation the starts under way go on at the agents."""
        loop = asyncio.get_running_loop()
        try:
            while True:
                now_s = loop.time()
                busy = {*self._fleet.busy, *self._starts}
                decision = decide(self._fleet.view, self._records, busy, self._fleet.held, now_s)
                for deployment_id in decision.start:
                    task = asyncio.create_task(self._start(deployment_id), name=f"keep-{deployment_id}")
                    self._starts[deployment_id] = task
                next_look_s = decision.next_look_s
                await self._fleet.wait_changed(
                    _IDLE_LOOK_S if next_look_s is None else min(_IDLE_LOOK_S, max(0.01, next_look_s - now_s))
                )
        finally:
            for task in list(self._starts.values()):
                task.cancel()
            await asyncio.gather(*self._starts.values(), return_exceptions=True)

    async def _start(self, deployment_id: str) -> None:
        succeeded = False
        detail = ""
        try:
            async for event in self._fleet.start_kept(deployment_id):
                succeeded = isinstance(event.payload, LifecycleDone)
                detail = getattr(event.payload, "detail", "")
        except RungError as error:
            detail = error.message
        finally:
            del self._starts[deployment_id]
        now_s = asyncio.get_running_loop().time()
        record = after_start(self._records.get(deployment_id), succeeded=succeeded, now_s=now_s)
        self._records[deployment_id] = record
        if not succeeded:
            wait_s = record.earliest_next_s - now_s
            _log.warning(
                "kept_deployment_not_started", deployment=deployment_id, detail=detail, retry_s=wait_s
            )
