"""The simulated Sana worker as a real process, over its own HTTP and through its adapter."""

from __future__ import annotations

import asyncio
import hashlib
import struct
from collections.abc import AsyncIterator
from contextlib import AbstractAsyncContextManager, aclosing
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from nodeagent.engines import EngineHealth, FreeControl, Generation, SanaAdapter, SleepControl, WorkerMemory
from nodeagent.simulators.gpu import SimulatedGpus, SimulatedGpuSpec
from nodeagent.supervisor._answering import require_answer
from rung.codec import GenerationEvent
from rung.errors import EngineFailedError, EngineProtocolError, EngineTimeoutError, InvalidRequestError
from rung.service import EngineClient
from rung.types import (
    ArtifactChunk,
    DeploymentSpec,
    EngineInput,
    EngineSpec,
    ImageInput,
    ImagePart,
    MeshInput,
    Phase,
    PhaseProgress,
    ProcessRuntime,
    ServiceEngine,
)
from tests.integration.engine_process import EngineProcess, engine_process, free_port, python_module

GIB = 1024**3
SPEC = DeploymentSpec(
    id="sana-1",
    node_id="n1",
    model="sana-sprint-1.6b",
    capabilities=("image",),
    engine=EngineSpec(
        engine=ServiceEngine(dialect="sana"),
        runtime=ProcessRuntime(executable="python"),
        start_timeout_s=10.0,
    ),
)
CAT = ImageInput(prompt="a cat", width_pixels=64, height_pixels=32, seed=7)


@pytest.fixture
async def adapter() -> AsyncIterator[SanaAdapter]:
    client = EngineClient()
    yield SanaAdapter(client)
    await client.aclose()


@pytest.fixture
def gpus(tmp_path: Path) -> SimulatedGpus:
    return SimulatedGpus.create(
        tmp_path / "gpus", gpus=[SimulatedGpuSpec(name="one", memory_total_bytes=8 * GIB)]
    )


def running(
    tmp_path: Path, adapter: SanaAdapter, **environment: str
) -> AbstractAsyncContextManager[EngineProcess]:
    port = free_port()
    line = adapter.command_line(SPEC, listen_host="127.0.0.1", listen_port=port)
    own = {
        "RUNG_SIM_SPEED": "100",
        "RUNG_SIM_LOAD_S": "0.05",
        "RUNG_SIM_GPUS": str(tmp_path / "gpus"),
        **environment,
    }
    return engine_process(
        [*python_module("nodeagent.simulators.sana"), *line.arguments],
        port=port,
        log_path=tmp_path / f"engine-{port}.log",
        environment=own,
    )


async def awake(engine: EngineProcess, adapter: SanaAdapter) -> None:
    await engine.become(EngineHealth.ASLEEP, adapter, SPEC)
    await adapter.wake(engine.base_url, SPEC, 2)


def held(gpus: SimulatedGpus) -> int:
    return sum(process.gpu_bytes.get(0, 0) for process in gpus.read().processes)


async def made(
    adapter: SanaAdapter, engine: EngineProcess, wanted: EngineInput, *, idle_timeout_s: float = 30.0
) -> tuple[list[bytes], list[PhaseProgress]]:
    """The pictures, and what was said on the way."""
    pictures: dict[str, bytes] = {}
    said: list[PhaseProgress] = []
    generation = Generation(job_id="job-1", input=wanted, idle_timeout_s=idle_timeout_s)
    async with aclosing(adapter.generate(engine.base_url, SPEC, generation)) as events:
        async for event in events:
            if isinstance(event, PhaseProgress):
                said.append(event)
            elif isinstance(event, ArtifactChunk):
                assert event.content_type == "image/png"
                pictures[event.artifact_id] = pictures.get(event.artifact_id, b"") + event.data
                if event.sha256:
                    assert event.sha256 == hashlib.sha256(pictures[event.artifact_id]).hexdigest()
    return list(pictures.values()), said


async def first(events: AsyncIterator[GenerationEvent]) -> GenerationEvent:
    return await anext(events)


async def posted(engine: EngineProcess, path: str, body: object) -> tuple[int, Any, str]:
    url = engine.base_url + path
    async with aiohttp.ClientSession() as session, session.post(url, json=body) as answer:
        return answer.status, await answer.json(), answer.headers.get("Retry-After", "")


