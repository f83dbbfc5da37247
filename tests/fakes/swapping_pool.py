"""A simulated pool with deployments that take turns on a swap slot, and a journal of that."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import msgspec

from controlplane.vram import PlacedDeployment, Swap
from rung.errors import UnavailableError
from rung.types import Residency
from tests.fakes.simulated_pool import SimulatedEngine, SimulatedPool

_DOWN = (Residency.STOPPED, Residency.FAILED)


class SwappingPool(SimulatedPool):
    """Never may two of a slot be up: they would want the same port.

    Args:
        engines: all engines.
        slots: by engine, the slot on which it takes turns.
        latency_s: as `SimulatedPool`.
        keep_s: as `SimulatedPool`.
    """

    def __init__(
        self,
        engines: Sequence[SimulatedEngine],
        slots: Mapping[str, str],
        *,
        latency_s: float = 0.0,
        keep_s: float = 0.0,
    ) -> None:
        super().__init__(engines, latency_s=latency_s, keep_s=keep_s)
        self._slots = dict(slots)

    def deployments(self) -> Sequence[PlacedDeployment]:
        """All engines, with their slots."""
        return [
            msgspec.structs.replace(each, swap_slot=self._slots.get(each.deployment_id, ""))
            for each in super().deployments()
        ]

    def changed(self) -> None:
        """Memory has changed hands, or an engine has come or gone.

        Raises:
            BrokenInvariantError: two of a slot are up.
        """
        up: dict[str, str] = {}
        for name, slot in self._slots.items():
            if self.engines[name].residency in _DOWN:
                continue
            if slot in up:
                self.break_(f"{up[slot]} and {name} are both up on {slot}")
            up[slot] = name
        super().changed()


class MemoryJournal:
    """What a store would keep."""

    def __init__(self) -> None:
        self.kept: dict[str, Swap] = {}
        self.full = False

    async def read(self) -> Sequence[Swap]:
        """What was kept."""
        if self.full:
            raise UnavailableError("the disk is full")
        return tuple(self.kept.values())

    async def write(self, swap: Swap) -> None:
        """Keep it."""
        if self.full:
            raise UnavailableError("the disk is full")
        self.kept[swap.slot] = swap

    async def erase(self, slot: str) -> None:
        """Forget it."""
        del self.kept[slot]
