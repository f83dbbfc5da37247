"""Leases, and what was promised of a pool and is not taken yet. Pure: the time comes in as an argument.

A promise counts against what is measured free until the holder has measurably taken it:

- What a deployment takes is the growth of its measured bytes since the promise. Several promises for one
  deployment are filled in the order in which they were made.
- What another holder takes is known only if somebody measured that holder. If nobody did, all of the
  promise stays outstanding: too much is counted, never too little.
- The end of a promise counts once the pool was measured after it: a holder may have taken more since the
  last measurement than that shows.
"""

from __future__ import annotations

from collections.abc import Mapping

import msgspec
from msgspec import Struct

from controlplane.vram._ledger import Ledger, Reservation
from controlplane.vram._plan import Demand
from rung.errors import InvalidRequestError, UnknownLeaseError
from rung.types import ReclaimGrade, Residency

_SETTLED = frozenset({Residency.AWAKE, Residency.ASLEEP, Residency.STOPPED, Residency.FAILED})


class Lease(Struct, frozen=True, kw_only=True):
    """A grant of memory that ends unless it is renewed. Times are those of the event loop's clock.

    Attributes:
        operation_id: the operation that asked for it.
        deployment_id: the deployment that takes the memory; empty if another program does.
        grade: how much others were disturbed.
    """

    id: str
    operation_id: str
    pool_id: str
    demand: Demand
    deployment_id: str = ""
    grade: ReclaimGrade
    granted_s: float
    ttl_s: float
    expires_s: float


class _Promise:
    __slots__ = ("deployment_id", "ended_s", "holder", "key", "pool_id", "promised_bytes", "raises")

    def __init__(
        self, key: str, pool_id: str, holder: str, promised_bytes: int, deployment_id: str, *, raises: bool
    ) -> None:
        self.key = key
        self.pool_id = pool_id
        self.holder = holder
        self.promised_bytes = promised_bytes
        self.deployment_id = deployment_id
        self.raises = raises
        self.ended_s: float | None = None


