"""A scripted node agent: a real gRPC server with the production interceptor, and no engines."""

# ruff: noqa: N802 - methods have the names of the API

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import grpc.aio
from prometheus_client import CollectorRegistry

from nodeagent.api import Drain, Runs
from rung import codec, reason_of_error, v1
from rung.codec import GenerationEvent
from rung.errors import RungError
from rung.service import CallInterceptor
from rung.types import (
    Deployment,
    DeploymentSpec,
    Endpoint,
    EndpointScope,
    Engine,
    EngineSpec,
    ExternalRuntime,
    HostStatus,
    LifecycleDone,
    LifecycleEvent,
    LifecyclePayload,
    LlamaCppEngine,
    NodeStatus,
    ProcessRuntime,
    Residency,
    ResidencyClass,
)

if TYPE_CHECKING:
    from typing import TypeAlias

    Context: TypeAlias = grpc.aio.ServicerContext[Any, Any]
    Script: TypeAlias = Callable[["ScriptedAgent", "Call"], AsyncIterator[LifecyclePayload]]
    RunScript: TypeAlias = Callable[[v1.RunBegin], AsyncIterator[v1.RunHead | bytes]]
    GenerationScript: TypeAlias = Callable[[v1.RunGenerationRequest], AsyncIterator[GenerationEvent]]


def a_status(host_id: str = "host-1", sample_time_s: float = 1.0) -> NodeStatus:
    return NodeStatus(
        sample_time_s=sample_time_s,
        gpus=(),
        host=HostStatus(
            memory_total_bytes=1,
            memory_available_bytes=1,
            disk_total_bytes=1,
            disk_free_bytes=1,
            cpu_count=1,
            cpu_utilization_percent=0.0,
            hostname="box",
        ),
        agent_version="test",
        host_id=host_id,
    )


def a_spec(
    deployment_id: str = "chat-1",
    *,
    node_id: str = "box",
    model: str = "tiny",
    aliases: tuple[str, ...] = (),
    engine: Engine | None = None,
    external: bool = False,
    residency_class: ResidencyClass = ResidencyClass.ON_DEMAND,
    keep_running: bool = False,
) -> DeploymentSpec:
    runtime = (
        ExternalRuntime(base_url="http://127.0.0.1:9") if external else ProcessRuntime(executable="engine")
    )
    return DeploymentSpec(
        id=deployment_id,
        node_id=node_id,
        model=model,
        aliases=aliases,
        engine=EngineSpec(engine=engine or LlamaCppEngine(model_path="/m.gguf"), runtime=runtime),
        residency_class=residency_class,
        keep_running=keep_running,
    )


def a_deployment(
    spec: DeploymentSpec, residency: Residency, *, generation: int = 1, scope: EndpointScope | None = None
) -> Deployment:
    endpoint = Endpoint("http://127.0.0.1:9", scope or EndpointScope.LOOPBACK)
    return Deployment(
        spec=spec,
        residency=residency,
        generation=generation,
        endpoint=endpoint if residency is Residency.AWAKE else None,
    )


@dataclass
class Call:
    """A lifecycle call as the agent got it."""

    action: str
    operation_id: str
    epoch: int
    deployment_id: str
    force: bool = False
    level: int = 0
    spec: DeploymentSpec | None = None


async def comes_up(agent: ScriptedAgent, call: Call) -> AsyncIterator[LifecyclePayload]:
    """The engine is awake at once."""
    known = agent.deployments.get(call.deployment_id)
    spec = call.spec or (known.spec if known else None)
    assert spec is not None
    awake = a_deployment(spec, Residency.AWAKE, generation=(known.generation if known else 0) + 1)
    agent.report(awake)
    yield LifecycleDone(awake)


@dataclass
class ScriptedAgent:
    """Answers as its fields say; `calls` and `runs` are what it was asked."""

    node_id: str = "box"
    script: Script = comes_up
    run_script: RunScript | None = None
    generation_script: GenerationScript | None = None
    watch_error: RungError | None = None
    deployments: dict[str, Deployment] = field(default_factory=dict)
    status: NodeStatus = field(default_factory=a_status)
    calls: list[Call] = field(default_factory=list)
    runs: list[v1.RunBegin] = field(default_factory=list)
    generations: list[v1.RunGenerationRequest] = field(default_factory=list)
    watches: int = 0
    run_streams: int = 0
    runs_cancelled: int = 0
    generations_cancelled: int = 0
    instance_id: str = "agent-1"
    port: int = 0
    _changed: asyncio.Event = field(default_factory=asyncio.Event)
    _server: grpc.aio.Server | None = None
    _watchers: list[asyncio.Queue[v1.WatchResponse | None]] = field(default_factory=list)

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.port}"

    async def start(self) -> None:
        self._server = grpc.aio.server(
            interceptors=[CallInterceptor(CollectorRegistry())], options=[("grpc.so_reuseport", 0)]
        )
        v1.add_NodeAgentServiceServicer_to_server(_Servicer(self), self._server)  # type: ignore[arg-type]
        self.port = self._server.add_insecure_port(f"127.0.0.1:{self.port}")
        await self._server.start()

    async def stop(self) -> None:
        """Go away at once; `start` listens on the same port again."""
        if self._server is not None:
            await self._server.stop(None)
            self._server = None

    async def until(self, holds: Callable[[], bool]) -> None:
        """Wait until something holds of what the agent was asked."""
        async with asyncio.timeout(10):
            while not holds():
                self._changed.clear()
                await self._changed.wait()

    def asked(self) -> None:
        self._changed.set()

    def report(self, deployment: Deployment) -> None:
        """Say that a deployment changed."""
        self.deployments[deployment.spec.id] = deployment
        self._say(v1.WatchResponse(deployment=codec.deployment_to_proto(deployment)))

    def remove(self, deployment_id: str) -> None:
        del self.deployments[deployment_id]
        self._say(v1.WatchResponse(removed_deployment_id=deployment_id))

    def tick(self, status: NodeStatus | None = None) -> None:
        """Say the newest measurements, as an agent does each second."""
        self.status = status or self.status
        self._say(v1.WatchResponse(status=codec.node_status_to_proto(self.status)))

    def break_watches(self) -> None:
        """End the streams of all watchers."""
        for watcher in self._watchers:
            watcher.put_nowait(None)

    def _say(self, message: v1.WatchResponse) -> None:
        for watcher in self._watchers:
            watcher.put_nowait(message)


