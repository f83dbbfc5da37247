"""No stream of a chat is silent for a second, however long its engine is, and none says more than it must."""

from __future__ import annotations

import asyncio
import gc
import json
import weakref
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from dataclasses import dataclass, field
from itertools import chain, repeat
from types import TracebackType
from typing import Any, TypeAlias

import pytest
from aiohttp import web
from prometheus_client import CollectorRegistry

from controlplane.fleet import NodeSchedulers, log_alert
from controlplane.gateway._keep_alive import KEEP_ALIVE_S, KeepAlive
from controlplane.gateway._openai import OpenAiRoutes
from controlplane.jobs import Jobs
from controlplane.pipelines import Pipelines, Slots
from rung.errors import EngineFailedError
from rung.service import EngineClient
from rung.types import JobKind, LifecycleProgress, Residency
from tests.fakes.engine_server import DONE, delta
from tests.fakes.fleet_view import FakeFleet, deployment_view
from tests.fakes.heard import Heard, request_with
from tests.fakes.store import MemoryStore
from tests.fakes.virtual_time import in_virtual_time

#: What is left of a second for a clock that adds up in floating point.
LONGEST_S = 1.0 - 1e-6
COMMENT = b": rung.progress "
#: What a pacer leaves between two pieces plays no part here.
Pace: TypeAlias = Callable[[], float] | None


@dataclass
class Script:
    """What an engine does: each piece of its answer, and how long it takes to come to it."""

    pieces: list[tuple[float, bytes]]
    head_after_s: float = 0.0
    fails: bool = False
    status: int = 200
    retry_after: str = ""

    @property
    def content_type(self) -> str:
        return "text/event-stream" if self.status == 200 else "application/json"

    async def __aenter__(self) -> Script:
        await asyncio.sleep(self.head_after_s)
        return self

    async def chunks(self, interval_s: Pace = None) -> AsyncIterator[bytes]:
        for after_s, piece in self.pieces:
            await asyncio.sleep(after_s)
            yield piece
        if self.fails:
            raise EngineFailedError("out of memory")

    async def read(self) -> bytes:
        return b"".join([piece async for piece in self.chunks()])

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        pass


@dataclass
class ScriptedFleet(FakeFleet):
    """Its engines act their scripts, one after the other."""

    scripts: list[Script]
    #: What is told of making it awake, and how long each step takes; awake already without any.
    waking: list[tuple[float, str]] = field(default_factory=list)
    asked: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        names = ("first", "second")[: len(self.scripts)]
        residency = Residency.STOPPED if self.waking else Residency.AWAKE
        super().__init__(*(deployment_view(name, None, residency=residency) for name in names))

    async def ensure_awake(self, deployment_id: str) -> AsyncIterator[LifecycleProgress]:  # type: ignore[override]  # as that of its parent
        for takes_s, detail in self.waking:
            yield LifecycleProgress(Residency.STARTING, detail)
            await asyncio.sleep(takes_s)
        self.show(deployment_view(deployment_id, None))

    def run_through_agent(  # type: ignore[override]  # a script is no run by an agent
        self, deployment_id: str, job_id: str, kind: JobKind, body: bytes, idle_timeout_s: float
    ) -> Script:
        self.asked.append(deployment_id)
        return self.scripts[len(self.asked) - 1]


def an_answer(*, token_s: float = 0.0, tokens: int = 1, head_s: float = 0.0) -> Script:
    """An answer that has a pause before its head and each token."""
    words = [(token_s, delta("Hello")) for _ in range(tokens)]
    return Script([*words, (0.0, delta("", "stop")), (0.0, DONE)], head_after_s=head_s)


