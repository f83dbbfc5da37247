"""A small chat through the ladder, over real connections to engines that a test writes."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import pytest
from aiohttp import web

from controlplane.fleet import NodeSchedulers, log_alert
from controlplane.ladder import Candidate, Circuits, RungSpec, TargetKind, build_ladder
from controlplane.pipelines import Slots
from controlplane.pipelines._asking import LadderAsk
from controlplane.pipelines._engage import HEARD_WITHIN_S, Engager
from controlplane.pipelines._router import Judged, Router
from controlplane.stages import Answer, Message
from rung.errors import (
    DeadlineExceededError,
    EngineProtocolError,
    EngineUnreachableError,
    NoTargetError,
    UnknownModelError,
)
from rung.service import EngineClient
from rung.types import Priority, Residency
from tests.fakes.engine_server import EngineServer
from tests.fakes.fleet_view import FakeFleet, deployment_view

QUESTION = [Message("system", "Be brief."), Message("user", "What is a cat?")]


class NoCloud:
    """A cloud model that must never be asked here."""

    def __init__(self) -> None:
        self.asked: list[str] = []
        found = Candidate(
            id="cloud/big",
            kind=TargetKind.CLOUD,
            owned=False,
            capabilities=frozenset({"chat"}),
            state="there",
        )
        self.candidates = {found.id: found}

    def refusal(self, target_id: str) -> str:
        return ""

    def model_name(self, target_id: str) -> str:
        return "big"

    async def open(self, target_id: str, body: bytes, *, stream: bool, idle_timeout_s: float) -> Any:
        self.asked.append(target_id)
        raise EngineUnreachableError("the cloud is away")


class Asked:
    """A small and a large deployment, a cloud model behind them, and what asks them."""

    def __init__(self, engine: EngineServer, client: EngineClient) -> None:
        self.engine = engine
        self.fleet = FakeFleet()
        self.lies(Residency.AWAKE)
        self.slots, self.cloud, circuits = Slots(), NoCloud(), Circuits(jitter=lambda: 1.0)
        rungs = [
            RungSpec(name="easy", max_effort=6, chain="small"),
            RungSpec(name="hard", min_effort=7, chain="large"),
        ]
        router = Router(
            fleet=self.fleet,
            slots=self.slots,
            circuits=circuits,
            ladder=build_ladder(rungs, {"small": ["small-1", "cloud/big"], "large": ["large-1"]}),
            cloud=self.cloud,
            classify=lambda _: Judged(9),
        )
        self.engager = Engager(
            fleet=self.fleet,
            schedulers=NodeSchedulers(self.fleet, idle_s=self.slots.idle_s, alert=log_alert),
            slots=self.slots,
            client=client,
            router=router,
            circuits=circuits,
            cloud=self.cloud,
            engine_idle_timeout_s=5.0,
        )
        self.ask = LadderAsk(router, self.engager)

    def lies(self, small: Residency) -> None:
        self.fleet.show(
            deployment_view("small-1", self.engine.url, model="small", residency=small, slots=1),
            deployment_view("large-1", self.engine.url, model="large"),
        )

    async def asks(self, **how: Any) -> Answer:
        fields: dict[str, Any] = {"local_only": True, "priority": Priority.AGENT, "effort": 2} | how
        return await self.ask(QUESTION, **fields)


@pytest.fixture
async def asked() -> AsyncIterator[Asked]:
    client = EngineClient()
    async with EngineServer() as engine:
        found = Asked(engine, client)
        yield found
        await found.engager.aclose()
        await client.aclose()


async def test_the_answer_comes_with_the_target_that_gave_it(asked: Asked) -> None:
    assert await asked.asks() == Answer(text="Hello world", target="small-1")
    assert await asked.asks(effort=9) == Answer(text="Hello world", target="large-1")
    assert await asked.asks(model="large", effort=None) == Answer(text="Hello world", target="large-1")

    body = asked.engine.bodies[0]
    assert body["messages"] == [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "What is a cat?"},
    ]
    assert (body["temperature"], body["max_tokens"], body["stream"]) == (0, 256, False)
    assert asked.slots.load("small-1") == (0, 0)


async def test_thoughts_that_an_engine_tells_apart_are_no_part_of_the_answer(asked: Asked) -> None:
    async def thinks(request: web.Request, body: dict[str, object]) -> web.StreamResponse:
        message = {"role": "assistant", "content": "A pet.", "reasoning_content": "What is a cat?"}
        return web.json_response({"choices": [{"index": 0, "message": message, "finish_reason": "stop"}]})

    asked.engine.answer = thinks

    assert (await asked.asks()).text == "A pet."


async def test_what_may_not_leave_owned_hardware_does_not_when_that_is_away(asked: Asked) -> None:
    asked.fleet.show(deployment_view("small-1", "http://127.0.0.1:9", model="small"))

    with pytest.raises(EngineUnreachableError):
        await asked.asks(local_only=True)
    assert asked.cloud.asked == []
    with pytest.raises(NoTargetError, match="cloud/big"):
        await asked.asks(local_only=False)
    assert asked.cloud.asked == ["cloud/big"]


async def test_one_that_is_gone_is_not_waited_for(asked: Asked) -> None:
    asked.fleet.show(deployment_view("small-1", "http://127.0.0.1:9", model="small"))

    async with asyncio.timeout(HEARD_WITHIN_S / 2):
        with pytest.raises(EngineUnreachableError):
            await asked.asks(local_only=True)


@pytest.mark.parametrize("residency", [Residency.ASLEEP, Residency.STOPPED, Residency.STARTING])
async def test_where_only_the_ready_are_asked_nobody_is_made_awake(
    asked: Asked, residency: Residency
) -> None:
    asked.lies(residency)
    asked.fleet.refuse_start = "it was woken for this"

    with pytest.raises(NoTargetError, match="nothing that could answer is ready"):
        await asked.asks(ready_only=True)
    assert asked.engine.bodies == []


async def test_where_only_the_ready_are_asked_a_full_one_counts_as_not_ready(asked: Asked) -> None:
    assert asked.slots.try_acquire("small-1", 1)

    with pytest.raises(NoTargetError, match="is ready"):
        await asked.asks(ready_only=True)

    asked.slots.release("small-1")
    assert (await asked.asks(ready_only=True)).target == "small-1"


async def test_an_answer_that_takes_too_long_is_given_up_and_its_slot_is_free(asked: Asked) -> None:
    asked.engine.answer = asked.engine.endless

    began_s = asyncio.get_running_loop().time()

    with pytest.raises(DeadlineExceededError, match=r"no answer within 0\.05 s"):
        await asked.asks(timeout_s=0.05)

    assert asyncio.get_running_loop().time() - began_s < 2.0
    assert asked.slots.load("small-1") == (0, 0)


async def test_what_is_no_answer_is_an_error(asked: Asked) -> None:
    async def odd(request: web.Request, body: dict[str, object]) -> web.StreamResponse:
        return web.json_response({"choices": []})

    asked.engine.answer = odd

    with pytest.raises(EngineProtocolError, match="without choices"):
        await asked.asks()


async def test_a_model_that_nobody_has_is_said_so(asked: Asked) -> None:
    with pytest.raises(UnknownModelError):
        await asked.asks(model="guard", effort=None)


async def test_half_a_character_goes_as_a_question_mark(asked: Asked) -> None:
    await asked.ask([Message("user", "half \ud800")], local_only=True, priority=Priority.AGENT, effort=2)

    assert asked.engine.bodies[0]["messages"] == [{"role": "user", "content": "half ?"}]
