"""The pipeline of voice over real jobs and artifacts; engines do what a test tells them."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any, TypeAlias

import aiohttp
import pytest
from msgspec.structs import replace

from controlplane.estimates import Estimates
from controlplane.fleet import DeploymentView
from controlplane.pipelines.speech import VoicePipeline, VoiceSlots
from rung.codec import GenerationEvent
from rung.errors import EngineFailedError, InvalidRequestError
from rung.types import (
    ArtifactChunk,
    EngineInput,
    JobKind,
    Phase,
    PhaseProgress,
    ServiceEngine,
    TokenDelta,
)
from tests.fakes.fleet_view import FakeFleet, deployment_view
from tests.fakes.gateway import Plane, a_plane

Script: TypeAlias = Callable[[EngineInput], AsyncGenerator[GenerationEvent, None]]
AUDIO = bytes(range(256)) * 40


def voice_view(name: str, dialect: str, capability: str) -> DeploymentView:
    view = deployment_view(name, None, model="voice", capabilities=(capability,))
    spec = view.deployment.spec
    spec = replace(spec, engine=replace(spec.engine, engine=ServiceEngine(dialect=dialect)))
    return replace(view, deployment=replace(view.deployment, spec=spec))


class Engines:
    """What each deployment does when it is asked."""

    def __init__(self, fleet: FakeFleet) -> None:
        self.scripts: dict[str, Script] = {}
        self.asked: list[str] = []
        self.closed: list[str] = []
        fleet.generate_through_agent = self.generate  # type: ignore[method-assign]  # no agents here

    async def generate(
        self, deployment_id: str, job_id: str, wanted: EngineInput, idle_timeout_s: float
    ) -> AsyncGenerator[GenerationEvent, None]:
        self.asked.append(deployment_id)
        try:
            async for event in self.scripts[deployment_id](wanted):
                yield event
        finally:
            self.closed.append(deployment_id)


@asynccontextmanager
async def rig(*views: DeploymentView) -> AsyncIterator[tuple[Plane, Engines]]:
    async with a_plane() as plane:
        plane.fleet.show(*views)
        engines = Engines(plane.fleet)
        pipeline = VoicePipeline(
            fleet=plane.fleet,
            engager=plane.pipelines.engager,
            artifacts=plane.artifacts,
            estimates=Estimates(),
            voice_slots=VoiceSlots(),
        )
        plane.pipelines.add(pipeline, JobKind.SPEECH, JobKind.TRANSCRIPTION)
        yield plane, engines


def piece(data: bytes, offset: int, whole: bytes = b"") -> ArtifactChunk:
    sha256 = hashlib.sha256(whole).hexdigest() if whole else ""
    return ArtifactChunk("0", "audio/wav", offset, data, sha256, len(whole), len(data))


async def speaks(wanted: EngineInput) -> AsyncGenerator[GenerationEvent, None]:
    yield PhaseProgress(phase=Phase.GENERATING, detail="saying it")
    yield piece(AUDIO[:6000], 0)
    yield piece(AUDIO[6000:], 6000)
    yield piece(b"", len(AUDIO), AUDIO)


async def fails_at_once(wanted: EngineInput) -> AsyncGenerator[GenerationEvent, None]:
    yield PhaseProgress(phase=Phase.GENERATING, detail="trying")
    raise EngineFailedError("it is out of order")


async def breaks_off(wanted: EngineInput) -> AsyncGenerator[GenerationEvent, None]:
    yield piece(AUDIO[:6000], 0)
    raise EngineFailedError("it broke off")


SPEECH = {"model": "voice", "input": "good morning"}


async def test_audio_comes_as_it_is_made_and_is_kept() -> None:
    async with rig(voice_view("a", "piper", "speech")) as (plane, engines):
        engines.scripts["a"] = speaks
        async with plane.http.post(f"{plane.url}/v1/audio/speech", json=SPEECH) as response:
            assert (response.status, response.content_type) == (200, "audio/wav")
            assert await response.read() == AUDIO
            assert response.headers["X-Rung-Target"] == "a"
            job_id = response.headers["X-Rung-Job"]
        job = await plane.ended(job_id)
        (kept,) = await plane.artifacts.of_job(job_id)
    assert (job.state, kept.size_bytes) == ("done", len(AUDIO))


async def test_the_first_audio_does_not_wait_for_the_last() -> None:
    gate = asyncio.Event()

    async def waits(wanted: EngineInput) -> AsyncGenerator[GenerationEvent, None]:
        yield piece(AUDIO[:6000], 0)
        await gate.wait()
        yield piece(AUDIO[6000:], 6000, AUDIO)

    async with rig(voice_view("a", "piper", "speech")) as (plane, engines):
        engines.scripts["a"] = waits
        async with plane.http.post(f"{plane.url}/v1/audio/speech", json=SPEECH) as response:
            assert await response.content.readexactly(6000) == AUDIO[:6000]
            gate.set()
            assert await response.read() == AUDIO[6000:]


async def test_another_one_speaks_where_the_first_fails_before_it_has_said_anything() -> None:
    async with rig(voice_view("a", "piper", "speech"), voice_view("b", "piper", "speech")) as (
        plane,
        engines,
    ):
        engines.scripts = {"a": fails_at_once, "b": speaks}
        async with plane.http.post(f"{plane.url}/v1/audio/speech", json=SPEECH) as response:
            assert await response.read() == AUDIO
            assert response.headers["X-Rung-Target"] == "b"
    assert engines.asked == ["a", "b"]


async def test_nobody_goes_on_where_one_broke_off_and_the_answer_is_cut() -> None:
    async with rig(voice_view("a", "piper", "speech"), voice_view("b", "piper", "speech")) as (
        plane,
        engines,
    ):
        engines.scripts = {"a": breaks_off, "b": speaks}
        async with plane.http.post(f"{plane.url}/v1/audio/speech", json=SPEECH) as response:
            job_id = response.headers["X-Rung-Job"]
            with pytest.raises(Exception, match=r"[Pp]ayload|disconnected|reset"):
                await response.read()
        job = await plane.ended(job_id)
        assert await plane.artifacts.of_job(job_id) == []
    assert (engines.asked, job.state, job.detail) == (["a"], "failed", "it broke off")
    assert engines.closed == ["a"]


async def test_a_request_that_is_at_fault_is_tried_nowhere_else() -> None:
    async def refuses(wanted: EngineInput) -> AsyncGenerator[GenerationEvent, None]:
        yield PhaseProgress(phase=Phase.GENERATING, detail="looking for the voice")
        raise InvalidRequestError("a has no voice 'x'; it has y", param="voice")

    async with rig(voice_view("a", "piper", "speech"), voice_view("b", "piper", "speech")) as (
        plane,
        engines,
    ):
        engines.scripts = {"a": refuses, "b": speaks}
        status, answer, _ = await plane.post("/v1/audio/speech", SPEECH | {"voice": "x"})
    assert (status, engines.asked) == (400, ["a"])
    assert answer["error"]["message"] == "a has no voice 'x'; it has y"


async def test_a_caller_who_leaves_closes_the_generation() -> None:
    async def never_ends(wanted: EngineInput) -> AsyncGenerator[GenerationEvent, None]:
        yield piece(AUDIO, 0)
        await asyncio.Event().wait()

    async with rig(voice_view("a", "piper", "speech")) as (plane, engines):
        engines.scripts["a"] = never_ends
        async with plane.http.post(f"{plane.url}/v1/audio/speech", json=SPEECH) as response:
            await response.content.readexactly(len(AUDIO))
            job_id = response.headers["X-Rung-Job"]
            response.close()
        job = await plane.ended(job_id)
        assert plane.slots.load("a") == (0, 0)
    assert (job.detail, engines.closed) == ("cancelled by caller_disconnected", ["a"])


def form(audio: bytes, **fields: str) -> aiohttp.FormData:
    data = aiohttp.FormData({"model": "voice", **fields})
    data.add_field("file", audio, filename="a.wav", content_type="audio/wav")
    return data


async def test_a_transcription_that_breaks_off_says_so_in_its_stream() -> None:
    async def stutters(wanted: EngineInput) -> AsyncGenerator[GenerationEvent, None]:
        yield TokenDelta("Good")
        raise EngineFailedError("it lost the thread")

    async with rig(voice_view("a", "speaches", "transcription")) as (plane, engines):
        engines.scripts["a"] = stutters
        url = f"{plane.url}/v1/audio/transcriptions"
        async with plane.http.post(url, data=form(b"RIFF", stream="true")) as response:
            text = await response.text()
        async with plane.http.post(url, data=form(b"RIFF")) as response:
            status = response.status
    assert '{"type":"transcript.text.delta","delta":"Good"}' in text
    assert "event: error" in text
    assert "it lost the thread" in text
    assert "transcript.text.done" not in text
    assert status == 502


@pytest.mark.parametrize(
    ("path", "data", "complaint"),
    [
        ("transcriptions", b"{}", "send a form"),
        ("transcriptions", {"model": "voice"}, "send a form"),
        ("transcriptions", form(b"x", response_format="docx"), "it must be one of json, text"),
        ("transcriptions", form(b"x", language="Deutsch, bitte"), "such as de or pt-BR"),
        ("translations", form(b"x", stream="true"), "a translation comes as a whole"),
    ],
)
async def test_forms_that_make_no_sense_are_refused(path: str, data: Any, complaint: str) -> None:
    async with rig(voice_view("a", "speaches", "transcription")) as (plane, engines):
        async with plane.http.post(f"{plane.url}/v1/audio/{path}", data=data) as response:
            answer = await response.json()
        assert (response.status, engines.asked) == (400, [])
    assert complaint in answer["error"]["message"]


async def test_a_recording_that_is_too_large_says_what_sets_the_limit() -> None:
    async with rig(voice_view("a", "speaches", "transcription")) as (plane, _):
        url = f"{plane.url}/v1/audio/transcriptions"
        async with plane.http.post(url, data=form(bytes(70_000))) as response:
            answer = await response.json()
    assert response.status == 413
    assert "server.max_request_bytes sets the limit" in answer["error"]["message"]
