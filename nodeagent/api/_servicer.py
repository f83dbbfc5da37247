"""NodeAgentService: decodes, calls the supervisor, encodes."""

# ruff: noqa: N802 - methods have the names of the API

from __future__ import annotations

import math
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing
from typing import TYPE_CHECKING, Any, TypeAlias, TypeVar

import grpc.aio
from msgspec.structs import replace

from nodeagent.api._drain import Drain
from nodeagent.api._runs import Runs
from nodeagent.engines import GenerateControl, Generation, RunKind, VoiceControl
from nodeagent.supervisor import Command, Operation, Supervisor
from nodeagent.telemetry import Telemetry
from rung import codec, reason_of_error, v1
from rung.errors import InvalidRequestError, RungError
from rung.service import StreamPacer
from rung.types import Deployment

if TYPE_CHECKING:
    Context: TypeAlias = grpc.aio.ServicerContext[Any, Any]

T = TypeVar("T")

_RUN_KINDS = {
    v1.RUN_KIND_CHAT_COMPLETIONS: RunKind.CHAT_COMPLETIONS,
    v1.RUN_KIND_COMPLETIONS: RunKind.COMPLETIONS,
    v1.RUN_KIND_EMBEDDINGS: RunKind.EMBEDDINGS,
    v1.RUN_KIND_PREDICTIONS: RunKind.PREDICTIONS,
}
_DEFAULT_IDLE_TIMEOUT_S = 600.0
#: So long at most may requests run on before a sleep is given up.
_DEFAULT_DRAIN_TIMEOUT_S = 600.0
_DEFAULT_TAIL_LINES = 100
_STATUS_INTERVAL_S = 1.0
#: A stream waits so long between its pieces for each stream there is: 48 ms at 64 streams, two frames of
#: a film, which a reader does not see. A piece costs more than its bytes, on both sides.
_UNPACED_STREAMS = 8
_INTERVAL_PER_STREAM_S = 0.00075
#: With as many streams, what all of them give within so long goes together.
_MESSAGE_PAUSE_S = 0.004


