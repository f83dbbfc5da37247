"""Meshes over HTTP and as jobs: of a picture, and of words, with real jobs, artifacts and targets."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import json
import random
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import aiohttp
import pytest
from msgspec.structs import replace

from controlplane.artifacts import Collector
from controlplane.estimates import Estimates
from controlplane.pipelines import Begun, Wish
from controlplane.pipelines.mesh import ChainedPictures, MeshPipeline
from rung.codec import GenerationEvent
from rung.errors import (
    EngineProtocolError,
    EngineTimeoutError,
    InvalidRequestError,
    RungError,
    UnknownModelError,
)
from rung.types import (
    ArtifactChunk,
    EngineInput,
    ImageInput,
    ImagePart,
    Job,
    JobDone,
    JobEvent,
    JobFailed,
    JobKind,
    JobState,
    MeshInput,
    Phase,
    PhaseProgress,
    Policy,
    Priority,
)
from tests.fakes.fleet_view import deployment_view
from tests.fakes.gateway import Plane
from tests.fakes.pictures import ScriptedPictures, a_picture_plane, a_png

GLB = b"glTF" + bytes(500_000)
CHAIR = ImagePart(content_type="image/png", data=a_png(3, 3))


def pieces(mesh: bytes = GLB) -> list[GenerationEvent]:
    """A mesh in two pieces, as an adapter gives it."""
    half = len(mesh) // 2
    first = ArtifactChunk("0", "model/gltf-binary", data=mesh[:half], size_bytes=len(mesh))
    digest = hashlib.sha256(mesh).hexdigest()
    last = ArtifactChunk("0", "model/gltf-binary", half, mesh[half:], digest, len(mesh))
    return [first, last]


GENERATING = PhaseProgress(phase=Phase.GENERATING, detail="making the shape")


@dataclass
class MeshEngines:
    """Engines of meshes that do what a test tells them; by default they make one."""

    script: dict[str, list[GenerationEvent | RungError]] = field(default_factory=dict)
    asked: list[tuple[str, MeshInput]] = field(default_factory=list)
    #: Awaited when an engine is asked.
    on_ask: Callable[[], Awaitable[None]] | None = None
    closed: int = 0
    #: Set: an engine has begun. Cleared gate: it does not end.
    begun: asyncio.Event = field(default_factory=asyncio.Event)
    gate: asyncio.Event = field(default_factory=asyncio.Event)

    def __post_init__(self) -> None:
        self.gate.set()

    async def generate_through_agent(
        self, deployment_id: str, job_id: str, wanted: EngineInput, idle_timeout_s: float
    ) -> AsyncGenerator[GenerationEvent, None]:
        assert isinstance(wanted, MeshInput)
        self.asked.append((deployment_id, wanted))
        if self.on_ask is not None:
            await self.on_ask()
        try:
            for step in self.script.get(deployment_id, [GENERATING, *pieces()]):
                if isinstance(step, RungError):
                    raise step
                yield step
                self.begun.set()
                await self.gate.wait()
        finally:
            self.closed += 1


@dataclass
class Rig:
    plane: Plane
    pictures: ScriptedPictures
    engines: MeshEngines
    estimates: Estimates

    def wish(self, prompt: str = "a chair", **more: Any) -> Wish:
        policy = more.pop("policy", Policy(priority=Priority.USER))
        effort = more.pop("effort", None)
        return Wish(
            kind=JobKind.MESH,
            model="",
            input=MeshInput(prompt=prompt, **more),
            policy=policy,
            effort=effort,
        )

    async def running(self, kind: JobKind) -> Sequence[Job]:
        """Jobs of a kind that have not ended."""
        found = await self.plane.jobs.list(page_size=10, states=[JobState.PENDING, JobState.RUNNING])
        return [job for job in found if job.kind is kind]

    async def events(self, wish: Wish) -> list[JobEvent]:
        job = self.plane.pipelines.start(wish)
        return [event async for event in self.plane.jobs.watch(job.id) if event.sequence]

    async def steps(self, wish: Wish) -> list[PhaseProgress]:
        return [each.payload for each in await self.events(wish) if isinstance(each.payload, PhaseProgress)]


@pytest.fixture
async def rig() -> AsyncIterator[Rig]:
    async with a_picture_plane() as (plane, pictures):
        plane.fleet.show(
            deployment_view("comfyui", None, model="sdxl", capabilities=("image",), slots=1),
            deployment_view("mesh-1", None, model="hunyuan", capabilities=("mesh",), slots=1),
            deployment_view("mesh-2", None, model="hunyuan", capabilities=("mesh",), slots=1),
        )
        engines, estimates = MeshEngines(), Estimates()
        pipeline = MeshPipeline(
            fleet=engines,
            engager=plane.pipelines.engager,
            pictures=ChainedPictures(plane.pipelines.start, plane.jobs, plane.artifacts),
            artifacts=plane.artifacts,
            estimates=estimates,
            choose=random.Random(1),
        )
        plane.pipelines.add(pipeline, JobKind.MESH)
        yield Rig(plane, pictures, engines, estimates)


def phases(steps: list[PhaseProgress]) -> list[Phase]:
    """The phases in their order, each once in a row."""
    told = [step.phase for step in steps]
    return [phase for place, phase in enumerate(told) if place == 0 or told[place - 1] is not phase]


async def test_of_a_picture_the_phases_come_in_order_and_the_mesh_is_kept(rig: Rig) -> None:
    events = await rig.events(rig.wish("", image=CHAIR, seed=5))
    steps = [each.payload for each in events if isinstance(each.payload, PhaseProgress)]
    assert phases(steps) == [Phase.HEALTH_CHECK, Phase.GENERATING, Phase.ENCODING, Phase.DONE]
    assert "seed 5" in next(step.detail for step in steps if step.phase is Phase.GENERATING)
    assert rig.engines.asked == [("mesh-1", MeshInput(image=CHAIR, seed=5))]
    assert rig.pictures.wishes == []
    (kept,) = await rig.plane.artifacts.of_job(events[0].job_id)
    assert (kept.content_type, kept.size_bytes) == ("model/gltf-binary", len(GLB))
    assert await rig.plane.artifacts.read(kept.id, 0, len(GLB)) == GLB


async def test_of_words_a_picture_is_drawn_first_by_a_job_of_its_own_that_has_ended_by_then(
    rig: Rig,
) -> None:
    under_way: list[str] = []

    async def look() -> None:
        """When the engine of meshes is asked, nothing of the picture is under way."""
        under_way.extend(job.id for job in await rig.running(JobKind.IMAGE))

    rig.engines.on_ask = look
    policy = Policy(local_only=True, priority=Priority.BACKGROUND, detached=True)
    steps = await rig.steps(rig.wish("a chair", policy=policy, effort=2))
    assert under_way == []
    (wish,) = rig.pictures.wishes
    assert isinstance(wish.input, ImageInput)
    assert wish.input.prompt.startswith("a chair; ")
    assert "plain white background" in wish.input.prompt
    assert (wish.kind, wish.effort) == (JobKind.IMAGE, 2)
    # It goes nowhere else than the mesh may, and nobody else waits for it.
    assert wish.policy == Policy(local_only=True, priority=Priority.BACKGROUND)
    _, asked = rig.engines.asked[0]
    assert asked.image == ImagePart(content_type="image/png", data=a_png(1))
    told = [step for step in steps if step.detail.startswith("picture")]
    assert phases(told)[-2:] == [Phase.SAMPLING, Phase.ENCODING]
    assert [step.percent for step in told if step.phase is Phase.SAMPLING] == [25.0, 75.0, 100.0]
    assert phases(steps)[-4:] == [Phase.HEALTH_CHECK, Phase.GENERATING, Phase.ENCODING, Phase.DONE]
    assert Phase.DONE not in [step.phase for step in told]
    drawing = next(step.detail.rpartition(" ")[2] for step in told if "by job" in step.detail)
    assert [each.content_type for each in await rig.plane.artifacts.of_job(drawing)] == ["image/png"]


async def test_a_seed_that_is_left_open_is_chosen_and_told(rig: Rig) -> None:
    events = await rig.events(rig.wish("", image=CHAIR))
    _, asked = rig.engines.asked[0]
    assert asked.seed == random.Random(1).getrandbits(32)
    details = [event.payload.detail for event in events if isinstance(event.payload, PhaseProgress)]
    assert any(f"seed {asked.seed}" in detail for detail in details)
    (mesh,) = await rig.plane.artifacts.of_job(events[0].job_id)
    assert mesh.seed == asked.seed


async def test_a_target_that_fails_is_followed_by_the_next_and_the_picture_is_drawn_once(rig: Rig) -> None:
    rig.engines.script["mesh-1"] = [GENERATING, EngineTimeoutError("says 'processing' for ever")]
    steps = await rig.steps(rig.wish())
    assert [target for target, _ in rig.engines.asked] == ["mesh-1", "mesh-2"]
    assert len(rig.pictures.wishes) == 1
    assert any(step.detail == "says 'processing' for ever; trying mesh-2" for step in steps)
    assert steps[-1].phase is Phase.DONE


async def test_what_breaks_off_after_a_piece_of_the_mesh_is_not_begun_anew_elsewhere(rig: Rig) -> None:
    rig.engines.script["mesh-1"] = [GENERATING, pieces()[0], EngineProtocolError("it broke off")]
    events = await rig.events(rig.wish("", image=CHAIR))
    end = events[-1].payload
    assert isinstance(end, JobFailed)
    assert "it broke off" in end.detail
    assert len(rig.engines.asked) == 1
    assert await rig.plane.artifacts.of_job(events[0].job_id) == []


async def test_a_piece_that_is_refused_was_not_delivered_so_that_the_next_target_is_tried(rig: Rig) -> None:
    rig.engines.script["mesh-1"] = [GENERATING, replace(pieces()[0], offset_bytes=5)]
    events = await rig.events(rig.wish("", image=CHAIR))
    assert isinstance(events[-1].payload, JobDone)
    assert [target for target, _ in rig.engines.asked] == ["mesh-1", "mesh-2"]
    assert len(await rig.plane.artifacts.of_job(events[0].job_id)) == 1


async def test_an_engine_that_ends_without_a_mesh_has_failed(rig: Rig) -> None:
    rig.engines.script["mesh-1"] = rig.engines.script["mesh-2"] = [GENERATING]
    end = (await rig.events(rig.wish("", image=CHAIR)))[-1].payload
    assert isinstance(end, JobFailed)
    assert "mesh-2 ended without a mesh" in end.detail


async def test_what_is_left_of_the_time_is_learnt_and_not_said_before(rig: Rig) -> None:
    steps = await rig.steps(rig.wish("", image=CHAIR))
    assert {step.remaining_s for step in steps} == {None}
    assert rig.estimates.estimate("mesh-1", "mesh") is not None
    # One with a texture is another matter.
    assert rig.estimates.estimate("mesh-1", "mesh_textured") is None
    rig.estimates.observe("mesh-1", "mesh_textured", 100.0)
    steps = await rig.steps(rig.wish("", image=CHAIR, texture=True))
    (said,) = [step for step in steps if step.phase is Phase.GENERATING]
    assert said.remaining_s is not None
    assert 90.0 < said.remaining_s <= 100.0
    assert said.job_remaining_s == said.remaining_s


async def test_waiting_for_the_engine_does_not_count_as_its_work(rig: Rig) -> None:
    queued = PhaseProgress(phase=Phase.QUEUED, detail="still at a mesh that was given up")
    rig.estimates.observe("mesh-1", "mesh", 100.0)
    rig.engines.script["mesh-1"] = [queued, GENERATING, *pieces()]
    steps = await rig.steps(rig.wish("", image=CHAIR))
    (waiting,) = [step for step in steps if step.phase is Phase.QUEUED]
    assert (waiting.detail, waiting.remaining_s) == (queued.detail, None)


async def test_a_cancelled_job_lets_go_of_the_engine(rig: Rig) -> None:
    rig.engines.gate.clear()
    job = rig.plane.pipelines.start(rig.wish("", image=CHAIR))
    await rig.engines.begun.wait()
    job.request_cancel("caller")
    assert (await rig.plane.ended(job.id)).state is JobState.CANCELLED
    assert rig.engines.closed == 1
    assert "mesh-1" not in rig.plane.slots.pressure


async def test_a_job_that_is_cancelled_while_its_picture_is_drawn_takes_that_with_it(rig: Rig) -> None:
    drawing = asyncio.Event()

    async def endless(begun: Begun, collector: Collector) -> None:
        drawing.set()
        await asyncio.Event().wait()

    rig.pictures.script = endless
    job = rig.plane.pipelines.start(rig.wish())
    await drawing.wait()
    (picture,) = await rig.running(JobKind.IMAGE)
    job.request_cancel("caller")
    assert (await rig.plane.ended(job.id)).state is JobState.CANCELLED
    assert (await rig.plane.ended(picture.id)).state is JobState.CANCELLED
    assert rig.engines.asked == []


async def test_a_picture_that_is_refused_ends_the_job_with_the_reason(rig: Rig) -> None:
    async def refuse(begun: Begun, collector: Collector) -> None:
        raise InvalidRequestError("the safety filter refuses it")

    rig.pictures.script = refuse
    end = (await rig.events(rig.wish()))[-1].payload
    assert isinstance(end, JobFailed)
    assert (end.reason.value, end.detail) == (
        "invalid_request",
        "no picture to model: the safety filter refuses it",
    )
    assert rig.engines.asked == []


async def test_a_picture_job_without_a_picture_ends_the_job(rig: Rig) -> None:
    async def nothing(begun: Begun, collector: Collector) -> None:
        pass

    rig.pictures.script = nothing
    end = (await rig.events(rig.wish()))[-1].payload
    assert isinstance(end, JobFailed)
    assert end.detail.startswith("no picture to model: job ")


@pytest.mark.parametrize(
    ("wanted", "why"),
    [
        (MeshInput(prompt="  "), "prompt is empty; say what to model"),
        (MeshInput(prompt="a chair", seed=2**32), "seed is 4294967296; it must be 0 to"),
    ],
)
async def test_what_cannot_be_modelled_is_no_job(rig: Rig, wanted: MeshInput, why: str) -> None:
    with pytest.raises(InvalidRequestError, match=why):
        rig.plane.pipelines.start(Wish(kind=JobKind.MESH, model="", input=wanted))


async def test_without_anybody_who_makes_meshes_no_picture_is_drawn(rig: Rig) -> None:
    rig.plane.fleet.show(deployment_view("comfyui", None, model="sdxl", capabilities=("image",)))
    with pytest.raises(UnknownModelError, match="no deployment can do mesh"):
        rig.plane.pipelines.start(rig.wish())


# Over HTTP.


async def test_the_answer_is_the_file(rig: Rig) -> None:
    body = {"image": base64.b64encode(CHAIR.data).decode(), "seed": 5, "texture": True}
    async with rig.plane.http.post(f"{rig.plane.url}/v1/meshes", json=body) as response:
        assert response.status == 200
        assert response.content_type == "model/gltf-binary"
        assert await response.read() == GLB
        headers = response.headers
    assert headers["X-Rung-Target"] == "mesh-1"
    assert rig.engines.asked == [("mesh-1", MeshInput(image=CHAIR, seed=5, texture=True))]
    async with rig.plane.http.get(rig.plane.url + headers["Content-Location"]) as again:
        assert await again.read() == GLB


async def test_a_form_has_the_picture_as_a_file(rig: Rig) -> None:
    form = aiohttp.FormData({"seed": "5", "texture": "true"})
    form.add_field("image", CHAIR.data, filename="chair.png", content_type="image/png")
    async with rig.plane.http.post(f"{rig.plane.url}/v1/meshes", data=form) as response:
        assert await response.read() == GLB
    assert rig.engines.asked == [("mesh-1", MeshInput(image=CHAIR, seed=5, texture=True))]


@pytest.mark.parametrize(
    ("accept", "content_type"),
    [("*/*", "application/x-ndjson"), ("text/event-stream", "text/event-stream")],
)
async def test_a_stream_is_the_log_of_the_job(rig: Rig, accept: str, content_type: str) -> None:
    body = {"prompt": "a chair", "local_only": True, "stream": True}
    headers = {"Accept": accept}
    async with rig.plane.http.post(f"{rig.plane.url}/v1/meshes", json=body, headers=headers) as response:
        assert response.content_type == content_type
        text, job_id = await response.text(), response.headers["X-Rung-Job"]
    lines = [line.removeprefix("data: ") for line in text.splitlines() if "{" in line]
    events = [json.loads(line) for line in lines]
    assert [event["sequence"] for event in events] == list(range(1, len(events) + 1))
    assert events[-1]["event"] == "done"
    last = [event for event in events if event["event"] == "artifact"][-1]
    async with rig.plane.http.get(rig.plane.url + last["url"]) as response:
        assert await response.read() == GLB
    assert rig.pictures.wishes[0].policy.local_only
    assert (await rig.plane.jobs.get(job_id)).policy.local_only


async def test_a_caller_that_goes_away_cancels_its_job(rig: Rig) -> None:
    rig.engines.gate.clear()
    body = {"image": base64.b64encode(CHAIR.data).decode()}
    asking = asyncio.create_task(rig.plane.post("/v1/meshes", body))
    await rig.engines.begun.wait()
    (job,) = await rig.running(JobKind.MESH)
    asking.cancel()
    assert (await rig.plane.ended(job.id)).state is JobState.CANCELLED


async def test_a_failure_has_its_status(rig: Rig) -> None:
    rig.engines.script["mesh-1"] = rig.engines.script["mesh-2"] = [EngineTimeoutError("for ever")]
    body = {"image": base64.b64encode(CHAIR.data).decode()}
    status, answer, headers = await rig.plane.post("/v1/meshes", body)
    assert status == 503
    assert "none of 2 targets could answer" in answer["error"]["message"]
    assert headers["X-Rung-Job"]


@pytest.mark.parametrize(
    ("body", "why"),
    [
        ({}, "prompt is empty"),
        ({"image": "bm9uZQ=="}, "image is not an image; send a PNG, JPEG or WebP file"),
        ({"image": "https://example.com/a.png"}, "pictures are not fetched from anywhere"),
        ({"prompt": "a chair", "effort": 11}, "effort is 11"),
        ({"prompt": "a chair", "tecture": True}, "unknown field `tecture`"),
    ],
)
async def test_what_is_wrong_with_a_request_is_said(rig: Rig, body: dict[str, Any], why: str) -> None:
    status, answer, _ = await rig.plane.post("/v1/meshes", body)
    assert status == 400
    assert why in answer["error"]["message"]


async def test_a_form_with_two_pictures_is_refused(rig: Rig) -> None:
    form = aiohttp.FormData()
    for name in ("front.png", "back.png"):
        form.add_field("image", CHAIR.data, filename=name, content_type="image/png")
    async with rig.plane.http.post(f"{rig.plane.url}/v1/meshes", data=form) as response:
        assert response.status == 400
        assert "one file too many" in (await response.json())["error"]["message"]
