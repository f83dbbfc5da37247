"""Telling what is under way: at once when it changes, and again for as long as it goes on."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import TypeAlias

from rung.types import LifecycleProgress, Residency

#: What is under way is told again this long after it was told: a little less than the second that
#: every stream promises.
KEEP_ALIVE_S = 0.9
#: Changes are told this far apart at least; an image that is pulled reports each of its pieces.
_LEAST_GAP_S = 0.1

Emit: TypeAlias = Callable[[LifecycleProgress], None]


def nobody(_: LifecycleProgress) -> None:
    """Takes progress that no operation waits for."""


class Progress:
    """One stretch of work, such as loading. Inside its context silence is filled, whoever is awaited.

    Args:
        emit: takes what is told.
        residency: where the deployment is; a function if that changes meanwhile.
        usual_s: how long this usually takes, if known.
    """

    def __init__(
        self, emit: Emit, residency: Residency | Callable[[], Residency], *, usual_s: float | None = None
    ) -> None:
        self._emit = emit
        self._residency = residency
        self._usual_s = usual_s
        self._loop = asyncio.get_running_loop()
        self._began_s = self._loop.time()
        self._told_s: float | None = None
        self._what: str | Callable[[], str] = ""
        self._percent: float | None = None
        self._timer: asyncio.TimerHandle | None = None

    @property
    def elapsed_s(self) -> float:
        """Time since it began."""
        return self._loop.time() - self._began_s

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *_: object) -> None:
        if self._timer is not None:
            self._timer.cancel()

    def expect(self, usual_s: float | None) -> None:
        """From now on it usually takes so long; None if that is not known."""
        self._usual_s = None if usual_s is None else self.elapsed_s + usual_s

    def say(self, what: str | Callable[[], str], *, percent: float | None = None) -> None:
        """Tell what is being done now; a function is asked each time. The same again tells nothing new."""
        if (what, percent) == (self._what, self._percent):
            return
        self._what, self._percent = what, percent
        if self._told_s is None:
            self._tell()
        else:
            self._tell_at(max(self._loop.time(), self._told_s + _LEAST_GAP_S))

    def _tell_at(self, when_s: float) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._timer = self._loop.call_at(when_s, self._tell)

    def _tell(self) -> None:
        elapsed_s = self.elapsed_s
        what = self._what() if callable(self._what) else self._what
        residency = self._residency() if callable(self._residency) else self._residency
        left_s = None if self._usual_s is None else self._usual_s - elapsed_s
        self._told_s = self._loop.time()
        self._tell_at(self._told_s + KEEP_ALIVE_S)
        self._emit(
            LifecycleProgress(
                residency,
                f"{what} ({elapsed_s:.0f} s)" if elapsed_s >= KEEP_ALIVE_S else what,
                self._percent,
                # One that takes longer than usual is not about to end: how long is not known.
                left_s if left_s is not None and left_s > 0 else None,
            )
        )
