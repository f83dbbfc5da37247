"""A scripted control plane: a real gRPC server with the production interceptor, and no fleet."""

# ruff: noqa: N802 - methods have the names of the API

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from typing import TYPE_CHECKING, Any

import grpc.aio
from google.protobuf.descriptor_pool import Default
from prometheus_client import CollectorRegistry

from rung import codec, v1
from rung.errors import RungError, UnknownDeploymentError, UnknownJobError, UnknownNodeError
from rung.service import CallInterceptor, GrpcServer, ServerOptions
from rung.types import (
    TERMINAL_EVENTS,
    EventPayload,
    FleetSnapshot,
    Job,
    JobEvent,
    JobKind,
    JobState,
    LifecycleEvent,
    LifecycleProgress,
    Phase,
    PhaseProgress,
)

if TYPE_CHECKING:
    from typing import TypeAlias

    Context: TypeAlias = grpc.aio.ServicerContext[Any, Any]

JOB_ID = "job-1"
_START_S = 1_750_000_000.0


def a_log(*payloads: EventPayload) -> list[JobEvent]:
    """Events of JOB_ID with sequences from 1."""
    return [
        JobEvent(JOB_ID, place, _START_S + place, float(place), payload)
        for place, payload in enumerate(payloads, 1)
    ]


def a_job(job_id: str = JOB_ID, state: JobState = JobState.DONE, **fields: Any) -> Job:
    """A job."""
    return Job(id=job_id, kind=JobKind.CHAT, state=state, model="m", create_time_s=_START_S, **fields)


class ScriptedControlPlane:
    """What the servicers say, and what they were asked.

    A stream of events sends `log` as far as it goes, waits for more, and ends after a terminal event.
    """

    def __init__(self) -> None:
        self.log: list[JobEvent] = []
        self.jobs: list[Job] = []
        self.snapshot = FleetSnapshot()
        self.lifecycle: list[LifecycleEvent] = []
        self.fleet_changes: list[v1.WatchFleetResponse] = []
        self.fail: RungError | Exception | None = None
        self.heartbeat_first = False
        self.requests: list[Any] = []
        self.metadata: list[dict[str, str]] = []
        self.deadlines: list[float | None] = []
        self.cancelled = 0
        self._changed = asyncio.Condition()
        self._server: GrpcServer | None = None

    async def start(self) -> None:
        """Listen on a free port."""
        pool = Default()
        names = ("rung.v1.InferenceService", "rung.v1.FleetService")
        self._server = GrpcServer(
            ServerOptions(port=0),
            services=[pool.FindServiceByName(name) for name in names],
            interceptors=[CallInterceptor(CollectorRegistry())],
            what="the scripted control plane",
        )
        inference = _Inference(self)  # type: ignore[abstract]  # the rest answers UNIMPLEMENTED
        fleet = _Fleet(self)  # type: ignore[abstract]  # the rest answers UNIMPLEMENTED
        v1.add_InferenceServiceServicer_to_server(inference, self._server.server)
        v1.add_FleetServiceServicer_to_server(fleet, self._server.server)
        await self._server.start()

    async def stop(self) -> None:
        """Cancel what runs and stop listening."""
        if self._server is not None:
            await self._server.stop(0)

    @property
    def port(self) -> int:
        """Where it listens."""
        assert self._server is not None
        return self._server.port

    @property
    def address(self) -> str:
        """Where it listens."""
        return f"127.0.0.1:{self.port}"

    async def append(self, *payloads: EventPayload) -> None:
        """Add to the log; streams send it at once."""
        places = range(len(self.log) + 1, len(self.log) + 1 + len(payloads))
        self.log += [
            JobEvent(JOB_ID, place, _START_S + place, float(place), payload)
            for place, payload in zip(places, payloads, strict=True)
        ]
        await self.wake()

    async def wake(self) -> None:
        """Let waiting tasks look again."""
        async with self._changed:
            self._changed.notify_all()

    async def until(self, holds: Callable[[], bool]) -> None:
        """Wait until something about the server holds."""
        async with asyncio.timeout(10), self._changed:
            await self._changed.wait_for(holds)

    def called(self, kind: type) -> list[Any]:
        """Requests of one kind, oldest first."""
        return [request for request in self.requests if isinstance(request, kind)]

    async def asked(self, request: object, context: Context) -> None:
        """Note a call; raises what the script says."""
        self.requests.append(request)
        self.metadata.append({key: str(value) for key, value in context.invocation_metadata() or ()})
        self.deadlines.append(context.time_remaining())
        await self.wake()
        if self.fail is not None:
            raise self.fail

    async def events(self, after_sequence: int) -> AsyncIterator[JobEvent]:
        """The log after a sequence, then what is appended."""
        try:
            place = after_sequence
            while True:
                for event in self.log[place:]:
                    place += 1
                    yield event
                    if isinstance(event.payload, TERMINAL_EVENTS):
                        return
                async with self._changed:
                    await self._changed.wait_for(lambda: len(self.log) > place)  # noqa: B023 - awaited here
        except asyncio.CancelledError:
            self.cancelled += 1
            await self.wake()
            raise