async def state(engine: EngineProcess) -> dict[str, Any]:
    async with aiohttp.ClientSession() as session, session.get(engine.base_url + "/sim/state") as answer:
        found = await answer.json()
        assert isinstance(found, dict)
        return found


async def becomes(engine: EngineProcess, name: str, value: int) -> None:
    """Wait until the engine counts so."""
    async with asyncio.timeout(10):
        while True:
            if (await state(engine))[name] == value:
                return
            await asyncio.sleep(0.01)


async def test_a_worker_sleeps_until_it_is_loaded_and_gives_its_memory_back(
    tmp_path: Path, adapter: SanaAdapter, gpus: SimulatedGpus
) -> None:
    assert isinstance(adapter, FreeControl)
    assert isinstance(adapter, SleepControl)
    async with running(tmp_path, adapter) as engine:
        await awake(engine, adapter)
        assert (await adapter.probe(engine.base_url, SPEC)).health is EngineHealth.READY
        weights = 3_200_000_000
        assert held(gpus) == weights
        assert await adapter.memory(engine.base_url, SPEC) == WorkerMemory(
            allocated_bytes=weights, reserved_bytes=weights
        )
        # One that has no tokens is asked how it is, where others are asked for one.
        await require_answer(adapter, engine.base_url, SPEC)
        await adapter.free(engine.base_url, SPEC)
        assert held(gpus) == 0
        assert (await adapter.probe(engine.base_url, SPEC)).health is EngineHealth.ASLEEP
        with pytest.raises(EngineFailedError, match="its model is not loaded"):
            await require_answer(adapter, engine.base_url, SPEC)


async def test_a_worker_without_room_for_its_model_says_so(
    tmp_path: Path, adapter: SanaAdapter, gpus: SimulatedGpus
) -> None:
    async with running(tmp_path, adapter, RUNG_SIM_VRAM_BYTES=str(9 * GIB)) as engine:
        await engine.become(EngineHealth.ASLEEP, adapter, SPEC)
        with pytest.raises(EngineFailedError, match="/load answers 507: CUDA out of memory"):
            await adapter.wake(engine.base_url, SPEC, 2)
        assert (await adapter.probe(engine.base_url, SPEC)).health is EngineHealth.ASLEEP
        assert held(gpus) == 0


async def test_each_picture_has_a_seed_of_its_own_and_no_percentage(
    tmp_path: Path, adapter: SanaAdapter, gpus: SimulatedGpus
) -> None:
    async with running(tmp_path, adapter) as engine:
        await awake(engine, adapter)
        wanted = ImageInput(prompt="a cat", width_pixels=64, height_pixels=32, seed=7, count=2)
        pictures, said = await made(adapter, engine, wanted)
        assert len(set(pictures)) == 2
        assert [struct.unpack_from(">II", picture, 16) for picture in pictures] == [(64, 32)] * 2
        assert [(step.phase, step.detail) for step in said] == [
            (Phase.SAMPLING, "picture 1 of 2, seed 7"),
            (Phase.SAMPLING, "picture 2 of 2, seed 8"),
        ]
        assert {step.percent for step in said} == {None}
        # The second one of a seed is the first one of the next.
        alone, _ = await made(
            adapter, engine, ImageInput(prompt="a cat", width_pixels=64, height_pixels=32, seed=8)
        )
        assert alone == pictures[1:]


async def test_a_size_that_is_left_open_is_for_the_worker_to_say(
    tmp_path: Path, adapter: SanaAdapter, gpus: SimulatedGpus
) -> None:
    async with running(tmp_path, adapter) as engine:
        await awake(engine, adapter)
        pictures, said = await made(adapter, engine, ImageInput(prompt="a cat"))
        assert struct.unpack_from(">II", pictures[0], 16) == (1024, 1024)
        assert said[0].detail.removeprefix("seed ").isdigit()


