"""The HTTP gateway with real jobs, pipelines and connections; the engine does what a test tells it."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import AsyncIterator
from typing import Any

import aiohttp
import openai
import pytest
from aiohttp import web

from controlplane.gateway import _keep_alive
from rung.types import FailureReason, Job, JobState, LifecycleProgress, Residency
from tests.fakes.engine_server import DONE, USAGE, delta, frame
from tests.fakes.fleet_view import deployment_view
from tests.fakes.gateway import Plane, a_plane

CHAT: dict[str, Any] = {"model": "tiny", "messages": [{"role": "user", "content": "Hi"}]}


@pytest.fixture
async def plane() -> AsyncIterator[Plane]:
    async with a_plane() as plane:
        yield plane


def unmarked(text: bytes) -> tuple[bytes, list[dict[str, str]]]:
    """A stream without what says who answered, and that."""
    mark = re.compile(rb',"rung":({[^}]*})')
    return mark.sub(b"", text), [json.loads(found) for found in mark.findall(text)]


async def test_a_whole_answer(plane: Plane) -> None:
    status, answer, headers = await plane.post("/v1/chat/completions", CHAT, **{"X-Request-Id": "mine"})

    assert status == 200
    assert answer["choices"][0]["message"]["content"] == "Hello world"
    assert answer["rung"] == {
        "job": headers["X-Rung-Job"],
        "requested": "tiny",
        "target": "tiny-1",
        "node": "workstation",
        "model": "tiny-served",
    }
    assert plane.engine.bodies[0]["model"] == "tiny-served"
    assert headers["X-Rung-Target"] == "tiny-1"
    assert headers["X-Rung-Node"] == "workstation"
    assert headers["X-Request-Id"] == "mine"
    job = await plane.ended(headers["X-Rung-Job"])
    assert job.state is JobState.DONE
    assert job.usage is not None
    assert job.usage.completion_tokens == 2
    assert plane.slots.load("tiny-1") == (0, 0)


@pytest.mark.parametrize("wants_usage", [True, False])
async def test_a_stream(plane: Plane, wants_usage: bool) -> None:
    body = CHAT | {"stream": True}
    if wants_usage:
        body["stream_options"] = {"include_usage": True}
    async with plane.http.post(f"{plane.url}/v1/chat/completions", json=body) as response:
        assert response.content_type == "text/event-stream"
        text = await response.read()

    bare, marks = unmarked(text)
    assert bare == delta("Hello") + delta(" world", "stop") + (USAGE if wants_usage else b"") + DONE
    assert [mark["target"] for mark in marks] == ["tiny-1"]
    assert marks[0]["job"] == response.headers["X-Rung-Job"]
    job = await plane.ended(response.headers["X-Rung-Job"])
    assert job.usage is not None
    assert job.usage.prompt_tokens == 5


async def test_the_openai_client(plane: Plane) -> None:
    async with plane.openai as client:
        whole = await client.chat.completions.create(**CHAT)
        assert whole.choices[0].message.content == "Hello world"

        stream = await client.chat.completions.create(
            **CHAT, stream=True, stream_options={"include_usage": True}
        )
        chunks = [chunk async for chunk in stream]
        assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == "Hello world"
        assert chunks[-1].usage is not None
        assert chunks[-1].usage.completion_tokens == 2

        vectors = await client.embeddings.create(model="tiny", input=["a", "b"], encoding_format="float")
        assert [row.embedding for row in vectors.data] == [[0.0, 0.5], [1.0, 0.5]]

        assert [model.id async for model in client.models.list()] == ["tiny"]
        assert (await client.models.retrieve("tiny")).owned_by == "rung"
        with pytest.raises(openai.NotFoundError) as unknown:
            await client.chat.completions.create(**(CHAT | {"model": "other"}))
        assert unknown.value.code == "model_not_found"


@pytest.mark.parametrize("is_head_first", [True, False])
async def test_the_openai_client_skips_what_is_said_before_the_first_token(
    plane: Plane, monkeypatch: pytest.MonkeyPatch, is_head_first: bool
) -> None:
    monkeypatch.setattr(_keep_alive, "KEEP_ALIVE_S", 0.01)
    said, writes = asyncio.Event(), web.StreamResponse.write

    async def write(response: web.StreamResponse, data: bytes) -> None:
        await writes(response, data)
        if data.startswith(b": rung.progress "):
            said.set()

    async def answer(request: web.Request, body: dict[str, object]) -> web.StreamResponse:
        if not is_head_first:
            await said.wait()
        response = await plane.engine.head(request)
        for piece in (delta("Hello"), delta(" world", "stop"), DONE):
            said.clear()
            await said.wait()
            await response.write(piece)
        return response

    monkeypatch.setattr(web.StreamResponse, "write", write)
    plane.engine.answer = answer
    async with plane.openai as client:
        chunks = [chunk async for chunk in await client.chat.completions.create(**CHAT, stream=True)]

    assert [chunk.choices[0].delta.content for chunk in chunks] == ["Hello", " world"]


async def test_tool_calls_pass_through(plane: Plane) -> None:
    call = {"index": 0, "id": "c1", "type": "function", "function": {"name": "look", "arguments": "{}"}}
    choice = {"index": 0, "delta": {"tool_calls": [call]}, "finish_reason": None}
    end = {"index": 0, "delta": {}, "finish_reason": "tool_calls"}

    async def answer(request: web.Request, body: dict[str, object]) -> web.StreamResponse:
        assert body["tools"]
        return await plane.engine.pieces(request, frame(choices=[choice]), frame(choices=[end]), DONE)

    plane.engine.answer = answer
    tool: Any = {"type": "function", "function": {"name": "look", "parameters": {"type": "object"}}}
    wish: Any = CHAT | {"tools": [tool], "stream": True}
    async with plane.openai as client:
        stream = await client.chat.completions.create(**wish)
        chunks = [chunk async for chunk in stream]

    calls = chunks[0].choices[0].delta.tool_calls
    assert calls is not None
    assert calls[0].function is not None
    assert calls[0].function.name == "look"
    assert chunks[-1].choices[0].finish_reason == "tool_calls"


@pytest.mark.parametrize(
    ("body", "status", "reason"),
    [
        (b"{", 400, "INVALID_REQUEST"),
        (b"[]", 400, "INVALID_REQUEST"),
        (b'{"model":"none","messages":[]}', 404, "UNKNOWN_MODEL"),
        (b'{"model":"tiny","x":"' + b"x" * 70_000 + b'"}', 413, "REQUEST_TOO_LARGE"),
    ],
)
async def test_bad_requests(plane: Plane, body: bytes, status: int, reason: str) -> None:
    async with plane.http.post(f"{plane.url}/v1/chat/completions", data=body) as response:
        assert response.status == status
        error = (await response.json())["error"]

    assert error["rung"]["reason"] == reason
    assert plane.engine.bodies == []
    assert plane.jobs.running == 0


@pytest.mark.parametrize(
    ("engine_status", "status", "reason"),
    [(400, 400, "ENGINE_REJECTED"), (500, 502, "ENGINE_FAILED"), (429, 502, "ENGINE_FAILED")],
)
@pytest.mark.parametrize("stream", [True, False])
async def test_an_engine_that_answers_with_an_error(
    plane: Plane, engine_status: int, status: int, reason: str, stream: bool
) -> None:
    async def answer(request: web.Request, body: dict[str, object]) -> web.StreamResponse:
        return web.json_response({"error": {"message": "the engine says no"}}, status=engine_status)

    plane.engine.answer = answer
    got, answered, headers = await plane.post("/v1/chat/completions", CHAT | {"stream": stream})

    assert got == status
    assert "the engine says no" in answered["error"]["message"]
    assert answered["error"]["rung"]["reason"] == reason
    assert (await plane.ended(headers["X-Rung-Job"])).state is JobState.FAILED
    assert plane.slots.load("tiny-1") == (0, 0)


@pytest.mark.parametrize("stream", [True, False])
async def test_an_engine_that_hangs(plane: Plane, stream: bool) -> None:
    async def answer(request: web.Request, body: dict[str, object]) -> web.StreamResponse:
        await plane.engine.release.wait()
        return web.Response()

    plane.engine.answer = answer
    status, answered, headers = await plane.post("/v1/chat/completions", CHAT | {"stream": stream})

    assert status == 504
    assert answered["error"]["rung"]["reason"] == "ENGINE_TIMEOUT"
    assert (await plane.ended(headers["X-Rung-Job"])).failure_reason is FailureReason.TIMEOUT


@pytest.mark.parametrize(
    ("pieces", "reason", "kept"),
    [
        ([delta("Hello"), b"data: {not json\n\n"], FailureReason.ENGINE_PROTOCOL, delta("Hello")),
        ([delta("Hello"), b'data: {"choices"'], FailureReason.ENGINE_PROTOCOL, delta("Hello")),
        ([delta("Hello"), DONE], FailureReason.ENGINE_PROTOCOL, delta("Hello")),
        ([delta("Hello"), frame(error="broken"), DONE], FailureReason.ENGINE_ERROR, delta("Hello")),
    ],
    ids=["not json", "cut in an event", "no finish reason", "error frame"],
)
async def test_a_stream_that_breaks_says_so(
    plane: Plane, pieces: list[bytes], reason: FailureReason, kept: bytes
) -> None:
    async def answer(request: web.Request, body: dict[str, object]) -> web.StreamResponse:
        return await plane.engine.pieces(request, *pieces)

    plane.engine.answer = answer
    async with plane.http.post(f"{plane.url}/v1/chat/completions", json=CHAT | {"stream": True}) as response:
        text = await response.read()

    assert text.startswith(kept)
    assert text.endswith(DONE)
    assert json.loads(text[len(kept) + 6 : -len(DONE)])["error"]["rung"]["reason"]
    job = await plane.ended(response.headers["X-Rung-Job"])
    assert job.failure_reason is reason
    assert plane.slots.load("tiny-1") == (0, 0)


async def test_an_engine_that_goes_away_in_mid_answer(plane: Plane) -> None:
    async def answer(request: web.Request, body: dict[str, object]) -> web.StreamResponse:
        response = await plane.engine.head(request)
        await response.write(delta("Hello"))
        assert request.transport is not None
        request.transport.abort()
        return response

    plane.engine.answer = answer
    async with plane.openai as client:
        stream = await client.chat.completions.create(**CHAT, stream=True)
        with pytest.raises(openai.APIError, match="tiny-1"):
            async for _ in stream:
                pass


async def test_a_caller_that_leaves_cancels_the_engine(plane: Plane) -> None:
    plane.engine.answer = plane.engine.endless
    async with plane.http.post(f"{plane.url}/v1/chat/completions", json=CHAT | {"stream": True}) as response:
        await response.content.readany()
        job_id = response.headers["X-Rung-Job"]
        response.close()

    await asyncio.wait_for(plane.engine.broken_off.wait(), 5)
    job = await plane.ended(job_id)
    assert (job.state, job.detail) == (JobState.CANCELLED, "cancelled by caller_disconnected")
    assert plane.slots.load("tiny-1") == (0, 0)


async def test_a_caller_whose_going_is_noticed_by_writing_to_it_is_no_defect(
    plane: Plane, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    plane.engine.answer = plane.engine.endless
    writes = web.StreamResponse.write

    async def write(response: web.StreamResponse, data: bytes) -> None:
        # The engine's own responses are of this class too.
        if "X-Rung-Job" in response.headers:
            raise aiohttp.ClientConnectionResetError("Cannot write to closing transport")
        await writes(response, data)

    monkeypatch.setattr(web.StreamResponse, "write", write)
    async with plane.http.post(f"{plane.url}/v1/chat/completions", json=CHAT | {"stream": True}) as response:
        job = await plane.ended(response.headers["X-Rung-Job"])

    assert (job.state, job.detail) == (JobState.CANCELLED, "cancelled by caller_disconnected")
    assert plane.slots.load("tiny-1") == (0, 0)
    assert [record for record in caplog.records if record.levelname == "ERROR"] == []


async def test_a_caller_that_leaves_before_the_answer_cancels_the_engine(plane: Plane) -> None:
    async def answer(request: web.Request, body: dict[str, object]) -> web.StreamResponse:
        plane.engine.started.set()
        await plane.engine.release.wait()
        return web.Response()

    plane.engine.answer = answer
    call = asyncio.create_task(plane.post("/v1/chat/completions", CHAT))
    await plane.engine.started.wait()
    call.cancel()

    await asyncio.wait_for(plane.engine.broken_off.wait(), 5)


async def test_cancelling_a_job_ends_its_stream(plane: Plane) -> None:
    plane.engine.answer = plane.engine.endless
    async with plane.http.post(f"{plane.url}/v1/chat/completions", json=CHAT | {"stream": True}) as response:
        job_id = response.headers["X-Rung-Job"]
        status, _, _ = await plane.post(f"/v1/jobs/{job_id}/cancel", None)
        text = await response.read()

    assert status == 200
    assert b"JOB_CANCELLED" in text
    assert text.endswith(DONE)
    assert (await plane.ended(job_id)).state is JobState.CANCELLED
    await asyncio.wait_for(plane.engine.broken_off.wait(), 5)


async def test_the_next_target_is_tried(plane: Plane) -> None:
    away = deployment_view("away", "http://127.0.0.1:9")
    plane.fleet.show(away, deployment_view("tiny-1", plane.engine.url))

    status, _, headers = await plane.post("/v1/chat/completions", CHAT)

    assert status == 200
    assert headers["X-Rung-Target"] == "tiny-1"
    assert plane.slots.load("away") == (0, 0)


async def test_all_targets_away(plane: Plane) -> None:
    plane.fleet.show(deployment_view("away", "http://127.0.0.1:9", external=True))

    status, answered, _ = await plane.post("/v1/chat/completions", CHAT)

    assert status == 502
    assert answered["error"]["rung"]["reason"] == "ENGINE_UNREACHABLE"


async def test_a_stopped_engine_is_started_with_progress(plane: Plane) -> None:
    plane.fleet.show(deployment_view("tiny-1", None, residency=Residency.STOPPED))
    plane.fleet.steps = [LifecycleProgress(Residency.STARTING, "loading weights, 40 %")]
    plane.fleet.awake_view = deployment_view("tiny-1", plane.engine.url)
    async with plane.http.post(f"{plane.url}/v1/chat/completions", json=CHAT | {"stream": True}) as response:
        text = await response.read()

    comment, _, _ = text.partition(b"\n\n")
    told = json.loads(comment.removeprefix(b": rung.progress "))
    assert (told["phase"], told["detail"]) == ("engine_start", "loading weights, 40 %")
    assert unmarked(text)[0].endswith(delta("Hello") + delta(" world", "stop") + DONE)


async def test_an_engine_that_does_not_start(plane: Plane) -> None:
    plane.fleet.show(deployment_view("tiny-1", None, residency=Residency.STOPPED))
    plane.fleet.refuse_start = "tiny-1 died while loading: exit code 1"

    status, answered, headers = await plane.post("/v1/chat/completions", CHAT)

    assert status == 503
    assert "died while loading" in answered["error"]["message"]
    job = await plane.ended(headers["X-Rung-Job"])
    assert job.failure_reason is FailureReason.ENGINE_START_FAILED


async def test_requests_wait_for_a_slot(plane: Plane) -> None:
    plane.fleet.show(deployment_view("tiny-1", plane.engine.url, slots=1))
    plane.engine.answer = plane.engine.endless
    first = asyncio.create_task(plane.post("/v1/chat/completions", CHAT | {"stream": True}))
    await plane.engine.started.wait()
    plane.engine.answer = plane.engine.tell
    second = asyncio.create_task(plane.post("/v1/chat/completions", CHAT))
    async for event in plane.jobs.watch((await _newest(plane)).id):
        if "place 1" in getattr(event.payload, "detail", ""):
            break
    assert plane.slots.load("tiny-1") == (1, 1)

    first.cancel()

    assert (await asyncio.wait_for(second, 5))[0] == 200


async def _newest(plane: Plane) -> Job:
    while True:
        found = await plane.jobs.list(page_size=10)
        if len(found) == 2:
            return found[0]
        await asyncio.sleep(0)


@pytest.mark.parametrize(
    "headers",
    [{"Host": "evil.example"}, {"Origin": "https://evil.example"}],
    ids=["rebound name", "foreign page"],
)
async def test_foreign_pages_are_refused(plane: Plane, headers: dict[str, str]) -> None:
    status, answered, _ = await plane.post("/v1/chat/completions", CHAT, **headers)

    assert status == 403
    assert answered["error"]["rung"]["reason"] == "NOT_ALLOWED"


async def test_a_detached_job_and_its_log(plane: Plane) -> None:
    body = {"kind": "chat", "request": CHAT, "request_id": "once"}
    status, job, headers = await plane.post("/v1/jobs", body)
    _, again, _ = await plane.post("/v1/jobs", body)
    assert (status, headers["Location"], again["id"]) == (201, f"/v1/jobs/{job['id']}", job["id"])

    async with plane.http.get(f"{plane.url}/v1/jobs/{job['id']}/events") as response:
        assert response.content_type == "application/x-ndjson"
        lines = [json.loads(line) for line in (await response.text()).splitlines()]
    lines = [line for line in lines if line["sequence"]]
    assert [line["sequence"] for line in lines] == list(range(1, len(lines) + 1))
    assert lines[0]["event"] == "accepted"
    assert lines[-1]["event"] == "done"
    assert "".join(line.get("content", "") for line in lines) == "Hello world"

    events = f"{plane.url}/v1/jobs/{job['id']}/events"
    accept = {"Accept": "text/event-stream", "Last-Event-ID": str(lines[-2]["sequence"])}
    async with plane.http.get(events, headers=accept) as response:
        text = await response.text()
    assert text.startswith(f"id: {lines[-1]['sequence']}\ndata: ")
    assert text.count("\n\n") == 1
    async with plane.http.get(events, params={"after": "999"}) as response:
        assert response.status == 416
    async with plane.http.get(events, params={"after": "x"}) as response:
        assert response.status == 400


async def test_jobs_are_listed_and_shown(plane: Plane) -> None:
    _, _, headers = await plane.post("/v1/chat/completions", CHAT)
    job_id = headers["X-Rung-Job"]
    async with plane.http.get(f"{plane.url}/v1/jobs", params={"state": "done"}) as response:
        assert [job["id"] for job in (await response.json())["data"]] == [job_id]
    async with plane.http.get(f"{plane.url}/v1/jobs/{job_id}") as response:
        assert (await response.json())["served"]["target"] == "tiny-1"
    async with plane.http.get(f"{plane.url}/v1/jobs/none") as response:
        assert response.status == 404
    async with plane.http.get(f"{plane.url}/v1/jobs", params={"state": "odd"}) as response:
        assert response.status == 400


async def test_health_metrics_and_strange_paths(plane: Plane) -> None:
    await plane.post("/v1/chat/completions", CHAT)
    async with plane.http.get(f"{plane.url}/metrics") as response:
        text = await response.text()
    assert 'rung_jobs_total{kind="chat",state="done",target="tiny-1"} 1.0' in text
    assert 'rung_tokens_total{direction="completion",target="tiny-1"} 2.0' in text
    async with plane.http.get(f"{plane.url}/healthz") as response:
        assert response.status == 200
    async with plane.http.get(f"{plane.url}/readyz") as response:
        assert response.status == 200
    plane.gateway.drain()
    async with plane.http.get(f"{plane.url}/readyz") as response:
        assert response.status == 503
    async with plane.http.get(f"{plane.url}/nowhere") as response:
        assert (response.status, (await response.json())["error"]["type"]) == (404, "invalid_request_error")
    async with plane.http.get(f"{plane.url}/v1/chat/completions") as response:
        assert (response.status, response.headers["Allow"]) == (405, "POST")
