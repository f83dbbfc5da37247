"""The simulated Hunyuan3D as a real process, over its own HTTP and through its adapter."""

from __future__ import annotations

import asyncio
import base64
import hashlib
from collections.abc import AsyncIterator
from contextlib import AbstractAsyncContextManager, aclosing
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from nodeagent.engines import EngineHealth, Generation, Hunyuan3dAdapter
from nodeagent.simulators._glb import model_glb
from nodeagent.simulators._png import paint_png
from nodeagent.simulators.gpu import SimulatedGpus, SimulatedGpuSpec
from rung.codec import GenerationEvent
from rung.errors import EngineFailedError, EngineProtocolError, EngineTimeoutError
from rung.service import EngineClient
from rung.types import (
    ArtifactChunk,
    DeploymentSpec,
    EngineSpec,
    ImagePart,
    MeshInput,
    Phase,
    PhaseProgress,
    ProcessRuntime,
    ServiceEngine,
)
from tests.integration.engine_process import EngineProcess, engine_process, free_port, python_module, until

GIB = 1024**3
PNG = paint_png(b"a chair", 32, 32)
SPEC = DeploymentSpec(
    id="mesh-1",
    node_id="n1",
    model="hunyuan3d-2.1",
    capabilities=("mesh",),
    engine=EngineSpec(engine=ServiceEngine(dialect="hunyuan3d"), runtime=ProcessRuntime(executable="python")),
)


@pytest.fixture
async def adapter() -> AsyncIterator[Hunyuan3dAdapter]:
    client = EngineClient()
    yield Hunyuan3dAdapter(client, poll_s=0.02, shape_timeout_s=5.0, texture_timeout_s=5.0)
    await client.aclose()


def running(
    tmp_path: Path, version: str = "2.1", *arguments: str, **environment: str
) -> AbstractAsyncContextManager[EngineProcess]:
    port = free_port()
    command = [*python_module("nodeagent.simulators.hunyuan3d"), "--host", "127.0.0.1", "--port", str(port)]
    own = {
        "RUNG_SIM_SPEED": "100",
        "RUNG_SIM_LOAD_S": "0.05",
        "RUNG_SIM_HUNYUAN3D_VERSION": version,
        **environment,
    }
    log_path = tmp_path / f"engine-{port}.log"
    return engine_process([*command, *arguments], port=port, log_path=log_path, environment=own)


def wanted(*, texture: bool = False, seed: int = 7, idle_timeout_s: float = 30.0) -> Generation:
    image = ImagePart(content_type="image/png", data=PNG)
    asked = MeshInput(image=image, seed=seed, texture=texture)
    return Generation(job_id="job-1", input=asked, idle_timeout_s=idle_timeout_s)


async def made(
    adapter: Hunyuan3dAdapter, engine: EngineProcess, generation: Generation
) -> tuple[bytes, list[PhaseProgress]]:
    """The mesh, and what was said on the way."""
    said: list[PhaseProgress] = []
    pieces: list[ArtifactChunk] = []
    async with aclosing(adapter.generate(engine.base_url, SPEC, generation)) as events:
        async for event in events:
            if isinstance(event, PhaseProgress):
                said.append(event)
            elif isinstance(event, ArtifactChunk):
                pieces.append(event)
    mesh = b"".join(piece.data for piece in pieces)
    assert {piece.content_type for piece in pieces} == {"model/gltf-binary"}
    assert pieces[-1].sha256 == hashlib.sha256(mesh).hexdigest()
    return mesh, said


async def asked(engine: EngineProcess, method: str, path: str, body: object = None) -> tuple[int, Any]:
    url = engine.base_url + path
    async with aiohttp.ClientSession() as session, session.request(method, url, json=body) as answer:
        is_json = answer.content_type == "application/json"
        return answer.status, await answer.json() if is_json else await answer.read()


async def first(events: AsyncIterator[GenerationEvent]) -> GenerationEvent:
    return await anext(events)


async def state(engine: EngineProcess) -> dict[str, Any]:
    _, found = await asked(engine, "GET", "/sim/state")
    assert isinstance(found, dict)
    return found


async def becomes(engine: EngineProcess, name: str, value: int) -> None:
    """Wait until the engine counts so."""
    async with asyncio.timeout(10):
        while True:
            if (await state(engine))[name] == value:
                return
            await asyncio.sleep(0.01)