class LeaseBook:
    """The leases of a node, and the promises to them and to the deployments that are being raised."""

    def __init__(self) -> None:
        self._leases: dict[str, Lease] = {}
        self._promises: dict[str, _Promise] = {}
        #: What a deployment held when the first promise to it was made, or less: growth counts from here.
        self._base_bytes: dict[str, int] = {}

    @property
    def leases(self) -> tuple[Lease, ...]:
        """Leases by the time of their grant."""
        return tuple(self._leases.values())

    @property
    def awaits_measurement(self) -> bool:
        """Whether leases have ended whose memory counts as promised until the pool is measured again."""
        return any(each.ended_s is not None and not each.raises for each in self._promises.values())

    def has_just_ended(self, pool_id: str) -> bool:
        """Whether that is so for one pool: what is free there, and whose the rest is, is not known now."""
        return any(
            each.pool_id == pool_id and each.ended_s is not None and not each.raises
            for each in self._promises.values()
        )

    def of_operation(self, operation_id: str) -> Lease | None:
        """The lease that an operation got, or None."""
        return next((each for each in self._leases.values() if each.operation_id == operation_id), None)

    def leased(self) -> frozenset[str]:
        """Deployments with leases."""
        return frozenset(each.deployment_id for each in self._leases.values() if each.deployment_id)

    def next_expiry_s(self) -> float | None:
        """When the next lease ends if none is renewed."""
        return min((each.expires_s for each in self._leases.values()), default=None)

    def grant(self, lease: Lease, ledger: Ledger) -> None:
        """Write a lease down.

        Args:
            lease: the lease.
            ledger: the pool as it was measured for the grant.
        """
        self._leases[lease.id] = lease
        holder = lease.demand.holder or lease.id
        promise = _Promise(
            lease.id, lease.pool_id, holder, lease.demand.vram_bytes, lease.deployment_id, raises=False
        )
        self._add(promise, ledger)

    def renew(self, lease_id: str, now_s: float) -> Lease:
        """Let a lease last its TTL again from now.

        Raises:
            UnknownLeaseError: it has ended, or never was.
        """
        lease = self._leases.get(lease_id)
        if lease is None:
            raise UnknownLeaseError(f"there is no lease {lease_id}, or it has ended", lease=lease_id)
        lease = msgspec.structs.replace(lease, expires_s=now_s + lease.ttl_s)
        self._leases[lease_id] = lease
        return lease

    def end(self, lease_id: str, now_s: float) -> Lease | None:
        """End a lease; None if it had ended already."""
        lease = self._leases.pop(lease_id, None)
        if lease is not None:
            self._promises[lease_id].ended_s = now_s
        return lease

    def expire(self, now_s: float) -> tuple[Lease, ...]:
        """End the leases whose time is over."""
        over = tuple(each for each in self._leases.values() if each.expires_s <= now_s)
        for lease in over:
            self.end(lease.id, now_s)
        return over

    def promise_raise(self, deployment_id: str, promised_bytes: int, ledger: Ledger) -> None:
        """Keep memory for a deployment that is about to be raised."""
        key = _raise_key(deployment_id)
        promise = _Promise(key, ledger.pool_id, deployment_id, promised_bytes, deployment_id, raises=True)
        self._add(promise, ledger)

    def end_raise(self, deployment_id: str, now_s: float) -> None:
        """The raise is over. Its promise ends once the deployment was measured in a settled residency.

        One that was given up may go on taking memory.
        """
        self._promises[_raise_key(deployment_id)].ended_s = now_s

    def raise_is_open(self, deployment_id: str) -> bool:
        """Whether memory is still kept for a raise of the deployment."""
        return _raise_key(deployment_id) in self._promises

    def reservations(
        self, ledger: Ledger, measured_s: float, taken_bytes: Mapping[str, int]
    ) -> dict[str, Reservation]:
        """What is promised of a pool, by lease, given a measurement of it.

        Args:
            ledger: the pool as measured.
            measured_s: when.
            taken_bytes: what holders that are no deployments were measured to hold, by lease.
        """
        self._close(ledger, measured_s)
        grown_bytes: dict[str, int] = {}
        for deployment_id, base_bytes in self._base_bytes.items():
            entry = ledger.entry(deployment_id)
            if entry is not None and entry.measured:
                self._base_bytes[deployment_id] = min(base_bytes, entry.resident_bytes)
                grown_bytes[deployment_id] = entry.resident_bytes - self._base_bytes[deployment_id]
        found: dict[str, Reservation] = {}
        for promise in self._promises.values():
            if promise.pool_id != ledger.pool_id:
                continue
            if promise.deployment_id:
                taken = min(promise.promised_bytes, grown_bytes.get(promise.deployment_id, 0))
                if taken:
                    grown_bytes[promise.deployment_id] -= taken
            else:
                taken = taken_bytes.get(promise.key, 0)
            found[promise.key] = Reservation(
                holder=promise.holder,
                promised_bytes=promise.promised_bytes,
                taken_bytes=taken,
                deployment_id=promise.deployment_id,
            )
        return found

    def _add(self, promise: _Promise, ledger: Ledger) -> None:
        self._promises[promise.key] = promise
        if promise.deployment_id and promise.deployment_id not in self._base_bytes:
            entry = ledger.entry(promise.deployment_id)
            self._base_bytes[promise.deployment_id] = entry.resident_bytes if entry else 0

    def _close(self, ledger: Ledger, measured_s: float) -> None:
        """Forget the promises that had ended when the pool was measured."""
        for promise in tuple(self._promises.values()):
            if promise.pool_id != ledger.pool_id or promise.ended_s is None or measured_s < promise.ended_s:
                continue
            entry = ledger.entry(promise.deployment_id)
            if promise.raises and entry is not None and entry.residency not in _SETTLED:
                continue
            del self._promises[promise.key]
            if not promise.deployment_id:
                continue
            if any(each.deployment_id == promise.deployment_id for each in self._promises.values()):
                # It may leave all that it had with the deployment; that is no growth of the others.
                self._base_bytes[promise.deployment_id] += promise.promised_bytes
            else:
                self._base_bytes.pop(promise.deployment_id, None)


def check_ttl(ttl_s: float) -> None:
    """Refuse a TTL that is not one.

    Raises:
        InvalidRequestError: it is not more than 0.
    """
    if not ttl_s > 0:
        raise InvalidRequestError(f"a lease cannot last {ttl_s} s")


def _raise_key(deployment_id: str) -> str:
    return f"raise of {deployment_id}"
