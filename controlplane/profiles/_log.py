"""The events of one switch, from its plan to its last, and those who read them."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator

from msgspec.structs import replace

from rung.errors import RungError
from rung.service import Signal
from rung.types import ProfileDone, ProfileEvent, ProfileFailed, ProfilePayload, ProfileStep

#: Readers hear something at least once a second.
KEEP_ALIVE_S = 0.9


class SwitchLog:
    """What a switch has told. A step that goes on is told again whenever nothing else was for `KEEP_ALIVE_S`.

    Args:
        operation_id: the caller's own id of the operation.
        profile: name of the profile that is switched to.
    """

    def __init__(self, operation_id: str, profile: str) -> None:
        self.operation_id = operation_id
        self.profile = profile
        self.ended = False
        self._loop = asyncio.get_running_loop()
        self._began_s = self._loop.time()
        self._events: list[ProfileEvent] = []
        self._signal = Signal()
        self._refused: RungError | None = None
        self._said_s = self._began_s
        self._timer: asyncio.TimerHandle | None = None

    def add(self, payload: ProfilePayload) -> None:
        """Add an event; `ProfileDone` and `ProfileFailed` end the log."""
        self._said_s = self._loop.time()
        self._append(payload)
        if isinstance(payload, ProfileDone | ProfileFailed):
            self._end()

    def refuse(self, error: RungError) -> None:
        """End with an error that is raised to the readers, unless it has ended."""
        if not self.ended:
            self._refused = error
            self._end()

    async def events(self) -> AsyncGenerator[ProfileEvent, None]:
        """All events from the first, then new ones as they come, to the end. Raises what `refuse` said."""
        place = 0
        while True:
            while place < len(self._events):
                place += 1
                yield self._events[place - 1]
            if self._refused is not None:
                raise type(self._refused)(self._refused.message, **self._refused.metadata)
            if self.ended:
                return
            await self._signal.wait()

    def _append(self, payload: ProfilePayload) -> None:
        elapsed_s = self._loop.time() - self._began_s
        self._events.append(ProfileEvent(self.operation_id, len(self._events) + 1, elapsed_s, payload))
        self._cancel_timer()
        if isinstance(payload, ProfileStep):
            self._timer = self._loop.call_later(KEEP_ALIVE_S, self._keep_alive, payload)
        self._signal.fire()

    def _keep_alive(self, said: ProfileStep) -> None:
        left_s = said.expected_s
        if left_s is not None and not said.done:
            now_s = self._loop.time()
            left_s, self._said_s = max(0.0, left_s - (now_s - self._said_s)), now_s
        self._append(replace(said, expected_s=left_s))

    def _cancel_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()

    def _end(self) -> None:
        self.ended = True
        self._cancel_timer()
        self._signal.fire()
