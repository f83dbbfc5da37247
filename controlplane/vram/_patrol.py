"""What a scheduler does that nobody asked for: it looks at every pool now and then, and at what is due.

The most urgent first: a turn on a swap slot that was given up for nothing goes back, what is shrunk and
pinned grows, what is idle stops, what is warm comes back.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import msgspec

from controlplane.vram._gauge import Gauge
from controlplane.vram._ledger import Ledger
from controlplane.vram._obedience import Obedience
from controlplane.vram._plan import Demand, apply
from controlplane.vram._ports import Measurement, PlacedDeployment, Pools
from controlplane.vram._queue import Planner
from controlplane.vram._raises import Raises
from controlplane.vram._room import WaitingRoom
from controlplane.vram._steps import Steps
from controlplane.vram._swaps import Swaps
from controlplane.vram._upkeep import idle_step, missing_bytes, to_grow, to_restore
from controlplane.vram._view import View
from rung.types import Infeasible, Priority

#: Raises a deployment for which there is room, although nobody waits for it.
Restore = Callable[[PlacedDeployment, View], bool]


class Patrol:
    """Looks after the pools of a node.

    Args:
        pools: knows the deployments.
        gauge: measures.
        room: those who wait, and may be joined by what is due.
        raises: what is on its way up: such a pool is left alone.
        obedience: who is left alone.
        swaps: turns that are to be given back.
        steps: carries out.
        planner: says whether there could be room.
        view: the pool as the scheduler sees it.
        restore: raises what there is room for.
    """

    def __init__(
        self,
        *,
        pools: Pools,
        gauge: Gauge,
        room: WaitingRoom,
        raises: Raises,
        obedience: Obedience,
        swaps: Swaps,
        steps: Steps,
        planner: Planner,
        view: Callable[[Measurement], View],
        restore: Restore,
    ) -> None:
        self._pools = pools
        self._gauge = gauge
        self._room = room
        self._raises = raises
        self._obedience = obedience
        self._swaps = swaps
        self._steps = steps
        self._plan = planner
        self._view = view
        self._restore = restore

    async def look(self, wanted: set[str]) -> bool:
        """Do the first thing that is due; False if nothing is.

        Args:
            wanted: pools for whose memory somebody waits: nothing comes back there by itself.
        """
        by_pool: dict[str, list[PlacedDeployment]] = {}
        for placed in self._pools.deployments():
            by_pool.setdefault(placed.pool_id, []).append(placed)
        for pool_id, placed_there in by_pool.items():
            if await self._look_after(pool_id, placed_there, wanted=pool_id in wanted):
                return True
        return False

    async def _look_after(self, pool_id: str, placed: list[PlacedDeployment], *, wanted: bool) -> bool:
        measurement = await self._gauge.newest(pool_id)
        if measurement is None or self._raises.of(pool_id):
            return False
        view = self._view(measurement)
        kept = {*self._obedience.failures(_now_s())}
        kept |= {each.deployment_id for each in self._room}
        await self._swaps.settle(view.ledger, _now_s())
        owed = self._swaps.owed(view.ledger, placed, kept, _now_s())
        if owed is not None:
            self._join(owed)
            return True
        kept |= {*self._obedience.left_alone(_now_s())}
        if self._grow(view.ledger, placed, kept):
            return True
        step = idle_step(view.ledger, placed, kept)
        if step is not None:
            apply(view.ledger, step)
            await self._steps.carry_out(pool_id, step)
            return True
        taken = {each.deployment_id for each in placed if self._swaps.taken(each, view.ledger)}
        restored = None if wanted else to_restore(view.ledger, placed, kept | taken)
        return restored is not None and self._restore(restored, view)

    def _grow(self, ledger: Ledger, placed: list[PlacedDeployment], kept: set[str]) -> bool:
        """Have a pinned deployment that is shrunk wait for its turn to grow, once others can make room."""
        found = to_grow(ledger, placed, kept)
        if found is None:
            return False
        missing = missing_bytes(found, ledger.entry(found.deployment_id))
        demand = msgspec.structs.replace(self._demand_of(found), vram_bytes=missing)
        if isinstance(self._plan(ledger, self._obedience.keep_away(demand, _now_s())), Infeasible):
            return False
        self._join(found)
        return True

    def _join(self, placed: PlacedDeployment) -> None:
        self._room.join_raise(placed.pool_id, self._demand_of(placed), placed.deployment_id)

    def _demand_of(self, placed: PlacedDeployment) -> Demand:
        return self._swaps.demand_of(placed, Priority.USER)


def _now_s() -> float:
    return asyncio.get_running_loop().time()