@pytest.mark.parametrize("version", ["2.0", "2.1"])
@pytest.mark.parametrize("texture", [False, True])
async def test_both_versions_make_a_mesh_of_a_picture(
    tmp_path: Path, adapter: Hunyuan3dAdapter, version: str, texture: bool
) -> None:
    async with running(tmp_path, version, "--enable_tex") as engine:
        await engine.become(EngineHealth.READY, adapter, SPEC)
        mesh, said = await made(adapter, engine, wanted(texture=texture))
        seen = PNG if version == "2.1" else PNG + b"7"
        assert mesh == model_glb(seen, texture=texture)
        assert {step.phase for step in said} == {Phase.GENERATING}
        # Only 2.1 tells when it begins to paint.
        details = [step.detail for step in said]
        assert any("paints the mesh" in each for each in details) == (texture and version == "2.1")


async def test_a_seed_makes_another_mesh_with_2_0_and_none_with_2_1(
    tmp_path: Path, adapter: Hunyuan3dAdapter
) -> None:
    for version, differ in (("2.0", True), ("2.1", False)):
        async with running(tmp_path, version) as engine:
            await engine.become(EngineHealth.READY, adapter, SPEC)
            one, _ = await made(adapter, engine, wanted(seed=1))
            other, _ = await made(adapter, engine, wanted(seed=2))
            assert (one != other) is differ


async def test_a_job_of_2_1_without_a_texture_says_texturing_for_ever(
    tmp_path: Path, adapter: Hunyuan3dAdapter
) -> None:
    async with running(tmp_path) as engine:
        await engine.become(EngineHealth.READY, adapter, SPEC)
        body = {"image": base64.b64encode(PNG).decode()}
        _, sent = await asked(engine, "POST", "/send", body)
        await becomes(engine, "completed", 1)
        assert await asked(engine, "GET", f"/status/{sent['uid']}") == (200, {"status": "texturing"})


async def test_what_failed_and_what_never_was_are_processing_for_ever(
    tmp_path: Path, adapter: Hunyuan3dAdapter
) -> None:
    async with running(tmp_path) as engine:
        await engine.become(EngineHealth.READY, adapter, SPEC)
        _, sent = await asked(engine, "POST", "/send", {"image": "bm9uZQ=="})
        await until(lambda: "Exception in thread" in engine.log(), "its failure")
        for uid in (sent["uid"], "no-such-job"):
            assert await asked(engine, "GET", f"/status/{uid}") == (200, {"status": "processing"})


async def test_a_failure_that_is_not_told_ends_at_our_deadline(tmp_path: Path) -> None:
    client = EngineClient()
    adapter = Hunyuan3dAdapter(client, poll_s=0.01, shape_timeout_s=0.3)
    async with running(tmp_path, "2.0", RUNG_SIM_FAULTS="http_500") as engine:
        await engine.become(EngineHealth.READY, adapter, SPEC)
        with pytest.raises(EngineTimeoutError, match=r"'processing' for 0\.3 s, as it does for ever"):
            await made(adapter, engine, wanted())
        # What failed is over: the next one is not kept waiting.
        await asked(engine, "POST", "/sim/faults", {"faults": []})
        _, said = await made(adapter, engine, wanted())
        assert {step.phase for step in said} == {Phase.GENERATING}
    await client.aclose()


async def test_any_failure_of_generate_is_a_404_with_words_that_tell_nothing(
    tmp_path: Path, adapter: Hunyuan3dAdapter
) -> None:
    async with running(tmp_path, RUNG_SIM_FAULTS="http_500") as engine:
        await engine.become(EngineHealth.READY, adapter, SPEC)
        status, said = await asked(engine, "POST", "/generate", {"image": base64.b64encode(PNG).decode()})
        assert status == 404
        assert said["text"].startswith("**NETWORK ERROR")
        with pytest.raises(EngineFailedError, match="/generate answers 404; its log has the reason"):
            await made(adapter, engine, wanted())


async def test_while_generate_runs_nothing_else_is_answered_and_the_engine_counts_as_well(
    tmp_path: Path, adapter: Hunyuan3dAdapter
) -> None:
    async with running(tmp_path, RUNG_SIM_FAULTS="hang") as engine:
        await engine.become(EngineHealth.READY, adapter, SPEC)
        making = asyncio.create_task(made(adapter, engine, wanted()))
        await becomes(engine, "active", 1)
        probe = await adapter.probe(engine.base_url, SPEC)
        assert (probe.health, probe.detail) == (
            EngineHealth.READY,
            "it is at a mesh, and answers nothing else",
        )
        await asked(engine, "POST", "/sim/faults", {"faults": []})
        mesh, _ = await making
        assert mesh == model_glb(PNG, texture=False)


