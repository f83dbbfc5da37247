"""The random schedules notice what is spoilt: without any one of its safeguards the scheduler breaks some."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import msgspec
import pytest

from controlplane.vram import SchedulerOptions
from controlplane.vram._leases import LeaseBook
from controlplane.vram._obedience import Obedience
from controlplane.vram._scheduler import NodeScheduler
from tests.simulation.schedules import play

SEEDS = 900

Spoil = Callable[[pytest.MonkeyPatch], None]


def _ignore(*args: Any, **kwargs: Any) -> None:
    """Do nothing."""


def no_reservations(patch: pytest.MonkeyPatch) -> None:
    view = NodeScheduler._view

    def spoilt(self: NodeScheduler, measurement: Any) -> Any:
        found = view(self, measurement)
        found.ledger = msgspec.structs.replace(found.ledger, reservations=())
        return found

    patch.setattr(NodeScheduler, "_view", spoilt)


def promises_end_before_the_pool_is_measured(patch: pytest.MonkeyPatch) -> None:
    close = LeaseBook._close
    patch.setattr(LeaseBook, "_close", lambda self, ledger, measured_s: close(self, ledger, float("inf")))


def nothing_is_kept_for_a_raise(patch: pytest.MonkeyPatch) -> None:
    promise = LeaseBook.promise_raise
    patch.setattr(LeaseBook, "promise_raise", lambda self, name, size, ledger: promise(self, name, 0, ledger))


def what_is_taken_counts_twice(patch: pytest.MonkeyPatch) -> None:
    reservations = LeaseBook.reservations

    def spoilt(self: LeaseBook, *args: Any) -> Any:
        return {
            key: msgspec.structs.replace(each, taken_bytes=2 * each.taken_bytes)
            for key, each in reservations(self, *args).items()
        }

    patch.setattr(LeaseBook, "reservations", spoilt)


def a_raise_that_failed_counts_as_settled(patch: pytest.MonkeyPatch) -> None:
    end = LeaseBook.end_raise

    def spoilt(self: LeaseBook, deployment_id: str, now_s: float) -> None:
        end(self, deployment_id, now_s)
        for promise in self._promises.values():
            promise.raises = False

    patch.setattr(LeaseBook, "end_raise", spoilt)


def leases_do_not_expire(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(LeaseBook, "next_expiry_s", lambda self: None)
    patch.setattr(LeaseBook, "expire", lambda self, now_s: ())


def who_leaves_stays_in_the_queue(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(NodeScheduler, "_left", _ignore)


def steps_have_no_deadline(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(SchedulerOptions, "deadline_s", lambda self, expected_s: 1e9)


def liars_are_believed_again_and_again(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Obedience, "carried_out", _ignore)


def failures_are_forgotten(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Obedience, "failed", _ignore)


@pytest.mark.parametrize(
    "spoil",
    [
        no_reservations,
        promises_end_before_the_pool_is_measured,
        nothing_is_kept_for_a_raise,
        what_is_taken_counts_twice,
        a_raise_that_failed_counts_as_settled,
        leases_do_not_expire,
        who_leaves_stays_in_the_queue,
        steps_have_no_deadline,
        liars_are_believed_again_and_again,
        failures_are_forgotten,
    ],
    ids=lambda spoil: spoil.__name__,
)
def test_a_spoilt_scheduler_breaks_some_schedule(spoil: Spoil, monkeypatch: pytest.MonkeyPatch) -> None:
    spoil(monkeypatch)

    with pytest.raises((AssertionError, ExceptionGroup)) as broken:  # noqa: PT012 - some seed, no matter which
        for seed in range(SEEDS):
            play(seed)

    error: BaseException = broken.value
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    assert isinstance(error, AssertionError)
