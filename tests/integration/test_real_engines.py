"""One request, end to end, on real parts: a real llama.cpp, in a process and in a container."""

from __future__ import annotations

import importlib.util
import signal
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import openai
import pytest

from rung.types import Policy, Residency, TokenDelta
from tests.integration.docker_engine import (
    IMAGE,
    build_empty_image,
    permitted_mounts,
    python_runtime,
    require_docker,
)
from tests.integration.stack import LLAMA_CPP_PYTHON, Stack, stack
from tests.integration.tiny_gguf import CONTEXT_TOKENS, write_tiny_gguf

pytestmark = [
    pytest.mark.llamacpp,
    pytest.mark.skipif(
        importlib.util.find_spec("llama_cpp") is None, reason="llama-cpp-python is not installed"
    ),
]


def _deployment(model: Path, runtime: dict[str, Any]) -> dict[str, Any]:
    return {
        "id": "tiny",
        "model": "tiny-random",
        "slots": 1,
        "engine": {
            "kind": "llamacpp",
            "server": "llama-cpp-python",
            "model_path": str(model),
            "context_tokens": CONTEXT_TOKENS,
            "gpu_layers": 0,
        },
        "runtime": runtime,
    }


@pytest.fixture(params=["process", pytest.param("docker", marks=pytest.mark.docker)])
async def real(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[Stack]:
    model = write_tiny_gguf(tmp_path / "tiny.gguf")
    agent: dict[str, Any]
    if request.param == "docker":
        client = require_docker()
        build_empty_image(client)
        client.close()
        runtime = python_runtime(tmp_path)
        runtime["command"] = [sys.executable, "-m", "llama_cpp.server"]
        agent = {"images": [IMAGE], "mount_folders": permitted_mounts()}
    else:
        runtime = {"kind": "process", "executable": "llama-cpp-python"}
        agent = {"executables": {"llama-cpp-python": LLAMA_CPP_PYTHON}}
    async with stack(tmp_path, [_deployment(model, runtime)], agent=agent) as running:
        try:
            yield running
        finally:
            async for _ in running.client.stop_deployment("tiny"):
                pass


@pytest.mark.timeout(240)
async def test_a_real_engine_answers_every_client(real: Stack) -> None:
    # The SDK; the engine is started on demand.
    stream = real.client.chat("Hello", model="tiny-random", max_tokens=16)
    events = [event async for event in stream]
    text = "".join(event.payload.content for event in events if isinstance(event.payload, TokenDelta))
    assert text
    assert [event.sequence for event in events if event.sequence] == list(
        range(1, 1 + sum(1 for event in events if event.sequence))
    )

    # The official OpenAI client, streaming and not.
    wish: Any = {
        "model": "tiny-random",
        "messages": [{"role": "user", "content": "Hello"}],
        "max_tokens": 16,
        "temperature": 0,
        "seed": 7,
    }
    async with openai.AsyncOpenAI(base_url=f"{real.http}/v1", api_key="none", max_retries=0) as client:
        chunks = [chunk async for chunk in await client.chat.completions.create(**wish, stream=True)]
        streamed = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
        whole = await client.chat.completions.create(**wish)
    assert streamed
    assert whole.choices[0].message.content == streamed
    assert whole.usage is not None
    assert whole.usage.completion_tokens == 16

    # The agent dies and comes back: the engine was not disturbed.
    before = await real.deployment("tiny", Residency.AWAKE)
    await real.agent.end(signal.SIGKILL)
    await real.agent.start()
    # What was known of it before would look the same.
    await real.heard()
    after = await real.deployment("tiny", Residency.AWAKE)
    assert (after.pid, after.container_id, after.generation) == (
        before.pid,
        before.container_id,
        before.generation,
    )
    job = await real.client.create_job(
        "Again", model="tiny-random", max_tokens=4, policy=Policy(detached=True)
    )
    events = [event async for event in real.client.watch_job(job.id)]
    assert any(isinstance(event.payload, TokenDelta) for event in events)