class Plane:
    """The route of chats, without a network."""

    def __init__(self, *scripts: Script, waking: Sequence[tuple[float, str]] = ()) -> None:
        fleet = ScriptedFleet(list(scripts), list(waking))
        slots = Slots()
        self.pipelines = Pipelines(
            jobs=Jobs(MemoryStore(), monotonic_s=asyncio.get_running_loop().time),
            fleet=fleet,
            schedulers=NodeSchedulers(fleet, idle_s=slots.idle_s, alert=log_alert),
            slots=slots,
            client=EngineClient(),
            registry=CollectorRegistry(),
        )
        self.routes = OpenAiRoutes(self.pipelines)

    async def ask(self, heard: Heard) -> web.StreamResponse:
        body = {"model": "tiny", "messages": [{"role": "user", "content": "Hi"}], "stream": True}
        return await self.routes.chat(request_with(heard, json.dumps(body).encode(), {}))


async def heard_of(*scripts: Script) -> Heard:
    heard = Heard()
    await Plane(*scripts).ask(heard)
    return heard


def comments(heard: Heard) -> list[dict[str, Any]]:
    return [json.loads(text.removeprefix(COMMENT)) for _, text in heard.told if text.startswith(COMMENT)]


def answer(heard: Heard) -> bytes:
    """What was told but for comments."""
    return b"".join(text for _, text in heard.told if not text.startswith(COMMENT))


@pytest.mark.parametrize(
    "script",
    [
        pytest.param(an_answer(head_s=30.0), id="before the head"),
        pytest.param(an_answer(token_s=30.0), id="before the first token"),
        pytest.param(an_answer(token_s=3.0, tokens=5), id="between tokens"),
        pytest.param(an_answer(token_s=0.79, tokens=20), id="tokens just in time"),
        pytest.param(an_answer(token_s=0.81, tokens=20), id="tokens just too late"),
    ],
)
@in_virtual_time
async def test_it_is_never_silent_for_a_second(script: Script) -> None:
    heard = await heard_of(script)

    assert max(heard.gaps_s) < LONGEST_S
    assert answer(heard).startswith(delta("Hello"))
    assert answer(heard).endswith(DONE)


@pytest.mark.parametrize("script", [an_answer(head_s=3.0), an_answer(token_s=3.0)])
@in_virtual_time
async def test_it_says_what_is_under_way_and_since_when(script: Script) -> None:
    assert comments(await heard_of(script)) == [
        {"phase": "generating", "elapsed_s": elapsed_s, "detail": "first is answering"}
        for elapsed_s in (0.8, 1.6, 2.4)
    ]


@in_virtual_time
async def test_where_tokens_come_nothing_is_put_in_between() -> None:
    assert comments(await heard_of(an_answer(token_s=0.7, tokens=50))) == []


@in_virtual_time
async def test_where_they_pause_no_more_is_said_than_needed() -> None:
    waits_s = chain.from_iterable(repeat((0.01,) * 100 + (1.0,), 5))
    heard = await heard_of(Script([*((each, delta("Hello")) for each in waits_s), (0.0, delta("", "stop"))]))

    assert max(heard.gaps_s) < LONGEST_S
    assert len(comments(heard)) == 5


@pytest.mark.parametrize("step_s", [0.1, 0.5, 0.79])
@in_virtual_time
async def test_what_is_said_of_waking_counts(step_s: float) -> None:
    steps = [f"loading weights, {part} %" for part in range(0, 100, 10)]
    heard = Heard()
    await Plane(an_answer(), waking=[(step_s, step) for step in steps]).ask(heard)

    assert max(heard.gaps_s) < LONGEST_S
    assert [told["detail"] for told in comments(heard)] == steps


@in_virtual_time
async def test_a_step_of_waking_that_takes_long_is_told_again() -> None:
    heard = Heard()
    await Plane(an_answer(), waking=[(30.0, "loading weights")]).ask(heard)

    assert max(heard.gaps_s) < LONGEST_S
    assert {told["phase"] for told in comments(heard)} == {"engine_start"}


