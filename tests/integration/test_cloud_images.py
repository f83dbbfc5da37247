"""Pictures by cloud models, against the simulated API in a process of its own."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from msgspec.structs import replace
from prometheus_client import CollectorRegistry

from controlplane.cloud import CloudDrawing, CloudPictures, CloudSpend, CloudTargets
from controlplane.store import CloudCalls, JobStore
from rung.codec import GenerationEvent
from rung.errors import (
    BudgetExhaustedError,
    EngineFailedError,
    EngineProtocolError,
    EngineRejectedError,
    EngineTimeoutError,
    UnsuitableTargetError,
)
from rung.types import ArtifactChunk, ImageInput, ImagePart, PhaseProgress
from tests.fakes.pictures import a_png
from tests.integration.cloud_process import CloudProcess, cloud_process, cloud_targets, provider

DRAWING = CloudDrawing(
    usd_per_image=0.25,
    prices={"low": 0.02, "medium 1536x1024": 0.06},
    sizes=("1024x1024", "1536x1024", "1024x1536"),
    qualities={"lightning": "low", "quality": "medium"},
)
TARGET = "openai/gpt-image-1"
PICTURE = ImagePart(content_type="image/png", data=a_png())
#: A head is all that is looked at of a mask: the colour type with transparency.
MASK = ImagePart(content_type="image/png", data=a_png()[:25] + b"\x06" + a_png()[26:])


class Studio:
    """A provider that draws, and what it gave."""

    def __init__(self, api: CloudProcess, targets: CloudTargets, spend: CloudSpend) -> None:
        self.api = api
        self.targets = targets
        self.spend = spend
        self.pictures = CloudPictures(targets, idle_timeout_s=5.0)
        self.events: list[GenerationEvent] = []

    async def draw(self, prompt: str = "a cat", **more: Any) -> float:
        async def take(event: GenerationEvent) -> None:
            self.events.append(event)

        return await self.pictures.generate(TARGET, ImageInput(prompt=prompt, **more), take)

    @property
    def files(self) -> list[ArtifactChunk]:
        return [event for event in self.events if isinstance(event, ArtifactChunk)]

    @property
    def said(self) -> list[str]:
        return [event.detail for event in self.events if isinstance(event, PhaseProgress)]

    @property
    def spent_usd(self) -> float:
        spending = self.spend.spending("openai")
        assert spending.reserved_micro_usd == 0
        return spending.spent_micro_usd / 1e6

    async def asked(self) -> dict[str, Any]:
        async with aiohttp.ClientSession() as http, http.get(f"{self.api.url}/sim/state") as response:
            state = await response.json()
        found: dict[str, Any] = state["last_request"]
        return found


@pytest.fixture(scope="module")
def process() -> Iterator[CloudProcess]:
    with cloud_process("--slow-first-byte-s", "0.2") as api:
        yield api


@pytest.fixture
async def studio(process: CloudProcess, tmp_path: Path) -> AsyncIterator[Studio]:
    await process.begin()
    store = await JobStore.open(tmp_path / "rung.db")
    base = provider("openai", process.url, cap_usd=1.0)
    model = replace(
        base.models[0], id=TARGET, model="gpt-image-1", capabilities=("image",), drawing=DRAWING, aliases=()
    )
    chosen = replace(base, models=(model, *base.models))
    async with cloud_targets(chosen, store=CloudCalls(store), registry=CollectorRegistry()) as (
        targets,
        spend,
    ):
        yield Studio(process, targets, spend)
    await store.aclose()


async def test_pictures_come_with_their_type_and_cost_what_the_configuration_says(studio: Studio) -> None:
    cost_usd = await studio.draw(tier="quality", count=2, width_pixels=1600, height_pixels=900)

    assert cost_usd == studio.spent_usd == pytest.approx(0.12)
    assert studio.said == ["gpt-image-1 draws 1536x1024 medium: 2 for $0.06 each"]
    assert await studio.asked() == {
        "model": "gpt-image-1",
        "prompt": "a cat",
        "n": 2,
        "size": "1536x1024",
        "quality": "medium",
    }
    assert [each.content_type for each in studio.files] == ["image/png"] * 2
    assert len({each.data for each in studio.files}) == 2
    assert all(each.sha256 and each.size_bytes == len(each.data) for each in studio.files)


async def test_what_not_to_draw_is_said_in_the_prompt(studio: Studio) -> None:
    await studio.draw(negative_prompt="dogs", tier="lightning")
    asked = await studio.asked()
    assert (asked["prompt"], asked["quality"]) == ("a cat\n\nAvoid: dogs", "low")
    assert studio.spent_usd == pytest.approx(0.02)


async def test_an_edit_sends_its_picture_and_its_mask(studio: Studio) -> None:
    await studio.draw(operation="inpaint", images=(PICTURE, MASK))
    asked = await studio.asked()
    assert (asked["image"], asked["mask"]) == ("image.png: image/png", "mask.png: image/png")
    assert (asked["n"], asked["size"]) == ("1", "1024x1024")


@pytest.mark.parametrize(
    "wanted",
    [
        {"operation": "upscale", "images": (PICTURE,)},
        {"operation": "inpaint", "images": (PICTURE, PICTURE)},
        {"operation": "generate", "images": (PICTURE,)},
        {"count": 11},
    ],
)
async def test_what_it_cannot_do_is_for_others_and_is_not_sent(
    studio: Studio, wanted: dict[str, Any]
) -> None:
    with pytest.raises(UnsuitableTargetError):
        await studio.draw(**wanted)
    assert (await studio.api.asked(), studio.spent_usd) == (0, 0.0)


@pytest.mark.parametrize(
    ("fault", "error", "said", "cost_usd"),
    [
        ("moderation", EngineRejectedError, "rejected by the safety system", 0.0),
        ("rate_limit_seconds", EngineFailedError, "HTTP 429", 0.0),
        ("http_500", EngineFailedError, "HTTP 500", 0.0),
        ("quota", EngineFailedError, "HTTP 429", 0.0),
        # It was drawn, and will be on the bill.
        ("broken_base64", EngineProtocolError, "broken base64", 0.25),
        ("no_picture", EngineProtocolError, "no picture", 0.25),
        ("links", EngineProtocolError, "a link, which is not followed", 0.25),
        ("malformed", EngineProtocolError, "not understood", 0.25),
    ],
)
async def test_what_goes_wrong_is_whose_fault_it_is_and_costs_what_it_costs(
    studio: Studio, fault: str, error: type[Exception], said: str, cost_usd: float
) -> None:
    await studio.api.misbehave(fault)
    with pytest.raises(error, match=said) as raised:
        await studio.draw()
    metadata = getattr(raised.value, "metadata", {})
    if fault == "moderation":
        assert metadata["engine_code"] == "moderation_blocked"
    if fault == "rate_limit_seconds":
        assert metadata["retry_after"] == "7"
    assert studio.files == []
    assert studio.spent_usd == pytest.approx(cost_usd)
    refusal = studio.targets.refusal(TARGET)
    assert ("no money or quota left" in refusal) is (fault == "quota")


async def test_a_slow_one_is_waited_for_and_a_silent_one_is_given_up(studio: Studio) -> None:
    await studio.api.misbehave("slow_first_byte")
    await studio.draw(tier="lightning")
    assert len(studio.files) == 1
    await studio.api.misbehave("hang")
    studio.pictures = CloudPictures(studio.targets, idle_timeout_s=0.2)
    with pytest.raises(EngineTimeoutError):
        await studio.draw(tier="lightning")
    # Nobody knows whether it drew: it counts.
    assert studio.spent_usd == pytest.approx(0.04)


async def test_cancelled_it_lets_go_and_counts(studio: Studio) -> None:
    await studio.api.misbehave("hang")
    task = asyncio.create_task(studio.draw())
    async with asyncio.timeout(10):
        while not await studio.api.asked():
            pass
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    async with asyncio.timeout(10):
        while not await studio.api.aborted():
            pass
    assert studio.spent_usd == pytest.approx(0.25)


async def test_the_days_money_is_never_overdrawn(studio: Studio) -> None:
    results = await asyncio.gather(*(studio.draw() for _ in range(6)), return_exceptions=True)
    refused = [each for each in results if isinstance(each, BudgetExhaustedError)]
    assert len(refused) == 2
    assert (await studio.api.asked(), studio.spent_usd) == (4, 1.0)
    with pytest.raises(BudgetExhaustedError):
        await studio.draw(tier="lightning")


async def test_a_model_for_chats_does_not_draw(studio: Studio) -> None:
    with pytest.raises(UnsuitableTargetError, match="does not draw"):
        await studio.pictures.generate("openai/chat", ImageInput(prompt="x"), lambda _: asyncio.sleep(0))
