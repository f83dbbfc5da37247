"""Waking everyone who waits for a change."""

from __future__ import annotations

import asyncio


class Signal:
    """Wakes all who wait at the moment it fires, and remembers nothing.

    Look at the state and call `wait` without an await in between: on one event loop no change is
    missed then.
    """

    __slots__ = ("_event",)

    def __init__(self) -> None:
        self._event = asyncio.Event()

    def fire(self) -> None:
        """Wake all who wait."""
        self._event.set()
        self._event = asyncio.Event()

    async def wait(self, timeout_s: float | None = None) -> bool:
        """Wait until it fires; False when it did not within `timeout_s`."""
        event = self._event
        try:
            async with asyncio.timeout(timeout_s):
                await event.wait()
        except TimeoutError:
            return False
        return True
