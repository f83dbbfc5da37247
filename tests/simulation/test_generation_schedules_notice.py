"""The random schedules of pictures notice what is spoilt: without a safeguard some stream breaks."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import structlog

from controlplane.artifacts import Artifacts, Collector
from controlplane.gateway import _generations
from controlplane.jobs import LiveJob, _jobs
from controlplane.pipelines import Slots
from controlplane.pipelines.image import PhaseOrder, Told
from controlplane.vram import NodeScheduler
from rung.types import ArtifactChunk
from tests.fakes.simulated_pool import BrokenInvariantError
from tests.simulation.generation_schedules import cause_of, play

SEEDS = 400


@pytest.fixture(autouse=True, scope="module")
def quiet() -> Iterator[None]:
    """What fails in schedules is meant to."""
    before = structlog.get_config()
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(50))
    yield
    structlog.configure(**before)


Spoil = Callable[[pytest.MonkeyPatch], None]


def silence_between_events(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(_generations, "KEEP_ALIVE_S", 1.3)


def events_without_a_line_count_as_lines(patch: pytest.MonkeyPatch) -> None:
    events = _generations.Followed.events
    patch.setattr(_generations.Followed, "events", lambda self, *, has_told=None: events(self))


def heartbeats_that_come_late(patch: pytest.MonkeyPatch) -> None:
    arrives = _jobs._arrives
    patch.setattr(_jobs, "_arrives", lambda job, timeout_s: arrives(job, timeout_s * 1.5))


def phases_as_they_come(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(PhaseOrder, "tell", lambda self, told: (told,))


def sampling_as_it_comes(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(PhaseOrder, "_sampled", lambda self, now: now)


def sampling_that_goes_back(patch: pytest.MonkeyPatch) -> None:
    sampled = PhaseOrder._sampled

    def spoilt(self: PhaseOrder, now: Told) -> Told | None:
        self._percent = -10.0
        return sampled(self, now)

    patch.setattr(PhaseOrder, "_sampled", spoilt)


def events_that_are_skipped(patch: pytest.MonkeyPatch) -> None:
    kept = LiveJob.kept_after
    patch.setattr(LiveJob, "kept_after", lambda self, sequence: (kept(self, sequence) or [])[-3:])


def two_ends(patch: pytest.MonkeyPatch) -> None:
    end = LiveJob._end

    def spoilt(self: LiveJob, state: Any, terminal: Any) -> None:
        if self.terminal is not None:
            self.append(terminal)
        end(self, state, terminal)

    patch.setattr(LiveJob, "_end", spoilt)


def leases_that_are_kept(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(NodeScheduler, "release", lambda self, lease_id: None)


def slots_that_are_kept(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Slots, "release", lambda self, deployment_id: None)


def halves_that_stay_on_disk(patch: pytest.MonkeyPatch) -> None:
    async def nothing(self: Collector, rest: Any) -> None:
        return

    patch.setattr(Collector, "_discard", nothing)


def hashes_that_are_not_checked(patch: pytest.MonkeyPatch) -> None:
    complete = Collector._complete
    patch.setattr(Collector, "_complete", lambda self, making, claimed_sha256: complete(self, making, ""))


def gaps_that_are_not_checked(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Collector, "_check", lambda self, making, chunk: None)


def nothing_that_is_stored(patch: pytest.MonkeyPatch) -> None:
    async def nothing(self: Artifacts, artifact: Any) -> None:
        return

    patch.setattr(Artifacts, "keep", nothing)


def another_attempt_after_a_piece(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Collector, "has_told", property(lambda self: False, lambda self, value: None))


def pieces_that_come_twice(patch: pytest.MonkeyPatch) -> None:
    artifact = LiveJob.artifact

    def spoilt(self: LiveJob, chunk: ArtifactChunk) -> None:
        artifact(self, chunk)
        artifact(self, chunk)

    patch.setattr(LiveJob, "artifact", spoilt)


def less_than_nothing_that_remains(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(
        "controlplane.jobs._live._less", lambda remaining_s, passed_s: (remaining_s or 0.0) - passed_s
    )


@pytest.mark.parametrize(
    "spoil",
    [
        silence_between_events,
        events_without_a_line_count_as_lines,
        heartbeats_that_come_late,
        phases_as_they_come,
        sampling_as_it_comes,
        sampling_that_goes_back,
        events_that_are_skipped,
        two_ends,
        leases_that_are_kept,
        slots_that_are_kept,
        halves_that_stay_on_disk,
        hashes_that_are_not_checked,
        gaps_that_are_not_checked,
        nothing_that_is_stored,
        another_attempt_after_a_piece,
        pieces_that_come_twice,
        less_than_nothing_that_remains,
    ],
    ids=lambda spoil: spoil.__name__,
)
def test_a_spoilt_pipeline_breaks_some_schedule(spoil: Spoil, monkeypatch: pytest.MonkeyPatch) -> None:
    spoil(monkeypatch)

    with pytest.raises((BrokenInvariantError, ExceptionGroup)) as found:  # noqa: PT012 - some seed, no matter which
        for seed in range(SEEDS):
            play(seed)

    assert isinstance(cause_of(found.value), BrokenInvariantError)
