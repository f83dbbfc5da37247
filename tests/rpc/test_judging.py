"""Who says the effort that a caller left open: the caller, the rule, or the orchestrator as judge."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from typing import Any

import pytest
from aiohttp import web

from controlplane.ladder import Ladder, RungSpec, build_ladder
from controlplane.pipelines import Wish
from controlplane.pipelines._judging import classified_request, judge_by_rule
from rung.types import JobKind, JobState
from tests.fakes.engine_server import EngineServer
from tests.fakes.fleet_view import deployment_view
from tests.fakes.gateway import Plane, a_plane

#: The rule says 6, and is not sure of it.
UNSURE = "Plan the migration of our mail to another provider over a weekend."
HARD = "Prove that the sum of two continuous functions is continuous, then refactor this proof into lemmas."


def a_ladder() -> Ladder:
    rungs = [
        RungSpec(name="small", max_effort=6, chain="small"),
        RungSpec(name="large", min_effort=7, chain="large"),
    ]
    return build_ladder(rungs, {"small": ["tiny-1"], "large": ["big-1"]})


class Judged:
    """A small and a large model; the small one is the judge, and says what a test tells it."""

    def __init__(self, plane: Plane, large: EngineServer) -> None:
        self.plane = plane
        self.large = large
        self.verdict = '{"effort": 9}'
        self.asked: list[dict[str, Any]] = []
        plane.engine.answer = self.answer
        plane.fleet.show(
            deployment_view("tiny-1", plane.engine.url),
            deployment_view("big-1", large.url, model="big"),
        )

    async def answer(self, request: web.Request, body: dict[str, Any]) -> web.StreamResponse:
        if "rate how much thought" not in body["messages"][0]["content"]:
            return await self.plane.engine.tell(request, body)
        self.asked.append(body)
        message = {"role": "assistant", "content": self.verdict}
        return web.json_response({"choices": [{"index": 0, "message": message, "finish_reason": "stop"}]})

    async def ask(self, text: str, **fields: Any) -> tuple[int, dict[str, Any], Any]:
        body = {"model": "rung/auto", "messages": [{"role": "user", "content": text}]} | fields
        return await self.plane.post("/v1/chat/completions", body)


@pytest.fixture
async def judged() -> AsyncIterator[Judged]:
    async with a_plane(ladder=a_ladder(), ask_judge=True) as plane, EngineServer() as large:
        yield Judged(plane, large)


async def test_the_judge_decides_what_the_caller_left_open(judged: Judged) -> None:
    status, answer, headers = await judged.ask(UNSURE)

    assert status == 200
    assert answer["rung"]["effort"] == 9
    assert answer["rung"]["rung"] == "large"
    assert answer["rung"]["target"] == "big-1"
    assert headers["X-Rung-Effort"] == "9"
    assert judged.asked[0]["model"] == "tiny-served"
    assert json.loads(judged.asked[0]["messages"][1]["content"])["request"] == UNSURE


@pytest.mark.parametrize("verdict", ["eleven", '{"effort": 0}', ""])
async def test_a_judge_without_a_verdict_leaves_it_to_the_rule(judged: Judged, verdict: str) -> None:
    judged.verdict = verdict

    _, answer, _ = await judged.ask(UNSURE)

    assert answer["rung"]["rung"] == "small"
    assert len(judged.asked) == 1


async def test_the_judge_is_not_asked_when_the_rule_is_sure(judged: Judged) -> None:
    _, answer, _ = await judged.ask("Hi")

    assert answer["rung"]["rung"] == "small"
    assert judged.asked == []


@pytest.mark.parametrize(("field", "value"), [("effort", 3), ("reasoning_effort", "low")])
async def test_the_judge_is_not_asked_when_the_caller_has_decided(
    judged: Judged, field: str, value: object
) -> None:
    _, answer, _ = await judged.ask(HARD, **{field: value})

    assert answer["rung"]["rung"] == "small"
    assert judged.asked == []


async def test_the_judge_is_not_asked_about_a_named_model(judged: Judged) -> None:
    status, answer, _ = await judged.ask(HARD, model="big")

    assert status == 200
    assert answer["rung"]["target"] == "big-1"
    assert judged.asked == []


async def test_a_judge_that_is_away_leaves_it_to_the_rule(judged: Judged) -> None:
    judged.plane.fleet.show(
        deployment_view("tiny-1", "http://127.0.0.1:9"),
        deployment_view("big-1", judged.large.url, model="big"),
    )

    status, answer, headers = await judged.ask(HARD)

    assert status == 200
    assert answer["rung"]["target"] == "big-1"
    assert (await judged.plane.ended(headers["X-Rung-Job"])).state is JobState.DONE


async def test_the_rule_decides_where_no_judge_is_asked() -> None:
    async with a_plane(ladder=a_ladder()) as plane, EngineServer() as large:
        judged = Judged(plane, large)
        _, easy, _ = await judged.ask("Hi there!")
        _, hard, _ = await judged.ask(HARD)

    assert easy["rung"]["rung"] == "small"
    assert hard["rung"]["rung"] == "large"
    assert judged.asked == []


def test_what_is_classified_is_the_last_thing_that_the_user_said() -> None:
    picture = {"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}}
    body = {
        "messages": [
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": "First"},
            {"role": "assistant", "content": None},
            {"role": "user", "content": [{"type": "text", "text": "What is this?"}, picture]},
            {"role": "assistant", "content": "A cat"},
        ],
        "tools": [{"type": "function", "function": {"name": "look"}}],
    }

    found = classified_request(json.dumps(body).encode())

    assert found.text == "What is this?"
    assert (found.messages, found.characters, found.tools, found.images) == (5, 32, True, True)


@pytest.mark.parametrize("body", [b"", b"[]", b'{"messages": 3}', b'{"messages": [{"role": "user"}]}'])
def test_what_is_no_conversation_is_an_easy_one(body: bytes) -> None:
    judged = judge_by_rule(Wish(kind=JobKind.CHAT, model="", body=body))

    assert judged.effort <= 6
    assert judged.why.startswith("by rule")
