"""An agent that is told to stop while it serves: real processes, real signals."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc.aio
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from rung.errors import RungError
from rung.types import (
    EventPayload,
    JobDone,
    JobFailed,
    Policy,
    Residency,
    TokenDelta,
)
from tests.integration.stack import Stack, engine_pids, stack

#: Answers that go on for some seconds, and for longer than any test.
SOME = "count to 400"
LONG = "count to 100000"
#: How an agent is seen to have heard a signal.
HEALTH = health_pb2.HealthCheckRequest(service="rung.v1.NodeAgentService")


def simulated() -> dict[str, Any]:
    return {
        "id": "sim",
        "model": "sim",
        "engine": {"kind": "llamacpp", "model_path": "/models/nemotron-8b-q4.gguf"},
        "runtime": {
            "kind": "process",
            "executable": "llama-server",
            "environment": {"RUNG_SIM_SPEED": "2", "RUNG_SIM_LOAD_S": "0.2"},
        },
        "stop_grace": "2s",
    }


@pytest.fixture
async def running(tmp_path: Path) -> AsyncIterator[Stack]:
    """A control plane that reaches its engine through the agent alone."""
    async with stack(tmp_path, [simulated()], server={"direct_relay": False}) as found:
        async for _ in found.client.start_deployment("sim"):
            pass
        yield found


async def _begun(running: Stack, prompt: str) -> AsyncIterator[EventPayload]:
    """What follows of a job whose answer has begun."""
    job = await running.client.create_job(prompt, model="sim", policy=Policy(detached=True))
    events = aiter(running.client.watch_job(job.id))
    while not isinstance((await anext(events)).payload, TokenDelta):
        pass

    async def rest() -> AsyncIterator[EventPayload]:
        async for event in events:
            yield event.payload

    return rest()


async def _told_to_stop(running: Stack) -> asyncio.Task[int]:
    """Send SIGTERM, and return once the agent says that it serves no more; its exit code comes."""
    async with grpc.aio.insecure_channel(f"127.0.0.1:{running.agent.ready['port']}") as channel:
        said = aiter(health_pb2_grpc.HealthStub(channel).Watch(HEALTH))
        assert (await anext(said)).status == health_pb2.HealthCheckResponse.SERVING
        ending = asyncio.create_task(running.agent.end(signal.SIGTERM))
        async with asyncio.timeout(10):
            assert (await anext(said)).status == health_pb2.HealthCheckResponse.NOT_SERVING
    return ending


async def test_a_generation_ends_through_an_agent_that_was_told_to_stop_and_no_other_begins(
    running: Stack, tmp_path: Path
) -> None:
    engines = engine_pids(tmp_path)
    before = await running.deployment("sim", Residency.AWAKE)
    rest = await _begun(running, SOME)

    ending = await _told_to_stop(running)
    with pytest.raises(RungError, match="the agent of box is shutting down and begins nothing new"):
        await running.client.chat("Hello", model="sim").result()
    assert not ending.done()
    payloads = [payload async for payload in rest]

    assert "400" in "".join(each.content for each in payloads if isinstance(each, TokenDelta))
    assert isinstance(payloads[-1], JobDone)
    assert await ending == 0
    assert engine_pids(tmp_path) == engines, "engines go on"
    await running.agent.start()
    await running.heard()
    after = await running.deployment("sim", Residency.AWAKE)
    assert (after.pid, after.generation) == (before.pid, before.generation)
    assert (await running.client.chat("count to 3", model="sim").result()).text


async def test_a_second_signal_cuts_what_runs_in_words(running: Stack) -> None:
    rest = await _begun(running, LONG)

    ending = await _told_to_stop(running)
    os.kill(running.agent.ready["pid"], signal.SIGINT)

    async with asyncio.timeout(10):
        assert await ending == 0
        payloads = [payload async for payload in rest]
    failed = payloads[-1]
    assert isinstance(failed, JobFailed)
    assert failed.detail == "the agent of box shut down before this generation ended"
    assert "generations_cut" in running.agent.log()
    await running.agent.start()


async def test_an_agent_that_only_waits_stops_without_waiting(running: Stack) -> None:
    # Its stream stays open after it, and the control plane watches.
    assert (await running.client.chat("count to 3", model="sim").result()).text

    async with asyncio.timeout(10):
        assert await running.agent.end(signal.SIGTERM) == 0

    await running.agent.start()
