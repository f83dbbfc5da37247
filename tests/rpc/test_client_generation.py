"""Generations by the SDK: pictures put together from the events of their job, against the real servicers."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from rung import AsyncClient, Client, GenerationResult
from rung.errors import EngineRejectedError, InvalidRequestError, JobCancelledError, UnknownArtifactError
from rung.types import (
    ArtifactChunk,
    FailureReason,
    ImageInput,
    ImagePart,
    JobCancelled,
    JobDone,
    JobFailed,
    JobKind,
    Phase,
    PhaseProgress,
    Policy,
    Routed,
    Served,
    SpeechInput,
    TokenDelta,
    Usage,
    UsageReported,
)
from tests.fakes.api_server import ApiServer, an_api_server
from tests.fakes.artifacts import a_job
from tests.fakes.pictures import a_chunk, a_png

SERVED = Served("", "comfyui", "workstation", "sdxl")
PICTURE = a_png(3, 3)
SHA256 = hashlib.sha256(PICTURE).hexdigest()
HALF = len(PICTURE) // 2


def pieces(artifact_id: str, *, data: bool = True) -> tuple[ArtifactChunk, ArtifactChunk]:
    """A picture in two pieces, with or without what is in them."""
    first, second = (PICTURE[:HALF], PICTURE[HALF:]) if data else (b"", b"")
    size = len(PICTURE)
    return (
        ArtifactChunk(artifact_id, "image/png", 0, first, "", size, HALF),
        ArtifactChunk(artifact_id, "image/png", HALF, second, SHA256, size, size - HALF),
    )


@pytest.fixture
async def server() -> AsyncIterator[ApiServer]:
    async with an_api_server() as server:
        yield server


@pytest.fixture
async def client(server: ApiServer) -> AsyncIterator[AsyncClient]:
    async with AsyncClient(f"127.0.0.1:{server.server.port}") as found:
        yield found


async def test_pictures_are_put_together_from_their_pieces(
    server: ApiServer, client: AsyncClient, tmp_path: Path
) -> None:
    one, two = pieces("artifact-1"), pieces("artifact-2")
    server.pipelines.script = (
        Routed(SERVED),
        PhaseProgress(Phase.SAMPLING, step=1, total=4, percent=25),
        ArtifactChunk("artifact-p", "image/jpeg", data=b"seen", length_bytes=4, preview=True),
        one[0],
        two[0],
        one[1],
        two[1],
        # Of a try that gave up: it was never whole.
        pieces("artifact-3")[0],
        UsageReported(Usage(3, 4)),
        JobDone("stop"),
    )
    mask = ImagePart(content_type="image/png", data=a_png())
    stream = client.image(
        "a cat",
        tier="quality",
        operation="inpaint",
        negative_prompt="dogs",
        width_pixels=640,
        height_pixels=512,
        seed=0,
        images=[mask, mask],
        parameters={"cfg": 5},
        count=2,
        previews=True,
        model="sdxl",
        effort=3,
        policy=Policy(local_only=True),
        request_id="mine",
    )
    events = [event async for event in stream]
    result = await stream.result()

    assert len(events) == len(server.pipelines.script) + 1
    assert [each.data for each in result.images] == [PICTURE, PICTURE]
    assert [each.artifact.id for each in result.artifacts] == ["artifact-1", "artifact-2"]
    assert result.artifacts[0].artifact.sha256 == SHA256
    assert result.artifacts[0].artifact.job_id == result.job_id == stream.job_id
    assert (result.served, result.usage, result.finish_reason) == (SERVED, Usage(3, 4), "stop")
    saved = result.images[0].save(tmp_path)
    assert saved.read_bytes() == PICTURE
    assert (saved.parent, saved.suffix) == (tmp_path, ".png")
    (wish,) = server.pipelines.wishes
    assert wish.kind is JobKind.IMAGE
    assert wish.input == ImageInput(
        prompt="a cat",
        tier="quality",
        operation="inpaint",
        negative_prompt="dogs",
        width_pixels=640,
        height_pixels=512,
        seed=0,
        images=(mask, mask),
        parameters={"cfg": 5},
        count=2,
        previews=True,
    )
    assert (wish.model, wish.effort, wish.request_id) == ("sdxl", 3, "mine")
    assert wish.policy.local_only


async def test_what_did_not_come_with_the_events_is_fetched(server: ApiServer, client: AsyncClient) -> None:
    async with server.artifacts.collector(a_job()) as collector:
        await collector.take(a_chunk(0, PICTURE))
    (stored,) = collector.artifacts
    server.pipelines.script = (*pieces(stored.id, data=False), JobDone("stop"))

    result = await client.image("a cat").result()
    assert [each.data for each in result.images] == [PICTURE]

    server.pipelines.script = (*pieces("artifact-00000000000a0000000000", data=False), JobDone("stop"))
    with pytest.raises(UnknownArtifactError):
        await client.image("a cat").result()


async def test_other_inputs_are_generated_from_too_and_a_recording_has_a_text(
    server: ApiServer, client: AsyncClient
) -> None:
    server.pipelines.script = (TokenDelta("Hel"), TokenDelta("lo"), JobDone("stop", SERVED))
    result = await client.generate(SpeechInput(text="Hello"), model="amy").result()

    assert result == GenerationResult(job_id=result.job_id, text="Hello", served=SERVED, finish_reason="stop")
    (wish,) = server.pipelines.wishes
    assert (wish.kind, wish.input, wish.model) == (JobKind.SPEECH, SpeechInput(text="Hello"), "amy")


async def test_a_failure_is_raised_by_its_reason(server: ApiServer, client: AsyncClient) -> None:
    server.pipelines.script = (JobFailed(FailureReason.INVALID_REQUEST, "there is no tier fast"),)
    with pytest.raises(EngineRejectedError, match="there is no tier fast"):
        await client.image("a cat", tier="fast").result()

    server.pipelines.script = (JobCancelled("operator"),)
    with pytest.raises(JobCancelledError, match="operator"):
        await client.image("a cat").result()


async def test_a_job_can_be_made_from_any_input(server: ApiServer, client: AsyncClient) -> None:
    job = await client.create_job(wanted=ImageInput(prompt="a cat"), effort=2)

    assert job.id == "job-1"
    (wish,) = server.pipelines.wishes
    assert (wish.input, wish.effort, wish.policy.detached) == (ImageInput(prompt="a cat"), 2, True)
    with pytest.raises(InvalidRequestError):
        await client.create_job("Hi", wanted=ImageInput(prompt="a cat"))


async def test_who_leaves_early_takes_the_job_along(server: ApiServer, client: AsyncClient) -> None:
    server.pipelines.script = (PhaseProgress(Phase.SAMPLING),)
    async with client.image("a cat") as stream:
        await anext(stream)
    job = server.jobs.live["job-1"]
    while not job.ended:
        await job.changed.wait()

    assert job.cancelled_by == ["caller_disconnected"]


async def test_the_blocking_client_draws_as_well(server: ApiServer) -> None:
    server.pipelines.script = (*pieces("artifact-1"), JobDone("stop"))

    def draw() -> tuple[GenerationResult, int]:
        with Client(f"127.0.0.1:{server.server.port}") as client:
            with client.image("a cat", tier="lightning") as stream:
                events = len(list(stream))
            return client.generate(ImageInput(prompt="a dog")).result(), events

    result, events = await asyncio.to_thread(draw)
    assert [each.data for each in result.images] == [PICTURE]
    assert events == 4
    assert [wish.input for wish in server.pipelines.wishes] == [
        ImageInput(prompt="a cat", tier="lightning"),
        ImageInput(prompt="a dog"),
    ]
