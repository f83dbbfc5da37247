"""Signals that end the control plane: the first begins a drain, the next ones cut it short."""

from __future__ import annotations

import asyncio
import signal

from controlplane.jobs import Jobs

_SIGNALS = (signal.SIGTERM, signal.SIGINT)


class StopSignals:
    """SIGTERM and SIGINT from now on, either of them.

    `first` asks for a drain. `second` asks for its end: what runs is cancelled, and its callers are told so.
    A third one ends the process as if nobody had asked for signals, in case even that hangs.
    """

    def __init__(self) -> None:
        self.first = asyncio.Event()
        self.second = asyncio.Event()
        self._loop = asyncio.get_running_loop()
        for number in _SIGNALS:
            self._loop.add_signal_handler(number, self._came)

    def _came(self) -> None:
        if not self.first.is_set():
            self.first.set()
            return
        self.second.set()
        for number in _SIGNALS:
            self._loop.remove_signal_handler(number)
            signal.signal(number, signal.SIG_DFL)


async def drain_jobs(jobs: Jobs, grace_s: float, hurry: asyncio.Event) -> None:
    """Let running jobs end for `grace_s`, or until `hurry`; cancel the rest, and store all."""
    draining = asyncio.ensure_future(jobs.drain(grace_s))
    hurrying = asyncio.ensure_future(hurry.wait())
    try:
        await asyncio.wait((draining, hurrying), return_when=asyncio.FIRST_COMPLETED)
        # With none left they are being stored, which is not to be broken off.
        if not draining.done() and jobs.running:
            draining.cancel()
            await asyncio.gather(draining, return_exceptions=True)
            await jobs.drain(0.0)
        else:
            await draining
    finally:
        hurrying.cancel()
