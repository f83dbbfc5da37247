"""OpenAI's routes for pictures, as its own client uses them."""

from __future__ import annotations

import asyncio
import base64
import json
from collections.abc import AsyncIterator
from typing import Any, TypeAlias

import aiohttp
import openai
import pytest

from controlplane.artifacts import Collector
from controlplane.pipelines import Begun
from rung.errors import EngineFailedError
from rung.types import ArtifactChunk, ImageInput, JobState, Phase, Usage
from tests.fakes.gateway import Plane
from tests.fakes.pictures import SERVED, ScriptedPictures, a_chunk, a_picture_plane, a_png

Rig: TypeAlias = tuple[Plane, ScriptedPictures]


@pytest.fixture
async def rig() -> AsyncIterator[Rig]:
    async with a_picture_plane() as rig:
        yield rig


def wanted_of(pictures: ScriptedPictures) -> ImageInput:
    (wish,) = pictures.wishes
    assert isinstance(wish.input, ImageInput)
    return wish.input


async def test_pictures_by_url(rig: Rig) -> None:
    plane, pictures = rig
    async with plane.openai as client:
        answer = await client.images.generate(
            model="sdxl",
            prompt="a cat",
            n=2,
            size="1536x1024",
            quality="high",
            extra_body={"seed": 7, "negative_prompt": "dogs", "parameters": {"cfg": 5}, "effort": 9},
        )

    assert answer.data is not None
    for place, image in enumerate(answer.data):
        assert image.url is not None
        async with plane.http.get(image.url) as response:
            assert await response.read() == a_png(place + 1)
        # Our own field: what it takes to make it again.
        assert image.model_extra == {"seed": 7}
    wanted = wanted_of(pictures)
    assert (wanted.width_pixels, wanted.height_pixels, wanted.tier) == (1536, 1024, "ultra")
    assert (wanted.seed, wanted.negative_prompt, wanted.parameters) == (7, "dogs", {"cfg": 5})
    assert (wanted.prompt, wanted.count, wanted.previews) == ("a cat", 2, False)
    assert pictures.wishes[0].effort == 9


async def test_an_answer_says_who_it_is_from_and_has_inline_pictures_for_who_wants_them(rig: Rig) -> None:
    plane, _ = rig
    body = {"prompt": "a cat", "response_format": "b64_json"}
    status, answer, headers = await plane.post("/v1/images/generations", body, **{"X-Request-Id": "mine"})

    assert status == 200
    assert [base64.b64decode(image["b64_json"]) for image in answer["data"]] == [a_png()]
    assert answer["usage"] == {
        "input_tokens": 0,
        "input_tokens_details": {"image_tokens": 0, "text_tokens": 0},
        "output_tokens": 0,
        "total_tokens": 0,
    }
    assert answer["rung"] == {
        "job": headers["X-Rung-Job"],
        "requested": "",
        "target": "comfyui",
        "node": "workstation",
        "model": "sdxl",
    }
    assert (headers["X-Rung-Target"], headers["X-Rung-Node"]) == ("comfyui", "workstation")
    assert headers["X-Request-Id"] == "mine"


@pytest.mark.parametrize(
    ("quality", "tier"),
    [
        (None, ""),
        ("auto", ""),
        ("low", "lightning"),
        ("medium", "quality"),
        ("high", "ultra"),
        ("standard", "quality"),
        ("hd", "ultra"),
    ],
)
async def test_qualities_are_tiers(rig: Rig, quality: str | None, tier: str) -> None:
    plane, pictures = rig
    await plane.post("/v1/images/generations", {"prompt": "a cat", "quality": quality})

    assert wanted_of(pictures).tier == tier


