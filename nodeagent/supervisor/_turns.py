"""The order of what is asked of one deployment."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager

from nodeagent.supervisor._progress import Emit, Progress
from rung.types import Residency


class Start:
    """A start that was asked, from then until it has ended."""

    def __init__(self, task: asyncio.Task[object], *, pinned: bool) -> None:
        self.task = task
        self.pinned = pinned
        self.called_off = False
        self._failed = False

    def call_off(self) -> None:
        """Cancel it, once: what it then does to leave nothing running must not be cut short."""
        if not self.called_off and not self._failed:
            self.called_off = True
            self.task.cancel()

    def failed(self) -> None:
        """It leaves nothing running by itself: there is nothing to call off any more."""
        self._failed = True


class Turns:
    """Lets one operation at a time do its work, in the order in which they were asked.

    Args:
        residency: where the deployment is, for those that wait.
    """

    def __init__(self, residency: Callable[[], Residency]) -> None:
        self._residency = residency
        self._lock = asyncio.Lock()
        self._doing = ""
        self._waiting = 0
        self._starts: list[Start] = []

    @property
    def awaited(self) -> bool:
        """Whether an operation waits for its turn."""
        return self._waiting > 0

    @asynccontextmanager
    async def turn(self, doing: str, emit: Emit) -> AsyncIterator[None]:
        """Wait until all that was asked before is done; `doing` is what those who come later read."""
        must_wait = self._lock.locked() or self.awaited
        self._waiting += 1
        try:
            with Progress(emit, self._residency) as progress:
                if must_wait:
                    progress.say(lambda: f"waiting for the {self._doing} that is under way")
                # First come, first served: that is what keeps the order.
                await self._lock.acquire()
        finally:
            self._waiting -= 1
        self._doing = doing
        try:
            yield
        finally:
            self._lock.release()

    @contextmanager
    def asked_to_start(self, *, pinned: bool) -> Iterator[Start]:
        """Make the start that the current task is about known to stops that are asked after it."""
        task = asyncio.current_task()
        assert task is not None
        start = Start(task, pinned=pinned)
        self._starts.append(start)
        try:
            yield start
        finally:
            self._starts.remove(start)

    def call_off_starts(self, *, force: bool) -> None:
        """Call off every start that was asked so far; those of pinned engines only with `force`."""
        for start in self._starts:
            if force or not start.pinned:
                start.call_off()
