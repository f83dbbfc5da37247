"""What was learnt survives a restart: read at the start, and written soon after it changed."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Collection, Sequence
from typing import Protocol

import structlog

from controlplane.estimates._estimates import Estimates, Key, Observations
from rung.errors import RungError

_log = structlog.get_logger("rung.estimates")

#: What a crash loses at most.
WRITE_EVERY_S = 2.0
#: A deployment that is taken out of the configuration may come back: it is remembered for so long.
_KEPT_WHEN_GONE_S = 30 * 24 * 3600.0


class EstimateStore(Protocol):
    """Where observations are kept, as `controlplane.store.EstimateRows` has it."""

    async def read(self) -> Sequence[Observations]:
        """All of them, least recently observed first."""
        ...

    async def write(
        self, changed: Sequence[Observations], forgotten: Sequence[Key], *, time_s: float
    ) -> None:
        """Replace those of some steps, and remove those of others."""
        ...

    async def delete_gone(self, deployments: Collection[str], *, before_s: float) -> int:
        """Forget those of other deployments than these, observed last before a Unix time."""
        ...


class EstimateKeeper:
    """Keeps `estimates` on disk.

    Args:
        store: where.
        unix_s: Unix time.
    """

    def __init__(self, store: EstimateStore, *, unix_s: Callable[[], float] = time.time) -> None:
        self.estimates = Estimates()
        self._store = store
        self._unix_s = unix_s
        self._writing: asyncio.Task[None] | None = None

    async def start(self, deployments: Collection[str]) -> None:
        """Read what was learnt before, and forget what deployments did that are long gone.

        Raises:
            UnavailableError: the store cannot be read.
        """
        await self._store.delete_gone(deployments, before_s=self._unix_s() - _KEPT_WHEN_GONE_S)
        self.estimates.restore(await self._store.read())
        self._writing = asyncio.create_task(self._write_behind(), name="estimates")

    async def aclose(self) -> None:
        """Write what was learnt since."""
        if self._writing is not None:
            self._writing.cancel()
            await asyncio.gather(self._writing, return_exceptions=True)
        await self._write()

    async def _write_behind(self) -> None:
        while True:
            await asyncio.sleep(WRITE_EVERY_S)
            await self._write()

    async def _write(self) -> None:
        changed, forgotten = self.estimates.take_changed()
        if not changed and not forgotten:
            return
        try:
            await self._store.write(changed, forgotten, time_s=self._unix_s())
        except BaseException as error:
            self.estimates.not_stored([*((each.deployment_id, each.step) for each in changed), *forgotten])
            if not isinstance(error, RungError):
                raise
            _log.warning("estimates_not_stored", steps=len(changed), error=error.message)
