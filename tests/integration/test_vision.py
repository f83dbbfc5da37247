"""A picture in a chat, on real processes: an engine that sees is started for it beside a pinned one."""

from __future__ import annotations

import asyncio
import base64
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from nodeagent.simulators._png import paint_png
from nodeagent.simulators.gpu import SimulatedGpus, SimulatedGpuSpec
from rung import ChatMessage, Policy
from rung.errors import InvalidRequestError
from rung.types import ImagePart, LifecycleFailed, Residency, Routed
from tests.integration.stack import Stack, stack

GIB = 1 << 30
PICTURE = paint_png(b"a receipt", 16, 16)


@pytest.fixture
async def box(tmp_path: Path) -> AsyncIterator[Stack]:
    """A card of 24 GiB: an orchestrator has 12, and what sees takes 6, its projector aside."""
    gpus = tmp_path / "gpus"
    SimulatedGpus.create(gpus, gpus=[SimulatedGpuSpec(name="one", memory_total_bytes=24 * GIB)])
    environment = {"RUNG_SIM_GPUS": str(gpus), "RUNG_SIM_SPEED": "50", "RUNG_SIM_LOAD_S": "0.3"}
    vllm: dict[str, Any] = {"kind": "vllm", "max_model_len_tokens": 4096, "sleep_mode": True}
    deployments: list[dict[str, Any]] = [
        {
            "id": "orchestrator",
            "model": "nemotron-8b",
            "residency_class": "pinned",
            "shrinkable": True,
            "engine": vllm | {"model": "nemotron-8b-awq", "gpu_memory_utilization": 0.5},
            "runtime": {"kind": "process", "executable": "vllm", "environment": environment},
        },
        {
            "id": "vision",
            "model": "qwen2.5-vl-7b",
            "capabilities": ["chat", "vision"],
            "context_tokens": 4096,
            "idle_timeout": "2s",
            "max_grade": "quick",
            "vram": 6 * GIB,
            "engine": {
                "kind": "llamacpp",
                "model_path": "/models/qwen2.5-vl-7b-instruct-q4_k_m.gguf",
                "projector_path": "/models/mmproj-qwen2.5-vl-7b-f16.gguf",
                "context_tokens": 4096,
            },
            "runtime": {"kind": "process", "executable": "llama-server", "environment": environment},
        },
    ]
    # More than is free, though the orchestrator could give of its cache.
    deployments.append(deployments[-1] | {"id": "gemma", "model": "gemma-27b", "vram": 16 * GIB})
    ladder = {
        "chains": {"chat": ["orchestrator"], "vision": ["vision"]},
        "rungs": [
            {"name": "chat", "chain": "chat"},
            {"name": "vision", "modality": "vision", "capabilities": ["vision"], "chain": "vision"},
        ],
    }
    server = {"max_request_bytes": 1 << 18}
    agent = {"simulated_gpus": str(gpus)}
    async with stack(tmp_path, deployments, agent=agent, ladder=ladder, server=server) as found:
        last = [event async for event in found.client.start_deployment("orchestrator")][-1]
        assert not isinstance(last.payload, LifecycleFailed), last
        yield found


def asking(*urls: str, **more: Any) -> dict[str, Any]:
    parts: list[dict[str, Any]] = [{"type": "text", "text": "What is it?"}]
    parts += [{"type": "image_url", "image_url": {"url": url}} for url in urls]
    return {"messages": [{"role": "user", "content": parts}], **more}


def data_url(data: bytes = PICTURE) -> str:
    return f"data:image/png;base64,{base64.b64encode(data).decode()}"


async def chat(box: Stack, body: dict[str, Any]) -> tuple[int, dict[str, Any]]:
    url = f"{box.http}/v1/chat/completions"
    async with asyncio.timeout(60), aiohttp.ClientSession() as http, http.post(url, json=body) as response:
        return response.status, await response.json()


async def test_what_sees_is_started_in_what_is_free_answers_and_is_stopped_when_idle(box: Stack) -> None:
    before = await box.deployment("orchestrator", Residency.AWAKE)
    assert (await box.deployment("vision")).residency is Residency.STOPPED

    # One that the engine fetches itself is passed on as it is.
    status, answer = await chat(box, asking(data_url(), "https://example.org/cat.png"))

    assert status == 200, answer
    assert answer["rung"]["target"] == "vision"
    assert "Pictures beside them: 2" in answer["choices"][0]["message"]["content"]
    await box.deployment("vision", Residency.STOPPED)

    # The same in our own types, and private.
    message = ChatMessage("user", "And this?", images=(ImagePart(content_type="image/png", data=PICTURE),))
    async with asyncio.timeout(60), box.client.chat((message,), policy=Policy(local_only=True)) as stream:
        events = [event async for event in stream]
        result = await stream.result()
    assert [each.payload.served.target for each in events if isinstance(each.payload, Routed)][-1] == "vision"
    assert "Pictures beside them: 1" in result.text
    await box.deployment("vision", Residency.STOPPED)

    after = await box.deployment("orchestrator", Residency.AWAKE)
    assert (after.pid, after.vram_bytes) == (before.pid, before.vram_bytes)


async def test_what_cannot_be_seen_is_refused_before_an_engine_is_started(box: Stack) -> None:
    status, refused = await chat(box, asking(data_url(), model="nemotron-8b"))
    assert status == 400
    assert refused["error"]["message"] == "nemotron-8b cannot do vision; as configured it can do chat"
    message = ChatMessage("user", "?", images=(ImagePart(content_type="text/html", data=b"<p>"),))
    with pytest.raises(InvalidRequestError, match="it must be image/"):
        await box.client.chat((message,)).result()

    status, refused = await chat(box, asking(data_url(bytes(1 << 19))))
    assert (status, refused["error"]["code"]) == (413, "request_too_large")

    status, refused = await chat(box, asking(*[data_url()] * 20))
    assert status == 503
    assert "about 5," in refused["error"]["message"]
    assert (await box.deployment("vision")).residency is Residency.STOPPED


async def test_where_it_does_not_fit_beside_the_pinned_one_nobody_gives_way(box: Stack) -> None:
    status, refused = await chat(box, asking(data_url(), model="gemma-27b"))
    assert status == 503
    assert "at grade quick" in refused["error"]["message"]
    assert (await box.deployment("orchestrator")).residency is Residency.AWAKE
