"""One transition at a time on each GPU: engines measure its free memory while they start and fall asleep."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterable
from contextlib import asynccontextmanager
from functools import partial

from nodeagent.supervisor._progress import Emit, Progress
from rung.types import Gpu, Residency


class GpuTurns:
    """The order of what changes the memory of the node's GPUs."""

    def __init__(self) -> None:
        self._locks: dict[str, asyncio.Lock] = {}
        self._doing: dict[str, str] = {}
        #: UUIDs, which are the ids here, by index.
        self._uuids: dict[str, str] = {}

    def know(self, gpus: Iterable[Gpu]) -> None:
        """Take note of the GPUs that there are; one that is lost for a while is still known."""
        for gpu in gpus:
            self._uuids[str(gpu.index)] = gpu.uuid

    @asynccontextmanager
    async def turn(
        self, gpus: tuple[str, ...], doing: str, emit: Emit, residency: Callable[[], Residency]
    ) -> AsyncIterator[None]:
        """Wait until nothing else changes the memory of these GPUs.

        Args:
            gpus: by index or UUID, as in a spec; none means all.
            doing: what those who come later read.
            emit: is told what this waits for.
            residency: where the deployment is, meanwhile.
        """
        # Always in the same order, so that two that want several never wait for each other.
        ids = sorted({self._uuids.get(name, name) for name in gpus or self._uuids})
        held: list[str] = []
        try:
            with Progress(emit, residency) as progress:
                for gpu in ids:
                    lock = self._locks.setdefault(gpu, asyncio.Lock())
                    if lock.locked():
                        progress.say(partial(self._waiting_for, gpu))
                    await lock.acquire()
                    held.append(gpu)
                    self._doing[gpu] = doing
            yield
        finally:
            for gpu in held:
                self._locks[gpu].release()

    def _waiting_for(self, gpu: str) -> str:
        return f"waiting for the {self._doing[gpu]} on its GPU"