@pytest.mark.parametrize("with_answer", [b"", b'{"error": {"message": "out of memory"}}'])
@in_virtual_time
async def test_what_fails_at_once_has_its_own_status(with_answer: bytes) -> None:
    status = 500 if with_answer else 200
    heard = Heard()
    script = Script([(0.0, with_answer)] if with_answer else [], head_after_s=0.7, status=status, fails=True)

    response = await Plane(script).ask(heard)

    assert response.status == 502
    assert response.headers["X-Rung-Target"] == "first"
    assert heard.told == []


@in_virtual_time
async def test_what_fails_later_fails_in_the_stream() -> None:
    heard = await heard_of(Script([], head_after_s=3.0, fails=True))

    assert len(comments(heard)) == 3
    event, done = answer(heard).split(b"\n\n", 1)
    assert json.loads(event.removeprefix(b"data: "))["error"]["rung"]["reason"] == "ENGINE_FAILED"
    assert done == DONE


@in_virtual_time
async def test_a_head_that_comes_before_the_answer_names_nobody_who_may_not_answer() -> None:
    breaks = Script([(0.0, b"{}")], head_after_s=2.0, status=500)
    heard = await heard_of(breaks, an_answer(head_s=0.0))

    assert heard.headers is not None
    assert "X-Rung-Job" in heard.headers
    assert "X-Rung-Target" not in heard.headers
    assert b'"target":"second"' in answer(heard)


@in_virtual_time
async def test_a_head_that_comes_with_the_answer_says_who_answers() -> None:
    heard = await heard_of(an_answer(token_s=0.5))

    assert heard.headers is not None
    assert heard.headers["X-Rung-Target"] == "first"


@pytest.mark.parametrize(("token_s", "is_answers"), [(0.79, True), (0.85, False)])
@in_virtual_time
async def test_there_is_one_head_before_everything_whoever_comes_first(
    token_s: float, is_answers: bool
) -> None:
    heard = Heard(head_takes_s=0.1)
    response = await Plane(an_answer(token_s=token_s)).ask(heard)

    assert answer(heard).startswith(delta("Hello"))
    assert ("X-Rung-Target" in response.headers) is is_answers


@in_virtual_time
async def test_an_answer_that_ends_while_the_head_is_sent_comes_after_it() -> None:
    heard = Heard(head_takes_s=0.3)
    await Plane(Script([], head_after_s=0.9, fails=True)).ask(heard)

    assert [text[:8] for _, text in heard.told] == [COMMENT[:8], b'data: {"', DONE[:8]]


@in_virtual_time
async def test_nothing_is_said_after_the_end() -> None:
    heard = await heard_of(an_answer(token_s=0.7))
    await asyncio.sleep(60.0)

    assert heard.told[-1][1] == DONE


@in_virtual_time
async def test_nor_while_the_caller_takes_the_end() -> None:
    class Slow(Heard):
        async def write_eof(self, chunk: bytes = b"") -> None:
            await super().write_eof(chunk)
            await asyncio.sleep(10.0)

    heard = Slow()
    await Plane(an_answer()).ask(heard)

    assert heard.told[-1][1] == DONE
    assert comments(heard) == []


@in_virtual_time
async def test_a_caller_that_has_enough_to_take_is_told_nothing() -> None:
    heard = Heard()
    asking = asyncio.create_task(Plane(an_answer(token_s=0.5, tokens=2)).ask(heard))
    await asyncio.sleep(0.4)
    heard.takes.clear()
    await asyncio.sleep(60.0)
    assert comments(heard) == []

    heard.takes.set()
    await asking

    assert answer(heard).endswith(DONE)


@in_virtual_time
async def test_of_what_is_said_one_is_waiting_at_most() -> None:
    class Held(Heard):
        async def write(self, chunk: bytes | bytearray | memoryview) -> None:
            # Nothing is held for this caller, so that each write waits for it.
            await super().write(chunk)
            if bytes(chunk).startswith(COMMENT):
                await asyncio.sleep(10.0)

    heard = Held()
    await Plane(an_answer(head_s=19.0)).ask(heard)

    assert len(comments(heard)) == 2


