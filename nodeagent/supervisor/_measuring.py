"""Measuring what an engine holds, and what it gave back: what engines say of their memory is not believed."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import TypeAlias

from msgspec import Struct

from nodeagent.supervisor._state import DeploymentState
from rung.types import GpuHealth, NodeStatus

#: Takes a sample of the node, now.
Look: TypeAlias = Callable[[], Awaitable[NodeStatus]]

#: Memory that is given back shows in the figures a little later, and is waited for so long.
SETTLE_S = 5.0
POLL_S = 0.25
#: Two figures that differ by less are the same.
_STEADY_BYTES = 16 << 20
#: The share of what was expected that is enough.
ENOUGH = 0.8


class Memory(Struct, frozen=True):
    """What one sample says: bytes that the engine holds, if the platform tells, and its GPUs' free bytes."""

    held_bytes: int | None
    free_bytes: int


def memory_of(status: NodeStatus, deployment_id: str, gpus: tuple[str, ...]) -> Memory | None:
    """The memory of a deployment on its GPUs (none means all); None without figures, or with old ones."""
    chosen = [gpu for gpu in status.gpus if not gpus or str(gpu.index) in gpus or gpu.uuid in gpus]
    if not chosen or any(gpu.health is GpuHealth.UNKNOWN for gpu in chosen):
        return None
    held = [
        process.memory_bytes
        for gpu in chosen
        for process in gpu.processes
        if process.deployment_id == deployment_id and process.memory_bytes is not None
    ]
    return Memory(sum(held) if held else None, sum(gpu.memory_free_bytes for gpu in chosen))


def freed_between(before: Memory, after: Memory, *, gone: bool) -> int:
    """Bytes that an engine gave back; never less than none.

    By its own figures if the platform has them, else by what is free. One that is `gone` has no figures
    because it holds nothing; another one without is merely not told of.
    """
    if before.held_bytes is not None and (gone or after.held_bytes is not None):
        return max(before.held_bytes - (after.held_bytes or 0), 0)
    return max(after.free_bytes - before.free_bytes, 0)


class Meter:
    """Measures the memory of one deployment.

    Args:
        state: is told what is measured.
        look: None if nothing can be measured.
    """

    def __init__(self, state: DeploymentState, look: Look | None) -> None:
        self._state = state
        self._look = look

    async def read(self) -> Memory | None:
        """What it holds now; None if that cannot be measured."""
        if self._look is None:
            return None
        found = memory_of(await self._look(), self._state.id, self._state.record.spec.engine.gpus)
        if found is not None:
            self._state.measured(found.held_bytes)
        return found

    async def freed(
        self, before: Memory | None, *, expected_bytes: int | None, gone: bool = False
    ) -> int | None:
        """What it has given back since `before`, once the figure has settled; None if it is not known.

        Args:
            before: as `read` found it.
            expected_bytes: as long as it is much less, the figure is given time; None for any at all.
            gone: whether the engine is.
        """
        if before is None:
            return None
        loop = asyncio.get_running_loop()
        deadline_s = loop.time() + SETTLE_S
        enough_bytes = 1 if expected_bytes is None else int(expected_bytes * ENOUGH)
        last_bytes: int | None = None
        while True:
            after = await self.read()
            freed_bytes = None if after is None else freed_between(before, after, gone=gone)
            if freed_bytes is not None and last_bytes is not None:
                steady = abs(freed_bytes - last_bytes) <= _STEADY_BYTES
                if steady and freed_bytes >= enough_bytes:
                    return freed_bytes
            if loop.time() >= deadline_s:
                return freed_bytes
            last_bytes = freed_bytes
            await asyncio.sleep(POLL_S)