class _Inference(v1.InferenceServiceServicer):
    def __init__(self, script: ScriptedControlPlane) -> None:
        self._script = script

    async def Generate(
        self, request: v1.GenerateRequest, context: Context
    ) -> AsyncIterator[v1.GenerateResponse]:
        await self._script.asked(request, context)
        async for event in self._script.events(0):
            yield v1.GenerateResponse(event=codec.job_event_to_proto(event))

    async def CreateJob(self, request: v1.CreateJobRequest, context: Context) -> v1.CreateJobResponse:
        await self._script.asked(request, context)
        return v1.CreateJobResponse(job=codec.job_to_proto(self._script.jobs[0]))

    async def GetJob(self, request: v1.GetJobRequest, context: Context) -> v1.GetJobResponse:
        await self._script.asked(request, context)
        for job in self._script.jobs:
            if job.id == request.job_id:
                return v1.GetJobResponse(job=codec.job_to_proto(job))
        raise UnknownJobError(f"there is no job {request.job_id}", job=request.job_id)

    async def ListJobs(self, request: v1.ListJobsRequest, context: Context) -> v1.ListJobsResponse:
        await self._script.asked(v1.ListJobsRequest.FromString(request.SerializeToString()), context)
        start = int(request.page_token or 0)
        end = start + request.page_size
        return v1.ListJobsResponse(
            jobs=[codec.job_to_proto(job) for job in self._script.jobs[start:end]],
            next_page_token=str(end) if end < len(self._script.jobs) else "",
        )

    async def WatchJob(
        self, request: v1.WatchJobRequest, context: Context
    ) -> AsyncIterator[v1.WatchJobResponse]:
        await self._script.asked(request, context)
        if self._script.heartbeat_first:
            beat = JobEvent(JOB_ID, 0, _START_S, 0.0, PhaseProgress(Phase.QUEUED, "still waiting"))
            yield v1.WatchJobResponse(event=codec.job_event_to_proto(beat))
        async for event in self._script.events(request.after_sequence):
            yield v1.WatchJobResponse(event=codec.job_event_to_proto(event))

    async def CancelJob(self, request: v1.CancelJobRequest, context: Context) -> v1.CancelJobResponse:
        await self._script.asked(request, context)
        return v1.CancelJobResponse(job=codec.job_to_proto(a_job(request.job_id, JobState.CANCELLED)))

    async def Embed(self, request: v1.EmbedRequest, context: Context) -> v1.EmbedResponse:
        await self._script.asked(request, context)
        return v1.EmbedResponse(
            vectors=[v1.EmbeddingVector(values=[float(len(text)), 0.5]) for text in request.inputs],
            job_id=JOB_ID,
        )

    async def ListModels(self, request: v1.ListModelsRequest, context: Context) -> v1.ListModelsResponse:
        await self._script.asked(request, context)
        return v1.ListModelsResponse(models=[v1.Model(id="m", deployments=["d"], ready=True)])

    async def ExplainRoute(
        self, request: v1.ExplainRouteRequest, context: Context
    ) -> v1.ExplainRouteResponse:
        await self._script.asked(request, context)
        considered = v1.ConsideredTarget(target="d", taken=True, reason="awake")
        return v1.ExplainRouteResponse(target="d", considered=[considered])