@pytest.mark.parametrize("texture", [False, True])
async def test_a_mesh_that_was_given_up_goes_on_and_the_next_one_waits_and_says_so(
    tmp_path: Path, adapter: Hunyuan3dAdapter, texture: bool
) -> None:
    async with running(tmp_path, RUNG_SIM_FAULTS="hang") as engine:
        await engine.become(EngineHealth.READY, adapter, SPEC)
        given_up = adapter.generate(engine.base_url, SPEC, wanted(texture=texture))
        await first(given_up)
        waiting = asyncio.create_task(first(given_up))
        await becomes(engine, "active", 1)
        waiting.cancel()
        await asyncio.gather(waiting, return_exceptions=True)
        async with aclosing(adapter.generate(engine.base_url, SPEC, wanted(texture=texture))) as events:
            step = await first(events)
            assert isinstance(step, PhaseProgress)
            assert step.phase is Phase.QUEUED
            assert "still at a mesh that was given up, and cannot be stopped" in step.detail
            assert (await state(engine))["active"] == 1
            await asked(engine, "POST", "/sim/faults", {"faults": []})
            pieces = [event.data async for event in events if isinstance(event, ArtifactChunk)]
        assert b"".join(pieces) == model_glb(PNG, texture=texture)
        found = await state(engine)
        assert (found["requests"], found["completed"]) == (2, 2)


async def test_another_process_knows_nothing_of_what_was_given_up(
    tmp_path: Path, adapter: Hunyuan3dAdapter
) -> None:
    async with running(tmp_path, RUNG_SIM_FAULTS="hang") as engine:
        await engine.become(EngineHealth.READY, adapter, SPEC)
        given_up = adapter.generate(engine.base_url, SPEC, wanted(texture=True))
        await first(given_up)
        await given_up.aclose()
    async with running(tmp_path) as engine:
        await engine.become(EngineHealth.READY, adapter, SPEC)
        _, said = await made(adapter, engine, wanted())
        assert {step.phase for step in said} == {Phase.GENERATING}


async def test_two_that_are_wanted_at_once_are_made_one_after_the_other(
    tmp_path: Path, adapter: Hunyuan3dAdapter
) -> None:
    gpu = SimulatedGpuSpec(name="one", memory_total_bytes=12 * GIB)
    SimulatedGpus.create(tmp_path / "gpus", gpus=[gpu])
    async with running(tmp_path, RUNG_SIM_GPUS=str(tmp_path / "gpus")) as engine:
        await engine.become(EngineHealth.READY, adapter, SPEC)
        # There is room for one of them.
        both = await asyncio.gather(*(made(adapter, engine, wanted(texture=True)) for _ in range(2)))
        assert [mesh for mesh, _ in both] == [model_glb(PNG, texture=True)] * 2
        phases = [step.phase for _, said in both for step in said]
        assert Phase.QUEUED in phases


async def test_jobs_that_are_sent_at_once_run_out_of_memory(
    tmp_path: Path, adapter: Hunyuan3dAdapter
) -> None:
    gpu = SimulatedGpuSpec(name="one", memory_total_bytes=12 * GIB)
    SimulatedGpus.create(tmp_path / "gpus", gpus=[gpu])
    async with running(tmp_path, RUNG_SIM_GPUS=str(tmp_path / "gpus")) as engine:
        await engine.become(EngineHealth.READY, adapter, SPEC)
        body = {"image": base64.b64encode(PNG).decode(), "texture": True}
        await asyncio.gather(*(asked(engine, "POST", "/send", body) for _ in range(2)))
        await until(lambda: "CUDA out of memory" in engine.log(), "its failure")


@pytest.mark.parametrize("texture", [False, True])
async def test_a_mesh_that_is_not_whole_is_not_given_on(tmp_path: Path, texture: bool) -> None:
    client = EngineClient()
    adapter = Hunyuan3dAdapter(client, poll_s=0.01, writing_s=0.1)
    async with running(tmp_path, RUNG_SIM_FAULTS="cut_mid_stream") as engine:
        await engine.become(EngineHealth.READY, adapter, SPEC)
        with pytest.raises(EngineProtocolError, match=r"a part of a mesh|not whole"):
            await made(adapter, engine, wanted(texture=texture))
    await client.aclose()


async def test_a_server_that_dies_while_it_loads_has_told_why(tmp_path: Path) -> None:
    async with running(tmp_path, RUNG_SIM_FAULTS="die_while_loading") as engine:
        assert await engine.exit_code() == 1
        assert "Unable to load weights" in engine.log()
