"""What is said of how much a job had delivered when the control plane crashed: no more than is known."""

from __future__ import annotations

import pytest

from controlplane.jobs import Jobs
from rung.types import FailureReason, JobFailed, JobKind, Phase, Policy, TokenDelta
from tests.fakes.store import MemoryStore


async def ended_by_crash(kind: JobKind, stored: list[str], lost: list[str]) -> JobFailed:
    """The end of a job that said something before a crash, of which the last was not stored yet."""
    store = MemoryStore()
    first = Jobs(store)
    job = first.open(kind=kind, model="m", policy=Policy())
    job.progress(Phase.ROUTE, "on its way")
    await first.store_now()
    for text in stored:
        job.text(TokenDelta(text))
        await first.store_now()
    for text in lost:
        job.text(TokenDelta(text))
    second = Jobs(store)
    await second.start()
    try:
        events = [event async for event in second.watch(job.id)]
        found = await second.get(job.id)
    finally:
        await second.drain(0.0)
    ended = events[-1].payload
    assert isinstance(ended, JobFailed)
    assert ended.reason is FailureReason.CONTROL_PLANE_RESTARTED
    assert found.detail == ended.detail
    return ended


@pytest.mark.parametrize("kind", [JobKind.CHAT, JobKind.TRANSCRIPTION])
async def test_what_was_stored_is_the_least_that_was_delivered(kind: JobKind) -> None:
    # More than one look at the store takes.
    ended = await ended_by_crash(kind, ["ab"] * 250, lost=["c"])

    assert ended.delivered_characters == 500
    assert ended.detail == (
        "the control plane was restarted while this job ran, after at least 500 characters of its text; "
        "send the request again"
    )


async def test_where_no_text_was_stored_it_is_not_said_that_none_was_delivered() -> None:
    ended = await ended_by_crash(JobKind.CHAT, [], lost=["a", "b"])

    assert ended.detail == (
        "the control plane was restarted while this job ran; how much of its text had been delivered is not "
        "known; send the request again"
    )


async def test_of_what_makes_no_text_nothing_is_said_of_characters() -> None:
    ended = await ended_by_crash(JobKind.IMAGE, [], lost=[])

    assert ended.detail == "the control plane was restarted while this job ran; send the request again"
