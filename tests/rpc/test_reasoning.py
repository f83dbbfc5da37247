"""From effort 7 on the orchestrator may hand the hard part on, over HTTP, with scripted engines."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from typing import Any

import pytest
from aiohttp import web

from controlplane.ladder import RungSpec, build_ladder
from rung.types import FailureReason, JobState, Node, NodeOwnership, NodeState, Phase, PhaseProgress
from tests.fakes.engine_server import DONE, USAGE, EngineServer, delta, frame
from tests.fakes.fleet_view import deployment_view
from tests.fakes.gateway import Plane, a_plane

MESSAGES = [{"role": "user", "content": "How many primes are there below 100?"}]
SPARK = Node(id="spark", address="127.0.0.1:2", state=NodeState.READY)
RENTED = Node(id="rented", address="127.0.0.1:3", state=NodeState.READY, ownership=NodeOwnership.RENTED)
PROBLEM = {"problem": "Count the primes below 100."}
LOOK = {"type": "function", "function": {"name": "look", "parameters": {}}}


def asks_to_reason(**fields: Any) -> bytes:
    made = {"index": 0, "id": "r1", "function": {"name": "reason", "arguments": json.dumps(PROBLEM)}}
    choice = {"index": 0, "delta": {"tool_calls": [made]}, "finish_reason": "tool_calls"}
    return frame(choices=[choice], **fields) + USAGE + DONE


class Talk:
    """Two engines: an orchestrator that calls `reason` when it is offered, and a reasoner that says 25."""

    def __init__(self, plane: Plane, reasoner: EngineServer) -> None:
        self.plane = plane
        self.reasoner = reasoner
        plane.engine.answer = self.orchestrate
        reasoner.answer = self.reason

    async def orchestrate(self, request: web.Request, body: dict[str, Any]) -> web.StreamResponse:
        offered = any(tool["function"]["name"] == "reason" for tool in body.get("tools", ()))
        results = [message["content"] for message in body["messages"] if message["role"] == "tool"]
        text = f"It is {results[-1]}" if results else "No idea."
        if body.get("stream"):
            if offered and not results:
                return await self.plane.engine.pieces(request, delta("Well. "), asks_to_reason())
            return await self.plane.engine.pieces(request, delta(text, "stop"), USAGE, DONE)
        message: dict[str, Any] = {"role": "assistant", "content": text}
        if offered and not results:
            function = {"name": "reason", "arguments": json.dumps(PROBLEM)}
            message |= {"tool_calls": [{"id": "r1", "type": "function", "function": function}]}
        usage = {"prompt_tokens": 5, "completion_tokens": 2, "total_tokens": 7}
        return web.json_response(
            {
                "id": "1",
                "choices": [{"index": 0, "message": message, "finish_reason": "stop"}],
                "usage": usage,
            }
        )

    async def reason(self, request: web.Request, body: dict[str, Any]) -> web.StreamResponse:
        thought = frame(choices=[{"index": 0, "delta": {"reasoning_content": "hm"}, "finish_reason": None}])
        return await self.reasoner.pieces(request, thought, delta("25", "stop"), USAGE, DONE)

    async def ask(self, effort: int, **fields: Any) -> tuple[bytes, Any]:
        headers = fields.pop("headers", {})
        body = {"model": "rung/auto", "effort": effort, "messages": MESSAGES, "stream": True} | fields
        url = f"{self.plane.url}/v1/chat/completions"
        async with self.plane.http.post(url, json=body, headers=headers) as response:
            return await response.read(), response.headers

    async def phases(self, job_id: str) -> list[tuple[Phase, str]]:
        found = [event.payload async for event in self.plane.jobs.watch(job_id)]
        return [(each.phase, each.detail) for each in found if isinstance(each, PhaseProgress)]


@pytest.fixture
async def talk() -> AsyncIterator[Talk]:
    chains = {"chat": ["tiny-1"], "reasoning": ["spark/thinker", "rented/thinker"]}
    rungs = [
        RungSpec(name="chat", max_effort=6, chain="chat"),
        RungSpec(name="reasoning", min_effort=7, chain="chat", reason="reasoning"),
    ]
    async with a_plane(ladder=build_ladder(rungs, chains)) as plane, EngineServer() as reasoner:
        plane.fleet.show(
            deployment_view("tiny-1", plane.engine.url, capabilities=("chat", "tools")),
            deployment_view("thinker-1", reasoner.url, model="thinker", node=SPARK),
            deployment_view("thinker-2", reasoner.url, model="thinker", node=RENTED),
        )
        yield Talk(plane, reasoner)


def text_of(stream: bytes) -> str:
    events = [json.loads(event[6:]) for event in stream.split(b"\n\n") if event.startswith(b"data: {")]
    return "".join(choice["delta"].get("content") or "" for event in events for choice in event["choices"])


def mark_of(stream: bytes) -> dict[str, Any]:
    events = [json.loads(event[6:]) for event in stream.split(b"\n\n") if event.startswith(b"data: {")]
    (mark,) = [event["rung"] for event in events if "rung" in event]
    assert isinstance(mark, dict)
    return mark


async def test_effort_7_reasons_and_the_orchestrator_finishes(talk: Talk) -> None:
    stream, headers = await talk.ask(7, stream_options={"include_usage": True})

    assert text_of(stream) == "Well. It is 25"
    assert stream.endswith(DONE)
    assert stream.count(DONE) == 1
    mark = mark_of(stream)
    assert (mark["target"], mark["effort"], mark["rung"]) == ("tiny-1", 7, "reasoning")
    assert mark["reasoned_by"] == ["thinker-1"]
    assert talk.reasoner.bodies[0]["messages"] == [{"role": "user", "content": PROBLEM["problem"]}]
    assert b'"completion_tokens":4' in stream
    assert (Phase.REASONING, "thinker-1 is reasoning") in await talk.phases(headers["X-Rung-Job"])
    assert (await talk.plane.ended(headers["X-Rung-Job"])).state is JobState.DONE
    assert talk.plane.slots.load("tiny-1") == talk.plane.slots.load("thinker-1") == (0, 0)


async def test_effort_6_is_not_offered_it(talk: Talk) -> None:
    stream, _ = await talk.ask(6, tools=[LOOK])

    assert text_of(stream) == "No idea."
    assert [tool["function"]["name"] for tool in talk.plane.engine.bodies[0]["tools"]] == ["look"]  # type: ignore[attr-defined]
    assert talk.reasoner.bodies == []


async def test_a_whole_answer_reasons_too(talk: Talk) -> None:
    status, answer, headers = await talk.plane.post(
        "/v1/chat/completions", {"model": "rung/9", "messages": MESSAGES}
    )

    assert status == 200
    assert answer["choices"][0]["message"]["content"] == "It is 25"
    assert answer["rung"]["reasoned_by"] == ["thinker-1"]
    assert answer["usage"]["completion_tokens"] == 4
    assert (await talk.plane.ended(headers["X-Rung-Job"])).state is JobState.DONE


async def test_the_reasoners_chain_carries_on_when_one_fails(talk: Talk) -> None:
    away = deployment_view("thinker-1", "http://127.0.0.1:9", model="thinker", node=SPARK)
    views = talk.plane.fleet.view.deployments
    talk.plane.fleet.show(views["tiny-1"], away, views["thinker-2"])

    stream, _ = await talk.ask(8)

    assert text_of(stream) == "Well. It is 25"
    assert mark_of(stream)["reasoned_by"] == ["thinker-2"]


@pytest.mark.parametrize(
    ("begun", "why"),
    [
        pytest.param([delta("It is 24")], "in mid-answer", id="breaks off"),
        pytest.param([delta("", "stop"), USAGE, DONE], "without an answer", id="says nothing"),
    ],
)
async def test_what_a_reasoner_began_and_did_not_end_is_reasoned_anew_by_the_next(
    talk: Talk, begun: list[bytes], why: str
) -> None:
    async def break_off_once(request: web.Request, body: dict[str, Any]) -> web.StreamResponse:
        talk.reasoner.answer = talk.reason
        return await talk.reasoner.pieces(request, *begun)

    talk.reasoner.answer = break_off_once

    stream, headers = await talk.ask(8)

    assert text_of(stream) == "Well. It is 25"
    assert mark_of(stream)["reasoned_by"] == ["thinker-2"]
    (told,) = [line for phase, line in await talk.phases(headers["X-Rung-Job"]) if "trying" in line]
    assert why in told
    assert told.endswith("; trying thinker-2")
    assert talk.plane.slots.load("thinker-1") == talk.plane.slots.load("thinker-2") == (0, 0)


async def test_when_all_reasoners_break_off_the_orchestrator_is_told(talk: Talk) -> None:
    async def break_off(request: web.Request, body: dict[str, Any]) -> web.StreamResponse:
        return await talk.reasoner.pieces(request, delta("It is 24"))

    talk.reasoner.answer = break_off

    stream, _ = await talk.ask(8)

    assert "No reasoner can answer now" in text_of(stream)
    assert "24" not in text_of(stream)
    assert len(talk.reasoner.bodies) == 2


async def test_local_only_holds_for_the_reasoner(talk: Talk) -> None:
    views = talk.plane.fleet.view.deployments
    talk.plane.fleet.show(views["tiny-1"], views["thinker-2"])

    stream, headers = await talk.ask(8, headers={"X-Rung-Local-Only": "true"})

    assert talk.reasoner.bodies == []
    assert "No reasoner can answer now" in text_of(stream)
    assert "local_only" in text_of(stream)
    assert "reasoned_by" not in mark_of(stream)
    assert (await talk.plane.ended(headers["X-Rung-Job"])).state is JobState.DONE


async def test_an_orchestrator_that_never_stops_calling_is_made_to_finish(talk: Talk) -> None:
    async def insist(request: web.Request, body: dict[str, Any]) -> web.StreamResponse:
        if "tools" in body:
            return await talk.plane.engine.pieces(request, asks_to_reason())
        return await talk.plane.engine.pieces(request, delta("Enough.", "stop"), DONE)

    talk.plane.engine.answer = insist

    stream, _ = await talk.ask(10)

    assert text_of(stream) == "Enough."
    assert len(talk.reasoner.bodies) == 3


async def test_an_orchestrator_that_breaks_after_the_reasoning_fails_the_job(talk: Talk) -> None:
    async def break_off(request: web.Request, body: dict[str, Any]) -> web.StreamResponse:
        if body["messages"][-1]["role"] == "tool":
            return await talk.plane.engine.pieces(request, delta("It is"))
        return await talk.plane.engine.pieces(request, delta("Well. "), asks_to_reason())

    talk.plane.engine.answer = break_off

    stream, headers = await talk.ask(8)

    assert b'"error"' in stream
    job = await talk.plane.ended(headers["X-Rung-Job"])
    assert job.failure_reason is FailureReason.ENGINE_PROTOCOL
    assert talk.plane.slots.load("tiny-1") == (0, 0)


async def test_the_callers_own_tool_calls_pass_through(talk: Talk) -> None:
    made = {"index": 0, "id": "a", "type": "function", "function": {"name": "look", "arguments": "{}"}}

    async def look(request: web.Request, body: dict[str, Any]) -> web.StreamResponse:
        end = {"index": 0, "delta": {"tool_calls": [made]}, "finish_reason": "tool_calls"}
        return await talk.plane.engine.pieces(request, frame(choices=[end]), DONE)

    talk.plane.engine.answer = look

    stream, _ = await talk.ask(8, tools=[LOOK])

    event = json.loads(stream.split(b"\n\n")[0][6:])
    assert event["choices"][0]["delta"]["tool_calls"] == [made]
    assert talk.reasoner.bodies == []


async def test_a_named_model_is_offered_nothing(talk: Talk) -> None:
    stream, _ = await talk.ask(9, model="tiny")

    assert text_of(stream) == "No idea."
    assert "tools" not in talk.plane.engine.bodies[0]