class NodeAgentServicer:
    """What is not here answers UNIMPLEMENTED (see `rung.service.add_service`)."""

    def __init__(
        self, supervisor: Supervisor, telemetry: Telemetry, agent_instance_id: str, drain: Drain
    ) -> None:
        self._supervisor = supervisor
        self._telemetry = telemetry
        self._agent_instance_id = agent_instance_id
        self._drain = drain
        self._pacer = StreamPacer(
            unpaced_streams=_UNPACED_STREAMS, interval_per_stream_s=_INTERVAL_PER_STREAM_S
        )

    async def Watch(self, request: v1.WatchRequest, context: Context) -> AsyncIterator[v1.WatchResponse]:
        """A snapshot, then whatever differs from what was sent; a slow reader skips what is superseded.

        While generations end at a stop it goes on: engines that are reached without this agent serve on.
        """
        self._supervisor.raise_epoch(request.epoch)
        status = self._telemetry.status
        sent = {each.spec.id: each for each in self._supervisor.deployments}
        sequence = 1
        yield v1.WatchResponse(sequence=sequence, snapshot=self._snapshot(sent))
        while not self._drain.over.is_set():
            if self._same(sent) and self._telemetry.status is status:
                await self._supervisor.changed.wait(_STATUS_INTERVAL_S / 4)
            responses = self._differences(sent)
            if self._telemetry.status is not status:
                status = self._telemetry.status
                responses.append(v1.WatchResponse(status=self._node_status()))
            for response in responses:
                sequence += 1
                response.sequence = sequence
                yield response

    def _snapshot(self, deployments: dict[str, Deployment]) -> v1.NodeSnapshot:
        return v1.NodeSnapshot(
            node_id=self._supervisor.node_id,
            agent_instance_id=self._agent_instance_id,
            status=self._node_status(),
            deployments=[codec.deployment_to_proto(each) for each in deployments.values()],
            epoch=self._supervisor.epoch,
        )

    def _node_status(self) -> v1.NodeStatus:
        age_s = self._telemetry.sample_age_s
        return codec.node_status_to_proto(
            replace(self._telemetry.status, sample_age_s=age_s if math.isfinite(age_s) else None)
        )

    def _same(self, sent: dict[str, Deployment]) -> bool:
        now = self._supervisor.deployments
        return len(now) == len(sent) and all(sent.get(each.spec.id) is each for each in now)

    def _differences(self, sent: dict[str, Deployment]) -> list[v1.WatchResponse]:
        """What changed since `sent`, which is brought up to date."""
        responses: list[v1.WatchResponse] = []
        now = {each.spec.id: each for each in self._supervisor.deployments}
        for deployment_id, deployment in now.items():
            if sent.get(deployment_id) is not deployment:
                sent[deployment_id] = deployment
                responses.append(v1.WatchResponse(deployment=codec.deployment_to_proto(deployment)))
        for deployment_id in [key for key in sent if key not in now]:
            del sent[deployment_id]
            responses.append(v1.WatchResponse(removed_deployment_id=deployment_id))
        return responses

    async def StartEngine(
        self, request: v1.StartEngineRequest, context: Context
    ) -> AsyncIterator[v1.StartEngineResponse]:
        """Start, with progress."""
        spec = codec.deployment_spec_from_proto(request.spec)
        operation = self._supervisor.start(self._command(request.command), spec)
        async for event in _events(operation):
            yield v1.StartEngineResponse(event=event)

    async def StopEngine(
        self, request: v1.StopEngineRequest, context: Context
    ) -> AsyncIterator[v1.StopEngineResponse]:
        """Stop, with progress."""
        operation = self._supervisor.stop(
            self._command(request.command), request.deployment_id, force=request.force
        )
        async for event in _events(operation):
            yield v1.StopEngineResponse(event=event)

    async def SleepEngine(
        self, request: v1.SleepEngineRequest, context: Context
    ) -> AsyncIterator[v1.SleepEngineResponse]:
        """Sleep, with progress."""
        operation = self._supervisor.sleep(
            self._command(request.command),
            request.deployment_id,
            level=request.level,
            force=request.force,
            drain_timeout_s=_drain_timeout_s(context),
        )
        async for event in _events(operation):
            yield v1.SleepEngineResponse(event=event)

    async def ShrinkEngine(
        self, request: v1.ShrinkEngineRequest, context: Context
    ) -> AsyncIterator[v1.ShrinkEngineResponse]:
        """Shrink, with progress."""
        operation = self._supervisor.shrink(
            self._command(request.command), request.deployment_id, drain_timeout_s=_drain_timeout_s(context)
        )
        async for event in _events(operation):
            yield v1.ShrinkEngineResponse(event=event)

    async def WakeEngine(
        self, request: v1.WakeEngineRequest, context: Context
    ) -> AsyncIterator[v1.WakeEngineResponse]:
        """Wake, with progress."""
        operation = self._supervisor.wake(self._command(request.command), request.deployment_id)
        async for event in _events(operation):
            yield v1.WakeEngineResponse(event=event)

    async def FreeEngine(
        self, request: v1.FreeEngineRequest, context: Context
    ) -> AsyncIterator[v1.FreeEngineResponse]:
        """Free, with progress."""
        operation = self._supervisor.free(self._command(request.command), request.deployment_id)
        async for event in _events(operation):
            yield v1.FreeEngineResponse(event=event)

    async def ForgetEngine(
        self, request: v1.ForgetEngineRequest, context: Context
    ) -> v1.ForgetEngineResponse:
        """Forget a deployment."""
        await self._supervisor.forget(self._command(request.command), request.deployment_id)
        return v1.ForgetEngineResponse()

    def _command(self, command: v1.Command) -> Command:
        """Raises DrainingError."""
        self._drain.require_open()
        return Command(command.operation_id, command.epoch)

    def Run(self, request: AsyncIterator[v1.RunRequest], context: Context) -> AsyncIterator[v1.RunResponse]:
        """Generations, as many at once as the caller wants."""
        return Runs(self._run, pause_s=self._pause_s, drain=self._drain).responses(request)

    def _pause_s(self) -> float:
        return _MESSAGE_PAUSE_S if self._pacer.interval_s() else 0.0

    async def _run(self, begin: v1.RunBegin) -> AsyncGenerator[v1.RunHead | bytes, None]:
        """One generation.

        Between two looks the engine's bytes queue up in its connection, and come joined. With many streams
        at once, each waits a little between its looks.
        """
        kind = _RUN_KINDS.get(begin.kind)
        if kind is None:
            raise InvalidRequestError("kind is not one of the routes that a generation may use")
        engine = self._supervisor.engine(begin.deployment_id)
        idle_timeout_s = _idle_timeout_s(begin)
        spec = engine.deployment.spec
        with self._pacer, engine.serving() as base_url:
            async with engine.adapter.run(
                base_url, spec, kind, begin.body, idle_timeout_s=idle_timeout_s
            ) as reply:
                yield v1.RunHead(
                    status_code=reply.status, content_type=reply.content_type, retry_after=reply.retry_after
                )
                if early := reply.ready():
                    yield early
                is_stream = reply.content_type.startswith("text/event-stream")
                async for chunk in reply.chunks(self._pacer.interval_s if is_stream else None):
                    yield chunk

    async def RunGeneration(
        self, request: v1.RunGenerationRequest, context: Context
    ) -> AsyncIterator[v1.RunGenerationResponse]:
        """One generation by an engine with a dialect of its own."""
        wanted = codec.read_engine_input(request)
        if wanted is None:
            raise InvalidRequestError("the request has no input that this version knows")
        engine = self._supervisor.engine(request.deployment_id)
        spec, adapter = engine.deployment.spec, engine.adapter
        if not isinstance(adapter, GenerateControl):
            raise InvalidRequestError(f"{spec.id}: its engine has OpenAI's routes only", deployment=spec.id)
        generation = Generation(job_id=request.job_id, input=wanted, idle_timeout_s=_idle_timeout_s(request))
        begun = False
        try:
            async with self._drain.generation():
                with engine.serving() as base_url:
                    async with aclosing(adapter.generate(base_url, spec, generation)) as events:
                        async for event in events:
                            begun = True
                            yield codec.generation_event_to_proto(event)
        except RungError as error:
            if not begun:
                raise
            yield v1.RunGenerationResponse(failed=_failed(error))
        finally:
            # It has left models loaded, or has not: whoever asks for memory next has to know.
            self._telemetry.look_soon()

    async def ListVoices(self, request: v1.ListVoicesRequest, context: Context) -> v1.ListVoicesResponse:
        """The voices of an engine that speaks."""
        engine = self._supervisor.engine(request.deployment_id)
        spec, adapter = engine.deployment.spec, engine.adapter
        if not isinstance(adapter, VoiceControl):
            raise InvalidRequestError(f"{spec.id}: its engine has no voices", deployment=spec.id)
        with engine.serving() as base_url:
            voices = await adapter.voices(base_url, spec)
        return v1.ListVoicesResponse(voices=[codec.voice_to_proto(voice) for voice in voices])

    async def ReadEngineLog(
        self, request: v1.ReadEngineLogRequest, context: Context
    ) -> AsyncIterator[v1.ReadEngineLogResponse]:
        """The output of the engine that runs, or of the one that ran last."""
        engine = self._supervisor.engine(request.deployment_id)
        tail_lines = request.tail_lines or _DEFAULT_TAIL_LINES
        async with self._drain.until_over():
            async for line in engine.log(tail_lines=tail_lines, follow=request.follow):
                yield v1.ReadEngineLogResponse(lines=[line])


def _idle_timeout_s(request: v1.RunBegin | v1.RunGenerationRequest) -> float:
    if request.HasField("idle_timeout"):
        return codec.duration_from_proto(request.idle_timeout)
    return _DEFAULT_IDLE_TIMEOUT_S


def _failed(error: RungError) -> v1.RunFailed:
    reason = codec.FAILURE_REASONS.to_proto[reason_of_error(error)]
    return v1.RunFailed(reason=reason, detail=error.message)


def _drain_timeout_s(context: Context) -> float:
    # None, whatever its type says, for a caller without a deadline.
    remaining_s = context.time_remaining() or _DEFAULT_DRAIN_TIMEOUT_S
    return min(remaining_s, _DEFAULT_DRAIN_TIMEOUT_S)


async def _events(operation: Operation) -> AsyncIterator[v1.LifecycleEvent]:
    async for event in operation.events():
        yield codec.lifecycle_event_to_proto(event)
