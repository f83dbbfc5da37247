"""No stream of a generation is silent for a second, whatever events there are that it has no line for."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias
from unittest.mock import Mock

import pytest
from aiohttp import web
from multidict import CIMultiDict
from prometheus_client import CollectorRegistry

from controlplane.api._inference import InferenceServicer
from controlplane.artifacts import Artifacts
from controlplane.fleet import NodeSchedulers, log_alert
from controlplane.gateway._audio import AudioRoutes
from controlplane.gateway._generate_stream import GenerateStreamRoutes
from controlplane.gateway._generations import Follower
from controlplane.gateway._images import ImageRoutes
from controlplane.gateway._jobs import JobRoutes, ndjson_event
from controlplane.gateway._keep_alive import KEEP_ALIVE_S
from controlplane.gateway._meshes import MeshRoutes
from controlplane.jobs import Jobs, LiveJob
from controlplane.pipelines import Begun, Pipelines, Slots, Wish
from controlplane.workflows import Workflows
from rung import codec, v1
from rung.service import EngineClient
from rung.types import ImageInput, JobKind, Phase, Policy, Usage
from tests.fakes.artifacts import MemoryRows
from tests.fakes.fleet_view import FakeFleet, deployment_view
from tests.fakes.heard import Heard, request_with
from tests.fakes.store import MemoryStore
from tests.fakes.virtual_time import in_virtual_time

KINDS = (JobKind.IMAGE, JobKind.MESH, JobKind.SPEECH, JobKind.TRANSCRIPTION)
#: What is left of a second for a clock that adds up in floating point.
LONGEST_S = 1.0 - 1e-6

Script: TypeAlias = Callable[[LiveJob], Awaitable[None]]


@dataclass
class ScriptedGenerations:
    """Carries out a script, whatever is wanted."""

    script: Script

    def prepared(self, wish: Wish) -> Wish:
        return wish

    async def run(self, begun: Begun) -> str:
        await self.script(begun.job)
        return "stop"


class Plane:
    """The routes of generations, without a network."""

    def __init__(self, script: Script, folder: Path) -> None:
        clock = asyncio.get_running_loop().time
        capabilities = tuple(kind.value for kind in KINDS)
        fleet = FakeFleet(deployment_view("maker", None, model="maker", capabilities=capabilities))
        slots = Slots()
        self.jobs = Jobs(MemoryStore(), monotonic_s=clock)
        self.pipelines = Pipelines(
            jobs=self.jobs,
            fleet=fleet,
            schedulers=NodeSchedulers(fleet, idle_s=slots.idle_s, alert=log_alert),
            slots=slots,
            client=EngineClient(),
            registry=CollectorRegistry(),
        )
        self.pipelines.add(ScriptedGenerations(script), *KINDS)
        follower = Follower(self.jobs, self.pipelines)
        self.artifacts = artifacts = Artifacts(folder, MemoryRows())
        self.images = ImageRoutes(follower, artifacts)
        self.short = GenerateStreamRoutes(follower, artifacts)
        self.audio = AudioRoutes(follower, artifacts, fleet)
        self.meshes = MeshRoutes(follower, artifacts)
        self.job_routes = JobRoutes(self.jobs, self.pipelines)


Ask: TypeAlias = Callable[[Plane, Heard], Awaitable[object]]
Handler: TypeAlias = Callable[[web.Request], Awaitable[web.StreamResponse]]


def asks(handler_of: Callable[[Plane], Handler], accept: str = "", **body: object) -> Ask:
    """A request in JSON."""

    async def ask(plane: Plane, heard: Heard) -> None:
        request = request_with(heard, json.dumps(body).encode(), {"Accept": accept})
        await handler_of(plane)(request)

    return ask


async def transcription(plane: Plane, heard: Heard) -> None:
    def part(name: str, content: str) -> str:
        return f'--x\r\nContent-Disposition: form-data; name="{name}"\r\n\r\n{content}\r\n'

    form = part("stream", "true") + part('file"; filename="a.wav', "RIFF") + "--x--\r\n"
    request = request_with(heard, form.encode(), {"Content-Type": "multipart/form-data; boundary=x"})
    await plane.audio.transcriptions(request)
    for value in (await request.post()).values():
        if isinstance(value, web.FileField):
            value.file.close()


def some_job(plane: Plane) -> str:
    wish = Wish(kind=JobKind.IMAGE, model="", input=ImageInput(prompt="a cat"), policy=Policy())
    return plane.pipelines.start(wish).id


async def job_events(plane: Plane, heard: Heard) -> None:
    await plane.job_routes.events(request_with(heard, b"", {}, {"id": some_job(plane)}))


async def watch_job(plane: Plane, heard: Heard) -> None:
    servicer = InferenceServicer(plane.jobs, plane.pipelines, plane.artifacts, Workflows())
    request = v1.WatchJobRequest(job_id=some_job(plane))
    heard.headers = CIMultiDict()
    async for response in servicer.WatchJob(request, Mock()):
        event = codec.job_event_from_proto(response.event)
        assert event is not None
        await heard.write(ndjson_event(event))


SSE = "text/event-stream"
#: The streams that tell only some events, then those of whole logs.
SELECTIVE: dict[str, Ask] = {
    "images": asks(lambda plane: plane.images.generations, prompt="a cat", stream=True, partial_images=2),
    "generate": asks(lambda plane: plane.short.stream, prompt="a cat"),
    "generate-sse": asks(lambda plane: plane.short.stream, SSE, prompt="a cat"),
    "speech": asks(lambda plane: plane.audio.speech, input="good morning", stream_format="sse"),
    "transcription": transcription,
}
WHOLE: dict[str, Ask] = {
    "meshes": asks(lambda plane: plane.meshes.create, prompt="a chair", stream=True),
    "meshes-sse": asks(lambda plane: plane.meshes.create, SSE, prompt="a chair", stream=True),
    "job-events": job_events,
    "WatchJob": watch_job,
}
every_stream = pytest.mark.parametrize(
    "ask", [pytest.param(ask, id=name) for name, ask in (SELECTIVE | WHOLE).items()]
)
every_selective_stream = pytest.mark.parametrize(
    "ask", [pytest.param(ask, id=name) for name, ask in SELECTIVE.items()]
)


async def heard_of(script: Script, ask: Ask, folder: Path) -> Heard:
    plane, heard = Plane(script, folder), Heard()
    await ask(plane, heard)
    await plane.pipelines.aclose()
    return heard


def nothing_to_tell(job: LiveJob) -> None:
    """An event for which most streams have no line of their own."""
    job.consumed(Usage(prompt_tokens=1))


@every_stream
@pytest.mark.parametrize("after_s", [0.1, 0.199, 0.21, 0.5, 0.79])
@in_virtual_time
async def test_an_event_without_a_line_does_not_put_off_the_next_line(
    ask: Ask, after_s: float, tmp_path: Path
) -> None:
    async def script(job: LiveJob) -> None:
        job.progress(Phase.GENERATING, "making it")
        await asyncio.sleep(after_s)
        nothing_to_tell(job)
        await asyncio.sleep(0.8)

    heard = await heard_of(script, ask, tmp_path)

    assert max(heard.gaps_s) < LONGEST_S


@every_stream
@in_virtual_time
async def test_nor_do_such_events_without_end(ask: Ask, tmp_path: Path) -> None:
    async def script(job: LiveJob) -> None:
        job.progress(Phase.GENERATING, "making it")
        for _ in range(500):
            await asyncio.sleep(0.01)
            nothing_to_tell(job)

    heard = await heard_of(script, ask, tmp_path)

    assert max(heard.gaps_s) < LONGEST_S


@every_selective_stream
@in_virtual_time
async def test_where_nothing_needs_saying_there_is_one_line_for_each_keep_alive(
    ask: Ask, tmp_path: Path
) -> None:
    async def script(job: LiveJob) -> None:
        job.progress(Phase.GENERATING, "making it")
        for _ in range(80):
            await asyncio.sleep(0.1)
            nothing_to_tell(job)

    heard = await heard_of(script, ask, tmp_path)

    assert min(heard.gaps_s[1:-1]) > KEEP_ALIVE_S - 1e-6


@every_stream
@in_virtual_time
async def test_where_lines_come_none_is_put_in_between(ask: Ask, tmp_path: Path) -> None:
    async def script(job: LiveJob) -> None:
        for step in range(10):
            job.progress(Phase.GENERATING, f"part {step}")
            await asyncio.sleep(0.7)

    heard = await heard_of(script, ask, tmp_path)

    told = [line["detail"] for line in heard.lines if line.get("phase") == "generating"]
    assert told == [f"part {step}" for step in range(10)]


@every_stream
@in_virtual_time
async def test_it_is_not_silent_before_the_first_phase(ask: Ask, tmp_path: Path) -> None:
    async def script(job: LiveJob) -> None:
        await asyncio.sleep(0.7)
        nothing_to_tell(job)
        await asyncio.sleep(5.0)

    heard = await heard_of(script, ask, tmp_path)

    assert max(heard.gaps_s) < LONGEST_S
    assert {line["phase"] for line in heard.lines if "phase" in line} - {"done"} == {"route"}


@every_stream
@in_virtual_time
async def test_it_is_not_silent_between_the_last_phase_and_the_end(ask: Ask, tmp_path: Path) -> None:
    async def script(job: LiveJob) -> None:
        job.progress(Phase.ENCODING, "storing it", remaining_s=2.0, job_remaining_s=2.0)
        job.progress(Phase.DONE, "made")
        await asyncio.sleep(5.0)

    heard = await heard_of(script, ask, tmp_path)

    assert max(heard.gaps_s) < LONGEST_S


@pytest.mark.parametrize("name", ["images", "generate", "generate-sse"])
@in_virtual_time
async def test_done_is_only_the_last_line(name: str, tmp_path: Path) -> None:
    async def script(job: LiveJob) -> None:
        job.progress(Phase.ENCODING, "storing it", remaining_s=2.0, job_remaining_s=2.0)
        job.progress(Phase.DONE, "made")
        await asyncio.sleep(5.0)

    first, *rest = [
        line for line in (await heard_of(script, SELECTIVE[name], tmp_path)).lines if "phase" in line
    ]
    if name != "images":
        assert rest.pop()["phase"] == "done"

    assert first["remaining_s"] == 2.0
    assert len(rest) == 6
    assert {(line["phase"], line["detail"], line.get("remaining_s")) for line in rest} == {
        ("encoding", "storing it", None)
    }


@every_selective_stream
@in_virtual_time
async def test_what_is_said_in_between_is_true_when_it_is_said(ask: Ask, tmp_path: Path) -> None:
    async def script(job: LiveJob) -> None:
        job.progress(Phase.GENERATING, "making it", remaining_s=2.0, job_remaining_s=10.0)
        for _ in range(30):
            await asyncio.sleep(0.1)
            nothing_to_tell(job)
        job.progress(Phase.ENCODING, "storing it")

    heard = await heard_of(script, ask, tmp_path)

    told = [line for line in heard.lines if line.get("phase") == "generating"]
    assert {line["detail"] for line in told} == {"making it"}
    assert [line["elapsed_s"] for line in told] == [0.0, 0.8, 1.6, 2.4]
    # More than was thought is not less than nothing.
    assert [line.get("remaining_s") for line in told] == [2.0, 1.2, 0.4, None]
    assert [line["job_remaining_s"] for line in told] == [10.0, 9.2, 8.4, 7.6]
