"""`POST /generate/stream`: a line for everything that happens, whatever happens."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import json
from collections.abc import AsyncIterator
from typing import Any, TypeAlias

import pytest

from controlplane.artifacts import Collector
from controlplane.pipelines import Begun
from rung.errors import VramInfeasibleError
from rung.types import ImageInput, JobState, Phase, Policy
from tests.fakes.gateway import Plane
from tests.fakes.pictures import ScriptedPictures, a_chunk, a_picture_plane, a_png

Rig: TypeAlias = tuple[Plane, ScriptedPictures]

#: What the stream of a picture by the fast tier looks like, but for the times and the pictures at its end.
LIGHTNING = """\
{"phase":"health_check","detail":"Checking ComfyUI status"}
{"phase":"vram_acquire","detail":"Requesting VRAM slot (mode=quick)"}
{"phase":"vram_acquire","detail":"VRAM acquired: 1127MB free (mode=quick)"}
{"phase":"safety_filter","detail":"Safety: unrestricted"}
{"phase":"prompt_enhance","detail":"Skipped (fast tier)"}
{"phase":"model_swap","detail":"Loading sdxl"}
{"phase":"workflow_build","detail":"Building lightning workflow (1024x1024)"}
{"phase":"queued","detail":"Submitted to ComfyUI"}
{"phase":"sampling","step":1,"total":4,"percent":25}
{"phase":"sampling","step":3,"total":4,"percent":75}
{"phase":"sampling","step":4,"total":4,"percent":100}
{"phase":"encoding","detail":"Encoding images"}
{"phase":"done","detail":"1 image(s) generated"}
"""


@pytest.fixture
async def rig() -> AsyncIterator[Rig]:
    async with a_picture_plane() as rig:
        yield rig


async def lines_of(plane: Plane, body: dict[str, Any]) -> tuple[list[dict[str, Any]], str]:
    async with plane.http.post(f"{plane.url}/generate/stream", json=body) as response:
        assert response.status == 200
        assert response.content_type == "application/x-ndjson"
        text = await response.text()
        return [json.loads(line) for line in text.splitlines()], response.headers["X-Rung-Job"]


async def test_the_lines_are_those_of_the_phases_and_the_last_one_has_the_picture(rig: Rig) -> None:
    plane, pictures = rig
    lines, job_id = await lines_of(plane, {"prompt": "a cat", "tier": "lightning", "seed": 7, "effort": 3})

    assert all(type(line.pop("elapsed_s")) is float for line in lines)
    (image,) = lines[-1].pop("images")
    assert [json.dumps(line, separators=(",", ":")) for line in lines] == LIGHTNING.splitlines()
    async with plane.http.get(plane.url + image["url"]) as response:
        data = await response.read()
        assert response.content_type == image["content_type"] == "image/png"
    assert data == a_png()
    assert image["sha256"] == hashlib.sha256(data).hexdigest()
    assert (image["size_bytes"], image["seed"]) == (len(data), 7)
    (wish,) = pictures.wishes
    assert wish.input == ImageInput(prompt="a cat", tier="lightning", seed=7)
    assert wish.effort == 3
    assert (await plane.ended(job_id)).state is JobState.DONE


async def test_everything_that_can_be_asked_for_reaches_the_pipeline(rig: Rig) -> None:
    plane, pictures = rig
    picture = base64.b64encode(a_png(8, 8)).decode()
    await lines_of(
        plane,
        {
            "prompt": "a dog",
            "negative_prompt": "cats",
            "tier": "quality",
            "width": 640,
            "height": 512,
            "seed": 0,
            "operation": "inpaint",
            "images": [picture, f"data:image/png;base64,{picture}"],
            "parameters": {"denoise": 0.5},
            "local_only": True,
            "count": 2,
            "previews": True,
            "model": "sdxl",
        },
    )

    (wish,) = pictures.wishes
    wanted = wish.input
    assert isinstance(wanted, ImageInput)
    assert [image.data for image in wanted.images] == [a_png(8, 8)] * 2
    assert (wanted.width_pixels, wanted.height_pixels, wanted.seed, wanted.count) == (640, 512, 0, 2)
    assert (wanted.operation, wanted.negative_prompt, wanted.previews) == ("inpaint", "cats", True)
    assert wanted.parameters == {"denoise": 0.5}
    assert wish.model == "sdxl"
    assert wish.policy == Policy(local_only=True)


async def test_while_a_phase_goes_on_a_line_says_so_within_a_second(rig: Rig) -> None:
    plane, pictures = rig
    seen = asyncio.Event()

    async def slow(begun: Begun, collector: Collector) -> None:
        begun.job.progress(
            Phase.VRAM_ACQUIRE, "Sleeping reasoning model", remaining_s=5.0, job_remaining_s=60
        )
        await seen.wait()

    pictures.script = slow
    async with plane.http.post(f"{plane.url}/generate/stream", json={"prompt": "a cat"}) as response:
        first, again = [json.loads(await response.content.readline()) for _ in range(2)]
        seen.set()
        last = json.loads((await response.read()).splitlines()[-1])

    assert (first["remaining_s"], first["job_remaining_s"]) == (5.0, 60.0)
    assert again["phase"] == "vram_acquire"
    assert again["detail"] == "Sleeping reasoning model"
    assert first["elapsed_s"] < again["elapsed_s"] <= first["elapsed_s"] + 1.0
    assert again["remaining_s"] < 5.0
    assert last == {
        "phase": "done",
        "elapsed_s": last["elapsed_s"],
        "detail": "0 image(s) generated",
        "images": [],
    }


async def test_a_failure_is_the_last_line(rig: Rig) -> None:
    plane, pictures = rig

    async def fail(begun: Begun, collector: Collector) -> None:
        begun.job.progress(Phase.VRAM_ACQUIRE, "Requesting VRAM slot")
        raise VramInfeasibleError("a game holds 20 GB")

    pictures.script = fail
    lines, _ = await lines_of(plane, {"prompt": "a cat"})

    elapsed_s = lines[-1].pop("elapsed_s")
    assert elapsed_s >= 0
    assert lines[-1] == {"phase": "failed", "reason": "vram_infeasible", "detail": "a game holds 20 GB"}


async def hold(begun: Begun, collector: Collector) -> None:
    begun.job.progress(Phase.SAMPLING, step=1, total=4, percent=25)
    await asyncio.get_running_loop().create_future()


async def test_a_cancelled_job_says_by_whom(rig: Rig) -> None:
    plane, pictures = rig
    pictures.script = hold
    async with plane.http.post(f"{plane.url}/generate/stream", json={"prompt": "a cat"}) as response:
        await response.content.readline()
        await plane.post(f"/v1/jobs/{response.headers['X-Rung-Job']}/cancel", {})
        last = json.loads((await response.read()).splitlines()[-1])

    assert (last["phase"], last["by"]) == ("cancelled", "caller")


@pytest.mark.parametrize("detached", [False, True])
async def test_who_goes_away_takes_the_job_along_unless_it_is_detached(rig: Rig, detached: bool) -> None:
    plane, pictures = rig
    released = asyncio.Event()

    async def paint(begun: Begun, collector: Collector) -> None:
        begun.job.progress(Phase.SAMPLING, step=1, total=4, percent=25)
        await released.wait()
        await collector.take(a_chunk(0, a_png()))

    pictures.script = paint
    body = {"prompt": "a cat", "detached": detached}
    async with plane.http.post(f"{plane.url}/generate/stream", json=body) as response:
        await response.content.readline()
        job_id = response.headers["X-Rung-Job"]
        response.close()
    if detached:
        released.set()
    job = await plane.ended(job_id)

    assert job.state is (JobState.DONE if detached else JobState.CANCELLED)
    assert job.detail == ("" if detached else "cancelled by caller_disconnected")


async def test_as_server_sent_events_each_has_its_place_in_the_log(rig: Rig) -> None:
    plane, _ = rig
    headers = {"Accept": "text/event-stream"}
    url = f"{plane.url}/generate/stream"
    async with plane.http.post(url, json={"prompt": "a cat"}, headers=headers) as response:
        assert response.content_type == "text/event-stream"
        frames = (await response.text()).removesuffix("\n\n").split("\n\n")
        job_id = response.headers["X-Rung-Job"]

    ids = [int(frame.splitlines()[0].removeprefix("id: ")) for frame in frames]
    told = [json.loads(frame.splitlines()[1].removeprefix("data: ")) for frame in frames]
    assert [line["phase"] for line in told][-2:] == ["encoding", "done"]
    resumed = await (await plane.http.get(f"{plane.url}/v1/jobs/{job_id}/events?after={ids[-2]}")).text()
    assert [json.loads(line)["event"] for line in resumed.splitlines()][::2] == ["artifact", "done"]


async def test_pictures_come_inline_and_previews_while_it_is_sampled_for_who_wants_them(rig: Rig) -> None:
    plane, pictures = rig
    gate = asyncio.Event()
    script = pictures.script

    async def slower(begun: Begun, collector: Collector) -> None:
        await script(begun, collector)
        await gate.wait()

    pictures.script = slower
    body = {"prompt": "a cat", "previews": True, "response_format": "b64_json"}
    previews = []
    async with plane.http.post(f"{plane.url}/generate/stream", json=body) as response:
        while True:
            line = json.loads(await response.content.readline())
            if "preview" in line:
                previews.append(line)
                gate.set()
            if line["phase"] == "done":
                break

    # Of those that came before anybody read, only the newest is kept.
    assert base64.b64decode(previews[-1]["preview"]["b64_json"]) == b"seen after 4"
    assert previews[-1]["preview"]["content_type"] == "image/jpeg"
    assert (previews[-1]["phase"], previews[-1]["step"]) == ("sampling", 4)
    assert base64.b64decode(line["images"][0]["b64_json"]) == a_png()


@pytest.mark.parametrize(
    ("change", "says", "param"),
    [
        ({"prompt": " "}, "prompt is empty", "prompt"),
        ({"images": ["@@"]}, "images[0] is not valid base64", "images[0]"),
        ({"images": [base64.b64encode(b"GIF89a").decode()]}, "images[0] is not an image", "images[0]"),
        ({"images": ["https://example.org/a.png"]}, "images[0] is an address", "images[0]"),
        (
            {"images": [base64.b64encode(a_png(60_000, 60_000)).decode()]},
            "images[0] is 60000x60000 pixels",
            "images[0]",
        ),
        ({"width": 100_000}, "width has a side of 100000 pixels", "width"),
        ({"height": -1}, "height has a side of -1 pixels", "height"),
        ({"count": 0}, "count is 0", "count"),
        ({"effort": 11}, "effort is 11", "effort"),
        ({"seed": -1}, "seed is -1", "seed"),
        ({"response_format": "gif"}, "response_format is 'gif'", "response_format"),
        ({"promt": "a cat"}, "unknown field `promt`", None),
        ({"prompt": 7}, "Expected `str`, got `int`", None),
    ],
)
async def test_what_is_wrong_with_a_request_is_answered_with_a_status(
    rig: Rig, change: dict[str, Any], says: str, param: str | None
) -> None:
    plane, pictures = rig
    status, answer, _ = await plane.post("/generate/stream", {"prompt": "a cat"} | change)

    assert status == 400
    assert says in answer["error"]["message"]
    assert answer["error"]["param"] == param
    assert pictures.wishes == []
    assert plane.jobs.running == 0


async def test_a_model_that_there_is_not_is_a_404(rig: Rig) -> None:
    plane, _ = rig
    status, answer, _ = await plane.post("/generate/stream", {"prompt": "a cat", "model": "midjourney"})

    assert status == 404
    assert answer["error"]["code"] == "model_not_found"