async def test_a_stream_has_partial_pictures_and_then_the_whole(rig: Rig) -> None:
    plane, pictures = rig
    taken = [asyncio.Event() for _ in range(5)]

    async def paint(begun: Begun, collector: Collector) -> None:
        begun.job.routed(SERVED)
        for step in range(1, 5):
            begun.job.progress(Phase.SAMPLING, step=step, total=4, percent=step * 25.0)
            await collector.take(ArtifactChunk("p", "image/jpeg", data=b"seen after %d" % step, preview=True))
            if step in (2, 3):
                await taken[step].wait()
        begun.job.consumed(Usage(prompt_tokens=3, completion_tokens=4))
        await collector.take(a_chunk(0, a_png()))

    pictures.script = paint
    events = []
    async with plane.openai as client:
        stream = await client.images.generate(
            model="sdxl",
            prompt="a cat",
            stream=True,
            partial_images=2,
            quality="low",
            size="auto",
            extra_body={"seed": 9},
        )
        async for event in stream:
            events.append(event)
            taken[len(events) + 1].set()

    assert [event.type for event in events] == [
        "image_generation.partial_image",
        "image_generation.partial_image",
        "image_generation.completed",
    ]
    # Two of four previews, spread over the sampling.
    assert [base64.b64decode(event.b64_json) for event in events] == [
        b"seen after 2",
        b"seen after 3",
        a_png(),
    ]
    assert [getattr(event, "partial_image_index", None) for event in events] == [0, 1, None]
    completed = events[-1]
    assert completed.type == "image_generation.completed"
    assert completed.output_format == "png"
    assert completed.usage.total_tokens == 7
    assert completed.model_extra is not None
    assert completed.model_extra["seed"] == 9
    assert wanted_of(pictures).previews


async def test_between_the_events_of_a_stream_comments_say_how_far_it_is(rig: Rig) -> None:
    plane, _ = rig
    body = {"prompt": "a cat", "stream": True}
    async with plane.http.post(f"{plane.url}/v1/images/generations", json=body) as response:
        assert response.content_type == "text/event-stream"
        assert "X-Rung-Job" in response.headers
        frames = (await response.text()).removesuffix("\n\n").split("\n\n")

    mark = ": rung.progress "
    told = [json.loads(frame.removeprefix(mark)) for frame in frames if frame.startswith(mark)]
    assert [line["phase"] for line in told[:2]] == ["health_check", "vram_acquire"]
    assert told[-1]["phase"] == "encoding"
    (event,) = [frame for frame in frames if not frame.startswith(":")]
    name, data = event.splitlines()
    assert name == "event: image_generation.completed"
    assert json.loads(data.removeprefix("data: "))["rung"]["target"] == "comfyui"


async def fail(begun: Begun, collector: Collector) -> None:
    begun.job.routed(SERVED)
    begun.job.progress(Phase.SAMPLING, "Sampling")
    raise EngineFailedError("ComfyUI ran out of memory")


async def test_a_failure_is_an_error_of_the_client_also_in_a_stream(rig: Rig) -> None:
    plane, pictures = rig
    pictures.script = fail
    async with plane.openai as client:
        with pytest.raises(openai.InternalServerError) as failed:
            await client.images.generate(prompt="a cat")
        assert "out of memory" in failed.value.message
        assert failed.value.response.headers["X-Rung-Target"] == "comfyui"

        stream = await client.images.generate(prompt="a cat", stream=True, model="sdxl")
        with pytest.raises(openai.APIError, match="out of memory"):
            async for _ in stream:
                pass


async def test_who_goes_away_takes_the_job_along(rig: Rig) -> None:
    plane, pictures = rig
    begun_jobs: asyncio.Queue[str] = asyncio.Queue()

    async def hold(begun: Begun, collector: Collector) -> None:
        begun_jobs.put_nowait(begun.job.id)
        await asyncio.get_running_loop().create_future()

    pictures.script = hold
    asking = asyncio.create_task(plane.post("/v1/images/generations", {"prompt": "a cat"}))
    job_id = await begun_jobs.get()
    asking.cancel()
    job = await plane.ended(job_id)

    assert (job.state, job.detail) == (JobState.CANCELLED, "cancelled by caller_disconnected")


async def test_an_edit_with_a_mask_paints_where_the_mask_is(rig: Rig) -> None:
    plane, pictures = rig
    async with plane.openai as client:
        answer = await client.images.edit(
            model="sdxl",
            image=("cat.png", a_png(4, 4)),
            mask=("mask.png", a_png(5, 5)),
            prompt="a hat",
            n=1,
            size="1024x1024",
            extra_body={"seed": 3, "parameters": '{"denoise": 0.4}'},
        )

    assert answer.data is not None
    assert len(answer.data) == 1
    wanted = wanted_of(pictures)
    assert wanted.operation == "inpaint"
    assert [image.data for image in wanted.images] == [a_png(4, 4), a_png(5, 5)]
    assert (wanted.prompt, wanted.seed, wanted.parameters) == ("a hat", 3, {"denoise": 0.4})


