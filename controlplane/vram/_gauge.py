"""Measurements of a node's pools that are true of now."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from controlplane.vram._ports import Measurement, Pools, SchedulerOptions, VramAlert
from controlplane.vram._upkeep import LowMemoryWatch
from rung.errors import UnavailableError

_NEVER_S = float("-inf")


class Gauge:
    """Measures pools, refuses what is old, and tells when one runs low.

    A measurement from before the end of the pool's last step says nothing about now.
    """

    def __init__(self, pools: Pools, alert: Callable[[VramAlert], None], options: SchedulerOptions) -> None:
        self._pools = pools
        self._alert = alert
        self._options = options
        self._watch = LowMemoryWatch(options)
        self._stepped_s: dict[str, float] = {}

    def stepped(self, pool_id: str) -> None:
        """A step has just ended."""
        self._stepped_s[pool_id] = asyncio.get_running_loop().time()

    async def measured(self, pool_id: str, not_before_s: float = _NEVER_S) -> Measurement:
        """A measurement that is true of now; waits for one.

        Raises:
            UnavailableError: there was none for too long.
            NotFoundError: there is no such pool.
        """
        loop, options = asyncio.get_running_loop(), self._options
        limit_s = loop.time() + options.measurement_wait_s
        while True:
            found = await self.newest(pool_id, not_before_s)
            if found is not None:
                return found
            if loop.time() >= limit_s:
                raise UnavailableError(
                    f"{pool_id} was not measured for {options.measurement_wait_s:.0f} s: nothing is granted",
                    pool=pool_id,
                )
            await asyncio.sleep(options.measurement_retry_s)

    async def newest(self, pool_id: str, not_before_s: float = _NEVER_S) -> Measurement | None:
        """The newest measurement; None if it is too old, or there is none.

        Raises:
            NotFoundError: there is no such pool.
        """
        try:
            async with asyncio.timeout(self._options.measurement_age_s):
                found = await self._pools.measure(pool_id)
        except (TimeoutError, UnavailableError):
            return None
        oldest_s = asyncio.get_running_loop().time() - self._options.measurement_age_s
        if found.measured_s < max(not_before_s, oldest_s, self._stepped_s.get(pool_id, _NEVER_S)):
            return None
        alert = self._watch.look(found.ledger)
        if alert is not None:
            self._alert(alert)
        return found
