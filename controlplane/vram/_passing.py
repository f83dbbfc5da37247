"""Who may go before a demand that cannot be served now, and what is held against it."""

from __future__ import annotations

import asyncio
from collections.abc import Collection

import msgspec

from controlplane.vram._obedience import Obedience
from controlplane.vram._pending import Pending
from controlplane.vram._plan import Demand
from controlplane.vram._ports import Pools, placed_deployment
from controlplane.vram._queue import Planner, QueueRules, leaves_room, may_be_overtaken, waits_for_leases
from controlplane.vram._room import WaitingRoom
from controlplane.vram._upkeep import missing_bytes
from controlplane.vram._view import View


class Passing:
    """Rule 4 of the queue, with the figures of the pool."""

    def __init__(
        self,
        *,
        room: WaitingRoom,
        pools: Pools,
        obedience: Obedience,
        planner: Planner,
        rules: QueueRules,
    ) -> None:
        self._room = room
        self._pools = pools
        self._obedience = obedience
        self._plan = planner
        self._rules = rules

    def may_pass(self, pending: Pending, demand: Demand, waiting: Pending, view: View) -> bool:
        """Whether a demand may go before one that cannot be served now."""
        now_s = asyncio.get_running_loop().time()
        if may_be_overtaken(waiting.queued, now_s, self._rules):
            return True
        return not self._takes_from(pending, demand, waiting, view)

    def passes(self, pending: Pending, demand: Demand, blocked: Collection[Pending], view: View) -> None:
        """A demand is served now: count it for those whose turn would have been before."""
        for each in self._room.before(pending):
            if each not in blocked or self._takes_from(pending, demand, each, view):
                self._room.overtake(each)

    def _takes_from(self, pending: Pending, demand: Demand, waiting: Pending, view: View) -> bool:
        now_s = asyncio.get_running_loop().time()
        theirs = self._obedience.keep_away(self._demand_of(waiting, view), now_s)
        if pending.raises:
            return not waits_for_leases(view.ledger, theirs, self._plan)
        return not leaves_room(
            view.ledger,
            theirs,
            taken_bytes=demand.vram_bytes,
            reservations=view.reservations,
            overtakers=waiting.overtakers,
            planner=self._plan,
        )

    def _demand_of(self, pending: Pending, view: View) -> Demand:
        placed = placed_deployment(self._pools, pending.deployment_id) if pending.raises else None
        if placed is None:
            return pending.demand
        entry = view.ledger.entry(pending.deployment_id)
        return msgspec.structs.replace(pending.demand, vram_bytes=missing_bytes(placed, entry))