@in_virtual_time
async def test_a_caller_that_has_gone_is_no_defect() -> None:
    complaints: list[dict[str, Any]] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: complaints.append(context))
    heard = Heard(has_gone=True)

    asking = asyncio.create_task(Plane(an_answer(head_s=5.0)).ask(heard))
    await asyncio.wait([asking])
    assert isinstance(asking.exception(), ConnectionError)
    del asking
    gc.collect()

    assert heard.told == []
    assert complaints == []


async def leave(asking: asyncio.Task[web.StreamResponse], others: set[asyncio.Task[Any]]) -> None:
    asking.cancel()
    await asyncio.wait([asking])
    assert asking.cancelled()
    await asyncio.sleep(0)
    assert asyncio.all_tasks() == others


@pytest.mark.parametrize("after_s", [0.0, 0.5, KEEP_ALIVE_S, 0.85, 0.95, 5.0])
@pytest.mark.parametrize("takes", [True, False])
@in_virtual_time
async def test_a_caller_that_leaves_leaves_nothing_behind(after_s: float, takes: bool) -> None:
    others = asyncio.all_tasks()
    heard = Heard(head_takes_s=0.1)
    asking = asyncio.create_task(Plane(an_answer(head_s=30.0)).ask(heard))
    await asyncio.sleep(after_s)
    if not takes:
        heard.takes.clear()
        await asyncio.sleep(0.01)

    await leave(asking, others)
    told = list(heard.told)
    await asyncio.sleep(60.0)

    assert heard.told == told


@in_virtual_time
async def test_one_that_leaves_while_the_last_comment_waits_for_it_leaves_nothing_behind_either() -> None:
    others = asyncio.all_tasks()
    heard = Heard(head_takes_s=60.0)
    asking = asyncio.create_task(Plane(Script([], head_after_s=1.0, fails=True)).ask(heard))
    await asyncio.sleep(2.0)

    await leave(asking, others)

    assert heard.told == []


def said_by(said: list[float], takes_s: float = 0.0) -> Callable[[], Coroutine[Any, Any, None]]:
    async def say() -> None:
        said.append(asyncio.get_running_loop().time())
        await asyncio.sleep(takes_s)

    return say


@pytest.mark.parametrize("takes_s", [0.0, 5.0])
@in_virtual_time
async def test_nothing_is_left_of_what_kept_a_stream_alive(takes_s: float) -> None:
    said: list[float] = []
    say = said_by(said, takes_s)
    left = weakref.ref(say)

    async with KeepAlive(say):
        await asyncio.sleep(1.0)
    del say
    gc.collect()

    assert left() is None
    assert len(said) == 1


@in_virtual_time
async def test_what_was_about_to_be_said_at_the_end_is_not() -> None:
    said: list[float] = []
    loop = asyncio.get_running_loop()
    ended = loop.create_future()
    # In the same round of the loop, and before.
    loop.call_at(loop.time() + KEEP_ALIVE_S - 5e-10, ended.set_result, None)

    async with KeepAlive(said_by(said)):
        await ended

    assert said == []


@pytest.mark.parametrize(("error", "is_defect"), [(ConnectionResetError, False), (KeyError, True)])
@pytest.mark.parametrize("takes_s", [0.0, 20.0])
@in_virtual_time
async def test_that_nobody_listens_is_for_the_writer_to_notice_and_a_defect_is_not_hidden(
    takes_s: float, error: type[Exception], is_defect: bool
) -> None:
    complaints: list[type[Exception]] = []
    asyncio.get_running_loop().set_exception_handler(
        lambda _, context: complaints.append(type(context["exception"]))
    )
    said: list[float] = []
    say = said_by(said, takes_s)

    async def fails() -> None:
        await say()
        raise error

    async with KeepAlive(fails):
        await asyncio.sleep(10.0)
    gc.collect()

    assert len(said) == 1
    assert complaints == [error] * is_defect
