"""Meshes from a caller to an engine and back, on a card without room for who draws beside who models."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from nodeagent.simulators._glb import model_glb
from nodeagent.simulators._png import paint_png
from nodeagent.simulators.gpu import SimulatedGpus, SimulatedGpuSpec
from rung.types import ImagePart, JobEvent, Phase, PhaseProgress, Residency, Routed
from tests.integration.stack import SIMULATORS, Stack, stack

GIB = 1 << 30
#: Whoever watches hears something at least so often.
LONGEST_GAP_S = 1.5
EXECUTABLES: dict[str, Any] = {
    name: SIMULATORS["ollama"] | {"arguments_prefix": ["-m", f"nodeagent.simulators.{name}"]}
    for name in ("hunyuan3d", "sana")
}


def deployment(kind: str, capability: str, vram_bytes: int, folder: Path, **more: Any) -> dict[str, Any]:
    environment = {
        "RUNG_SIM_GPUS": str(folder / "gpus"),
        "RUNG_SIM_SPEED": "50",
        "RUNG_SIM_LOAD_S": "0.1",
        "RUNG_SIM_HUNYUAN3D_VERSION": "2.1",
    }
    return {
        "id": kind,
        "model": f"{kind}-model",
        "engine": {"kind": kind},
        "runtime": {"kind": "process", "executable": kind, "environment": environment},
        "capabilities": [capability],
        "vram": vram_bytes,
        "start_timeout": "30s",
        **more,
    }


@pytest.fixture
async def box(tmp_path: Path) -> AsyncIterator[Stack]:
    """A card of 14 GiB: 11 GiB for meshes, or 6 GiB for pictures."""
    SimulatedGpus.create(tmp_path / "gpus", gpus=[SimulatedGpuSpec(name="one", memory_total_bytes=14 * GIB)])
    deployments = [
        deployment("sana", "image", 6 * GIB, tmp_path, model="sana-sprint-1.6b", residency_class="sleepable"),
        deployment("hunyuan3d", "mesh", 11 * GIB, tmp_path),
    ]
    agent = {"executables": EXECUTABLES, "simulated_gpus": str(tmp_path / "gpus")}
    async with stack(tmp_path, deployments, agent=agent) as found:
        yield found


async def followed(stream: Any) -> tuple[list[JobEvent], bytes]:
    """The events of a mesh, and its file."""
    async with asyncio.timeout(90), stream:
        events = [event async for event in stream]
        result = await stream.result()
    (file,) = result.artifacts
    assert file.artifact.content_type == "model/gltf-binary"
    return events, file.data


def steps(events: list[JobEvent]) -> list[PhaseProgress]:
    return [event.payload for event in events if isinstance(event.payload, PhaseProgress)]


async def test_of_words_a_picture_is_drawn_its_engine_gives_way_and_the_mesh_is_made(box: Stack) -> None:
    events, mesh = await followed(box.client.mesh("a chair"))
    assert mesh[:4] == b"glTF"
    told = steps(events)
    drawn = [step for step in told if step.detail.startswith("picture")]
    assert Phase.SAMPLING in {step.phase for step in drawn}
    assert told.index(drawn[-1]) < min(
        place for place, step in enumerate(told) if step.phase is Phase.GENERATING
    )
    assert [event.payload.served.target for event in events if isinstance(event.payload, Routed)] == [
        "hunyuan3d"
    ]
    assert told[-1].phase is Phase.DONE
    # Both would not fit: the one that drew has let go of its weights.
    assert (await box.deployment("sana")).residency in (Residency.ASLEEP, Residency.STOPPED)
    times_s = [0.0, *(event.elapsed_s for event in events)]
    assert max(later - earlier for earlier, later in pairwise(times_s)) < LONGEST_GAP_S


async def test_of_a_picture_over_http_the_file_is_the_answer(box: Stack) -> None:
    picture = paint_png(b"a chair", 32, 32)
    form = aiohttp.FormData({"texture": "true"})
    form.add_field("image", picture, filename="chair.png", content_type="image/png")
    url = f"{box.http}/v1/meshes"
    async with asyncio.timeout(90), aiohttp.ClientSession() as http, http.post(url, data=form) as response:
        assert response.status == 200, await response.text()
        assert response.headers["X-Rung-Target"] == "hunyuan3d"
        assert await response.read() == model_glb(picture, texture=True)
    assert (await box.deployment("sana")).residency is Residency.STOPPED


async def test_a_second_mesh_says_how_much_longer_it_takes(box: Stack) -> None:
    image = ImagePart(content_type="image/png", data=paint_png(b"a chair", 32, 32))
    first, _ = await followed(box.client.mesh(image=image, texture=True))
    second, _ = await followed(box.client.mesh(image=image, texture=True))
    remaining = [
        [step.remaining_s for step in steps(events) if step.phase is Phase.GENERATING]
        for events in (first, second)
    ]
    assert set(remaining[0]) == {None}
    assert remaining[1][0] is not None


async def test_a_cancelled_mesh_goes_on_in_the_engine_and_the_next_one_waits_for_it(box: Stack) -> None:
    image = ImagePart(content_type="image/png", data=paint_png(b"a chair", 32, 32))
    await followed(box.client.mesh(image=image))
    found = await box.deployment("hunyuan3d", Residency.AWAKE)
    assert found.endpoint is not None
    faults = f"{found.endpoint.base_url}/sim/faults"
    async with aiohttp.ClientSession() as http:
        await http.post(faults, json={"faults": ["hang"]})
        given_up = box.client.mesh(image=image, texture=True)
        async with given_up:
            async for event in given_up:
                if isinstance(event.payload, PhaseProgress) and event.payload.phase is Phase.GENERATING:
                    break
        waiting = box.client.mesh(image=image)
        async with asyncio.timeout(60), waiting:
            async for event in waiting:
                step = event.payload
                if isinstance(step, PhaseProgress) and "given up" in step.detail:
                    await http.post(faults, json={"faults": []})
            result = await waiting.result()
    assert result.artifacts[0].data == model_glb(image.data, texture=False)
