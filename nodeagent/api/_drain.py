"""How an agent stops: nothing new is begun, what runs may end for a while, and then its streams end."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import structlog

from rung.errors import DrainingError

_log = structlog.get_logger("rung.agent")


class Drain:
    """Knows which generations run, and ends what else would never end.

    Attributes:
        over: set once nothing is waited for any more: streams that go on for ever are to end then.
    """

    def __init__(self, node_id: str) -> None:
        self.over = asyncio.Event()
        self._node_id = node_id
        self._draining = False
        self._running: set[asyncio.Timeout] = set()
        self._endless: set[asyncio.Timeout] = set()

    @property
    def running(self) -> int:
        """Generations that run."""
        return len(self._running)

    def require_open(self) -> None:
        """Raises DrainingError once nothing new is begun."""
        if self._draining:
            raise DrainingError(
                f"the agent of {self._node_id} is shutting down and begins nothing new", node=self._node_id
            )

    @asynccontextmanager
    async def generation(self) -> AsyncIterator[None]:
        """One generation, which is let end.

        Raises:
            DrainingError: it may not begin, or was cut.
        """
        self.require_open()
        try:
            async with asyncio.timeout(None) as cut:
                self._running.add(cut)
                try:
                    yield
                finally:
                    self._running.discard(cut)
                    if self._draining and not self._running:
                        self._be_over()
        except TimeoutError:
            if not cut.expired():
                raise
            raise DrainingError(
                f"the agent of {self._node_id} shut down before this generation ended", node=self._node_id
            ) from None

    @asynccontextmanager
    async def until_over(self) -> AsyncIterator[None]:
        """Leaves its block once it is over: for what waits for something else, and would never look."""
        try:
            async with asyncio.timeout(None) as limit:
                self._endless.add(limit)
                try:
                    yield
                finally:
                    self._endless.discard(limit)
        except TimeoutError:
            if not limit.expired():
                raise

    def begin(self) -> None:
        """Begin nothing more. It is over once nothing runs."""
        self._draining = True
        if not self._running:
            self._be_over()

    async def end(self, timeout_s: float) -> None:
        """Wait until it is over, and cut what runs on after `timeout_s`."""
        try:
            async with asyncio.timeout(timeout_s):
                await self.over.wait()
        except TimeoutError:
            self.cut()

    def cut(self) -> None:
        """Wait for nothing any more: what runs is cut."""
        self._draining = True
        if self._running:
            _log.warning("generations_cut", generations=len(self._running))
        _expire(self._running)
        self._be_over()

    def _be_over(self) -> None:
        self.over.set()
        _expire(self._endless)


def _expire(limits: set[asyncio.Timeout]) -> None:
    """Each once."""
    now_s = asyncio.get_running_loop().time()
    while limits:
        limits.pop().reschedule(now_s)
