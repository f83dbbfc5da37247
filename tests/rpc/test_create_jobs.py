"""`POST /v1/jobs`, for every kind of job that can be created there."""

from __future__ import annotations

import base64
from collections.abc import AsyncIterator
from typing import Any, TypeAlias

import pytest

from rung.types import (
    ImageInput,
    ImagePart,
    JobKind,
    JobState,
    MeshInput,
    SpeechInput,
    TranscriptionInput,
)
from tests.fakes.gateway import Plane
from tests.fakes.pictures import ScriptedPictures, a_picture_plane, a_png

Rig: TypeAlias = tuple[Plane, ScriptedPictures]

PICTURE = {"content_type": "image/png", "data": base64.b64encode(a_png(4, 4)).decode()}
PART = ImagePart(content_type="image/png", data=a_png(4, 4))


@pytest.fixture
async def rig() -> AsyncIterator[Rig]:
    async with a_picture_plane() as rig:
        yield rig


@pytest.mark.parametrize(
    ("kind", "given", "wanted"),
    [
        (
            "image",
            {"prompt": "a cat", "tier": "quality", "images": [PICTURE], "seed": 7},
            ImageInput(prompt="a cat", tier="quality", images=(PART,), seed=7),
        ),
        ("video", {"prompt": "a cat"}, ImageInput(prompt="a cat", operation="animate")),
        ("video", {"prompt": "a", "operation": "mine"}, ImageInput(prompt="a", operation="mine")),
        ("speech", {"text": "Hello", "voice": "amy"}, SpeechInput(text="Hello", voice="amy")),
        (
            "transcription",
            {"audio": base64.b64encode(b"RIFF").decode()},
            TranscriptionInput(audio=b"RIFF"),
        ),
        ("mesh", {"image": PICTURE, "texture": True}, MeshInput(image=PART, texture=True)),
    ],
)
async def test_jobs_are_made_from_inputs(rig: Rig, kind: str, given: dict[str, Any], wanted: object) -> None:
    plane, pictures = rig
    body = {"kind": kind, "input": given, "effort": 4, "request_id": "mine", "policy": {"local_only": True}}
    status, job, headers = await plane.post("/v1/jobs", body)
    again = (await plane.post("/v1/jobs", body))[1]

    assert status == 201
    assert headers["Location"] == f"/v1/jobs/{job['id']}"
    assert again["id"] == job["id"]
    (wish,) = pictures.wishes
    assert (wish.kind, wish.input, wish.effort) == (JobKind(kind), wanted, 4)
    assert wish.policy.detached
    assert wish.policy.local_only
    assert (await plane.ended(job["id"])).state is JobState.DONE


@pytest.mark.parametrize(
    ("body", "says"),
    [
        ({"kind": "image"}, "input is missing; a job of kind image"),
        ({"kind": "chat", "input": {"prompt": "a cat"}}, "input is not for jobs of kind chat"),
        ({"kind": "chat"}, "request is missing; a job of kind chat"),
        (
            {"kind": "prediction", "input": {}},
            "kind is 'prediction'; it must be one of chat, embedding, image",
        ),
        ({"kind": "speech", "input": {}}, "missing required field `text`"),
        ({"kind": "image", "input": {"prompt": ""}}, "prompt is empty"),
        ({"kind": "image", "input": {"prompt": "a", "count": 99}}, "count is 99"),
        (
            {"kind": "image", "input": {"images": [{"content_type": "image/png", "data": "@"}]}},
            "Invalid base64",
        ),
        (
            {"kind": "mesh", "input": {"image": {"content_type": "image/png", "data": "AAAA"}}},
            "input.image is not an image",
        ),
        ({"kind": "image", "input": {"prompt": "a"}, "effort": 11}, "effort is 11"),
    ],
)
async def test_what_no_job_can_be_made_from_is_refused(rig: Rig, body: dict[str, Any], says: str) -> None:
    plane, pictures = rig
    status, answer, _ = await plane.post("/v1/jobs", body)

    assert status == 400
    assert says in answer["error"]["message"]
    assert pictures.wishes == []
