"""Errors of the HTTP gateway in OpenAI's shapes, and engines that fail late."""

from __future__ import annotations

import asyncio
import io
import json
from collections.abc import AsyncIterator
from typing import Any

import openai
import pytest
from aiohttp import web

from controlplane.config import ServerConfig
from rung.types import FailureReason, JobState, Residency
from tests.fakes.engine_server import DONE, delta
from tests.fakes.fleet_view import deployment_view
from tests.fakes.gateway import Plane, a_plane

CHAT: dict[str, Any] = {"model": "tiny", "messages": [{"role": "user", "content": "Hi"}]}
_MIB = 1024 * 1024


@pytest.fixture
async def plane() -> AsyncIterator[Plane]:
    async with a_plane() as plane:
        yield plane


@pytest.mark.parametrize("name", ["nope", "node/nope", "rung/99"])
async def test_a_model_that_there_is_not_is_told_as_openai_does(plane: Plane, name: str) -> None:
    async with plane.http.get(f"{plane.url}/v1/models/{name}") as response:
        assert response.status == 404
        error = (await response.json())["error"]

    assert error["message"] == f"there is no model {name!r}; `GET /v1/models` lists what there is"
    assert (error["type"], error["code"], error["param"]) == (
        "invalid_request_error",
        "model_not_found",
        "model",
    )
    async with plane.openai as client:
        with pytest.raises(openai.NotFoundError) as unknown:
            await client.models.retrieve(name)
    assert (unknown.value.code, unknown.value.param) == ("model_not_found", "model")


@pytest.mark.parametrize("status", [500, 503, 429])
async def test_an_engine_that_fails_is_a_server_error(plane: Plane, status: int) -> None:
    async def answer(request: web.Request, body: dict[str, object]) -> web.StreamResponse:
        return web.json_response({"error": {"message": "out of memory"}}, status=status)

    plane.engine.answer = answer
    async with plane.openai as client:
        with pytest.raises(openai.InternalServerError) as failed:
            await client.chat.completions.create(**CHAT)
    assert (failed.value.status_code, failed.value.type, failed.value.code) == (
        502,
        "server_error",
        "engine_failed",
    )


async def test_an_engine_that_cannot_be_reached_is_one_to_be_asked_again(plane: Plane) -> None:
    plane.fleet.show(deployment_view("away", "http://127.0.0.1:9", external=True))

    status, answered, headers = await plane.post("/v1/chat/completions", CHAT)

    assert (status, answered["error"]["type"]) == (502, "server_error")
    assert answered["error"]["code"] == "engine_unreachable"
    assert headers["Retry-After"] == "1"


async def test_what_is_only_away_for_now_is_no_server_error(plane: Plane) -> None:
    plane.fleet.show(deployment_view("tiny-1", None, residency=Residency.STOPPED))
    plane.fleet.refuse_start = "its node drains"

    status, answered, headers = await plane.post("/v1/chat/completions", CHAT)

    assert (status, answered["error"]["type"]) == (503, "service_unavailable_error")
    assert headers["Retry-After"] == "1"


async def test_an_engine_that_hangs_in_mid_stream_ends_it_with_an_error(plane: Plane) -> None:
    plane.fleet.show(deployment_view("tiny-1", plane.engine.url, slots=1))
    # It says "Hello", and nothing more.
    plane.engine.answer = plane.engine.endless
    async with plane.http.post(f"{plane.url}/v1/chat/completions", json=CHAT | {"stream": True}) as response:
        assert response.status == 200
        text = await asyncio.wait_for(response.read(), 10)

    events = [event for event in text.split(b"\n\n") if event.startswith(b"data: ")]
    assert json.loads(events[0].removeprefix(b"data: "))["choices"][0]["delta"]["content"] == "Hello"
    error = json.loads(events[1].removeprefix(b"data: "))["error"]
    assert (error["type"], error["code"]) == ("timeout_error", "engine_timeout")
    assert error["rung"]["reason"] == "ENGINE_TIMEOUT"
    assert error["rung"]["delivered_characters"] == "5"
    assert text.endswith(DONE)
    job = await plane.ended(response.headers["X-Rung-Job"])
    assert (job.state, job.failure_reason) == (JobState.FAILED, FailureReason.TIMEOUT)
    await asyncio.wait_for(plane.engine.broken_off.wait(), 5)
    assert plane.slots.load("tiny-1") == (0, 0)

    plane.engine.answer = plane.engine.tell
    assert (await plane.post("/v1/chat/completions", CHAT))[0] == 200, "its only slot is free"


async def test_so_it_is_for_openais_client(plane: Plane) -> None:
    plane.engine.answer = plane.engine.endless
    async with plane.openai as client:
        stream = aiter(await client.chat.completions.create(**CHAT, stream=True))
        assert (await anext(stream)).choices[0].delta.content == "Hello"
        with pytest.raises(openai.APIError, match="tiny-1") as failed:
            await anext(stream)
    assert failed.value.code == "engine_timeout"


async def test_a_stream_that_breaks_off_is_a_server_error(plane: Plane) -> None:
    async def answer(request: web.Request, body: dict[str, object]) -> web.StreamResponse:
        return await plane.engine.pieces(request, delta("Hello"))

    plane.engine.answer = answer
    async with plane.openai as client:
        stream = await client.chat.completions.create(**CHAT, stream=True)
        await anext(aiter(stream))
        with pytest.raises(openai.APIError) as failed:
            await anext(aiter(stream))
    assert (failed.value.type, failed.value.code) == ("server_error", "engine_protocol")


def a_chat_of(size_bytes: int) -> bytes:
    """A request of exactly this size."""
    head, tail = b'{"model":"tiny","messages":[{"role":"user","content":"', b'"}]}'
    return head + b"x" * (size_bytes - len(head) - len(tail)) + tail


async def in_chunks(body: bytes) -> AsyncIterator[bytes]:
    """A body of which nobody says beforehand how long it is."""
    for start in range(0, len(body), _MIB):
        yield body[start : start + _MIB]


@pytest.mark.parametrize("chunked", [False, True], ids=["with its length", "chunked"])
async def test_by_default_a_request_may_have_16_mib_and_not_a_byte_more(chunked: bool) -> None:
    default_bytes = ServerConfig().max_request_bytes
    assert default_bytes == 16 * _MIB
    async with a_plane(max_request_bytes=default_bytes) as plane:
        url = f"{plane.url}/v1/chat/completions"

        async def status_of(body: bytes) -> tuple[int, dict[str, Any]]:
            data: Any = in_chunks(body) if chunked else io.BytesIO(body)
            async with plane.http.post(url, data=data) as response:
                assert ("Transfer-Encoding" in response.request_info.headers) is chunked
                return response.status, await response.json()

        assert (await status_of(a_chat_of(default_bytes)))[0] == 200
        asked = len(plane.engine.bodies)
        status, answered = await status_of(a_chat_of(default_bytes + 1))

        assert status == 413
        assert answered["error"]["message"] == (
            "the request is larger than 16 MiB; server.max_request_bytes sets the limit"
        )
        assert answered["error"]["type"] == "invalid_request_error"
        assert len(plane.engine.bodies) == asked == 1
        assert plane.jobs.running == 0
