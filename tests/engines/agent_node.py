"""An agent as a process, asked as a control plane asks it."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import grpc.aio
import yaml

from rung import codec, v1
from rung.transport import ChannelOptions, open_channel
from rung.types import Deployment, DeploymentSpec, LifecycleDone, LifecycleEvent, LifecycleProgress, Residency
from tests.fakes.runs import a_run, answer_of
from tests.integration.stack import RungProcess, engine_pids


class AgentNode:
    """An agent that runs."""

    def __init__(self, agent: RungProcess) -> None:
        self.agent = agent
        self.progress: list[LifecycleProgress] = []
        self._operations = 0

    async def done(self, method: str, *, timeout_s: float = 60.0, **fields: Any) -> LifecycleDone:
        """The outcome of an operation that ends well; `progress` is what it told on the way."""
        self._operations += 1
        command = v1.Command(operation_id=f"own-{self._operations}", epoch=1)
        request = getattr(v1, f"{method}Request")(command=command, **fields)
        async with self._stub() as stub:
            events: list[LifecycleEvent] = [
                codec.lifecycle_event_from_proto(response.event)
                async for response in getattr(stub, method)(request, timeout=timeout_s)
            ]
        payloads = [event.payload for event in events]
        self.progress = [each for each in payloads if isinstance(each, LifecycleProgress)]
        assert isinstance(payloads[-1], LifecycleDone), payloads[-1]
        return payloads[-1]

    async def start(self, spec: DeploymentSpec, *, timeout_s: float = 60.0) -> LifecycleDone:
        """Start an engine."""
        proto = codec.deployment_spec_to_proto(spec)
        return await self.done("StartEngine", spec=proto, timeout_s=timeout_s)

    async def deployment(self, deployment_id: str) -> Deployment:
        """As a control plane sees it that connects now, once there is one."""
        async with self._stub() as stub:
            async for response in stub.Watch(v1.WatchRequest(epoch=1)):
                changed = [response.deployment] if response.HasField("deployment") else []
                for each in (*response.snapshot.deployments, *changed):
                    found = codec.deployment_from_proto(each)
                    if found.spec.id == deployment_id:
                        return found
        raise AssertionError("the watch ended without it")

    async def becomes(self, deployment_id: str, residency: Residency) -> Deployment:
        """The deployment, once it is so."""
        async with asyncio.timeout(30):
            while True:
                found = await self.deployment(deployment_id)
                if found.residency is residency:
                    return found
                await asyncio.sleep(0.1)

    async def says(self, deployment_id: str, body: bytes) -> bytes:
        """The answer of an engine, through the agent."""
        async with self._stub() as stub:
            return await answer_of(stub, a_run(deployment_id, body))

    @asynccontextmanager
    async def _stub(self) -> AsyncIterator[Any]:
        async with open_channel(ChannelOptions(address=f"127.0.0.1:{self.agent.ready['port']}")) as channel:
            assert isinstance(channel, grpc.aio.Channel)
            yield v1.NodeAgentServiceStub(channel)


@asynccontextmanager
async def agent_node(folder: Path, executables: Mapping[str, Any], **more: Any) -> AsyncIterator[AgentNode]:
    """An agent that may run these executables; at the end nothing of it is left."""
    config = folder / "agent.yaml"
    options = {
        "node_id": "box",
        "port": 0,
        "state_dir": str(folder / "agent"),
        "executables": dict(executables),
        **more,
    }
    config.write_text(yaml.safe_dump(options))
    agent = RungProcess(
        ["agent", "run", "--config", str(config)], folder / "agent" / "agent.json", folder / "agent.log"
    )
    await agent.start()
    try:
        yield AgentNode(agent)
    finally:
        await agent.end(signal.SIGTERM)
        for pid in engine_pids(folder):
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
