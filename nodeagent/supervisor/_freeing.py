"""How an engine gives back what it keeps as a cache, and how it is found out whether it did."""

from __future__ import annotations

import asyncio

from nodeagent.engines import FreeControl
from nodeagent.supervisor._draining import drained
from nodeagent.supervisor._measuring import Meter
from nodeagent.supervisor._progress import Emit, Progress
from nodeagent.supervisor._state import DeploymentState
from rung.errors import DeadlineExceededError
from rung.types import Residency

_GIB = 1 << 30
#: What an engine asks of the GPU for itself, with nothing loaded: more than that left is worth a word.
_OWN_BYTES = 3 * _GIB // 2
#: An image takes a minute, a queue of them several. The caller is told all the while, and may leave.
DRAIN_TIMEOUT_S = 300.0


async def free_cache(
    state: DeploymentState, control: FreeControl, meter: Meter, emit: Emit, *, drain_timeout_s: float
) -> int | None:
    """Have an engine flush once it has nothing to do; returns the bytes that this freed, if known.

    Asked while it works it would do nothing for whoever waits, and afterwards take the models from whoever
    comes next.

    Raises:
        DeadlineExceededError: it was busy for too long; nothing was asked of it.
        RungError: it did not take the call.
    """
    running, spec = state.record.running, state.record.spec
    assert running is not None
    with Progress(emit, lambda: state.residency) as progress:
        try:
            async with asyncio.timeout(drain_timeout_s):
                await drained(state, control, progress)
        except TimeoutError:
            raise DeadlineExceededError(
                f"{state.id} keeps its memory: what it was doing did not end within {drain_timeout_s:g} s",
                deployment=state.id,
            ) from None
        before = await meter.read()
        progress.say("asking it to give back its memory")
        await control.free(running.base_url, spec)
        progress.say("measuring what it gave back")
        freed_bytes = await meter.freed(before, expected_bytes=None)
        held_bytes = before.held_bytes if before is not None else None
        if state.residency is Residency.FAILED:
            # It died meanwhile, and its last words stand.
            return freed_bytes
        if held_bytes is not None and freed_bytes is not None and held_bytes - freed_bytes > _OWN_BYTES:
            left_bytes = held_bytes - freed_bytes
            state.show(
                state.residency,
                f"gave back {freed_bytes / _GIB:.1f} GiB and still holds {left_bytes / _GIB:.1f} GiB: what "
                "extensions keep for themselves goes only with a restart",
            )
        return freed_bytes
