"""A pool as the scheduler sees it: what was measured, and what it knows beside that."""

from __future__ import annotations

from collections.abc import Collection

import msgspec

from controlplane.vram._leases import LeaseBook
from controlplane.vram._ledger import Ledger, LedgerEntry, Reservation
from controlplane.vram._obedience import Obedience
from controlplane.vram._ports import Measurement
from controlplane.vram._raises import Raises


class View:
    """The ledger with what is promised, leased, in transition and spent; `reservations` are by lease.

    `soon` is the ledger of a moment later, when what has just come up may be touched; None if nothing has.
    """

    __slots__ = ("ledger", "reservations", "soon")

    def __init__(
        self, measurement: Measurement, *, book: LeaseBook, raises: Raises, obedience: Obedience, now_s: float
    ) -> None:
        ledger, leased = measurement.ledger, book.leased()
        self.reservations: dict[str, Reservation] = book.reservations(
            ledger, measurement.measured_s, measurement.taken_bytes
        )
        entries: list[LedgerEntry] = []
        settling: set[str] = set()
        for entry in ledger.entries:
            entry = obedience.adjust(entry, now_s)
            in_flux = entry.in_flux or raises.is_rising(entry.deployment_id)
            if not in_flux and raises.settles(entry.deployment_id):
                settling.add(entry.deployment_id)
                in_flux = True
            is_leased = entry.leased or entry.deployment_id in leased
            if (in_flux, is_leased) != (entry.in_flux, entry.leased):
                entry = msgspec.structs.replace(entry, leased=is_leased, in_flux=in_flux)
            entries.append(entry)
        self.ledger: Ledger = msgspec.structs.replace(
            ledger, entries=tuple(entries), reservations=tuple(self.reservations.values())
        )
        self.soon: Ledger | None = _settled(self.ledger, settling) if settling else None


def _settled(ledger: Ledger, names: Collection[str]) -> Ledger:
    """The ledger with those in it no longer in flux."""
    return msgspec.structs.replace(
        ledger,
        entries=tuple(
            msgspec.structs.replace(each, in_flux=False) if each.deployment_id in names else each
            for each in ledger.entries
        ),
    )