async def test_a_worker_that_is_busy_is_asked_again_and_that_is_said(
    tmp_path: Path, adapter: SanaAdapter, gpus: SimulatedGpus
) -> None:
    async with running(tmp_path, adapter, RUNG_SIM_FAULTS="hang") as engine:
        await awake(engine, adapter)
        other = asyncio.create_task(made(adapter, engine, CAT))
        await becomes(engine, "active", 1)
        assert await posted(engine, "/unload", {}) == (503, {"error": "busy with something else"}, "0.2")
        assert await adapter.requests(engine.base_url, SPEC) == 1
        with pytest.raises(EngineTimeoutError, match=r"busy with something else for 0\.3 s"):
            await made(adapter, engine, CAT, idle_timeout_s=0.3)
        generation = Generation(job_id="job-2", input=CAT)
        async with aclosing(adapter.generate(engine.base_url, SPEC, generation)) as events:
            phases = []
            async for event in events:
                if isinstance(event, PhaseProgress):
                    phases.append(event.phase)
                    if event.phase is Phase.QUEUED:
                        await posted(engine, "/sim/faults", {"faults": []})
        assert phases[:2] == [Phase.SAMPLING, Phase.QUEUED]
        assert phases[-1] is Phase.SAMPLING
        await other


async def test_what_is_wrong_with_a_request_is_said(
    tmp_path: Path, adapter: SanaAdapter, gpus: SimulatedGpus
) -> None:
    picture = ImagePart(content_type="image/png", data=b"x")
    async with running(tmp_path, adapter) as engine:
        await awake(engine, adapter)
        for wanted, why in (
            (MeshInput(prompt="a chair"), "Sana makes pictures, and nothing else"),
            (ImageInput(prompt=" "), "prompt is empty"),
            (ImageInput(prompt="a cat", operation="img2img", images=(picture,)), "is for ComfyUI"),
            (ImageInput(prompt="a cat", seed=-1), "seed is -1"),
            (ImageInput(prompt="a cat", parameters={"cfg": 1}), "has steps, guidance_scale"),
            (ImageInput(prompt="a cat", parameters={"steps": "two"}), "steps is 'two'; it must be a number"),
            (ImageInput(prompt="a cat", parameters={"steps": 0}), "steps is 0; it must be at least 1"),
            (ImageInput(prompt="a cat", width_pixels=65), "multiples of 32"),
        ):
            with pytest.raises(InvalidRequestError, match=why):
                await made(adapter, engine, wanted)


async def test_a_failure_is_told_as_what_it_is(
    tmp_path: Path, adapter: SanaAdapter, gpus: SimulatedGpus
) -> None:
    async with running(tmp_path, adapter, RUNG_SIM_FAULTS="http_500") as engine:
        await engine.become(EngineHealth.ASLEEP, adapter, SPEC)
        with pytest.raises(
            EngineFailedError, match=r"/generate answers 409: sana-sprint-1\.6b is not loaded"
        ):
            await made(adapter, engine, CAT)
        await adapter.wake(engine.base_url, SPEC, 2)
        with pytest.raises(EngineFailedError, match=r"/generate failed \(simulated fault\)"):
            await made(adapter, engine, CAT)
        await posted(engine, "/sim/faults", {"faults": ["cut_mid_stream"]})
        with pytest.raises(EngineProtocolError, match="that are no PNG"):
            await made(adapter, engine, CAT)


async def test_what_a_worker_began_it_finishes(
    tmp_path: Path, adapter: SanaAdapter, gpus: SimulatedGpus
) -> None:
    async with running(tmp_path, adapter, RUNG_SIM_FAULTS="hang") as engine:
        await awake(engine, adapter)
        generation = Generation(job_id="job-1", input=CAT)
        left = adapter.generate(engine.base_url, SPEC, generation)
        await first(left)
        waiting = asyncio.create_task(first(left))
        await becomes(engine, "active", 1)
        waiting.cancel()
        await asyncio.gather(waiting, return_exceptions=True)
        assert (await state(engine))["active"] == 1
        await posted(engine, "/sim/faults", {"faults": []})
        await becomes(engine, "active", 0)
        assert (await state(engine))["completed"] == 1


async def test_a_worker_of_another_model_is_not_well(
    tmp_path: Path, adapter: SanaAdapter, gpus: SimulatedGpus
) -> None:
    other = DeploymentSpec(id="d2", node_id="n1", model="other", capabilities=("image",), engine=SPEC.engine)
    async with running(tmp_path, adapter) as engine:
        await engine.become(EngineHealth.ASLEEP, adapter, SPEC)
        probe = await adapter.probe(engine.base_url, other)
        assert probe.health is EngineHealth.UNWELL
        assert "it has the model sana-sprint-1.6b, not other" in probe.detail
