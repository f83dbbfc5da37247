"""A pool as the scheduler sees it: what was measured, and what it knows beside that."""

from __future__ import annotations

import msgspec

from controlplane.vram._leases import LeaseBook
from controlplane.vram._ledger import Ledger, LedgerEntry, Reservation
from controlplane.vram._obedience import Obedience
from controlplane.vram._ports import Measurement
from controlplane.vram._raises import Raises


class View:
    """The ledger with what is promised, leased, in transition and spent; `reservations` are by lease."""

    __slots__ = ("ledger", "reservations")

    def __init__(
        self, measurement: Measurement, *, book: LeaseBook, raises: Raises, obedience: Obedience, now_s: float
    ) -> None:
        ledger, leased = measurement.ledger, book.leased()
        self.reservations: dict[str, Reservation] = book.reservations(
            ledger, measurement.measured_s, measurement.taken_bytes
        )
        entries: list[LedgerEntry] = []
        for entry in ledger.entries:
            entry = obedience.adjust(entry, now_s)
            in_flux = entry.in_flux or raises.in_flux(entry.deployment_id)
            is_leased = entry.leased or entry.deployment_id in leased
            if (in_flux, is_leased) != (entry.in_flux, entry.leased):
                entry = msgspec.structs.replace(entry, leased=is_leased, in_flux=in_flux)
            entries.append(entry)
        self.ledger: Ledger = msgspec.structs.replace(
            ledger, entries=tuple(entries), reservations=tuple(self.reservations.values())
        )
