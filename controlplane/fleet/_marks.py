"""What the fleet remembers over a restart: nodes that were drained, and swaps that are under way."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

import msgspec

from controlplane.vram import Swap

_DRAINED = "drained_node"
_SWAP = "swap"
_decoder = msgspec.msgpack.Decoder(Swap)


class Marks(Protocol):
    """Small records by kind and key, as `controlplane.store.FleetMarks` keeps them.

    Each method raises UnavailableError if the store cannot be used.
    """

    async def read(self, kind: str) -> Mapping[str, bytes]:
        """The records of a kind, by key."""
        ...

    async def put(self, kind: str, key: str, record: bytes) -> None:
        """Keep a record in place of another one of its key."""
        ...

    async def remove(self, kind: str, key: str) -> None:
        """Forget a record; nothing happens if there is none."""
        ...


class NoMarks:
    """Keeps nothing: for where nothing outlives this process."""

    async def read(self, kind: str) -> Mapping[str, bytes]:
        """Nothing was kept."""
        return {}

    async def put(self, kind: str, key: str, record: bytes) -> None:
        """Do nothing."""

    async def remove(self, kind: str, key: str) -> None:
        """Do nothing."""


class DrainMarks:
    """The nodes that an operator drained."""

    def __init__(self, marks: Marks) -> None:
        self._marks = marks

    async def read(self) -> frozenset[str]:
        """Their ids."""
        return frozenset(await self._marks.read(_DRAINED))

    async def write(self, node_id: str, *, drained: bool) -> None:
        """Remember that a node was drained, or taken back."""
        if drained:
            await self._marks.put(_DRAINED, node_id, b"")
        else:
            await self._marks.remove(_DRAINED, node_id)


class NodeSwaps:
    """The swaps that are under way on a node: the port `SwapJournal`."""

    def __init__(self, marks: Marks, node_id: str) -> None:
        self._marks = marks
        self._node_id = node_id

    async def read(self) -> tuple[Swap, ...]:
        """What was kept."""
        kept = await self._marks.read(_SWAP)
        return tuple(_decoder.decode(record) for key, record in sorted(kept.items()) if self._is_of_node(key))

    async def write(self, swap: Swap) -> None:
        """Keep a swap, in place of another one of its slot."""
        await self._marks.put(_SWAP, f"{self._node_id}/{swap.slot}", msgspec.msgpack.encode(swap))

    async def erase(self, slot: str) -> None:
        """Forget the swap of a slot."""
        await self._marks.remove(_SWAP, f"{self._node_id}/{slot}")

    def _is_of_node(self, key: str) -> bool:
        return key.rpartition("/")[0] == self._node_id
