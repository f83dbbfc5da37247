"""What our adapter and ComfyUI do together: one suite, for the simulator in every run, and for a real one.

`RUNG_COMFYUI_DIR=checkout pytest -m real_comfyui tests/engines` runs it on a real one; see
`comfyui_server` for what that needs. Real or not, they compute on the CPU, with random weights.
"""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import AsyncIterator
from pathlib import Path

import httpx
import msgspec
import pytest
import pytest_asyncio

from nodeagent.engines import ComfyUiAdapter
from nodeagent.engines._comfyui_classes import NodeClass, node_class_of
from nodeagent.engines._comfyui_generate import ComfyUiPace
from nodeagent.simulators._comfyui_nodes import node_kinds
from nodeagent.simulators._comfyui_pictures import Picture, png
from rung.codec import GenerationEvent
from rung.errors import EngineFailedError, EngineUnreachableError, InvalidRequestError
from rung.service import EngineClient
from rung.types import (
    Phase,
    PhaseProgress,
    WorkflowFile,
)
from tests.engines.comfyui_client import PATIENCE_S, SEEDS, Comfy, Told, noise
from tests.engines.comfyui_graphs import Graph, changed, node, painted, sampled, sampled_twice, uploaded
from tests.engines.comfyui_server import (
    CHECKPOINT,
    REAL_SIDE,
    SIMULATED_SIDE,
    comfyui_server,
    real_comfyui,
)
from tests.fakes.proxy import BreakableProxy
from tests.integration.engine_process import EngineProcess

pytestmark = [pytest.mark.asyncio(loop_scope="module"), pytest.mark.timeout(600)]

#: More than any test waits for.
_ENDLESS = 5000
_PACE = ComfyUiPace(waiting_poll_s=0.1, running_poll_s=0.2, rejoin_pause_s=0.1, stop_pause_s=0.1)


