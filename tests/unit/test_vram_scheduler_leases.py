"""The lease book: what is promised and not taken yet, as measurements come in."""

from __future__ import annotations

import pytest

from controlplane.vram import Demand, Lease, Ledger, LedgerEntry, ReclaimGrade
from controlplane.vram._leases import LeaseBook
from rung.errors import UnknownLeaseError
from rung.types import Residency, ResidencyClass

GIB = 1 << 30
POOL = "workstation/0"


def pool(**held_gib: float) -> Ledger:
    """A pool whose deployments hold so much, all of them awake but those named `…_waking`."""
    entries = []
    for name, size_gib in held_gib.items():
        waking = name.endswith("_waking")
        entries.append(
            LedgerEntry(
                deployment_id=name.removesuffix("_waking"),
                residency=Residency.WAKING if waking else Residency.AWAKE,
                residency_class=ResidencyClass.CACHE,
                resident_bytes=int(size_gib * GIB),
                measured=True,
            )
        )
    return Ledger(pool_id=POOL, total_bytes=32 * GIB, free_bytes=16 * GIB, entries=tuple(entries))


def lease(name: str, size_gib: int, *, deployment_id: str = "", at_s: float = 0.0) -> Lease:
    return Lease(
        id=name,
        operation_id=f"operation of {name}",
        pool_id=POOL,
        demand=Demand(vram_bytes=size_gib * GIB, holder=name),
        deployment_id=deployment_id,
        grade=ReclaimGrade.QUICK,
        granted_s=at_s,
        ttl_s=10.0,
        expires_s=at_s + 10.0,
    )


def outstanding(
    book: LeaseBook, ledger: Ledger, at_s: float, taken: dict[str, int] | None = None
) -> dict[str, float]:
    found = book.reservations(ledger, at_s, taken or {})
    return {key: each.outstanding_bytes / GIB for key, each in found.items()}


def test_what_nobody_has_measured_stays_promised() -> None:
    book = LeaseBook()
    book.grant(lease("training", 10), pool())

    assert outstanding(book, pool(), 1.0) == {"training": 10.0}
    assert outstanding(book, pool(), 2.0, {"training": 4 * GIB}) == {"training": 6.0}
    assert outstanding(book, pool(), 3.0, {"training": 12 * GIB}) == {"training": 0.0}


def test_what_a_deployment_has_grown_by_is_taken() -> None:
    book = LeaseBook()
    book.grant(lease("image", 10, deployment_id="comfyui"), pool(comfyui=3))

    assert outstanding(book, pool(comfyui=3), 1.0) == {"image": 10.0}
    assert outstanding(book, pool(comfyui=7), 2.0) == {"image": 6.0}
    assert outstanding(book, pool(comfyui=15), 3.0) == {"image": 0.0}


def test_a_deployment_that_lets_go_of_its_cache_first_has_taken_what_it_takes_after_that() -> None:
    book = LeaseBook()
    book.grant(lease("image", 10, deployment_id="comfyui"), pool(comfyui=8))

    assert outstanding(book, pool(comfyui=2), 1.0) == {"image": 10.0}
    assert outstanding(book, pool(comfyui=8), 2.0) == {"image": 4.0}


def test_two_leases_of_one_deployment_share_its_growth() -> None:
    book = LeaseBook()
    book.grant(lease("first", 6, deployment_id="comfyui"), pool(comfyui=1))
    book.grant(lease("second", 4, deployment_id="comfyui"), pool(comfyui=1))

    assert outstanding(book, pool(comfyui=8), 1.0) == {"first": 0.0, "second": 3.0}


def test_what_the_first_lease_leaves_behind_is_not_taken_by_the_second() -> None:
    book = LeaseBook()
    book.grant(lease("first", 6, deployment_id="comfyui"), pool(comfyui=1))
    book.grant(lease("second", 4, deployment_id="comfyui"), pool(comfyui=1))
    book.end("first", 1.0)  # it took its 6 GiB since the last measurement

    assert outstanding(book, pool(comfyui=7), 2.0) == {"second": 4.0}
    assert outstanding(book, pool(comfyui=9), 3.0) == {"second": 2.0}


def test_an_estimate_is_no_growth() -> None:
    book = LeaseBook()
    book.grant(lease("image", 10, deployment_id="comfyui"), pool(comfyui=3))
    guessed = LedgerEntry(
        deployment_id="comfyui",
        residency=Residency.AWAKE,
        residency_class=ResidencyClass.CACHE,
        resident_bytes=13 * GIB,
    )
    ledger = Ledger(pool_id=POOL, total_bytes=32 * GIB, free_bytes=16 * GIB, entries=(guessed,))

    assert outstanding(book, ledger, 1.0) == {"image": 10.0}


def test_the_end_of_a_lease_counts_once_the_pool_was_measured_after_it() -> None:
    book = LeaseBook()
    book.grant(lease("training", 10), pool())
    book.end("training", 5.0)

    assert book.leases == ()
    assert outstanding(book, pool(), 4.9) == {"training": 10.0}
    assert book.awaits_measurement
    assert outstanding(book, pool(), 5.0) == {}
    assert not book.awaits_measurement


def test_a_raise_keeps_its_promise_until_its_deployment_has_settled() -> None:
    book = LeaseBook()
    book.promise_raise("model", 12 * GIB, pool(model=0))
    book.end_raise("model", 5.0)

    assert list(outstanding(book, pool(model_waking=4), 6.0).values()) == [8.0]
    assert book.raise_is_open("model")
    assert outstanding(book, pool(model=12), 7.0) == {}
    assert not book.raise_is_open("model")


def test_a_lease_ends_when_its_time_is_over_and_not_before() -> None:
    book = LeaseBook()
    book.grant(lease("training", 10), pool())

    assert book.next_expiry_s() == 10.0
    assert book.expire(9.99) == ()
    assert book.renew("training", 9.0).expires_s == 19.0
    assert book.expire(18.99) == ()
    assert [each.id for each in book.expire(19.0)] == ["training"]
    with pytest.raises(UnknownLeaseError):
        book.renew("training", 19.0)
    assert book.end("training", 19.0) is None
