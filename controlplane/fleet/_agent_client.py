"""Calls to a node's agent: the only place where the fleet touches gRPC.

Requests and answers are `rung.types` values, failures are `rung.errors`.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Iterator
from contextlib import contextmanager
from typing import Any, TypeAlias

import grpc
import grpc.aio
from msgspec import Struct

from controlplane.fleet._agent_runs import AGENT_MARGIN_S, AgentRun, RunStream
from rung import codec, error_of_failure, v1
from rung.codec import GenerationEvent
from rung.errors import (
    EngineTimeoutError,
    NodeUnreachableError,
    NotImplementedYetError,
    RungError,
)
from rung.transport import DETAILS_TRAILER, ChannelOptions, Peer, error_from_rpc, open_channel, words_of
from rung.types import (
    Deployment,
    DeploymentSpec,
    EngineInput,
    JobFailed,
    JobKind,
    LifecycleEvent,
    NodeStatus,
    Voice,
)

#: Codes that gRPC itself gives to a call whose peer or connection is gone.
_CONNECTION_CODES = frozenset(
    {
        grpc.StatusCode.UNAVAILABLE,
        grpc.StatusCode.UNKNOWN,
        grpc.StatusCode.INTERNAL,
        grpc.StatusCode.CANCELLED,
        grpc.StatusCode.DEADLINE_EXCEEDED,
    }
)
#: A request of more than this goes over a stream of its own.
_LARGEST_SHARED_BYTES = 64 * 1024
#: Listing voices reads a folder.
_VOICES_TIMEOUT_S = 5.0

_RUN_KINDS = {
    JobKind.CHAT: v1.RUN_KIND_CHAT_COMPLETIONS,
    JobKind.EMBEDDING: v1.RUN_KIND_EMBEDDINGS,
    JobKind.PREDICTION: v1.RUN_KIND_PREDICTIONS,
}


class AgentSnapshot(Struct, frozen=True, kw_only=True):
    """Everything about a node at one moment; replaces all that was known."""

    node_id: str
    agent_instance_id: str
    epoch: int
    status: NodeStatus
    deployments: tuple[Deployment, ...]


class DeploymentRemoved(Struct, frozen=True):
    """A deployment is no longer on the node."""

    deployment_id: str


AgentUpdate: TypeAlias = AgentSnapshot | NodeStatus | Deployment | DeploymentRemoved


class AgentClient:
    """One channel to one agent. Make it inside the running event loop."""

    def __init__(self, node_id: str, address: str) -> None:
        self.node_id = node_id
        self._peer = Peer(
            name=f"the agent of {node_id}", address=address, start="is it running? (`rung agent run`)"
        )
        self._channel = open_channel(ChannelOptions(address=address))
        self._stub = v1.NodeAgentServiceStub(self._channel)
        self._runs: RunStream | None = None
        self._open_calls = 0
        self._retired = False
        self._closing: asyncio.Task[None] | None = None

    async def watch(self, epoch: int) -> AsyncGenerator[AgentUpdate, None]:
        """A snapshot, then changes, until the stream breaks.

        Raises:
            NodeUnreachableError: the connection could not be made, or broke.
            StaleEpochError: another control plane owns the node.
        """
        self._opened()
        call = self._stub.Watch(v1.WatchRequest(epoch=epoch))
        try:
            async for message in call:
                update = _update(message)
                if update is not None:
                    yield update
        except grpc.aio.AioRpcError as failure:
            raise self._error(failure) from failure
        finally:
            call.cancel()
            self._closed()

    def start_engine(
        self, spec: DeploymentSpec, *, operation_id: str, epoch: int
    ) -> AsyncGenerator[LifecycleEvent, None]:
        """Start an engine. For this and the other operations see `NodeAgentService`."""
        request = v1.StartEngineRequest(
            command=_command(operation_id, epoch), spec=codec.deployment_spec_to_proto(spec)
        )
        return self._operate(self._stub.StartEngine(request))

    def stop_engine(
        self, deployment_id: str, *, operation_id: str, epoch: int, force: bool = False
    ) -> AsyncGenerator[LifecycleEvent, None]:
        """Stop an engine."""
        request = v1.StopEngineRequest(
            command=_command(operation_id, epoch), deployment_id=deployment_id, force=force
        )
        return self._operate(self._stub.StopEngine(request))

    def sleep_engine(
        self, deployment_id: str, *, operation_id: str, epoch: int, level: int = 0, force: bool = False
    ) -> AsyncGenerator[LifecycleEvent, None]:
        """Move an engine's weights to host memory."""
        request = v1.SleepEngineRequest(
            command=_command(operation_id, epoch), deployment_id=deployment_id, level=level, force=force
        )
        return self._operate(self._stub.SleepEngine(request))

    def shrink_engine(
        self, deployment_id: str, *, operation_id: str, epoch: int
    ) -> AsyncGenerator[LifecycleEvent, None]:
        """Have an engine give up its KV cache."""
        request = v1.ShrinkEngineRequest(command=_command(operation_id, epoch), deployment_id=deployment_id)
        return self._operate(self._stub.ShrinkEngine(request))

    def wake_engine(
        self, deployment_id: str, *, operation_id: str, epoch: int
    ) -> AsyncGenerator[LifecycleEvent, None]:
        """Move an engine's weights back."""
        request = v1.WakeEngineRequest(command=_command(operation_id, epoch), deployment_id=deployment_id)
        return self._operate(self._stub.WakeEngine(request))

    def free_engine(
        self, deployment_id: str, *, operation_id: str, epoch: int
    ) -> AsyncGenerator[LifecycleEvent, None]:
        """Ask a caching engine to give back its memory."""
        request = v1.FreeEngineRequest(command=_command(operation_id, epoch), deployment_id=deployment_id)
        return self._operate(self._stub.FreeEngine(request))

    async def _operate(
        self, call: grpc.aio.UnaryStreamCall[Any, Any]
    ) -> AsyncGenerator[LifecycleEvent, None]:
        with self._follows(call):
            async for message in call:
                yield codec.lifecycle_event_from_proto(message.event)

    @contextmanager
    def _follows(self, call: grpc.aio.UnaryStreamCall[Any, Any]) -> Iterator[None]:
        """Its failures in our words; leaving it ends the call."""
        self._opened()
        try:
            yield
        except grpc.aio.AioRpcError as failure:
            raise self._error(failure) from failure
        except asyncio.CancelledError:
            if _task_is_cancelled():
                raise
            raise NodeUnreachableError(
                f"the channel to {self.node_id} was closed", node=self.node_id
            ) from None
        finally:
            call.cancel()
            self._closed()

    def run(
        self, deployment_id: str, *, job_id: str, kind: JobKind, body: bytes, idle_timeout_s: float
    ) -> AgentRun:
        """One generation through the agent; enter the result to begin it.

        All share one stream, but for those with large bodies, which would hold up the others.

        Raises:
            NotImplementedYetError: this kind of job has no route through an agent.
        """
        run_kind = _RUN_KINDS.get(kind)
        if run_kind is None:
            raise NotImplementedYetError(f"jobs of kind {kind} do not go through an agent in this version")
        begin = v1.RunBegin(
            job_id=job_id,
            deployment_id=deployment_id,
            kind=run_kind,
            body=body,
            idle_timeout=codec.duration_to_proto(idle_timeout_s),
        )
        shared = len(body) <= _LARGEST_SHARED_BYTES
        return AgentRun(self._shared_stream if shared else self._open_stream, begin, idle_timeout_s)

    def _shared_stream(self) -> RunStream:
        if self._runs is None or not self._runs.is_open:
            self._runs = self._open_stream(lasts=True)
        else:
            self._opened()
        return self._runs

    def _open_stream(self, *, lasts: bool = False) -> RunStream:
        self._opened()
        return RunStream(self.node_id, self._stub.Run(), error=self._error, left=self._closed, lasts=lasts)

    async def generate(
        self, deployment_id: str, *, job_id: str, wanted: EngineInput, idle_timeout_s: float
    ) -> AsyncGenerator[GenerationEvent, None]:
        """One generation by an engine with a dialect of its own; its end is a complete result.

        Closing the iteration early cancels the generation in the engine.

        Raises:
            InvalidRequestError: the engine has no such generation, or refused this one.
            NotAwakeError, UnknownDeploymentError: as the agent says.
            VramInfeasibleError: the engine ran out of GPU memory.
            EngineUnreachableError, EngineTimeoutError, EngineProtocolError, EngineFailedError: the engine.
            NodeUnreachableError: the agent does not answer.
        """
        request = v1.RunGenerationRequest(
            job_id=job_id,
            deployment_id=deployment_id,
            idle_timeout=codec.duration_to_proto(idle_timeout_s),
        )
        codec.write_generation_input(wanted, request)
        call = self._stub.RunGeneration(request)
        messages = call.__aiter__()
        with self._follows(call):
            while True:
                try:
                    async with asyncio.timeout(idle_timeout_s + AGENT_MARGIN_S):
                        message = await anext(messages, None)
                except TimeoutError:
                    raise EngineTimeoutError(
                        f"{deployment_id} on {self.node_id} said nothing for {idle_timeout_s:g} s",
                        engine=deployment_id,
                    ) from None
                if message is None:
                    return
                if message.HasField("failed"):
                    failed = message.failed
                    reason = codec.FAILURE_REASONS.from_proto(failed.reason)
                    raise error_of_failure(JobFailed(reason, failed.detail))
                event = codec.generation_event_from_proto(message)
                if event is not None:
                    yield event

    async def voices(self, deployment_id: str) -> tuple[Voice, ...]:
        """The voices of an engine that speaks.

        Raises:
            InvalidRequestError: it does not.
            NotAwakeError, UnknownDeploymentError: as the agent says.
            EngineUnreachableError, EngineTimeoutError, EngineProtocolError: the engine.
            NodeUnreachableError: the agent does not answer.
        """
        self._opened()
        try:
            response = await self._stub.ListVoices(
                v1.ListVoicesRequest(deployment_id=deployment_id), timeout=_VOICES_TIMEOUT_S
            )
        except grpc.aio.AioRpcError as failure:
            raise self._error(failure) from failure
        finally:
            self._closed()
        return tuple(codec.voice_from_proto(voice) for voice in response.voices)

    def retire(self) -> None:
        """Close the channel as soon as no call uses it. Calls that run are left to finish."""
        self._retired = True
        if not self._open_calls:
            self._close()

    async def aclose(self) -> None:
        """Close the channel now; running calls are cancelled."""
        self._retired = True
        await self._close()

    @property
    def is_closed(self) -> bool:
        """Whether the channel is closed for good."""
        return self._closing is not None and self._closing.done()

    def _close(self) -> asyncio.Task[None]:
        async def close() -> None:
            if self._runs is not None:
                await self._runs.aclose()
            await self._channel.close()

        if self._closing is None:
            self._closing = asyncio.create_task(close(), name=f"close-{self.node_id}")
        return self._closing

    def _opened(self) -> None:
        self._open_calls += 1

    def _closed(self) -> None:
        self._open_calls -= 1
        if self._retired and not self._open_calls:
            self.retire()

    def _error(self, failure: grpc.aio.AioRpcError) -> RungError:
        # An error with details was raised by the agent; one without is gRPC's own.
        of_agent = any(key == DETAILS_TRAILER for key, _ in failure.trailing_metadata() or ())
        if not of_agent and failure.code() in _CONNECTION_CODES:
            said = words_of(failure, self._peer)
            return NodeUnreachableError(
                said or f"the connection to {self._peer.name} at {self._peer.address} broke",
                node=self.node_id,
            )
        return error_from_rpc(failure, self._peer)


def _command(operation_id: str, epoch: int) -> v1.Command:
    return v1.Command(operation_id=operation_id, epoch=epoch)


def _task_is_cancelled() -> bool:
    task = asyncio.current_task()
    return task is None or task.cancelling() > 0


def _update(message: v1.WatchResponse) -> AgentUpdate | None:
    """What a message of a watch says; None for an event that this version does not know."""
    match message.WhichOneof("event"):
        case "status":
            return codec.node_status_from_proto(message.status)
        case "deployment":
            return codec.deployment_from_proto(message.deployment)
        case "removed_deployment_id":
            return DeploymentRemoved(message.removed_deployment_id)
        case "snapshot":
            snapshot = message.snapshot
            return AgentSnapshot(
                node_id=snapshot.node_id,
                agent_instance_id=snapshot.agent_instance_id,
                epoch=snapshot.epoch,
                status=codec.node_status_from_proto(snapshot.status),
                deployments=tuple(codec.deployment_from_proto(found) for found in snapshot.deployments),
            )
        case _:
            return None