async def test_edits_take_several_pictures_and_stream(rig: Rig) -> None:
    plane, pictures = rig
    async with plane.openai as client:
        stream = await client.images.edit(
            model="sdxl", image=[a_png(4, 4), a_png(6, 6)], prompt="both", stream=True, partial_images=0
        )
        events = [event async for event in stream]

    assert [event.type for event in events] == ["image_edit.completed"]
    wanted = wanted_of(pictures)
    assert wanted.operation == "img2img"
    assert [image.data for image in wanted.images] == [a_png(4, 4), a_png(6, 6)]


async def test_variations_need_no_prompt(rig: Rig) -> None:
    plane, pictures = rig
    form = aiohttp.FormData({"n": "1", "size": "512x512"})
    form.add_field("image", a_png(4, 4), filename="cat.png")
    async with plane.http.post(f"{plane.url}/v1/images/variations", data=form) as response:
        assert response.status == 200

    wanted = wanted_of(pictures)
    assert (wanted.operation, wanted.prompt, wanted.width_pixels) == ("img2img", "", 512)


@pytest.mark.parametrize(
    "pictures_of_body",
    [
        {"image": "DATA"},
        {"image": ["DATA"]},
        {"images": ["data:image/png;base64,DATA"]},
        {"images": [{"image_url": "data:image/png;base64,DATA"}]},
    ],
)
async def test_an_edit_may_be_json(rig: Rig, pictures_of_body: dict[str, Any]) -> None:
    plane, pictures = rig
    text = json.dumps({"prompt": "a hat", "operation": "upscale"} | pictures_of_body)
    body = json.loads(text.replace("DATA", base64.b64encode(a_png(4, 4)).decode()))
    status, _, _ = await plane.post("/v1/images/edits", body)

    assert status == 200
    wanted = wanted_of(pictures)
    assert wanted.operation == "upscale"
    assert [(image.content_type, image.data) for image in wanted.images] == [("image/png", a_png(4, 4))]


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"prompt": ""}, "prompt"),
        ({"size": "huge"}, "size"),
        ({"size": "1024x99999"}, "size"),
        ({"n": 11}, "n"),
        ({"n": 0}, "n"),
        ({"quality": "best"}, "quality"),
        ({"response_format": "file"}, "response_format"),
        ({"output_format": "jpeg"}, "output_format"),
        ({"background": "transparent"}, "background"),
        ({"stream": True, "partial_images": 9}, "partial_images"),
        ({"effort": 0}, "effort"),
        ({"n": "two"}, None),
    ],
)
async def test_values_that_mean_nothing_here_are_refused_by_name(
    rig: Rig, change: dict[str, Any], param: str | None
) -> None:
    plane, pictures = rig
    status, answer, _ = await plane.post("/v1/images/generations", {"prompt": "a cat"} | change)

    assert status == 400
    assert answer["error"]["param"] == param
    assert answer["error"]["type"] == "invalid_request_error"
    assert pictures.wishes == []


async def test_a_form_without_a_picture_or_with_something_else_for_one_is_refused(rig: Rig) -> None:
    plane, _ = rig
    url = f"{plane.url}/v1/images/edits"
    without = aiohttp.FormData({"prompt": "a hat"}, default_to_multipart=True)
    async with plane.http.post(url, data=without) as response:
        assert response.status == 400
        assert (await response.json())["error"]["param"] == "image"

    text = aiohttp.FormData({"prompt": "a hat"})
    text.add_field("image[]", b"not a picture", filename="cat.png", content_type="image/png")
    async with plane.http.post(url, data=text) as response:
        assert response.status == 400
        assert (await response.json())["error"]["message"].startswith("image[] is not an image")


async def test_a_form_that_is_too_large_is_a_413(rig: Rig) -> None:
    plane, _ = rig
    form = aiohttp.FormData({"prompt": "a hat"})
    form.add_field("image", a_png() + b"x" * 70_000, filename="cat.png", content_type="image/png")
    async with plane.http.post(f"{plane.url}/v1/images/edits", data=form) as response:
        assert response.status == 413
