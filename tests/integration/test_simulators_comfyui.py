"""The simulated ComfyUI as a real process, through its adapter, over HTTP and over its WebSocket."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp
import msgspec
import pytest

from nodeagent.engines import ComfyUiAdapter, EngineHealth
from nodeagent.simulators.gpu import SimulatedGpus, SimulatedGpuSpec
from rung.service import EngineClient
from rung.types import ComfyUiEngine, DeploymentSpec, EngineSpec, ProcessRuntime
from tests.integration.engine_process import EngineProcess, engine_process, free_port, python_module, until

GIB = 1024**3
#: What the process holds for using the GPU at all.
CONTEXT = GIB // 2
SPEC = DeploymentSpec(
    id="sim-comfyui",
    node_id="n1",
    model="comfyui",
    engine=EngineSpec(
        engine=ComfyUiEngine(reserve_vram_bytes=GIB // 2), runtime=ProcessRuntime(executable="comfyui")
    ),
)
CHECKPOINTS = {"lightning": 5 * GIB, "quality": 11 * GIB, "ultra": 19 * GIB}


@pytest.fixture
async def adapter() -> AsyncIterator[ComfyUiAdapter]:
    client = EngineClient()
    yield ComfyUiAdapter(client)
    await client.aclose()


@pytest.fixture
def gpus(tmp_path: Path) -> SimulatedGpus:
    gpu = SimulatedGpuSpec(name="RTX 5090", memory_total_bytes=32 * GIB)
    return SimulatedGpus.create(tmp_path / "gpus", gpus=[gpu])


Start = Callable[..., AbstractAsyncContextManager[EngineProcess]]


@pytest.fixture
def start(adapter: ComfyUiAdapter, gpus: SimulatedGpus, tmp_path: Path) -> Start:
    @asynccontextmanager
    async def started(*more: str, ready: bool = True, **environment: str) -> AsyncIterator[EngineProcess]:
        port = free_port()
        line = adapter.command_line(SPEC, listen_host="127.0.0.1", listen_port=port)
        given = {
            "RUNG_SIM_SPEED": "100",
            "RUNG_SIM_LOAD_S": "0.02",
            "RUNG_SIM_GPUS": str(tmp_path / "gpus"),
            "RUNG_SIM_CHECKPOINTS": ",".join(f"{name}={size}" for name, size in CHECKPOINTS.items()),
            **line.environment,
            **environment,
        }
        command = [*python_module("nodeagent.simulators.comfyui"), *line.arguments, *more]
        log_path = tmp_path / f"comfyui-{port}.log"
        async with engine_process(command, port=port, log_path=log_path, environment=given) as engine:
            if ready:
                await engine.become(EngineHealth.READY, adapter, SPEC)
            yield engine

    return started


def held(gpus: SimulatedGpus) -> int:
    return sum(process.gpu_bytes.get(0, 0) for process in gpus.read().processes)


def picture(checkpoint: str, *, seed: int = 1, steps: int = 4, side: int = 1024) -> dict[str, Any]:
    """A graph that samples once."""
    sampler = {"seed": seed, "steps": steps, "cfg": 7.0, "sampler_name": "euler", "scheduler": "normal"}
    links = {"model": ["4", 0], "positive": ["6", 0], "negative": ["7", 0], "latent_image": ["5", 0]}
    size = {"width": side, "height": side, "batch_size": 1}
    return {
        "4": {"class_type": "CheckpointLoaderSimple", "inputs": {"ckpt_name": checkpoint}},
        "5": {"class_type": "EmptyLatentImage", "inputs": size},
        "6": {"class_type": "CLIPTextEncode", "inputs": {"text": "a cat", "clip": ["4", 1]}},
        "7": {"class_type": "CLIPTextEncode", "inputs": {"text": "", "clip": ["4", 1]}},
        "3": {"class_type": "KSampler", "inputs": {**sampler, "denoise": 1.0, **links}},
        "8": {"class_type": "VAEDecode", "inputs": {"samples": ["3", 0], "vae": ["4", 2]}},
        "9": {"class_type": "SaveImage", "inputs": {"images": ["8", 0], "filename_prefix": "probe"}},
    }


def empty_picture() -> dict[str, Any]:
    """A graph without weights."""
    size = {"width": 64, "height": 64, "batch_size": 1, "color": 0}
    return {
        "1": {"class_type": "EmptyImage", "inputs": size},
        "2": {"class_type": "SaveImage", "inputs": {"images": ["1", 0], "filename_prefix": "probe"}},
    }


async def get(engine: EngineProcess, path: str) -> Any:
    async with aiohttp.ClientSession() as session, session.get(engine.base_url + path) as response:
        assert response.status == 200
        return await response.json()


async def post(engine: EngineProcess, path: str, body: object) -> tuple[int, Any]:
    data = body if isinstance(body, bytes) else msgspec.json.encode(body)
    async with (
        aiohttp.ClientSession() as session,
        session.post(engine.base_url + path, data=data) as response,
    ):
        text = await response.read()
        is_json = response.content_type == "application/json"
        return response.status, msgspec.json.decode(text) if is_json else text.decode()


async def submit(engine: EngineProcess, graph: dict[str, Any], **more: object) -> str:
    status, body = await post(engine, "/prompt", {"prompt": graph, **more})
    assert (status, body["node_errors"]) == (200, {})
    return str(body["prompt_id"])


async def ended(engine: EngineProcess, prompt_id: str) -> dict[str, Any]:
    """Its history, once there is one."""
    history: dict[str, dict[str, Any]] = {}
    async with asyncio.timeout(20):
        while not history:
            history = await get(engine, f"/history/{prompt_id}")
    return history[prompt_id]


class Events:
    """What a client is told."""

    def __init__(self, socket: aiohttp.ClientWebSocketResponse) -> None:
        self._socket = socket

    async def next(self) -> tuple[str, dict[str, Any]]:
        """The next event: its type and data. Previews are passed over."""
        async with asyncio.timeout(20):
            while isinstance((frame := await self._socket.receive()).data, bytes):
                pass
        message = msgspec.json.decode(frame.data)
        return message["type"], message["data"]

    async def until(self, event: str) -> dict[str, Any]:
        """The data of the next event of a type; others are passed over."""
        while True:
            found, data = await self.next()
            if found == event:
                return data

    async def of_prompt(self) -> list[tuple[str, dict[str, Any]]]:
        """All events until the frame that ends a prompt."""
        found: list[tuple[str, dict[str, Any]]] = []
        while not found or found[-1][0] != "executing" or found[-1][1]["node"] is not None:
            found.append(await self.next())
        return found

    async def send(self, text: str) -> None:
        """Say something."""
        await self._socket.send_str(text)


@asynccontextmanager
async def events_of(engine: EngineProcess, client_id: str) -> AsyncIterator[Events]:
    url = f"{engine.base_url}/ws?clientId={client_id}"
    async with aiohttp.ClientSession() as session, session.ws_connect(url) as socket:
        yield Events(socket)


# Starting.


async def test_its_port_opens_when_it_is_ready(
    start: Start, adapter: ComfyUiAdapter, gpus: SimulatedGpus
) -> None:
    async with start(ready=False, RUNG_SIM_LOAD_S="0.3") as engine:
        _, seen = await engine.become(EngineHealth.READY, adapter, SPEC)
        assert seen == [EngineHealth.ABSENT, EngineHealth.READY]
        assert held(gpus) == CONTEXT
        await until(lambda: "To see the GUI" in engine.log(), "the last milestone")
        steps = [found for text in engine.log().splitlines() if (found := adapter.load_progress(text))]
        assert [step.detail for step in steps] == [
            "found a GPU with 32768 MB",
            "custom nodes imported",
            "ready",
        ]
    assert held(gpus) == 0


async def test_it_may_die_while_it_starts(start: Start) -> None:
    async with start(ready=False, RUNG_SIM_FAULTS="die_while_loading") as engine:
        assert await engine.exit_code() == 1
        assert "ModuleNotFoundError" in engine.log()


async def test_it_may_never_be_ready(start: Start, adapter: ComfyUiAdapter) -> None:
    async with start(ready=False, RUNG_SIM_FAULTS="never_ready") as engine:
        await until(lambda: "custom nodes" in engine.log(), "it has imported its nodes")
        assert (await adapter.probe(engine.base_url, SPEC)).health is EngineHealth.ABSENT


async def test_a_full_gpu_does_not_let_it_start(start: Start, gpus: SimulatedGpus) -> None:
    gpus.set_unattributed(0, 32 * GIB)
    async with start(ready=False) as engine:
        assert await engine.exit_code() == 1
        assert "CUDA error: out of memory" in engine.log()


async def test_options_that_are_gone_are_refused(start: Start) -> None:
    async with start("--normalvram", ready=False) as engine:
        assert await engine.exit_code() == 2


async def test_health_may_hang(start: Start, adapter: ComfyUiAdapter) -> None:
    async with start() as engine:
        await post(engine, "/sim/faults", {"faults": ["hang_health"]})
        probe = await adapter.probe(engine.base_url, SPEC)

    assert (probe.health, probe.detail) == (EngineHealth.UNWELL, "did not answer within 2 s")


# Memory.


async def test_models_stay_until_they_are_freed(
    start: Start, adapter: ComfyUiAdapter, gpus: SimulatedGpus
) -> None:
    async with start(RUNG_SIM_SPEED="5") as engine, events_of(engine, "me") as events:
        await submit(engine, picture("lightning"), client_id="me")
        await events.until("progress")
        # Weights, and what sampling a megapixel takes.
        assert held(gpus) == CONTEXT + 6 * GIB
        await events.of_prompt()

        # PyTorch keeps what was worked with, and ComfyUI calls that free.
        (device,) = await adapter.devices(engine.base_url, SPEC)
        assert device.torch_total_bytes == 6 * GIB
        assert device.torch_free_bytes == GIB
        assert device.vram_free_bytes == 27 * GIB - CONTEXT
        assert device.free_for_others_bytes == 32 * GIB - held(gpus) == 26 * GIB - CONTEXT
        await until(lambda: held(gpus) == CONTEXT + 5 * GIB, "PyTorch gives it back when nothing comes")

        await adapter.free(engine.base_url, SPEC)
        await until(lambda: held(gpus) == CONTEXT, "the models are gone")


async def test_freeing_waits_for_the_prompt_that_runs(
    start: Start, adapter: ComfyUiAdapter, gpus: SimulatedGpus
) -> None:
    async with start(RUNG_SIM_SPEED="1") as engine, events_of(engine, "me") as events:
        await submit(engine, picture("lightning", steps=6), client_id="me")
        await events.until("progress")
        assert (await adapter.queue(engine.base_url, SPEC)).busy
        await adapter.free(engine.base_url, SPEC)
        await events.until("progress")
        assert held(gpus) == CONTEXT + 6 * GIB
        await events.of_prompt()
        await until(lambda: held(gpus) == CONTEXT, "the models are gone")
        assert not (await adapter.queue(engine.base_url, SPEC)).busy


async def test_a_flush_that_is_a_lie_changes_nothing(
    start: Start, adapter: ComfyUiAdapter, gpus: SimulatedGpus
) -> None:
    async with start(RUNG_SIM_FAULTS="free_ignored") as engine:
        await ended(engine, await submit(engine, picture("lightning")))
        await adapter.free(engine.base_url, SPEC)
        await ended(engine, await submit(engine, empty_picture()))
        assert held(gpus) >= CONTEXT + 5 * GIB


async def test_under_pressure_the_least_recently_used_model_goes(
    start: Start, adapter: ComfyUiAdapter, gpus: SimulatedGpus
) -> None:
    async with start() as engine:
        for name, seed in (("lightning", 1), ("quality", 1), ("lightning", 2)):
            await ended(engine, await submit(engine, picture(name, seed=seed)))
        assert (await get(engine, "/sim/state"))["models"] == ["quality", "lightning"]
        await ended(engine, await submit(engine, picture("ultra")))
        assert (await get(engine, "/sim/state"))["models"] == ["lightning", "ultra"]
        await adapter.free(engine.base_url, SPEC)
        await until(lambda: held(gpus) == CONTEXT, "the models are gone")


async def test_too_little_memory_fails_the_prompt_and_not_the_engine(
    start: Start, gpus: SimulatedGpus
) -> None:
    async with start() as engine, events_of(engine, "me") as events:
        await ended(engine, await submit(engine, picture("lightning", side=512)))
        gpus.set_unattributed(0, 20 * GIB)
        prompt_id = await submit(engine, picture("ultra"), client_id="me")
        error = await events.until("execution_error")
        history = await ended(engine, prompt_id)
        # It lets go of everything, also of what others loaded.
        assert held(gpus) == CONTEXT
        gpus.set_unattributed(0, 0)
        again = await ended(engine, await submit(engine, picture("ultra")))

    assert error["exception_type"] == "torch.OutOfMemoryError"
    assert (error["node_id"], error["node_type"]) == ("3", "KSampler")
    assert set(error["executed"]) == {"4", "5", "6", "7"}
    assert history["status"]["status_str"] == "error"
    assert history["status"]["completed"] is False
    assert history["status"]["messages"][-1][0] == "execution_error"
    assert again["status"]["status_str"] == "success"


async def test_too_little_memory_may_also_kill_it(start: Start, gpus: SimulatedGpus) -> None:
    async with start(RUNG_SIM_FAULTS="out_of_memory_kills") as engine:
        gpus.set_unattributed(0, 20 * GIB)
        await submit(engine, picture("ultra"))
        assert await engine.exit_code() == 1
        assert "CUDA error: out of memory" in engine.log()
        assert held(gpus) == 0


async def test_without_a_gpu_it_computes_on_the_cpu(
    start: Start, adapter: ComfyUiAdapter, gpus: SimulatedGpus
) -> None:
    async with start("--cpu") as engine:
        (device,) = await adapter.devices(engine.base_url, SPEC)
        history = await ended(engine, await submit(engine, picture("ultra", steps=1, side=64)))
        assert held(gpus) == 0

    assert (device.type, device.index) == ("cpu", None)
    assert history["status"]["completed"]


# What a client is told.


async def test_a_client_is_told_of_its_prompt_in_order(start: Start) -> None:
    async with start() as engine, events_of(engine, "me") as events:
        first, hello = await events.next()
        assert (first, hello["sid"]) == ("status", "me")
        assert hello["status"] == {"exec_info": {"queue_remaining": 0}}
        prompt_id = await submit(engine, picture("lightning", steps=3), client_id="me")
        found = await events.of_prompt()
        history = (await get(engine, f"/history/{prompt_id}"))[prompt_id]

    kinds = [kind for kind, _ in found if kind not in {"status", "progress_state"}]
    start_of_it = ["execution_start", "execution_cached"]
    nodes = ["executing"] * 5 + ["progress"] * 3 + ["executing"] * 2 + ["executed"]
    assert kinds == [*start_of_it, *nodes, "execution_success", "executing"]
    assert [data["value"] for kind, data in found if kind == "progress"] == [1, 2, 3]
    assert {data["max"] for kind, data in found if kind == "progress"} == {3}
    assert all(data["prompt_id"] == prompt_id for kind, data in found if kind != "status")
    states = [data["nodes"] for kind, data in found if kind == "progress_state"][-1]
    assert {node["state"] for node in states.values()} == {"finished"}
    image = {"filename": "probe_00001_.png", "subfolder": "", "type": "output"}
    assert next(data["output"] for kind, data in found if kind == "executed") == {"images": [image]}
    # The history is there when the last frame is.
    assert history["outputs"] == {"9": {"images": [image]}}
    assert history["status"]["status_str"] == "success"
    assert [message[0] for message in history["status"]["messages"]] == [*start_of_it, "execution_success"]
    assert history["prompt"][1] == prompt_id


async def test_the_same_again_is_answered_from_what_is_known(start: Start, adapter: ComfyUiAdapter) -> None:
    async with start() as engine, events_of(engine, "me") as events:
        await submit(engine, picture("lightning"), client_id="me")
        await events.of_prompt()
        await submit(engine, picture("lightning"), client_id="me")
        again = await events.of_prompt()
        await adapter.free(engine.base_url, SPEC)
        await submit(engine, picture("lightning"), client_id="me")
        anew = await events.of_prompt()

    cached = [data["nodes"] for kind, data in again + anew if kind == "execution_cached"]
    assert cached == [["4", "5", "6", "7", "3", "8", "9"], []]
    assert "progress" not in [kind for kind, _ in again]
    assert [data["node"] for kind, data in again if kind == "executed"] == ["9"]
    assert "progress" in [kind for kind, _ in anew]


async def test_a_prompt_without_a_client_is_told_to_nobody_but_its_progress_to_all(start: Start) -> None:
    async with start() as engine, events_of(engine, "me") as events:
        await events.next()
        await ended(engine, await submit(engine, picture("lightning", steps=2)))
        await submit(engine, empty_picture(), client_id="me")
        kinds = []
        while (found := await events.next())[0] != "execution_start":
            kinds.append(found[0])

    assert set(kinds) == {"status", "progress", "progress_state"}


async def test_an_old_connection_takes_the_new_one_with_it(start: Start) -> None:
    """As the real one: events then stop without a word, and the history is what remains."""
    async with start() as engine, aiohttp.ClientSession() as session:
        url = f"{engine.base_url}/ws?clientId=me"
        old = await session.ws_connect(url)
        await old.receive()
        async with events_of(engine, "me") as events:
            await events.next()
            await old.close()
            await ended(engine, await submit(engine, empty_picture(), client_id="me"))
            await events.send('{"type": "feature_flags", "data": {}}')
            kind, flags = await events.next()

    assert (kind, flags["supports_preview_metadata"]) == ("feature_flags", True)


async def test_events_may_be_cut_and_the_prompt_goes_on(start: Start) -> None:
    async with start(RUNG_SIM_FAULTS="cut_mid_stream") as engine:
        async with events_of(engine, "me") as events:
            prompt_id = await submit(engine, picture("lightning"), client_id="me")
            with pytest.raises(TypeError):
                await events.of_prompt()
        assert (await ended(engine, prompt_id))["status"]["status_str"] == "success"


# The queue.


async def test_prompts_run_in_the_order_of_their_numbers(start: Start, adapter: ComfyUiAdapter) -> None:
    async with start(RUNG_SIM_FAULTS="hang") as engine:
        first = await submit(engine, picture("lightning"))
        running: list[Any] = []
        async with asyncio.timeout(10):
            while not running:
                running = (await get(engine, "/queue"))["queue_running"]
        second, third = [await submit(engine, empty_picture()) for _ in range(2)]
        urgent = await submit(engine, empty_picture(), front=True)
        queue = await get(engine, "/queue")
        counted = await adapter.queue(engine.base_url, SPEC)
        remaining = await get(engine, "/prompt")
        deleted = await post(engine, "/queue", {"delete": [second, "unknown"]})
        left = await get(engine, "/queue")
        await post(engine, "/sim/faults", {"faults": []})
        await ended(engine, third)
        history = await get(engine, "/history")

    assert [row[1] for row in queue["queue_running"]] == [first]
    assert [row[1] for row in queue["queue_pending"]] == [urgent, second, third]
    assert (counted.running, counted.pending) == (1, 3)
    assert remaining == {"exec_info": {"queue_remaining": 4}}
    assert deleted == (200, "")
    assert [row[1] for row in left["queue_pending"]] == [urgent, third]
    # What was deleted leaves no trace.
    assert list(history) == [first, urgent, third]


async def test_an_interrupt_stops_the_prompt_at_its_next_step(start: Start) -> None:
    async with start(RUNG_SIM_SPEED="1") as engine, events_of(engine, "me") as events:
        prompt_id = await submit(engine, picture("lightning", steps=200), client_id="me")
        await events.until("progress")
        await post(engine, "/interrupt", {"prompt_id": str(uuid.uuid4())})
        await events.until("progress")
        assert (await post(engine, "/interrupt", {"prompt_id": prompt_id}))[0] == 200
        stopped = await events.until("execution_interrupted")
        assert (await events.until("executing"))["node"] is None
        history = await ended(engine, prompt_id)
        again = await submit(engine, picture("lightning", seed=2, steps=1))
        assert (await ended(engine, again))["status"]["status_str"] == "success"

    assert (stopped["node_id"], stopped["node_type"]) == ("3", "KSampler")
    assert (history["status"]["status_str"], history["outputs"]) == ("error", {})


async def test_the_history_can_be_cleared(start: Start) -> None:
    async with start() as engine:
        prompts = [await submit(engine, empty_picture()) for _ in range(3)]
        await ended(engine, prompts[-1])
        assert list(await get(engine, "/history?max_items=2")) == prompts[1:]
        await post(engine, "/history", {"delete": [prompts[0]]})
        assert list(await get(engine, "/api/history")) == prompts[1:]
        await post(engine, "/history", {"clear": True})
        assert await get(engine, "/history") == {}


# Refusals.


def broken(node_id: str, **inputs: object) -> dict[str, Any]:
    graph = picture("lightning")
    given = {**graph[node_id]["inputs"], **inputs}
    kept = {name: value for name, value in given.items() if value is not None}
    return {**graph, node_id: {**graph[node_id], "inputs": kept}}


@pytest.mark.parametrize(
    ("graph", "node_id", "kind"),
    [
        (broken("3", seed=None), "3", "required_input_missing"),
        (broken("3", steps=0), "3", "value_smaller_than_min"),
        (broken("3", cfg=101.0), "3", "value_bigger_than_max"),
        (broken("5", width="wide"), "5", "invalid_input_type"),
        (broken("4", ckpt_name="absent"), "4", "value_not_in_list"),
        (broken("8", samples=["3"]), "8", "bad_linked_input"),
        (broken("8", samples=["4", 0]), "8", "return_type_mismatch"),
        (broken("8", samples=["77", 0]), "8", "exception_during_inner_validation"),
        (broken("3", latent_image=["3", 0]), "3", "dependency_cycle"),
    ],
)
async def test_what_is_wrong_with_a_node_is_said(
    start: Start, graph: dict[str, Any], node_id: str, kind: str
) -> None:
    async with start() as engine:
        status, body = await post(engine, "/prompt", {"prompt": graph})

    assert (status, body["error"]["type"]) == (400, "prompt_outputs_failed_validation")
    assert list(body["node_errors"]) == [node_id]
    assert [error["type"] for error in body["node_errors"][node_id]["errors"]] == [kind]
    assert body["node_errors"][node_id]["dependent_outputs"] == ["9"]
    assert body["node_errors"][node_id]["class_type"] == graph[node_id]["class_type"]


async def test_other_refusals_have_their_own_types(start: Start) -> None:
    no_output = {"1": empty_picture()["1"]}
    stranger = {"1": {"class_type": "Stranger", "inputs": {}}}
    async with start() as engine:
        found = {
            "no_prompt": await post(engine, "/prompt", {}),
            "prompt_no_outputs": await post(engine, "/prompt", {"prompt": no_output}),
            "invalid_prompt": await post(engine, "/prompt", {"prompt": stranger}),
            "invalid_prompt_id": await post(
                engine, "/prompt", {"prompt": empty_picture(), "prompt_id": "mine"}
            ),
        }
        not_json = [await post(engine, path, b"oops") for path in ("/prompt", "/free")]
        own = str(uuid.uuid4())
        assert await submit(engine, empty_picture(), prompt_id=own) == own
        await post(engine, "/sim/faults", {"faults": ["http_500"]})
        faulty = await post(engine, "/prompt", {"prompt": empty_picture()})

    assert {body["error"]["type"]: status for status, body in found.values()} == dict.fromkeys(found, 400)
    assert [status for status, _ in not_json] == [500, 500]
    assert faulty[0] == 500


async def test_a_bad_output_is_skipped_while_another_is_well(start: Start) -> None:
    graph = {
        **empty_picture(),
        "3": {"class_type": "PreviewImage", "inputs": {}},
    }
    async with start() as engine:
        status, body = await post(engine, "/prompt", {"prompt": graph})
        history = await ended(engine, body["prompt_id"])

    assert status == 200
    assert [error["type"] for error in body["node_errors"]["3"]["errors"]] == ["required_input_missing"]
    assert list(history["outputs"]) == ["2"]
