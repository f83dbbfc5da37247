"""Doing something while children run, and noticing when one of them ends."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Coroutine
from types import TracebackType
from typing import Any, TypeVar

from controlplane.local._child import Child

T = TypeVar("T")

_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class ChildDiedError(Exception):
    """A child ended that should have gone on."""

    def __init__(self, child: Child) -> None:
        super().__init__(f"{child.name} ended with exit code {child.exit_code}")
        self.child = child


class StopRequestedError(Exception):
    """Somebody asked us to stop: Ctrl-C, SIGTERM or a closed terminal."""


class Watch:
    """Watches children and signals. Use as an async context manager, in the main thread.

    While it is entered, a signal ends what `during` does instead of the process. A signal that comes
    during the clean-up afterwards changes nothing: the clean-up has bounds of its own.
    """

    def __init__(self) -> None:
        self._stop = asyncio.Event()
        self._died = asyncio.Event()
        self._dead: list[Child] = []
        self._waits: dict[str, asyncio.Task[None]] = {}

    async def __aenter__(self) -> Watch:
        loop = asyncio.get_running_loop()
        for number in _SIGNALS:
            loop.add_signal_handler(number, self._stop.set)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for task in self._waits.values():
            task.cancel()
        await asyncio.gather(*self._waits.values(), return_exceptions=True)
        loop = asyncio.get_running_loop()
        for number in _SIGNALS:
            loop.remove_signal_handler(number)

    def add(self, child: Child) -> None:
        """Watch a child from now on."""
        self._waits[child.name] = asyncio.create_task(self._wait(child), name=f"wait-{child.name}")

    def remove(self, child: Child) -> None:
        """A child may end from now on."""
        self._waits.pop(child.name).cancel()

    async def _wait(self, child: Child) -> None:
        await child.wait()
        self._dead.append(child)
        self._died.set()

    async def during(self, work: Coroutine[Any, Any, T]) -> T:
        """Do `work` while all children live; it is cancelled otherwise.

        Raises:
            ChildDiedError: a child ended.
            StopRequestedError: a signal came.
        """
        working = asyncio.create_task(work)
        stopping = asyncio.create_task(self._stop.wait())
        dying = asyncio.create_task(self._died.wait())
        try:
            await asyncio.wait({working, stopping, dying}, return_when=asyncio.FIRST_COMPLETED)
            if stopping.done():
                raise StopRequestedError
            if self._dead:
                # A child's death explains why the work failed, not the other way round.
                raise ChildDiedError(self._dead[0])
            return await working
        finally:
            for task in (stopping, dying, working):
                task.cancel()
            await asyncio.gather(stopping, dying, working, return_exceptions=True)

    async def until_stopped(self) -> None:
        """Wait for a signal.

        Raises:
            ChildDiedError: a child ended first.
        """
        try:
            await self.during(asyncio.Event().wait())
        except StopRequestedError:
            return
