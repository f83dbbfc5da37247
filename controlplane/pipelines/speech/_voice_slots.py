"""How many generations of voice a node does at once."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager

from controlplane.pipelines._slots import Slots

DEFAULT_VOICE_SLOTS = 2


class VoiceSlots:
    """Bounds speech and transcriptions by node, so that a heap of them leaves the others there in peace.

    Args:
        default: generations at once on a node.
        limits: by node, where it is another number.
    """

    def __init__(self, default: int = DEFAULT_VOICE_SLOTS, limits: Mapping[str, int] | None = None) -> None:
        self._default = default
        self._limits = limits or {}
        self._slots = Slots()

    def load(self, node_id: str) -> tuple[int, int]:
        """Generations that run on a node, and that wait."""
        return self._slots.load(node_id)

    @asynccontextmanager
    async def held(self, node_id: str, on_wait: Callable[[str], None]) -> AsyncIterator[None]:
        """Hold a slot of a node for as long as the context lasts; who came first is first.

        Args:
            node_id: the node.
            on_wait: told one's place in the queue, in words, and when it moves.

        Raises:
            QueueFullError: too many wait already.
        """
        limit = self._limits.get(node_id, self._default)
        if not self._slots.try_acquire(node_id, limit):
            slots = "the voice slot" if limit == 1 else f"one of {limit} voice slots"
            async for place in self._slots.acquire(node_id):
                on_wait(f"waiting for {slots} of {node_id}; place {place} in the queue")
        try:
            yield
        finally:
            self._slots.release(node_id)
