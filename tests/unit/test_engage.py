"""Who is tried, and when the next one is; engines and cloud models do what a test tells them."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from controlplane.ladder import Candidate
from controlplane.pipelines._generation import DeliveredError
from controlplane.pipelines._wish import Wish
from rung.errors import (
    BudgetExhaustedError,
    EngineFailedError,
    EngineProtocolError,
    EngineRejectedError,
    EngineTimeoutError,
    EngineUnreachableError,
    InvalidRequestError,
    NotAwakeError,
    QueueFullError,
    RungError,
    UnsuitableTargetError,
    VramInfeasibleError,
)
from rung.types import JobKind, Policy, Priority, Residency
from tests.fakes.engaging import AReply, Place


@pytest.fixture
async def place() -> AsyncIterator[Place]:
    found = Place()
    yield found
    await found.engager.aclose()


async def test_what_a_cloud_model_took_is_told_once_its_answer_has_ended(place: Place) -> None:
    place.answers.of["near"] = place.answers.of["far"] = EngineUnreachableError("away")
    place.answers.of["c/0"] = AReply(cost_usd=0.25)
    engaged = await place.ask()
    assert place.job.spent_usd == 0.0

    async with engaged:
        pass

    assert place.job.spent_usd == 0.25


class TestMovingOn:
    @pytest.mark.parametrize("status", [401, 403, 408, 429, 500, 502, 503, 504, 529])
    async def test_after_a_status_of_the_engines_making(self, place: Place, status: int) -> None:
        failing = place.answers.of["near"] = AReply(status, b'{"error": {"message": "no room"}}')
        assert await place.answered_by() == "far"
        assert place.answers.asked == ["near", "far"]
        assert place.job.lines[0] == f"near answered HTTP {status}: no room; trying far"
        assert place.job.served == ["near", "far"]
        assert failing.closed
        assert not place.slots.pressure

    @pytest.mark.parametrize(
        "error",
        [
            EngineUnreachableError("no connection"),
            EngineTimeoutError("no answer for 1 s"),
            EngineProtocolError("that is not HTTP"),
            EngineFailedError("out of memory"),
        ],
    )
    async def test_after_a_lost_connection_or_silence_and_its_circuit_is_told(
        self, place: Place, error: RungError
    ) -> None:
        place.answers.of["near"] = error
        for _ in range(3):
            assert await place.answered_by() == "far"
        assert place.answers.asked == ["near", "far"] * 3
        assert await place.answered_by() == "far"
        assert place.answers.asked[6:] == ["far"]

    @pytest.mark.parametrize(
        "error",
        [
            BudgetExhaustedError("today's $5 are spent"),
            NotAwakeError("it was put to sleep"),
            QueueFullError("1024 wait"),
            UnsuitableTargetError("it takes no audio"),
            VramInfeasibleError("it does not fit"),
        ],
    )
    async def test_after_what_says_nothing_of_its_health_and_its_circuit_is_not_told(
        self, place: Place, error: RungError
    ) -> None:
        place.answers.of["near"] = error
        for _ in range(5):
            assert await place.answered_by() == "far"
        assert place.answers.asked == ["near", "far"] * 5
        assert not place.circuits

    async def test_after_an_engine_that_does_not_start(self, place: Place) -> None:
        place.lies("near", Residency.STOPPED)
        place.fleet.refuse_start = "its image is missing"
        assert await place.answered_by() == "far"
        assert place.answers.asked == ["far"]
        assert "its image is missing; trying far" in place.job.lines

    async def test_never_after_a_status_of_the_callers_making(self, place: Place) -> None:
        for status in (400, 404, 405, 409, 413, 415, 422):
            place.answers.of["near"] = AReply(status, b'{"error": {"message": "messages is missing"}}')
            with pytest.raises(EngineRejectedError, match="messages is missing"):
                await place.ask()
        assert place.answers.asked == ["near"] * 7
        assert not place.circuits
        assert not place.slots.pressure

    async def test_never_after_a_request_that_the_cloud_cannot_understand(self) -> None:
        place = Place(deployments=0, models=2)
        place.answers.of["c/0"] = InvalidRequestError("messages is missing")
        with pytest.raises(InvalidRequestError):
            await place.ask()
        assert place.answers.asked == ["c/0"]

    async def test_a_rejection_closes_a_circuit_for_the_target_is_well(self, place: Place) -> None:
        place.answers.of["near"] = AReply(503)
        for _ in range(3):
            await place.answered_by()
        place.now_s += 2.0
        place.answers.of["near"] = AReply(400)
        with pytest.raises(EngineRejectedError):
            await place.ask()
        assert not place.circuits

    async def test_a_named_model_is_never_replaced(self, place: Place) -> None:
        place.answers.of["near"] = AReply(503)
        for _ in range(4):
            with pytest.raises(EngineFailedError):
                await place.ask(model="near")
        assert place.answers.asked == ["near"] * 4


class TestCircuits:
    async def test_retry_after_is_honoured(self, place: Place) -> None:
        place.answers.of["near"] = AReply(429, retry_after="30")
        assert await place.answered_by() == "far"
        place.answers.of.clear()
        assert await place.answered_by() == "far"
        place.now_s += 30.0
        assert await place.answered_by() == "near"

    async def test_so_it_is_when_it_is_a_date(self, place: Place) -> None:
        place.answers.of["near"] = AReply(429, retry_after="Sat, 21 Nov 2026 18:50:07 GMT")
        assert await place.answered_by() == "far"
        place.answers.of.clear()
        place.now_s += 29.0
        assert await place.answered_by() == "far"
        place.now_s += 1.0
        assert await place.answered_by() == "near"

    @pytest.mark.parametrize("said", ["soon", "Wed, 21 Oct 2026 07:28:00 GMT", ""])
    async def test_one_that_is_not_understood_is_a_failure_as_any_other(
        self, place: Place, said: str
    ) -> None:
        place.answers.of["near"] = AReply(503, retry_after=said)
        assert await place.answered_by() == "far"
        place.answers.of.clear()
        assert await place.answered_by() == "near"

    async def test_an_answer_that_is_cut_counts_although_it_had_begun(self, place: Place) -> None:
        for _ in range(3):
            with pytest.raises(EngineProtocolError):
                async with await place.ask():
                    raise EngineProtocolError("it ended in mid-answer")
        assert await place.answered_by() == "far"

    async def test_so_does_a_result_that_is_made_piece_by_piece_and_it_is_not_begun_anew(
        self, place: Place
    ) -> None:
        wish = Wish(kind=JobKind.CHAT, model="rung/auto", body=b"{}", policy=Policy(priority=Priority.USER))
        tried: list[str] = []

        async def attempt(target: Candidate) -> None:
            tried.append(target.id)
            raise DeliveredError(EngineProtocolError("it ended in mid-picture"))

        for _ in range(3):
            targets = place.router.choose(place.router.route(wish))
            with pytest.raises(EngineProtocolError, match="mid-picture"):
                await place.engager.first(place.job, wish, targets, attempt)
        assert tried == ["near"] * 3
        assert await place.answered_by() == "far"

    async def test_a_whole_answer_makes_up_for_what_was_before(self, place: Place) -> None:
        for _ in range(4):
            place.answers.of["near"] = AReply(503)
            await place.answered_by()
            await place.answered_by()
            place.answers.of.clear()
            assert await place.answered_by() == "near"
        assert not place.circuits

    async def test_one_request_tries_it_again_and_the_others_do_not_wait_for_it(self, place: Place) -> None:
        place.answers.of["near"] = AReply(503)
        for _ in range(3):
            await place.answered_by()
        place.answers.of.clear()
        place.answers.asked.clear()
        place.now_s += 2.0
        gate = place.answers.gates["near"] = asyncio.Event()
        probe = asyncio.create_task(place.answered_by())
        await asyncio.wait_for(place.answers.held.wait(), 10.0)
        for _ in range(3):
            assert await place.answered_by() == "far"
        gate.set()
        assert await probe == "near"
        assert await place.answered_by() == "near"

    async def test_a_probe_whose_caller_leaves_is_followed_by_another(self, place: Place) -> None:
        place.answers.of["near"] = AReply(503)
        for _ in range(3):
            await place.answered_by()
        place.answers.of.clear()
        place.answers.asked.clear()
        place.now_s += 2.0
        place.answers.gates["near"] = asyncio.Event()
        probe = asyncio.create_task(place.answered_by())
        await asyncio.wait_for(place.answers.held.wait(), 10.0)
        probe.cancel()
        with pytest.raises(asyncio.CancelledError):
            await probe
        assert not place.slots.pressure
        place.answers.gates.clear()
        assert await place.answered_by() == "near"


class TestBridge:
    BRIDGED = Policy(priority=Priority.USER, bridge_allowed=True)

    async def test_the_next_that_is_ready_answers_while_the_first_is_made_awake(self, place: Place) -> None:
        place.lies("near", Residency.ASLEEP)
        place.fleet.may_wake.clear()
        assert await place.answered_by(self.BRIDGED) == "far"
        assert await place.answered_by(self.BRIDGED) == "far"
        assert place.answers.asked == ["far", "far"]
        assert place.job.lines[0] == "far answers while near is made ready"

        place.fleet.may_wake.set()
        await asyncio.wait_for(place.fleet.woken.wait(), 10.0)
        assert place.fleet.raised == ["near"], "it is made awake once, not by each request"
        assert await place.answered_by(self.BRIDGED) == "near"

    async def test_without_leave_the_request_waits_for_the_first(self, place: Place) -> None:
        place.lies("near", Residency.ASLEEP)
        assert await place.answered_by() == "near"
        assert place.answers.asked == ["near"]

    async def test_local_only_is_not_bridged_by_the_cloud(self) -> None:
        place = Place(deployments=1, models=1)
        place.lies("near", Residency.ASLEEP)
        local = Policy(priority=Priority.USER, bridge_allowed=True, local_only=True)
        assert await place.answered_by(local) == "near"
        assert place.answers.asked == ["near"]

    async def test_where_nobody_else_is_ready_the_request_waits_for_the_first(self) -> None:
        place = Place()
        place.lies("near", Residency.ASLEEP)
        place.lies("far", Residency.STOPPED)
        local = Policy(priority=Priority.USER, bridge_allowed=True, local_only=True)
        assert await place.answered_by(local) == "near"
        assert place.fleet.raised == ["near"]

    async def test_a_bridge_that_fails_is_followed_by_the_first(self) -> None:
        place = Place(deployments=1, models=1)
        place.lies("near", Residency.ASLEEP)
        place.answers.of["c/0"] = EngineUnreachableError("no connection")
        assert await place.answered_by(self.BRIDGED) == "near"
        assert place.answers.asked == ["c/0", "near"]
        await place.engager.aclose()


# Any pattern of failures.

OUTCOMES: dict[str, Callable[[], AReply | RungError]] = {
    "well": AReply,
    "broken": lambda: EngineFailedError("HTTP 503"),
    "silent": lambda: EngineTimeoutError("no answer"),
    "gone": lambda: EngineUnreachableError("no connection"),
    "full": lambda: QueueFullError("1024 wait"),
    "poor": lambda: BudgetExhaustedError("spent"),
    "rejects": lambda: EngineRejectedError("messages is missing"),
}


@settings(max_examples=80, deadline=None)
@given(st.lists(st.sampled_from(sorted(OUTCOMES)), min_size=1, max_size=6))
def test_any_pattern_of_failures_yields_the_first_that_can_answer_or_names_all(pattern: list[str]) -> None:
    async def ask() -> tuple[Place, str, RungError | None]:
        place = Place(deployments=0, models=len(pattern))
        place.answers.of = {f"c/{at}": OUTCOMES[outcome]() for at, outcome in enumerate(pattern)}
        try:
            return place, await place.answered_by(), None
        except RungError as error:
            return place, "", error

    place, target, error = asyncio.run(ask())
    names = [f"c/{at}" for at in range(len(pattern))]
    decides = next((at for at, outcome in enumerate(pattern) if outcome in ("well", "rejects")), None)
    if decides is None:
        assert place.answers.asked == names
        assert error is not None
        assert len(names) == 1 or all(f"{name}: " in error.message for name in names)
    else:
        assert place.answers.asked == names[: decides + 1]
        assert target == (names[decides] if pattern[decides] == "well" else "")
        assert isinstance(error, EngineRejectedError) is (pattern[decides] == "rejects")
