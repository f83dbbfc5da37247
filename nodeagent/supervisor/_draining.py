"""Waiting until nothing is asked of an engine any more."""

from __future__ import annotations

import asyncio

from nodeagent.engines import FreeControl, SleepControl
from nodeagent.supervisor._progress import Progress
from nodeagent.supervisor._state import DeploymentState

_POLL_S = 0.25


async def drained(state: DeploymentState, control: SleepControl | FreeControl, progress: Progress) -> None:
    """Return when no request runs: of this agent's, or of those who reach the engine without it.

    Raises:
        EngineUnreachableError, EngineTimeoutError, EngineProtocolError: the engine does not say.
    """
    running = state.record.running
    assert running is not None
    if not state.idle.is_set():
        progress.say(lambda: f"letting {_requests(state.deployment.active_requests)} finish")
        await state.idle.wait()
    while count := await control.requests(running.base_url, state.record.spec):
        progress.say(f"letting {_requests(count)} finish that did not come through the agent")
        await asyncio.sleep(_POLL_S)


def _requests(count: int) -> str:
    return f"{count} running {'request' if count == 1 else 'requests'}"
