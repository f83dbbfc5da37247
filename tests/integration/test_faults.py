"""What breaks, and what the caller sees of it: simulated engines with faults, real processes, real kills."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import aiohttp
import grpc.aio
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from rung.errors import (
    DrainingError,
    EngineFailedError,
    EngineProtocolError,
    EngineStartFailedError,
    EngineTimeoutError,
    NotAllowedError,
    PinnedDeploymentError,
    RungError,
)
from rung.types import (
    FailureReason,
    JobCancelled,
    JobFailed,
    JobState,
    LifecycleFailed,
    Policy,
    Residency,
    TokenDelta,
)
from tests.integration.stack import Stack, engine_pids, stack

#: An answer that goes on for long enough to be broken off.
LONG = "count to 100000"


def simulated(deployment_id: str = "sim", faults: str = "", **fields: Any) -> dict[str, Any]:
    environment = {"RUNG_SIM_SPEED": "20", "RUNG_SIM_LOAD_S": "0.2"}
    if faults:
        environment["RUNG_SIM_FAULTS"] = faults
    return {
        "id": deployment_id,
        "model": deployment_id,
        "engine": {"kind": "llamacpp", "model_path": "/models/nemotron-8b-q4.gguf"},
        "runtime": {"kind": "process", "executable": "llama-server", "environment": environment},
        "stop_grace": "2s",
    } | fields


@pytest.fixture
async def running(tmp_path: Path) -> AsyncIterator[Stack]:
    async with stack(tmp_path, [simulated()]) as found:
        async for _ in found.client.start_deployment("sim"):
            pass
        yield found


async def _state(deployment_url: str) -> dict[str, Any]:
    async with aiohttp.ClientSession() as http, http.get(f"{deployment_url}/sim/state") as response:
        state: dict[str, Any] = await response.json()
        return state


async def _aborted(url: str) -> None:
    """Wait until the engine has noticed that a generation was broken off."""
    async with asyncio.timeout(10):
        while True:
            state = await _state(url)
            if state["aborted"] and not state["active"]:
                return
            await asyncio.sleep(0.05)


@pytest.mark.parametrize(
    ("fault", "error"),
    [
        ("http_500", EngineFailedError),
        ("hang", EngineTimeoutError),
        ("broken_sse", EngineProtocolError),
        ("cut_mid_stream", EngineProtocolError),
        ("error_frame_then_done", EngineFailedError),
    ],
)
async def test_a_faulty_engine_is_a_typed_error(tmp_path: Path, fault: str, error: type[RungError]) -> None:
    server = {"engine_idle_timeout": "1s"}
    async with stack(tmp_path, [simulated(faults=fault, slots=1)], server=server) as found:
        stream = found.client.chat("Tell me something", model="sim")
        with pytest.raises(error):
            await stream.result()
        assert stream.job_id
        job = await found.client.get_job(stream.job_id)
        assert job.state is JobState.FAILED
        # Nothing is locked: the next one gets the only slot, and fails in its own way.
        with pytest.raises(error):
            await found.client.chat("Again", model="sim").result()


async def test_an_engine_that_dies_while_loading_leaves_nothing(tmp_path: Path) -> None:
    async with stack(tmp_path, [simulated(faults="die_while_loading")]) as found:
        events = [event.payload async for event in found.client.start_deployment("sim")]
        failed = events[-1]
        assert isinstance(failed, LifecycleFailed)
        assert failed.reason is FailureReason.ENGINE_START_FAILED
        assert "exit code" in failed.detail
        assert engine_pids(tmp_path) == []
        with pytest.raises(EngineStartFailedError):
            await found.client.chat("Hello", model="sim").result()
        failed_deployment = await found.deployment("sim", Residency.FAILED)
        assert failed_deployment.failure_reason is FailureReason.ENGINE_START_FAILED


async def test_an_engine_that_is_never_ready_is_given_up(tmp_path: Path) -> None:
    async with stack(tmp_path, [simulated(faults="never_ready", start_timeout="1s")]) as found:
        events = [event.payload async for event in found.client.start_deployment("sim")]
        assert isinstance(events[-1], LifecycleFailed)
        assert "not ready within 1 s" in events[-1].detail
        assert engine_pids(tmp_path) == []


async def test_what_the_owner_does_not_permit_is_refused(tmp_path: Path) -> None:
    async with stack(tmp_path, [simulated()], agent={"executables": {}}) as found:
        with pytest.raises(NotAllowedError, match="executables"):
            async for _ in found.client.start_deployment("sim"):
                pass


async def test_a_pinned_engine_is_not_stopped(tmp_path: Path) -> None:
    async with stack(tmp_path, [simulated(residency_class="pinned", keep_running=True)]) as found:
        before = await found.deployment("sim", Residency.AWAKE)
        with pytest.raises(PinnedDeploymentError):
            async for _ in found.client.stop_deployment("sim"):
                pass
        after = await found.deployment("sim")
        assert (after.residency, after.pid) == (Residency.AWAKE, before.pid)


async def test_a_caller_that_leaves_frees_the_engine(running: Stack) -> None:
    endpoint = (await running.deployment("sim")).endpoint
    assert endpoint is not None
    stream = running.client.chat(LONG, model="sim", max_tokens=100_000)
    async for event in stream:
        if isinstance(event.payload, TokenDelta):
            break
    await stream.aclose()

    await _aborted(endpoint.base_url)
    assert stream.job_id
    events = [event async for event in running.client.watch_job(stream.job_id)]
    assert (await running.client.get_job(stream.job_id)).state is JobState.CANCELLED
    assert events[-1].payload.__class__.__name__ == "JobCancelled"


async def test_cancelling_reaches_the_engine_through_the_agent(tmp_path: Path) -> None:
    async with stack(tmp_path, [simulated()], server={"direct_relay": False}) as found:
        stream = found.client.chat(LONG, model="sim", max_tokens=100_000)
        async for event in stream:
            if isinstance(event.payload, TokenDelta):
                break
        endpoint = (await found.deployment("sim", Residency.AWAKE)).endpoint
        assert endpoint is not None
        assert stream.job_id
        await found.client.cancel_job(stream.job_id)
        await _aborted(endpoint.base_url)


@pytest.mark.parametrize("direct", [True, False], ids=["direct", "through the agent"])
async def test_the_agent_is_killed_in_mid_stream(tmp_path: Path, direct: bool) -> None:
    async with stack(tmp_path, [simulated()], server={"direct_relay": direct}) as found:
        stream = found.client.chat(LONG, model="sim", max_tokens=100_000)
        async for event in stream:
            if isinstance(event.payload, TokenDelta):
                break
        before = await found.deployment("sim", Residency.AWAKE)
        await found.agent.end(signal.SIGKILL)
        os.kill(before.pid, 0)
        assert stream.job_id
        if direct:
            # The engine is reached without its agent: the stream does not notice.
            async for event in stream:
                if isinstance(event.payload, TokenDelta):
                    break
            await stream.aclose()
        else:
            with pytest.raises(RungError):
                await stream.result()
            assert (await found.client.get_job(stream.job_id)).failure_reason is FailureReason.NODE_LOST
        await found.agent.start()
        await found.heard()
        after = await found.deployment("sim", Residency.AWAKE)
        assert (after.pid, after.generation) == (before.pid, before.generation)
        result = await found.client.chat("count to 3", model="sim").result()
        assert "3" in result.text


@pytest.mark.parametrize("direct", [True, False], ids=["direct", "through the agent"])
async def test_the_control_plane_is_killed_in_mid_stream(tmp_path: Path, direct: bool) -> None:
    async with stack(tmp_path, [simulated()], server={"direct_relay": direct}) as running:
        async for _ in running.client.start_deployment("sim"):
            pass
        before = await running.deployment("sim", Residency.AWAKE)
        assert before.endpoint is not None
        job = await running.client.create_job(
            LONG, model="sim", max_tokens=100_000, policy=Policy(detached=True)
        )
        seen = 0
        async for event in running.client.watch_job(job.id):
            seen = event.sequence
            if isinstance(event.payload, TokenDelta):
                break
        await running.plane.end(signal.SIGKILL)
        os.kill(before.pid, 0)
        # The connection to the engine broke with it, also that of an agent which lives on: nothing goes
        # on generating for nobody.
        await _aborted(before.endpoint.base_url)
        await running.plane.start()
        await running.connect()

        events = [event async for event in running.client.watch_job(job.id, after_sequence=seen)]
        assert all(event.sequence > seen for event in events)
        assert isinstance(events[-1].payload, JobFailed)
        ended = await running.client.get_job(job.id)
        assert ended.failure_reason is FailureReason.CONTROL_PLANE_RESTARTED
        after = await running.deployment("sim", Residency.AWAKE)
        assert after.pid == before.pid
        assert (await running.client.chat("count to 3", model="sim").result()).text


async def test_an_engine_that_is_killed_is_noticed_and_started_again(running: Stack) -> None:
    before = await running.deployment("sim", Residency.AWAKE)
    os.kill(before.pid, signal.SIGKILL)
    lost = await running.deployment("sim", Residency.FAILED)
    assert lost.failure_reason is FailureReason.ENGINE_LOST
    assert "SIGKILL" in lost.detail

    assert (await running.client.chat("count to 3", model="sim").result()).text
    after = await running.deployment("sim", Residency.AWAKE)
    assert after.generation == before.generation + 1


async def test_a_graceful_stop_lets_jobs_end(running: Stack) -> None:
    result = asyncio.ensure_future(running.client.chat("count to 40", model="sim").result())
    async with asyncio.timeout(10):
        # Another process brings it about.
        while (  # noqa: ASYNC110 - another process brings it about
            not [job async for job in running.client.list_jobs(states=[JobState.RUNNING])]
        ):
            await asyncio.sleep(0.02)

    assert await running.plane.end(signal.SIGTERM) == 0

    assert "40" in (await result).text
    await running.plane.start()


async def test_while_it_drains_it_says_so_takes_nothing_new_and_ends_what_lasts_too_long(
    running: Stack,
) -> None:
    health = health_pb2.HealthCheckRequest(service="rung.v1.InferenceService")
    job = await running.client.create_job(LONG, model="sim", policy=Policy(detached=True))
    events = aiter(running.client.watch_job(job.id))
    while not isinstance((await anext(events)).payload, TokenDelta):
        pass
    async with grpc.aio.insecure_channel(f"127.0.0.1:{running.plane.ready['grpc_port']}") as channel:
        said = aiter(health_pb2_grpc.HealthStub(channel).Watch(health))
        assert (await anext(said)).status == health_pb2.HealthCheckResponse.SERVING

        ending = asyncio.ensure_future(running.plane.end(signal.SIGTERM))

        assert (await anext(said)).status == health_pb2.HealthCheckResponse.NOT_SERVING
        with pytest.raises(DrainingError):
            await running.client.chat("Hello", model="sim").result()
        rest = [event.payload async for event in events]

    assert any(isinstance(each, TokenDelta) for each in rest), "it went on while there was time"
    assert rest[-1] == JobCancelled(by="drain")
    assert await ending == 0
    await running.plane.start()


async def test_a_second_signal_cuts_a_drain_short_and_callers_are_told(tmp_path: Path) -> None:
    async with stack(tmp_path, [simulated()], server={"drain": "10m"}) as found:
        async for _ in found.client.start_deployment("sim"):
            pass
        events = aiter(found.client.chat(LONG, model="sim"))
        while not isinstance((await anext(events)).payload, TokenDelta):
            pass
        ending = asyncio.ensure_future(found.plane.end(signal.SIGINT))
        async with asyncio.timeout(20):
            while "Ctrl-C or SIGTERM again ends it at once" not in found.plane.log():  # noqa: ASYNC110
                await asyncio.sleep(0.05)
        assert not ending.done()

        assert await found.plane.end(signal.SIGINT) == 0

        assert [event.payload async for event in events][-1] == JobCancelled(by="drain")
        assert await ending == 0
        assert str(tmp_path / "rung.yaml") in found.plane.log(), "it says which configuration it has"
        assert "no_nodes" not in found.plane.log()


async def test_an_external_engine_is_adopted_from_the_configuration(running: Stack, tmp_path: Path) -> None:
    endpoint = (await running.deployment("sim", Residency.AWAKE)).endpoint
    assert endpoint is not None
    other = tmp_path / "other"
    other.mkdir()
    external = {
        "id": "elsewhere",
        "model": "elsewhere",
        "engine": {"kind": "openai_compatible"},
        "runtime": {"kind": "external", "base_url": endpoint.base_url},
    }
    async with stack(other, [external]) as found:
        adopted = await found.deployment("elsewhere", Residency.AWAKE)
        assert adopted.pid == 0
        assert (await found.client.chat("count to 3", model="elsewhere").result()).text
        with pytest.raises(RungError, match="somebody else"):
            async for _ in found.client.stop_deployment("elsewhere"):
                pass