class _Fleet(v1.FleetServiceServicer):
    def __init__(self, script: ScriptedControlPlane) -> None:
        self._script = script

    async def ListNodes(self, request: v1.ListNodesRequest, context: Context) -> v1.ListNodesResponse:
        await self._script.asked(request, context)
        # One a page, to make the client turn pages.
        place = int(request.page_token or 0)
        nodes = self._script.snapshot.nodes
        return v1.ListNodesResponse(
            nodes=[codec.node_to_proto(node) for node in nodes[place : place + 1]],
            next_page_token=str(place + 1) if place + 1 < len(nodes) else "",
        )

    async def ListDeployments(
        self, request: v1.ListDeploymentsRequest, context: Context
    ) -> v1.ListDeploymentsResponse:
        await self._script.asked(request, context)
        place = int(request.page_token or 0)
        found = self._script.snapshot.deployments
        return v1.ListDeploymentsResponse(
            deployments=[codec.deployment_to_proto(each) for each in found[place : place + 1]],
            next_page_token=str(place + 1) if place + 1 < len(found) else "",
        )

    async def GetNode(self, request: v1.GetNodeRequest, context: Context) -> v1.GetNodeResponse:
        await self._script.asked(request, context)
        for node in self._script.snapshot.nodes:
            if node.id == request.node_id:
                return v1.GetNodeResponse(node=codec.node_to_proto(node))
        raise UnknownNodeError(f"there is no node {request.node_id}")

    async def GetDeployment(
        self, request: v1.GetDeploymentRequest, context: Context
    ) -> v1.GetDeploymentResponse:
        await self._script.asked(request, context)
        for found in self._script.snapshot.deployments:
            if found.spec.id == request.deployment_id:
                return v1.GetDeploymentResponse(deployment=codec.deployment_to_proto(found))
        raise UnknownDeploymentError(f"there is no deployment {request.deployment_id}")

    async def DrainNode(self, request: v1.DrainNodeRequest, context: Context) -> v1.DrainNodeResponse:
        await self._script.asked(request, context)
        return v1.DrainNodeResponse(node=v1.Node(id=request.node_id, state=v1.NODE_STATE_DRAINING))

    async def ResumeNode(self, request: v1.ResumeNodeRequest, context: Context) -> v1.ResumeNodeResponse:
        await self._script.asked(request, context)
        return v1.ResumeNodeResponse(node=v1.Node(id=request.node_id, state=v1.NODE_STATE_READY))

    async def WatchFleet(
        self, request: v1.WatchFleetRequest, context: Context
    ) -> AsyncIterator[v1.WatchFleetResponse]:
        await self._script.asked(request, context)
        snapshot = codec.fleet_snapshot_to_proto(self._script.snapshot)
        yield v1.WatchFleetResponse(sequence=1, snapshot=snapshot)
        for change in self._script.fleet_changes:
            yield change
        await asyncio.Event().wait()

    async def StartDeployment(
        self, request: v1.StartDeploymentRequest, context: Context
    ) -> AsyncIterator[v1.StartDeploymentResponse]:
        await self._script.asked(request, context)
        for event in self._script.lifecycle:
            yield v1.StartDeploymentResponse(event=codec.lifecycle_event_to_proto(event))
        # A script without an ending: the client's connection breaks here.
        if isinstance(self._script.lifecycle[-1].payload, LifecycleProgress):
            await asyncio.Event().wait()

    async def StopDeployment(
        self, request: v1.StopDeploymentRequest, context: Context
    ) -> AsyncIterator[v1.StopDeploymentResponse]:
        await self._script.asked(request, context)
        for event in self._script.lifecycle:
            yield v1.StopDeploymentResponse(event=codec.lifecycle_event_to_proto(event))

    async def SleepDeployment(
        self, request: v1.SleepDeploymentRequest, context: Context
    ) -> AsyncIterator[v1.SleepDeploymentResponse]:
        await self._script.asked(request, context)
        for event in self._script.lifecycle:
            yield v1.SleepDeploymentResponse(event=codec.lifecycle_event_to_proto(event))

    async def WakeDeployment(
        self, request: v1.WakeDeploymentRequest, context: Context
    ) -> AsyncIterator[v1.WakeDeploymentResponse]:
        await self._script.asked(request, context)
        for event in self._script.lifecycle:
            yield v1.WakeDeploymentResponse(event=codec.lifecycle_event_to_proto(event))

    async def FreeDeployment(
        self, request: v1.FreeDeploymentRequest, context: Context
    ) -> AsyncIterator[v1.FreeDeploymentResponse]:
        await self._script.asked(request, context)
        for event in self._script.lifecycle:
            yield v1.FreeDeploymentResponse(event=codec.lifecycle_event_to_proto(event))
