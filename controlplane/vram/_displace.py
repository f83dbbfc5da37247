"""Who has to stop before a deployment may take its turn on a swap slot. Pure.

Two of a slot are never up together, not even while one sleeps: its engine would keep the port. So the stop of
the other is part of every plan for a member, at STANDARD, whatever else is to be freed; its bytes count
as freed. It is the last step, so that the other goes on serving until there is room otherwise.
"""

from __future__ import annotations

from controlplane.vram._ledger import Ledger, LedgerEntry
from controlplane.vram._options import Option, stop_of
from rung.types import Infeasible, ReclaimGrade, Residency, ResidencyClass

_DOWN = frozenset({Residency.STOPPED, Residency.FAILED})


def is_up(entry: LedgerEntry) -> bool:
    """Whether a deployment has an engine, or may have one: then the port of its slot is taken."""
    return entry.residency not in _DOWN


def displaced(ledger: Ledger, displaces: tuple[str, ...]) -> list[tuple[LedgerEntry, Option]]:
    """The deployments that have to stop, by id, and what that frees and harms."""
    up = [entry for entry in ledger.entries if entry.deployment_id in displaces and is_up(entry)]
    return [(entry, stop_of(entry)) for entry in sorted(up, key=lambda entry: entry.deployment_id)]


def hindrance(
    stops: list[tuple[LedgerEntry, Option]], exclude: tuple[str, ...], max_grade: ReclaimGrade
) -> Infeasible | None:
    """Why one that has to stop cannot be told to; None if all can."""
    for entry, _ in stops:
        name = entry.deployment_id
        retry_when: tuple[str, ...] = ()
        if max_grade is ReclaimGrade.QUICK:
            why = "at grade quick nobody is stopped"
        elif entry.leased:
            why, retry_when = "a lease is held on it", (f"the lease on {name} ends",)
        elif entry.residency is Residency.UNKNOWN or entry.external or name in exclude:
            why = "it is left alone"
        elif entry.residency_class in (ResidencyClass.PINNED, ResidencyClass.CACHE):
            why = f"it is {entry.residency_class}"
        elif not entry.touchable:
            settled = entry.residency in (Residency.AWAKE, Residency.ASLEEP)
            why = "it has just come up" if settled else f"it is {entry.residency}"
            retry_when = (f"{name} has settled",)
        else:
            continue
        return Infeasible(
            detail=f"{name} has the swap slot and would have to stop, but {why}",
            missing_bytes=0,
            missing_at_full_bytes=0,
            largest_fit_bytes=0,
            retry_when=retry_when,
        )
    return None
