"""Two engines that cannot both be awake take turns on one GPU: the real agent, and engines as processes."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc.aio
import pytest
import yaml

from nodeagent.simulators.gpu import SimulatedGpus, SimulatedGpuSpec
from rung import codec, v1
from rung.errors import DeadlineExceededError
from rung.transport import ChannelOptions, error_from_rpc, open_channel
from rung.types import (
    Deployment,
    DeploymentSpec,
    EngineSpec,
    FailureReason,
    LifecycleDone,
    LifecycleFailed,
    LifecyclePayload,
    ProcessRuntime,
    Residency,
    ResidencyClass,
    VllmEngine,
)
from tests.fakes.runs import a_run, answer_of
from tests.integration.stack import SIMULATORS, RungProcess, engine_pids

GIB = 1 << 30
#: 0.55 of 32 GiB: of two only one can be awake.
AWAKE_BYTES = int(32 * GIB * 0.55)
#: What the simulator keeps of the GPU.
ASLEEP_BYTES = 1 * GIB


def a_model(deployment_id: str) -> DeploymentSpec:
    engine = VllmEngine(model=f"{deployment_id}-8b-fp8", gpu_memory_utilization=0.55, sleep_mode=True)
    return DeploymentSpec(
        id=deployment_id,
        node_id="box",
        model=deployment_id,
        engine=EngineSpec(engine=engine, runtime=ProcessRuntime(executable="vllm"), stop_grace_s=2.0),
        residency_class=ResidencyClass.SLEEPABLE,
    )


class Node:
    """An agent as a process, the simulated machine below it, and what a control plane asks of it."""

    def __init__(self, folder: Path) -> None:
        self.gpus = SimulatedGpus.create(
            folder / "gpus", gpus=[SimulatedGpuSpec(name="RTX 5090", memory_total_bytes=32 * GIB)]
        )
        vllm = SIMULATORS["vllm"] | {
            "environment": {
                "RUNG_SIM_GPUS": str(folder / "gpus"),
                "RUNG_SIM_LOAD_S": "0.1",
                "RUNG_SIM_SPEED": "5",
            }
        }
        config = folder / "agent.yaml"
        config.write_text(
            yaml.safe_dump(
                {
                    "node_id": "box",
                    "port": 0,
                    "state_dir": str(folder / "agent"),
                    "executables": {"vllm": vllm},
                    "simulated_gpus": str(folder / "gpus"),
                }
            )
        )
        self.agent = RungProcess(
            ["agent", "run", "--config", str(config)],
            folder / "agent" / "agent.json",
            folder / "agent.log",
        )
        self._operations = 0

    async def ask(self, method: str, *, timeout_s: float = 60.0, **fields: Any) -> LifecyclePayload:
        """How an operation ended."""
        self._operations += 1
        command = v1.Command(operation_id=f"{self.agent.ready['pid']}-{self._operations}", epoch=1)
        request = getattr(v1, f"{method}Request")(command=command, **fields)
        async with self._stub() as stub:
            try:
                events = [
                    codec.lifecycle_event_from_proto(response.event)
                    async for response in getattr(stub, method)(request, timeout=timeout_s)
                ]
            except grpc.aio.AioRpcError as failure:
                raise error_from_rpc(failure) from failure
        return events[-1].payload

    async def done(self, method: str, **fields: Any) -> LifecycleDone:
        """The outcome of an operation that ends well."""
        payload = await self.ask(method, **fields)
        assert isinstance(payload, LifecycleDone), payload
        return payload

    async def start(self, deployment_id: str) -> LifecycleDone:
        spec = codec.deployment_spec_to_proto(a_model(deployment_id))
        return await self.done("StartEngine", spec=spec)

    async def deployments(self) -> dict[str, Deployment]:
        """As a control plane sees them that connects now."""
        async with self._stub() as stub:
            async for response in stub.Watch(v1.WatchRequest(epoch=1)):
                found = [codec.deployment_from_proto(each) for each in response.snapshot.deployments]
                return {each.spec.id: each for each in found}
        raise AssertionError("the watch ended")

    async def becomes(
        self, deployment_id: str, residency: Residency, *, active_requests: int | None = None
    ) -> Deployment:
        """The deployment, once it is as wanted."""
        async with asyncio.timeout(20):
            while True:
                found = (await self.deployments())[deployment_id]
                if found.residency is residency and active_requests in (None, found.active_requests):
                    return found
                await asyncio.sleep(0.05)

    async def says(self, deployment_id: str, text: str, max_tokens: int = 20) -> bytes:
        """The answer of an engine, through the agent."""
        body = f'{{"messages":[{{"role":"user","content":"{text}"}}],"max_tokens":{max_tokens}}}'
        async with self._stub() as stub:
            return await answer_of(stub, a_run(deployment_id, body.encode()))

    def held(self) -> int:
        """Bytes that are taken on the GPU."""
        return 32 * GIB - self.gpus.read().gpu_free_bytes(0)

    def _stub(self) -> Any:
        return _Stub(f"127.0.0.1:{self.agent.ready['port']}")


class _Stub:
    def __init__(self, address: str) -> None:
        self._channel = open_channel(ChannelOptions(address=address))

    async def __aenter__(self) -> Any:
        # The generated types know the blocking calls only.
        return v1.NodeAgentServiceStub(await self._channel.__aenter__())

    async def __aexit__(self, *error: Any) -> None:
        await self._channel.__aexit__(*error)


@pytest.fixture
async def node(tmp_path: Path) -> AsyncIterator[Node]:
    made = Node(tmp_path)
    await made.agent.start()
    yield made
    await made.agent.end(signal.SIGTERM)
    for pid in engine_pids(tmp_path):
        os.kill(pid, signal.SIGKILL)


async def test_models_that_cannot_fit_together_take_turns(node: Node) -> None:
    await node.start("one")
    assert node.held() == AWAKE_BYTES

    slept = await node.done("SleepEngine", deployment_id="one", level=1)
    assert slept.freed_bytes == AWAKE_BYTES - ASLEEP_BYTES
    assert (slept.deployment.residency, slept.deployment.vram_bytes) == (Residency.ASLEEP, ASLEEP_BYTES)
    assert node.held() == ASLEEP_BYTES

    await node.start("two")
    assert node.held() == AWAKE_BYTES + ASLEEP_BYTES
    await node.done("SleepEngine", deployment_id="two", level=2)
    woken = await node.done("WakeEngine", deployment_id="one")

    assert (woken.deployment.residency, woken.deployment.vram_bytes) == (Residency.AWAKE, AWAKE_BYTES)
    assert node.held() == AWAKE_BYTES + ASLEEP_BYTES
    assert b"1 2 3" in await node.says("one", "count to 3")

    await node.done("SleepEngine", deployment_id="one", level=1)
    await node.done("WakeEngine", deployment_id="two")
    # Its weights were dropped, and are there again.
    assert b"1 2 3" in await node.says("two", "count to 3")
    stopped = await node.done("StopEngine", deployment_id="two")
    assert stopped.freed_bytes == AWAKE_BYTES
    assert node.held() == ASLEEP_BYTES


async def test_an_agent_that_is_killed_takes_a_sleeper_back_as_a_sleeper(node: Node) -> None:
    started = await node.start("one")
    await node.done("SleepEngine", deployment_id="one", level=2)

    await node.agent.end(signal.SIGKILL)
    await node.agent.start()
    found = await node.becomes("one", Residency.ASLEEP)

    assert (found.asleep_level, found.pid) == (2, started.deployment.pid)
    assert node.held() == ASLEEP_BYTES
    woken = await node.done("WakeEngine", deployment_id="one")
    assert (woken.deployment.vram_bytes, woken.deployment.generation) == (AWAKE_BYTES, 1)
    assert b"1 2 3" in await node.says("one", "count to 3")


async def test_waking_where_there_is_no_room_loses_that_engine_and_no_other(node: Node) -> None:
    await node.start("one")
    await node.done("SleepEngine", deployment_id="one", level=1)
    await node.start("two")

    outcome = await node.ask("WakeEngine", deployment_id="one")

    assert isinstance(outcome, LifecycleFailed)
    assert outcome.reason is FailureReason.ENGINE_LOST
    assert "out of memory" in outcome.detail.lower()
    found = await node.deployments()
    assert (found["one"].residency, found["two"].residency) == (Residency.FAILED, Residency.AWAKE)
    assert node.held() == AWAKE_BYTES
    assert b"1 2 3" in await node.says("two", "count to 3")


async def test_a_sleep_waits_for_what_runs_and_no_longer_than_its_deadline(node: Node) -> None:
    await node.start("one")
    talk = asyncio.create_task(node.says("one", "count to 300", max_tokens=2000))
    await node.becomes("one", Residency.AWAKE, active_requests=1)

    with pytest.raises(DeadlineExceededError):
        await node.ask("SleepEngine", deployment_id="one", level=1, timeout_s=0.5)
    await node.becomes("one", Residency.AWAKE)
    assert not talk.done()
    slept = await node.done("SleepEngine", deployment_id="one", level=1)

    assert b"299 300" in await talk
    assert slept.freed_bytes == AWAKE_BYTES - ASLEEP_BYTES
