"""What keeps a stream that others write to from being silent."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from types import TracebackType

#: A stream says what is under way at least once a second: this leaves time to send it.
KEEP_ALIVE_S = 0.8


class KeepAlive:
    """Has something said whenever nothing was written for `KEEP_ALIVE_S`; for streams of very many writes.

    A write costs its writer one look at the clock: it sets `wrote_s`. There is one timer, which is armed anew
    only when it fires, and a task only while something is said. The next thing is said no sooner than the one
    before it was taken, and nothing once the context is left, whose exit waits for what is just being said.

    Args:
        say: writes what is to be said, if anything is. A ConnectionError that it raises ends this, and is for
            the writer to notice.
    """

    __slots__ = ("_is_over", "_loop", "_say", "_saying", "_seen_s", "_timer", "wrote_s")

    def __init__(self, say: Callable[[], Awaitable[None]]) -> None:
        self._loop = asyncio.get_running_loop()
        self._say = say
        self._saying: asyncio.Task[None] | None = None
        self._is_over = False
        #: When something was last written, by the clock of the loop.
        self.wrote_s = self._loop.time()
        self._arm()

    async def __aenter__(self) -> KeepAlive:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._is_over = True
        self._timer.cancel()
        if self._saying is None:
            return
        try:
            if kind is None:
                # Cut off, it might leave half a head behind.
                await asyncio.wait([self._saying])
        finally:
            if not self._saying.done():
                # Of one that is done this would hide a defect.
                self._saying.cancel()

    def _arm(self) -> None:
        if self._is_over:
            return
        self._seen_s = self.wrote_s
        self._timer = self._loop.call_at(self.wrote_s + KEEP_ALIVE_S, self._look_at_clock)

    def _look_at_clock(self) -> None:
        if self.wrote_s != self._seen_s:
            self._arm()
        else:
            self._saying = self._loop.create_task(self._speak())

    async def _speak(self) -> None:
        if self._is_over:
            return
        try:
            await self._say()
        except ConnectionError:
            return
        self.wrote_s = self._loop.time()
        self._arm()
