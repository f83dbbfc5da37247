"""Deployments that take turns on a swap slot: who gave way to whom, and who has to come back.

A swap is written down before the one that is awake is told to stop, and is over when a member of the slot is
awake again. Until then, whatever comes between (the other does not come up, nobody wants it any more, the
control plane dies), the one that was awake before is raised again.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from contextlib import suppress

from controlplane.vram._displace import is_up
from controlplane.vram._ledger import Ledger, LedgerEntry
from controlplane.vram._plan import Demand
from controlplane.vram._ports import PlacedDeployment, Pools, Swap, SwapJournal
from rung.errors import RungError
from rung.types import Priority, ReclaimStep, Residency


class Swaps:
    """Swaps that are under way.

    Args:
        pools: knows the deployments.
        journal: keeps what has to survive.
        backoff_s: one that could not be raised again is tried again after so long.
    """

    def __init__(self, pools: Pools, journal: SwapJournal, *, backoff_s: float) -> None:
        self._pools = pools
        self._journal = journal
        self._open: dict[str, Swap] = {}
        self._is_read = False
        self._backoff_s = backoff_s
        #: By slot, when the one that gave way may be tried again.
        self._next_try_s: dict[str, float] = {}
        #: By slot, until when nobody knows whether the one that was told to stop will.
        self._unsure_until_s: dict[str, float] = {}

    def demand_of(self, placed: PlacedDeployment, priority: Priority) -> Demand:
        """What a deployment needs to be raised, and whom it displaces."""
        name = placed.deployment_id
        others = sorted(each.deployment_id for each in self._members(placed.swap_slot))
        return Demand(
            vram_bytes=placed.awake_bytes,
            max_grade=placed.max_grade,
            priority=priority,
            exclude=(name,),
            displaces=tuple(each for each in others if each != name),
            holder=name,
        )

    async def before(self, step: ReclaimStep, demand: Demand, ledger: Ledger) -> None:
        """A step is about to be taken for a demand: write down what it takes a turn away from.

        Raises:
            RungError: it could not be kept, and the step must not be taken.
        """
        entry = ledger.entry(step.deployment_id)
        if step.deployment_id not in demand.displaces or entry is None:
            return
        if entry.residency is not Residency.AWAKE:
            return
        slot = self._slot_of(step.deployment_id)
        swap = Swap(slot=slot, displaced=step.deployment_id, taker=demand.holder)
        await self._journal.write(swap)
        self._open[slot] = swap
        self._unsure_until_s.pop(slot, None)

    def failed(self, step: ReclaimStep, until_s: float) -> None:
        """A step failed: what it was told, the deployment may still do."""
        for swap in self._open.values():
            if swap.displaced == step.deployment_id:
                self._unsure_until_s[swap.slot] = until_s

    def gave_way_to(self, taker: str) -> str:
        """Who was awake before a deployment took its turn, which is not awake yet; empty if nobody was."""
        return next((swap.displaced for swap in self._open.values() if swap.taker == taker), "")

    async def settle(self, ledger: Ledger, now_s: float) -> None:
        """Take up what an earlier process left, and forget the swaps of a pool that are over.

        What the journal cannot do now is done the next time.
        """
        if not self._is_read:
            with suppress(RungError):
                self._open = {swap.slot: swap for swap in await self._journal.read()} | self._open
                self._is_read = True
        for swap in tuple(self._open.values()):
            members = self._entries(swap, ledger)
            if self._unsure_until_s.get(swap.slot, now_s) > now_s:
                continue
            if any(entry.residency is Residency.AWAKE for entry in members):
                with suppress(RungError):
                    await self._journal.erase(swap.slot)
                    del self._open[swap.slot]
                    self._next_try_s.pop(swap.slot, None)

    def owed(
        self, ledger: Ledger, placed: Sequence[PlacedDeployment], kept: Collection[str], now_s: float
    ) -> PlacedDeployment | None:
        """The first deployment that gave way for nothing, and has to be raised again; each now and then.

        Args:
            ledger: the pool.
            placed: its deployments.
            kept: deployments that are left alone, or waited for.
            now_s: the time.
        """
        for swap in self._open.values():
            members = self._entries(swap, ledger)
            waited_for = any(each.deployment_id in kept for each in self._members(swap.slot))
            if members and not waited_for and not any(is_up(entry) for entry in members):
                found = [each for each in placed if each.deployment_id == swap.displaced]
                if found and self._next_try_s.get(swap.slot, now_s) <= now_s:
                    self._next_try_s[swap.slot] = now_s + self._backoff_s
                    return found[0]
        return None

    def taken(self, placed: PlacedDeployment, ledger: Ledger) -> bool:
        """Whether another member of a deployment's slot is up, or has its turn now."""
        if not placed.swap_slot:
            return False
        if placed.swap_slot in self._open:
            return True
        entries = [ledger.entry(each.deployment_id) for each in self._members(placed.swap_slot)]
        return any(
            entry is not None and entry.deployment_id != placed.deployment_id and is_up(entry)
            for entry in entries
        )

    def _entries(self, swap: Swap, ledger: Ledger) -> list[LedgerEntry]:
        entries = [ledger.entry(each.deployment_id) for each in self._members(swap.slot)]
        return [entry for entry in entries if entry is not None]

    def _members(self, slot: str) -> list[PlacedDeployment]:
        return [each for each in self._pools.deployments() if slot and each.swap_slot == slot]

    def _slot_of(self, deployment_id: str) -> str:
        return next(
            each.swap_slot for each in self._pools.deployments() if each.deployment_id == deployment_id
        )
