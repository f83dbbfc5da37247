"""Pictures when our own engine is away: the chain ends at a cloud model, which is paid for and says so."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from controlplane.pipelines.image import IMAGE_PHASES
from rung import Policy
from rung.errors import NoTargetError
from rung.types import (
    ArtifactChunk,
    FailureReason,
    ImageInput,
    JobDone,
    JobEvent,
    JobFailed,
    PhaseProgress,
    Routed,
)
from tests.integration.cloud_process import KEY, CloudProcess, cloud_process
from tests.integration.engine_process import free_port
from tests.integration.stack import Stack, stack

TARGET = "openai/gpt-image-1"
#: Whoever watches hears something at least so often.
LONGEST_GAP_S = 1.5


class House:
    """A stack whose ComfyUI does not answer, with a cloud that has $0.05 a day."""

    def __init__(self, box: Stack, cloud: CloudProcess) -> None:
        self.box = box
        self.cloud = cloud

    async def draw(self, *, local_only: bool = False, **more: Any) -> list[JobEvent]:
        wanted = ImageInput(prompt="a cat", tier="lightning", **more)
        policy = Policy(local_only=local_only)
        async with asyncio.timeout(60):
            return [event async for event in self.box.client.generate(wanted, policy=policy)]


@pytest.fixture
async def house(tmp_path: Path) -> AsyncIterator[House]:
    key = tmp_path / "cloud.key"
    key.write_text(KEY)
    key.chmod(0o600)
    comfyui = {
        "id": "comfyui",
        "model": "comfyui",
        "residency_class": "cache",
        "capabilities": ["image", "video"],
        "engine": {"kind": "comfyui"},
        "runtime": {"kind": "external", "base_url": f"http://127.0.0.1:{free_port()}"},
    }
    model = {
        "id": "gpt-image-1",
        "capabilities": ["image"],
        "images": {"usd_per_image": 0.25, "prices": {"low": 0.02}},
    }
    ladder = {
        "chains": {"chat": ["openai/chat"], "image": ["comfyui", TARGET]},
        "rungs": [
            {"name": "chat", "chain": "chat"},
            {"name": "image", "modality": "image", "capabilities": ["image"], "chain": "image"},
        ],
    }
    chat = {
        "id": "chat",
        "max_output_tokens": 100,
        "usd_per_million_prompt_tokens": 1,
        "usd_per_million_completion_tokens": 1,
    }
    with cloud_process("--slow-first-byte-s", "3") as api:
        provider = {
            "id": "openai",
            "base_url": api.url,
            "api_key_file": str(key),
            "daily_cap_usd": 0.05,
            "models": [model, chat],
        }
        async with stack(tmp_path, [comfyui], ladder=ladder, cloud=[provider]) as box:
            yield House(box, api)


async def test_the_tail_of_the_chain_draws_until_its_money_is_spent_and_never_what_is_private(
    house: House,
) -> None:
    await house.cloud.misbehave("slow_first_byte")
    log = await house.draw()

    told = [event.payload for event in log if isinstance(event.payload, PhaseProgress)]
    assert isinstance(log[-1].payload, JobDone), log[-1]
    assert [event.payload.served.target for event in log if isinstance(event.payload, Routed)] == [TARGET]
    phases = [step.phase for step in told]
    assert [phase for phase in IMAGE_PHASES if phase in phases] == [
        *dict.fromkeys(phase for phase in phases if phase in IMAGE_PHASES)
    ]
    assert any(step.detail == "gpt-image-1 draws 1024x1024 low: 1 for $0.02 each" for step in told)
    # The provider says nothing for three seconds, and we do.
    times_s = [0.0, *(event.elapsed_s for event in log)]
    assert max(later - earlier for earlier, later in pairwise(times_s)) < LONGEST_GAP_S
    pieces = [event.payload for event in log if isinstance(event.payload, ArtifactChunk)]
    assert pieces[-1].content_type == "image/png"
    data = await house.box.client.get_artifact(pieces[-1].artifact_id)
    assert data.startswith(b"\x89PNG")
    job = await house.box.client.get_job(log[0].job_id)
    assert job.usage is not None
    assert job.usage.cost_usd == pytest.approx(0.02)

    await house.cloud.begin()
    with pytest.raises(NoTargetError, match="local_only"):
        await house.draw(local_only=True)
    assert await house.cloud.asked() == 0

    # OpenAI's own route, over HTTP; what is against the rules is the caller's fault.
    url, body = f"{house.box.http}/v1/images/generations", {"prompt": "something forbidden", "quality": "low"}
    async with aiohttp.ClientSession() as http, http.post(url, json=body) as response:
        assert response.status == 400
        assert "safety system" in (await response.json())["error"]["message"]

    assert isinstance((await house.draw())[-1].payload, JobDone)
    # $0.01 is left.
    asked = await house.cloud.asked()
    poor = (await house.draw())[-1].payload
    assert isinstance(poor, JobFailed)
    assert poor.reason is FailureReason.BUDGET_EXHAUSTED
    assert "$0.05" in poor.detail
    assert await house.cloud.asked() == asked