class _Servicer:
    def __init__(self, agent: ScriptedAgent) -> None:
        self._agent = agent

    def __getattr__(self, name: str) -> object:
        # Registering asks for every method; those that no test uses are not there.
        if name[0].isupper():
            return None
        raise AttributeError(name)

    async def Watch(self, request: v1.WatchRequest, context: Context) -> AsyncIterator[v1.WatchResponse]:
        agent = self._agent
        agent.watches += 1
        agent.asked()
        if agent.watch_error is not None:
            raise agent.watch_error
        queue: asyncio.Queue[v1.WatchResponse | None] = asyncio.Queue()
        agent._watchers.append(queue)
        try:
            yield v1.WatchResponse(
                sequence=1,
                snapshot=v1.NodeSnapshot(
                    node_id=agent.node_id,
                    agent_instance_id=agent.instance_id,
                    status=codec.node_status_to_proto(agent.status),
                    deployments=[codec.deployment_to_proto(found) for found in agent.deployments.values()],
                    epoch=request.epoch,
                ),
            )
            while (message := await queue.get()) is not None:
                yield message
        finally:
            agent._watchers.remove(queue)

    async def StartEngine(
        self, request: v1.StartEngineRequest, context: Context
    ) -> AsyncIterator[v1.StartEngineResponse]:
        spec = codec.deployment_spec_from_proto(request.spec)
        async for event in self._operate("start", request.command, spec.id, spec=spec):
            yield v1.StartEngineResponse(event=event)

    async def StopEngine(
        self, request: v1.StopEngineRequest, context: Context
    ) -> AsyncIterator[v1.StopEngineResponse]:
        async for event in self._operate("stop", request.command, request.deployment_id, force=request.force):
            yield v1.StopEngineResponse(event=event)

    async def SleepEngine(
        self, request: v1.SleepEngineRequest, context: Context
    ) -> AsyncIterator[v1.SleepEngineResponse]:
        async for event in self._operate(
            "sleep", request.command, request.deployment_id, force=request.force, level=request.level
        ):
            yield v1.SleepEngineResponse(event=event)

    async def ShrinkEngine(
        self, request: v1.ShrinkEngineRequest, context: Context
    ) -> AsyncIterator[v1.ShrinkEngineResponse]:
        async for event in self._operate("shrink", request.command, request.deployment_id):
            yield v1.ShrinkEngineResponse(event=event)

    async def WakeEngine(
        self, request: v1.WakeEngineRequest, context: Context
    ) -> AsyncIterator[v1.WakeEngineResponse]:
        async for event in self._operate("wake", request.command, request.deployment_id):
            yield v1.WakeEngineResponse(event=event)

    async def FreeEngine(
        self, request: v1.FreeEngineRequest, context: Context
    ) -> AsyncIterator[v1.FreeEngineResponse]:
        async for event in self._operate("free", request.command, request.deployment_id):
            yield v1.FreeEngineResponse(event=event)

    async def _operate(
        self, action: str, command: v1.Command, deployment_id: str, **more: Any
    ) -> AsyncIterator[v1.LifecycleEvent]:
        call = Call(action, command.operation_id, command.epoch, deployment_id, **more)
        self._agent.calls.append(call)
        self._agent.asked()
        sequence = 0
        async for payload in self._agent.script(self._agent, call):
            sequence += 1
            event = LifecycleEvent(command.operation_id, sequence, 0.1 * sequence, payload)
            yield codec.lifecycle_event_to_proto(event)

    def Run(self, request: AsyncIterator[v1.RunRequest], context: Context) -> AsyncIterator[v1.RunResponse]:
        self._agent.run_streams += 1
        return Runs(self._run, pause_s=lambda: 0.0, drain=Drain("box")).responses(request)

    async def _run(self, begin: v1.RunBegin) -> AsyncGenerator[v1.RunHead | bytes, None]:
        agent = self._agent
        agent.runs.append(begin)
        agent.asked()
        assert agent.run_script is not None
        try:
            async for piece in agent.run_script(begin):
                yield piece
        except (asyncio.CancelledError, GeneratorExit):
            agent.runs_cancelled += 1
            agent.asked()
            raise

    async def RunGeneration(
        self, request: v1.RunGenerationRequest, context: Context
    ) -> AsyncIterator[v1.RunGenerationResponse]:
        agent = self._agent
        agent.generations.append(request)
        agent.asked()
        assert agent.generation_script is not None
        try:
            async for event in agent.generation_script(request):
                yield codec.generation_event_to_proto(event)
        except RungError as error:
            reason = codec.FAILURE_REASONS.to_proto[reason_of_error(error)]
            yield v1.RunGenerationResponse(failed=v1.RunFailed(reason=reason, detail=error.message))
        except (asyncio.CancelledError, GeneratorExit):
            agent.generations_cancelled += 1
            agent.asked()
            raise
