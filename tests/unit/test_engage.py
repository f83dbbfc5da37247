"""Who is tried, and when the next one is; engines and cloud models do what a test tells them."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Mapping
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from controlplane.fleet import DeploymentView, NodeSchedulers, log_alert
from controlplane.ladder import Candidate, Circuits, Modality, RungSpec, TargetKind, build_ladder
from controlplane.pipelines import Slots
from controlplane.pipelines._engage import Engaged, Engager
from controlplane.pipelines._generation import DeliveredError
from controlplane.pipelines._router import Judged, Router
from controlplane.pipelines._wish import Wish
from rung.errors import (
    BudgetExhaustedError,
    EngineFailedError,
    EngineProtocolError,
    EngineRejectedError,
    EngineStartFailedError,
    EngineTimeoutError,
    EngineUnreachableError,
    InvalidRequestError,
    NotAwakeError,
    QueueFullError,
    RungError,
    UnsuitableTargetError,
    VramInfeasibleError,
)
from rung.service import EngineClient
from rung.types import JobKind, LifecycleProgress, Phase, Policy, Priority, Residency, Served
from tests.fakes.fleet_view import FakeFleet, deployment_view


@dataclass
class Said:
    """A job that remembers what it was told."""

    id: str = "job-1"
    model: str = "rung/auto"
    lines: list[str] = field(default_factory=list)
    served: list[str] = field(default_factory=list)
    spent_usd: float = 0.0

    def progress(
        self,
        phase: Phase,
        detail: str = "",
        *,
        percent: float | None = None,
        remaining_s: float | None = None,
    ) -> None:
        self.lines.append(detail)

    def begin_generating(self, served: Served) -> None:
        self.served.append(served.target)

    def spent(self, cost_usd: float) -> None:
        self.spent_usd += cost_usd


@dataclass
class AReply:
    """An answer of a status."""

    status: int = 200
    body: bytes = b"{}"
    retry_after: str = ""
    content_type: str = "text/event-stream"
    cost_usd: float = 0.0
    closed: bool = False

    async def chunks(self, interval_s: Callable[[], float] | None = None) -> AsyncIterator[bytes]:
        yield self.body

    async def read(self) -> bytes:
        return self.body

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.closed = True


class Answers:
    """What each target answers; who is not in `of` answers well. `asked` is who was asked, in order."""

    def __init__(self) -> None:
        self.of: dict[str, AReply | RungError] = {}
        self.asked: list[str] = []
        self.gates: dict[str, asyncio.Event] = {}
        #: Somebody waits at a gate.
        self.held = asyncio.Event()

    async def give(self, target: str) -> AReply:
        self.asked.append(target)
        if target in self.gates:
            self.held.set()
            await self.gates[target].wait()
        found = self.of.get(target) or AReply()
        if isinstance(found, RungError):
            raise found
        return found


class Engines(EngineClient):
    """Engines whose answers a test writes."""

    def __init__(self, answers: Answers) -> None:
        super().__init__()
        self._answers = answers

    async def post(self, url: str, body: bytes, *, what: str, idle_timeout_s: float, **_: Any) -> Any:
        return await self._answers.give(what)


class ACloud:
    """Cloud models whose answers a test writes."""

    def __init__(self, answers: Answers, *names: str) -> None:
        self._answers = answers
        self.candidates: Mapping[str, Candidate] = {
            name: Candidate(
                id=name, kind=TargetKind.CLOUD, owned=False, capabilities=frozenset({"chat"}), state="a model"
            )
            for name in names
        }

    def refusal(self, target_id: str) -> str:
        return ""

    def model_name(self, target_id: str) -> str:
        return target_id.rpartition("/")[2]

    async def open(self, target_id: str, body: bytes, *, stream: bool, idle_timeout_s: float) -> AReply:
        return await self._answers.give(target_id)


class WakingFleet(FakeFleet):
    """Deployments come up when they may; `raised` is who was asked to."""

    def __init__(self, *views: DeploymentView) -> None:
        super().__init__(*views)
        self.raised: list[str] = []
        self.woken = asyncio.Event()
        self.may_wake = asyncio.Event()
        self.may_wake.set()

    async def ensure_awake(self, deployment_id: str) -> AsyncIterator[LifecycleProgress]:  # type: ignore[override]  # a script needs no generator's `send`
        self.raised.append(deployment_id)
        yield LifecycleProgress(Residency.WAKING, detail="waking")
        await self.may_wake.wait()
        if self.refuse_start:
            raise EngineStartFailedError(self.refuse_start, deployment=deployment_id)
        self.put(deployment_id, Residency.AWAKE)
        self.woken.set()

    def put(self, name: str, residency: Residency) -> None:
        """Show a deployment in this state."""
        views = dict(self.view.deployments)
        views[name] = deployment_view(name, f"http://{name}", slots=1, residency=residency)
        self.show(*views.values())


class Place:
    """An engager over the deployments `near` and `far` and the cloud models `c/0`, `c/1` …, in this order."""

    def __init__(self, *, deployments: int = 2, models: int = 1) -> None:
        names = ["near", "far"][:deployments]
        self.fleet = WakingFleet(*(deployment_view(name, f"http://{name}", slots=1) for name in names))
        self.slots = Slots()
        self.now_s = 1000.0
        self.circuits = Circuits(jitter=lambda: 1.0)
        self.answers = Answers()
        models_ = [f"c/{place}" for place in range(models)]
        cloud = ACloud(self.answers, *models_)
        rung = RungSpec(name="all", modality=Modality.CHAT, chain="all")
        self.router = Router(
            fleet=self.fleet,
            slots=self.slots,
            circuits=self.circuits,
            ladder=build_ladder([rung], {"all": [*names, *models_]}),
            cloud=cloud,
            classify=lambda _: Judged(3),
            now_s=lambda: self.now_s,
        )
        self.engager = Engager(
            fleet=self.fleet,
            schedulers=NodeSchedulers(self.fleet, idle_s=self.slots.idle_s, alert=log_alert),
            slots=self.slots,
            client=Engines(self.answers),
            router=self.router,
            circuits=self.circuits,
            cloud=cloud,
            engine_idle_timeout_s=1.0,
            now_s=lambda: self.now_s,
            # 18:49:37 on 21 November 2026.
            unix_s=lambda: 1_795_286_977.0,
        )
        self.job = Said()

    def lies(self, name: str, residency: Residency) -> None:
        """A deployment is in this state; it can be made awake."""
        self.fleet.put(name, residency)

    async def ask(self, policy: Policy | None = None, model: str = "rung/auto") -> Engaged:
        wish = Wish(
            kind=JobKind.CHAT, model=model, body=b"{}", policy=policy or Policy(priority=Priority.USER)
        )
        targets = self.router.choose(self.router.route(wish))
        return await self.engager.engage(self.job, wish, targets, stream=True)

    async def answered_by(self, policy: Policy | None = None) -> str:
        async with await self.ask(policy) as engaged:
            return engaged.target


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
