"""The demands that wait for a node: who comes, who joins whom, who leaves, and in which order they stand."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator

import msgspec

from controlplane.vram._leases import LeaseBook
from controlplane.vram._pending import Pending
from controlplane.vram._plan import Demand
from controlplane.vram._queue import Queued, QueueRules, by_class, class_of, order, overtake
from rung.errors import AlreadyExistsError, DrainingError, RungError
from rung.types import Priority


class WaitingRoom:
    """Demands by their operation."""

    def __init__(self, book: LeaseBook, rules: QueueRules) -> None:
        self._book = book
        self._rules = rules
        self._pending: dict[str, Pending] = {}
        self._sequence = 0
        self._closed = False

    def __iter__(self) -> Iterator[Pending]:
        return iter(tuple(self._pending.values()))

    def __bool__(self) -> bool:
        return bool(self._pending)

    def join_lease(
        self, operation_id: str, pool_id: str, demand: Demand, *, ttl_s: float, deployment_id: str
    ) -> Pending:
        """The demand of an operation: a new one, the one that waits, or one that has its lease.

        Raises:
            AlreadyExistsError: the operation is another demand.
            DrainingError: the room is closed.
        """
        asked = pool_id, demand, deployment_id
        pending = self._pending.get(operation_id)
        if pending is not None:
            if (pending.pool_id, pending.demand, pending.deployment_id) != asked:
                raise AlreadyExistsError(f"operation {operation_id} is another demand")
            return pending
        pending = self._new(operation_id, pool_id, demand, ttl_s, deployment_id, raises=False)
        lease = self._book.of_operation(operation_id)
        if lease is None:
            self._pending[operation_id] = pending
        elif (lease.pool_id, lease.demand, lease.deployment_id) == asked:
            pending.grant(lease)
            pending.delivered = True  # to whoever asked first: that this one leaves does not end it
        else:
            raise AlreadyExistsError(f"operation {operation_id} has a lease for another demand")
        return pending

    def join_raise(self, pool_id: str, demand: Demand, deployment_id: str) -> Pending:
        """The demand for a deployment to be raised; the most urgent of those who joined it decides.

        Raises:
            DrainingError: the room is closed.
        """
        pending = self.raise_of(deployment_id)
        if pending is None:
            key = _raise_key(deployment_id)
            pending = self._new(key, pool_id, demand, 0.0, deployment_id, raises=True)
            self._pending[key] = pending
        else:
            self._hurry(pending, demand.priority)
        return pending

    def raise_of(self, deployment_id: str) -> Pending | None:
        """The demand for a deployment to be raised, if there is one."""
        return self._pending.get(_raise_key(deployment_id))

    def leave(self, pending: Pending) -> None:
        """A demand has its outcome, or was withdrawn; another one may have come with its id since."""
        if self._pending.get(pending.operation_id) is pending:
            del self._pending[pending.operation_id]

    def close(self, error: RungError) -> None:
        """Everybody leaves with an error, and nobody comes in any more."""
        self._closed = True
        for pending in self:
            self.leave(pending)
            pending.fail(error)

    def queues(self, pending: list[Pending], last_groups: dict[str, str]) -> list[list[Pending]]:
        """Demands in the order in which they are looked at, by pool; the pool with the first of all first.

        Args:
            pending: those that are to be looked at.
            last_groups: by pool, the deployment that was served last.
        """
        now_s = _now_s()
        by_pool: dict[str, dict[int, Pending]] = {}
        for each in pending:
            by_pool.setdefault(each.pool_id, {})[each.queued.sequence] = each
        found: list[tuple[int, int, list[Pending]]] = []
        for pool_id, waiting in by_pool.items():
            ordered = order(
                [each.queued for each in waiting.values()], now_s, self._rules, last_groups.get(pool_id, "")
            )
            queue = [waiting[each.sequence] for each in ordered]
            for place, each in enumerate(queue, 1):
                each.position = place
            found.append((class_of(ordered[0], now_s, self._rules), ordered[0].sequence, queue))
        return [queue for _, _, queue in sorted(found, key=lambda each: each[:2])]

    def before(self, pending: Pending) -> list[Pending]:
        """Those of the same pool whose turn would be before a demand's."""
        now_s = _now_s()
        others = [each for each in self if each.pool_id == pending.pool_id and each is not pending]
        return [
            each
            for each in others
            if by_class((each.queued, pending.queued), now_s, self._rules)[0] is each.queued
        ]

    def overtake(self, pending: Pending) -> None:
        """Another demand goes before this one."""
        pending.queued = overtake(pending.queued, _now_s())

    def _hurry(self, pending: Pending, priority: Priority) -> None:
        as_urgent = msgspec.structs.replace(pending.queued, priority=priority)
        now_s = _now_s()
        if class_of(as_urgent, now_s, self._rules) < class_of(pending.queued, now_s, self._rules):
            pending.queued = as_urgent

    def _new(
        self, key: str, pool_id: str, demand: Demand, ttl_s: float, deployment_id: str, *, raises: bool
    ) -> Pending:
        if self._closed:
            raise DrainingError("the scheduler of the node is shutting down")
        self._sequence += 1
        pending = Pending(
            operation_id=key,
            pool_id=pool_id,
            demand=demand,
            ttl_s=ttl_s,
            deployment_id=deployment_id,
            raises=raises,
            queued=Queued(
                sequence=self._sequence,
                priority=demand.priority,
                arrived_s=_now_s(),
                group=deployment_id,
            ),
        )
        pending.position = 1 + sum(each.pool_id == pool_id for each in self)
        return pending


def _raise_key(deployment_id: str) -> str:
    return f"raise of {deployment_id}"


def _now_s() -> float:
    return asyncio.get_running_loop().time()
