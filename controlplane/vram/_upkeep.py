"""What a node does when nobody asks for anything: idle deployments stop, warm ones come back. Pure."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator

from controlplane.vram._ledger import Ledger, LedgerEntry
from controlplane.vram._ports import PlacedDeployment, SchedulerOptions, VramAlert
from rung.types import ReclaimAction, ReclaimStep, Residency, ResidencyClass


def missing_bytes(placed: PlacedDeployment, entry: LedgerEntry | None) -> int:
    """What a deployment takes beyond what it holds, when it is raised."""
    return max(0, placed.awake_bytes - (entry.resident_bytes if entry else 0))


def raise_expected_s(entry: LedgerEntry) -> float:
    """How long it should take until the deployment is awake."""
    if entry.residency is Residency.ASLEEP:
        return entry.wake_expected_s
    return entry.timings.start_s


def idle_step(
    ledger: Ledger, placed: Iterable[PlacedDeployment], kept: Collection[str]
) -> ReclaimStep | None:
    """The stop of the first `on_demand` deployment that has had no requests for its idle timeout.

    Args:
        ledger: the pool.
        placed: its deployments.
        kept: deployments that are left alone.
    """
    for each, entry in _ours(ledger, placed, kept):
        if (
            each.idle_timeout_s is not None
            and entry.residency_class is ResidencyClass.ON_DEMAND
            and entry.residency in (Residency.AWAKE, Residency.ASLEEP)
            and not entry.busy
            and entry.idle_s >= each.idle_timeout_s
        ):
            return ReclaimStep(
                deployment_id=entry.deployment_id,
                action=ReclaimAction.STOP,
                expected_bytes=entry.resident_bytes,
                expected_s=entry.timings.stop_s,
            )
    return None


def to_restore(
    ledger: Ledger, placed: Iterable[PlacedDeployment], kept: Collection[str]
) -> PlacedDeployment | None:
    """The first warm deployment that is down and fits into what is free; nobody gives way for it.

    Args:
        ledger: the pool.
        placed: its deployments.
        kept: deployments that are left alone.
    """
    for each, entry in _ours(ledger, placed, kept):
        if (
            each.warm
            and entry.residency in (Residency.ASLEEP, Residency.STOPPED)
            and missing_bytes(each, entry) <= ledger.available_bytes
        ):
            return each
    return None


def to_grow(
    ledger: Ledger, placed: Iterable[PlacedDeployment], kept: Collection[str]
) -> PlacedDeployment | None:
    """The first pinned deployment that is shrunk: it does not stay so, unlike one that was put to sleep.

    Args:
        ledger: the pool.
        placed: its deployments.
        kept: deployments that are left alone.
    """
    for each, entry in _ours(ledger, placed, kept):
        if (
            entry.residency_class is ResidencyClass.PINNED
            and entry.residency is Residency.ASLEEP
            and entry.shrunk
        ):
            return each
    return None


def _ours(
    ledger: Ledger, placed: Iterable[PlacedDeployment], kept: Collection[str]
) -> Iterator[tuple[PlacedDeployment, LedgerEntry]]:
    """The deployments that upkeep may touch now, with what the ledger has of them."""
    for each in placed:
        entry = ledger.entry(each.deployment_id)
        if entry is not None and entry.deployment_id not in kept and entry.touchable and not entry.external:
            yield each, entry


class LowMemoryWatch:
    """Tells once when a pool's free memory falls below the limit, and once when it has recovered."""

    def __init__(self, options: SchedulerOptions) -> None:
        self._limit_bytes = options.low_free_bytes
        self._recovered_bytes = options.low_free_bytes + options.low_free_hysteresis_bytes
        self._low: set[str] = set()

    def look(self, ledger: Ledger) -> VramAlert | None:
        """The alert that a new measurement gives cause for, or None."""
        low = ledger.pool_id in self._low
        if low and ledger.free_bytes >= self._recovered_bytes:
            self._low.discard(ledger.pool_id)
        elif not low and ledger.free_bytes < self._limit_bytes:
            self._low.add(ledger.pool_id)
        else:
            return None
        return VramAlert(
            pool_id=ledger.pool_id,
            low=not low,
            free_bytes=ledger.free_bytes,
            limit_bytes=self._limit_bytes,
        )