@pytest_asyncio.fixture(
    scope="module",
    loop_scope="module",
    params=["simulator", pytest.param("real", marks=pytest.mark.real_comfyui)],
)
async def process(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> AsyncIterator[EngineProcess]:
    folder: Path = tmp_path_factory.mktemp(f"comfyui-{request.param}")
    async with comfyui_server(folder, real=_is_real(request)) as running:
        yield running


def _is_real(request: pytest.FixtureRequest) -> bool:
    real = bool(request.param == "real")
    if real and real_comfyui() is None:
        pytest.skip("there is no real ComfyUI: RUNG_COMFYUI_DIR names no checkout with a Python that runs it")
    return real


@pytest_asyncio.fixture(loop_scope="module")
async def comfy(process: EngineProcess, request: pytest.FixtureRequest) -> AsyncIterator[Comfy]:
    """With an empty queue, before and after."""
    real = "real" in request.node.callspec.id
    client = EngineClient()
    async with httpx.AsyncClient(base_url=process.base_url, timeout=30.0) as routes:
        side = REAL_SIDE if real else SIMULATED_SIDE
        comfy = Comfy(process.base_url, side, ComfyUiAdapter(client, pace=_PACE), routes)
        yield comfy
        await routes.post("/queue", json={"clear": True})
        await routes.post("/interrupt", json={})
        await comfy.until_empty()
    await client.aclose()


# What it makes.


async def test_a_graph_without_weights_gives_a_picture(comfy: Comfy) -> None:
    told = await comfy.told(painted(64, 48))

    assert told.sizes == [(64, 48)]
    assert told.phases == [Phase.ENCODING]


async def test_a_batch_gives_a_file_for_each_picture(comfy: Comfy) -> None:
    told = await comfy.told(painted(32, 32, count=3, color=next(SEEDS)))

    assert list(told.files) == ["0", "1", "2"]
    assert told.sizes == [(32, 32)] * 3


async def test_files_are_uploaded_and_read(comfy: Comfy) -> None:
    picture = png(Picture(width_pixels=20, height_pixels=10, colour=0xFF0000))
    file = WorkflowFile(name="my cat (1)/ä.png", content_type="image/png", data=picture)
    told = await comfy.told(uploaded(file.name, width=40, height=30), files=[file])

    assert told.sizes == [(40, 30)]


async def test_files_of_one_name_do_not_meet(comfy: Comfy) -> None:
    graph = {
        "1": node("LoadImage", image="@file:same.png"),
        "2": node("SaveImage", images=["1", 0], filename_prefix="rung"),
    }

    async def size(width: int) -> tuple[int, int]:
        data = png(Picture(width_pixels=width, height_pixels=16, colour=width))
        file = WorkflowFile(name="same.png", content_type="image/png", data=data)
        (found,) = (await comfy.told(graph, files=[file])).sizes
        return found

    assert list(await asyncio.gather(size(16), size(24), size(32))) == [(16, 16), (24, 16), (32, 16)]


async def test_what_is_only_shown_is_the_result_if_nothing_is_saved(comfy: Comfy) -> None:
    shown = {**painted(16, 16, color=next(SEEDS)), "3": node("PreviewImage", images=["1", 0])}
    only_shown = {name: each for name, each in shown.items() if name != "2"}

    assert len((await comfy.told(shown)).files) == 1
    assert (await comfy.told(only_shown)).sizes == [(16, 16)]


async def test_a_file_larger_than_a_piece_comes_in_pieces(comfy: Comfy) -> None:
    graph = {
        "1": node("LoadImage", image="@file:noise.png"),
        "2": node("SaveImage", images=["1", 0], filename_prefix="rung"),
    }
    file = WorkflowFile(name="noise.png", content_type="image/png", data=noise(512, 512))
    told = await comfy.told(graph, files=[file])

    assert told.sizes == [(512, 512)]
    ((_, data),) = told.files.values()
    assert len(data) > 2 * 256 * 1024


async def test_a_sampler_is_told_of_by_its_phases_and_steps(comfy: Comfy) -> None:
    told = await comfy.told(comfy.sampled(steps=4))

    assert told.phases[-2:] == [Phase.SAMPLING, Phase.ENCODING]
    assert told.steps == [(0, 4, 0.0), (1, 4, 25.0), (2, 4, 50.0), (3, 4, 75.0), (4, 4, 100.0)]
    assert told.sizes == [(comfy.side, comfy.side)]
    assert told.previews == []


async def test_many_steps_are_told_in_tens_of_percent(comfy: Comfy) -> None:
    told = await comfy.told(comfy.sampled(steps=25))

    assert [percent for _, _, percent in told.steps] == [0, 4, 12, 20, 32, 40, 52, 60, 72, 80, 92, 100]


async def test_a_model_that_is_loaded_is_named(comfy: Comfy) -> None:
    await comfy.routes.post("/free", json={"unload_models": True, "free_memory": True})
    told = await comfy.told(comfy.sampled(steps=1))

    assert told.phases == [Phase.MODEL_SWAP, Phase.SAMPLING, Phase.ENCODING]
    (loading,) = [each.detail for each in told.progress if each.phase is Phase.MODEL_SWAP]
    assert loading == f"loading {CHECKPOINT}"


async def test_previews_come_if_they_are_wanted_one_for_a_step(comfy: Comfy) -> None:
    told = await comfy.told(comfy.sampled(steps=4), previews=True)

    assert 1 <= len(told.previews) <= 4
    assert len({chunk.artifact_id for chunk in told.previews}) == len(told.previews)
    for chunk in told.previews:
        assert chunk.content_type in ("image/jpeg", "image/png")
        assert chunk.sha256 == hashlib.sha256(chunk.data).hexdigest()
        assert chunk.size_bytes == chunk.length_bytes == len(chunk.data)


async def test_the_same_again_comes_from_the_cache(comfy: Comfy) -> None:
    graph = comfy.sampled(steps=2)
    first = await comfy.told(graph)
    again = await comfy.told(graph)

    assert again.files == first.files
    assert [(each.detail, each.percent) for each in again.progress if each.phase is Phase.SAMPLING] == [
        ("taken from ComfyUI's cache", 100.0)
    ]


async def test_two_samplers_are_told_of_as_a_whole(comfy: Comfy) -> None:
    graph = sampled_twice(CHECKPOINT, seed=next(SEEDS), steps=(4, 2), side=comfy.side)
    told = await comfy.told(graph)

    percents = [percent for _, _, percent in told.steps]
    assert percents == [0.0, 16.7, 33.3, 50.0, 66.7, 66.7, 83.3, 100.0]
    details = [each.detail for each in told.progress if each.phase is Phase.SAMPLING]
    assert details == ["sampler 1 of 2"] * 5 + ["sampler 2 of 2"] * 3


# What it refuses.


@pytest.mark.parametrize(
    ("graph", "words"),
    [
        (
            sampled("absent.safetensors", seed=1, steps=1, side=64),
            ("node 4 (CheckpointLoaderSimple)", "ckpt_name", "'absent.safetensors'", CHECKPOINT),
        ),
        (changed(painted(), "1", width=0), ("node 1 (EmptyImage)", "width is 0", "from 1 to 16384")),
        (changed(painted(), "1", width="wide"), ("node 1 (EmptyImage)", "width is 'wide'", "an integer")),
        (changed(painted(), "1", color=None), ("node 1 (EmptyImage)", "color is missing", "an integer")),
        (changed(painted(), "2", images=["77", 0]), ("node 2 (SaveImage)", "images", "node 77", "1, 2")),
        (changed(painted(), "2", images=["1", 5]), ("node 2 (SaveImage)", "output 5", "which has 1")),
        (changed(painted(), "2", images="1"), ("node 2 (SaveImage)", "images is '1'", "IMAGE")),
        (
            changed(sampled(CHECKPOINT, seed=1, steps=1, side=64), "8", samples=["4", 0]),
            ("node 8 (VAEDecode)", "samples has to be LATENT", "is MODEL"),
        ),
        (
            changed(sampled(CHECKPOINT, seed=1, steps=1, side=64), "3", latent_image=["3", 0]),
            ("node 3 (KSampler)", "latent_image", "needs this node itself"),
        ),
        ({"1": node("SaveImag", images=["2", 0])}, ("node 1", "no class 'SaveImag'", "SaveImage")),
        ({"1": painted()["1"]}, ("no output node",)),
        (
            {**painted(), "3": node("PreviewImage")},
            ("node 3 (PreviewImage)", "images is missing", "a link to IMAGE"),
        ),
        (
            {
                **painted(),
                "3": changed(painted(), "1", width=0)["1"],
                "4": node("PreviewImage", images=["3", 0]),
            },
            ("would leave out a part", "node 3 (EmptyImage)", "width is 0"),
        ),
        (uploaded("absent.png", width=8, height=8), ("'absent.png'", "did not come with it")),
    ],
)
async def test_what_is_wrong_is_said_in_words(comfy: Comfy, graph: Graph, words: tuple[str, ...]) -> None:
    before = (await comfy.routes.get("/history")).json()
    with pytest.raises(InvalidRequestError) as refused:
        await comfy.told(graph)

    assert [word for word in words if word not in refused.value.message] == [], refused.value.message
    assert await comfy.queue() == ([], [])
    # What could be carried out in part was taken back before it ended, or as it did.
    assert len((await comfy.routes.get("/history")).json()) <= len(before) + 1


async def test_a_class_may_allow_what_its_list_does_not_have(comfy: Comfy) -> None:
    """An uploaded file is in a folder below, and the list has only those of the folder itself."""
    file = WorkflowFile(
        name="a.png", content_type="image/png", data=png(Picture(width_pixels=8, height_pixels=8))
    )
    graph = uploaded("a.png", width=8, height=8)
    listed = (await comfy.routes.get("/object_info/LoadImage")).json()["LoadImage"]["input"]["required"][
        "image"
    ]

    assert not any("/" in name for name in listed[0])
    assert len((await comfy.told(graph, files=[file])).files) == 1


# What fails.


async def test_a_node_that_fails_is_named(comfy: Comfy) -> None:
    file = WorkflowFile(name="cat.png", content_type="image/png", data=b"no picture at all")
    with pytest.raises(EngineFailedError) as failed:
        await comfy.told(uploaded("cat.png", width=8, height=8), files=[file])

    assert "node 1 (LoadImage) failed: PIL.UnidentifiedImageError" in failed.value.message


async def test_an_interrupt_by_somebody_else_is_told(comfy: Comfy) -> None:
    async def run() -> None:
        async with comfy.events(comfy.sampled(steps=_ENDLESS)) as events:
            async for event in events:
                if isinstance(event, PhaseProgress) and event.phase is Phase.SAMPLING:
                    await comfy.routes.post("/interrupt", json={})

    with pytest.raises(EngineFailedError, match=r"interrupted in ComfyUI at node 3 \(KSampler\)"):
        await run()


async def test_a_workflow_that_somebody_takes_out_of_the_queue_is_lost(comfy: Comfy) -> None:
    other = await comfy.submit(comfy.sampled(steps=_ENDLESS))
    await comfy.until_running(other)

    async def run() -> None:
        async with comfy.events(painted()) as events:
            async for event in events:
                assert isinstance(event, PhaseProgress)
                _, waiting = await comfy.queue()
                await comfy.routes.post("/queue", json={"delete": waiting})

    with pytest.raises(EngineFailedError, match="knows the workflow no more"):
        await run()
    assert (await comfy.queue())[0] == [other]


# Waiting, and cancelling.


async def test_it_waits_behind_others_and_says_where(comfy: Comfy) -> None:
    others = [await comfy.submit(comfy.sampled(steps=_ENDLESS)) for _ in range(2)]
    await comfy.until_running(others[0])
    details = []
    async with asyncio.timeout(PATIENCE_S), comfy.events(painted(color=next(SEEDS))) as events:
        async for event in events:
            if isinstance(event, PhaseProgress) and event.phase is Phase.QUEUED:
                details.append(event.detail)
                running, _ = await comfy.queue()
                await comfy.routes.post("/interrupt", json={"prompt_id": running[0]})

    assert details == ["2 ahead in ComfyUI's queue", "1 ahead in ComfyUI's queue"]


async def test_one_that_waits_is_cancelled_and_the_others_stay(comfy: Comfy) -> None:
    running = await comfy.submit(comfy.sampled(steps=_ENDLESS))
    await comfy.until_running(running)
    async with comfy.events(painted()) as events:
        first = await anext(events)
        behind = await comfy.submit(painted(color=next(SEEDS)))
        assert first.phase is Phase.QUEUED
        assert len((await comfy.queue())[1]) == 2

    assert await comfy.queue() == ([running], [behind])


async def test_one_that_runs_is_cancelled_and_the_others_go_on(comfy: Comfy) -> None:
    async with comfy.events(comfy.sampled(steps=_ENDLESS)) as events:
        async for event in events:
            if isinstance(event, PhaseProgress) and event.step:
                break
        behind = await comfy.submit(painted(color=next(SEEDS)))
    # Gone when `aclose` returns; the one behind it was not touched.
    running, waiting = await comfy.queue()
    assert [found for found in running + waiting if found != behind] == []
    await comfy.until_empty()
    history = (await comfy.routes.get(f"/history/{behind}")).json()
    assert history[behind]["status"]["status_str"] == "success"


async def test_a_task_that_is_cancelled_cancels_the_workflow(comfy: Comfy) -> None:
    sampling = asyncio.Event()

    async def read() -> None:
        async with comfy.events(comfy.sampled(steps=_ENDLESS)) as events:
            async for event in events:
                if isinstance(event, PhaseProgress) and event.step:
                    sampling.set()

    reading = asyncio.create_task(read())
    async with asyncio.timeout(PATIENCE_S):
        await sampling.wait()
    reading.cancel()
    with pytest.raises(asyncio.CancelledError):
        await reading
    await comfy.until_empty()


# Connections.


async def test_connections_that_are_cut_are_joined_again(comfy: Comfy) -> None:
    proxy = BreakableProxy(int(comfy.base_url.rpartition(":")[2]))
    await proxy.start()
    try:
        told: list[GenerationEvent] = []
        graph = comfy.sampled(steps=40)
        async with comfy.events(graph, base_url=f"http://{proxy.address}") as events:
            async for event in events:
                told.append(event)
                if isinstance(event, PhaseProgress) and event.step and event.step < 12:
                    proxy.cut()
    finally:
        await proxy.stop()
    steps = Told(told).steps
    # What was told before the cut, and what was told after it.
    assert steps[0] == (0, 40, 0.0)
    assert steps[-1] == (40, 40, 100.0)
    assert len(Told(told).files) == 1


async def test_a_history_that_somebody_clears_loses_nothing_that_was_told(comfy: Comfy) -> None:
    """The files are there, and their names were told."""
    clearing = asyncio.create_task(_clear_histories(comfy))
    try:
        for _ in range(5):
            assert len((await comfy.told(painted(16, 16, color=next(SEEDS)))).files) == 1
    finally:
        clearing.cancel()


async def _clear_histories(comfy: Comfy) -> None:
    while True:
        await comfy.routes.post("/history", json={"clear": True})
        await asyncio.sleep(0)


# What the simulator knows of nodes.


async def test_its_classes_take_and_give_the_same(comfy: Comfy) -> None:
    told = (await comfy.routes.get("/object_info")).json()
    ours = {name: node_class_of(kind.told(name)) for name, kind in node_kinds((CHECKPOINT,)).items()}
    # These need packages that are not everywhere.
    shared = {name for name in ours if name in told}
    assert ours.keys() - shared <= {"UpscaleModelLoader", "ImageUpscaleWithModel"}
    theirs = {name: node_class_of(told[name]) for name in shared}

    assert {name: _without_choices(ours[name]) for name in shared} == {
        name: _without_choices(theirs[name]) for name in shared
    }


def _without_choices(found: NodeClass) -> NodeClass:
    inputs = {
        name: msgspec.structs.replace(kind, choices=None if kind.choices is None else ())
        for name, kind in found.inputs.items()
    }
    return msgspec.structs.replace(found, inputs=inputs)


# Its end. These start one of their own.


@pytest.mark.parametrize("kind", ["simulator", pytest.param("real", marks=pytest.mark.real_comfyui)])
async def test_one_that_is_killed_is_unreachable_and_one_that_is_new_knows_nothing(
    kind: str, tmp_path: Path
) -> None:
    if kind == "real" and real_comfyui() is None:
        pytest.skip("there is no real ComfyUI: RUNG_COMFYUI_DIR names no checkout with a Python that runs it")
    real, side = kind == "real", REAL_SIDE if kind == "real" else SIMULATED_SIDE
    client = EngineClient()
    async with httpx.AsyncClient() as routes:
        pace = msgspec.structs.replace(_PACE, unreachable_s=1.0)
        async with comfyui_server(tmp_path, real=real) as engine:
            comfy = Comfy(engine.base_url, side, ComfyUiAdapter(client, pace=pace), routes)
            with pytest.raises(EngineUnreachableError):
                await _killed(comfy, engine)
        pace = msgspec.structs.replace(_PACE, unreachable_s=300.0)
        async with comfyui_server(tmp_path, real=real) as engine:
            comfy = Comfy(engine.base_url, side, ComfyUiAdapter(client, pace=pace), routes)
            waiting = asyncio.create_task(_killed(comfy, engine))
            await engine.exit_code(PATIENCE_S)
            port = int(engine.base_url.rpartition(":")[2])
            async with comfyui_server(tmp_path, real=real, port=port):
                with pytest.raises(EngineFailedError, match="knows the workflow no more"):
                    await waiting
    await client.aclose()


async def _killed(comfy: Comfy, engine: EngineProcess) -> None:
    async with comfy.events(comfy.sampled(steps=_ENDLESS)) as events:
        async for event in events:
            if isinstance(event, PhaseProgress) and event.step == 1:
                engine.process.kill()
            if isinstance(event, PhaseProgress) and event.phase is Phase.SAMPLING and not event.step:
                engine.process.kill()
