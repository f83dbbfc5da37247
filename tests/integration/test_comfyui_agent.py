"""A ComfyUI that the agent runs carries out workflows that a control plane sends to the agent."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import grpc.aio
import httpx
import msgspec
import pytest

from rung import codec, v1
from rung.codec import GenerationEvent
from rung.transport import ChannelOptions, open_channel
from rung.types import (
    ArtifactChunk,
    ComfyUiEngine,
    DeploymentSpec,
    EngineSpec,
    Phase,
    PhaseProgress,
    ProcessRuntime,
    WorkflowFile,
    WorkflowInput,
)
from tests.engines.agent_node import AgentNode, agent_node
from tests.engines.comfyui_graphs import Graph, sampled, uploaded
from tests.integration.engine_process import python_module

CHECKPOINT = "lightning.safetensors"
SPEC = DeploymentSpec(
    id="pictures",
    node_id="box",
    model="comfyui",
    engine=EngineSpec(engine=ComfyUiEngine(), runtime=ProcessRuntime(executable="comfyui"), stop_grace_s=2.0),
)


@pytest.fixture
async def node(tmp_path: Path) -> AsyncIterator[AgentNode]:
    path, *arguments = python_module("nodeagent.simulators.comfyui")
    comfyui = {
        "path": path,
        "arguments_prefix": arguments,
        "environment": {
            "RUNG_SIM_LOAD_S": "0.1",
            "RUNG_SIM_SPEED": "4",
            "RUNG_SIM_CHECKPOINTS": f"{CHECKPOINT}=1000",
        },
    }
    async with agent_node(tmp_path, {"comfyui": comfyui}) as running:
        yield running


@asynccontextmanager
async def call_of(
    node: AgentNode, graph: Graph, *, files: tuple[WorkflowFile, ...] = (), previews: bool = False
) -> AsyncIterator[Any]:
    wanted = WorkflowInput(graph_json=msgspec.json.encode(graph), files=files, previews=previews)
    request = v1.RunGenerationRequest(job_id="job-1", deployment_id=SPEC.id)
    codec.write_generation_input(wanted, request)
    async with open_channel(ChannelOptions(address=f"127.0.0.1:{node.agent.ready['port']}")) as channel:
        assert isinstance(channel, grpc.aio.Channel)
        call = v1.NodeAgentServiceStub(channel).RunGeneration(request)
        yield call
        call.cancel()


async def events_of(call: Any) -> list[GenerationEvent]:
    found = [codec.generation_event_from_proto(message) async for message in call]
    return [event for event in found if event is not None]


async def test_a_workflow_is_carried_out_by_the_agents_comfyui(node: AgentNode) -> None:
    await node.start(SPEC)
    async with call_of(node, sampled(CHECKPOINT, seed=1, steps=5, side=512), previews=True) as call:
        events = await events_of(call)

    told = [event for event in events if isinstance(event, PhaseProgress)]
    phases = list(dict.fromkeys(event.phase for event in told if event.phase is not Phase.QUEUED))
    assert phases == [Phase.MODEL_SWAP, Phase.SAMPLING, Phase.ENCODING]
    steps = [(event.step, event.total) for event in told if event.phase is Phase.SAMPLING]
    assert steps == [(step, 5) for step in range(6)]
    chunks = [event for event in events if isinstance(event, ArtifactChunk)]
    assert any(chunk.preview for chunk in chunks)
    data = b"".join(chunk.data for chunk in chunks if not chunk.preview)
    last = chunks[-1]
    assert data.startswith(b"\x89PNG")
    assert (last.sha256, last.size_bytes) == (hashlib.sha256(data).hexdigest(), len(data))


async def test_files_travel_with_the_workflow(node: AgentNode) -> None:
    await node.start(SPEC)
    picture = b"\x89PNG\r\n\x1a\n" + bytes(700_000)
    file = WorkflowFile(name="in.png", content_type="image/png", data=picture)
    async with call_of(node, uploaded("in.png", width=32, height=16), files=(file,)) as call:
        events = await events_of(call)

    (chunk,) = [event for event in events if isinstance(event, ArtifactChunk)]
    assert int.from_bytes(chunk.data[16:20], "big") == 32


async def test_a_workflow_that_is_wrong_is_refused_as_the_callers_fault(node: AgentNode) -> None:
    await node.start(SPEC)
    async with call_of(node, sampled("absent.safetensors", seed=1, steps=1, side=64)) as call:
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await events_of(call)

    assert refused.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert "'absent.safetensors'" in (refused.value.details() or "")
    assert CHECKPOINT in (refused.value.details() or "")


async def test_a_caller_that_leaves_cancels_its_workflow(node: AgentNode) -> None:
    started = await node.start(SPEC)
    assert started.deployment.endpoint is not None
    async with (
        httpx.AsyncClient(base_url=started.deployment.endpoint.base_url) as comfyui,
        call_of(node, sampled(CHECKPOINT, seed=1, steps=5000, side=512)) as call,
    ):
        async for message in call:
            event = codec.generation_event_from_proto(message)
            if isinstance(event, PhaseProgress) and event.step:
                break
        prompt = (await comfyui.get("/queue")).json()["queue_running"][0][1]
        call.cancel()
        history: dict[str, Any] = {}
        async with asyncio.timeout(20):
            while not history:
                history = (await comfyui.get(f"/history/{prompt}")).json()
    messages = [event for event, _ in history[prompt]["status"]["messages"]]
    assert messages[-1] == "execution_interrupted"
