"""Slots: how many requests each deployment serves at once, and who waits for the next."""

from __future__ import annotations

import asyncio
import math
import time
from collections import deque
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from rung.errors import QueueFullError
from rung.service import Signal

#: Most requests that wait for one deployment.
MAX_QUEUED = 1024


class _Lane:
    __slots__ = ("active", "emptied", "holds", "limit", "parked", "resumed", "waiting")

    def __init__(self) -> None:
        self.active = 0
        self.holds = 0
        self.limit = 1
        self.parked = 0
        self.waiting: deque[asyncio.Future[None]] = deque()
        self.emptied = Signal()
        self.resumed = Signal()


class Slots:
    """Counts requests by deployment. A slot that becomes free goes to who waited longest.

    Attributes:
        pressure: running and waiting requests for each slot, of deployments that have any; 1 or more of
            those without a free slot.
        full: deployments without a free slot.
    """

    def __init__(self) -> None:
        self._lanes: dict[str, _Lane] = {}
        self._released_s: dict[str, float] = {}
        self.pressure: dict[str, float] = {}
        self.full: set[str] = set()

    def load(self, deployment_id: str) -> tuple[int, int]:
        """Active and queued requests."""
        lane = self._lanes.get(deployment_id)
        return (lane.active, len(lane.waiting)) if lane else (0, 0)

    def idle_s(self, deployment_id: str) -> float:
        """Time since the last request of a deployment ended; 0 while one runs, endless before the first."""
        lane = self._lanes.get(deployment_id)
        if lane is not None and (lane.active or lane.waiting):
            return 0.0
        return time.monotonic() - self._released_s.get(deployment_id, -math.inf)

    def try_acquire(self, deployment_id: str, limit: int) -> bool:
        """Take a slot if one is free, nobody waits, and the deployment is not being drained."""
        lane = self._lanes.get(deployment_id)
        if lane is None:
            lane = self._lanes[deployment_id] = _Lane()
        lane.limit = limit
        if lane.active >= limit or lane.waiting or lane.holds:
            return False
        lane.active += 1
        self._weigh(deployment_id, lane)
        return True

    async def acquire(self, deployment_id: str) -> AsyncIterator[int]:
        """Wait for a slot after `try_acquire` said no; yields one's place in the queue, and when it moves.

        The slot is held once the iteration ends by itself.

        Raises:
            QueueFullError: too many wait already.
        """
        lane = self._lanes[deployment_id]
        if len(lane.waiting) >= MAX_QUEUED:
            raise QueueFullError(
                f"{len(lane.waiting)} requests wait for {deployment_id} already; try again later",
                deployment=deployment_id,
            )
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        lane.waiting.append(turn)
        self._weigh(deployment_id, lane)
        granted = False
        try:
            place = 0
            while not turn.done():
                now = lane.waiting.index(turn) + 1
                if now != place:
                    place = now
                    yield place
                await asyncio.wait([turn], timeout=1.0)
            granted = True
        finally:
            if not granted:
                if turn.done() and not turn.cancelled():
                    # It was granted while we were leaving: the next one gets it.
                    self.release(deployment_id)
                else:
                    lane.waiting.remove(turn)
                    self._admit(deployment_id, lane)

    def release(self, deployment_id: str) -> None:
        """Give a slot back; whoever waited longest gets it."""
        lane = self._lanes[deployment_id]
        lane.active -= 1
        if lane.active == 0:
            self._released_s[deployment_id] = time.monotonic()
        if lane.active <= lane.parked:
            lane.emptied.fire()
        self._admit(deployment_id, lane)

    @asynccontextmanager
    async def drained(self, deployment_id: str) -> AsyncIterator[None]:
        """Let no request of a deployment begin, and enter once those that run have ended.

        Requests that come meanwhile wait; leaving lets them begin.
        """
        lane = self._lanes.setdefault(deployment_id, _Lane())
        lane.holds += 1
        self._weigh(deployment_id, lane)
        try:
            while lane.active > lane.parked:
                await lane.emptied.wait()
            yield
        finally:
            lane.holds -= 1
            if not lane.holds:
                lane.resumed.fire()
            self._admit(deployment_id, lane)

    @asynccontextmanager
    async def parked(self, deployment_id: str) -> AsyncIterator[None]:
        """Keep a slot that is held, and do nothing with the engine: a drain does not wait for it meanwhile.

        Leaving waits until what the engine was drained for is over; it may not be awake any more then. So
        who waits for memory with a slot in hand holds up nobody who needs that engine drained to give some.
        """
        lane = self._lanes[deployment_id]
        lane.parked += 1
        if lane.active <= lane.parked:
            lane.emptied.fire()
        try:
            yield
            while lane.holds:
                await lane.resumed.wait()
        finally:
            lane.parked -= 1

    def _admit(self, deployment_id: str, lane: _Lane) -> None:
        """Give what slots are free to those who wait; let go of a lane that nobody uses."""
        while lane.waiting and not lane.holds and lane.active < lane.limit:
            turn = lane.waiting.popleft()
            if not turn.done():
                lane.active += 1
                turn.set_result(None)
        self._weigh(deployment_id, lane)
        if not (lane.active or lane.waiting or lane.holds):
            self._lanes.pop(deployment_id, None)

    def _weigh(self, deployment_id: str, lane: _Lane) -> None:
        """Keep what a choice reads of a thousand deployments in step with one lane."""
        if lane.holds or lane.waiting or lane.active >= lane.limit:
            self.full.add(deployment_id)
            self.pressure[deployment_id] = max(1.0, (lane.active + len(lane.waiting)) / lane.limit)
        elif lane.active:
            self.full.discard(deployment_id)
            self.pressure[deployment_id] = lane.active / lane.limit
        else:
            self.full.discard(deployment_id)
            self.pressure.pop(deployment_id, None)
