"""InferenceService: requests to jobs, jobs to streams."""

# ruff: noqa: N802 - methods have the names of the API

from __future__ import annotations

from collections.abc import AsyncIterator, Collection
from contextlib import aclosing
from typing import TYPE_CHECKING, Any, TypeAlias

import grpc.aio
from msgspec.structs import replace

from controlplane.api._paging import decode_token, encode_token, page_size
from controlplane.api._ports import ArtifactsPort, JobsPort, PipelinesPort, WorkflowsPort
from controlplane.api._wish import task_from_predict, wish_from_embed, wish_from_generate
from controlplane.jobs import HEARTBEAT_S
from rung import codec, v1
from rung.errors import InvalidRequestError
from rung.types import JobState

if TYPE_CHECKING:
    Context: TypeAlias = grpc.aio.ServicerContext[Any, Any]

_JOBS_ON_A_PAGE = 50
_HEARTBEAT_BOUNDS_S = (0.1, 60.0)


class InferenceServicer:
    """Decodes, calls, encodes. What is not here answers UNIMPLEMENTED (see `add_service`)."""

    def __init__(
        self,
        jobs: JobsPort,
        pipelines: PipelinesPort,
        artifacts: ArtifactsPort,
        workflows: WorkflowsPort,
    ) -> None:
        self._jobs = jobs
        self._pipelines = pipelines
        self._artifacts = artifacts
        self._workflows = workflows

    async def Generate(
        self, request: v1.GenerateRequest, context: Context
    ) -> AsyncIterator[v1.GenerateResponse]:
        """Begin a job and stream its log; a caller that goes away cancels it unless it is detached."""
        wish = await self._pipelines.prepare(wish_from_generate(request))
        job = self._pipelines.start(wish)
        if not wish.policy.detached:
            # Called however the call ends; a job that has ended does not mind.
            context.add_done_callback(
                lambda _: job.request_cancel("caller_disconnected")  # type: ignore[arg-type]  # wrong in the stubs
            )
        async for event in self._jobs.watch(job.id, with_data=True):
            response = v1.GenerateResponse()
            codec.write_job_event(event, response.event)
            yield response

    async def CreateJob(self, request: v1.CreateJobRequest, context: Context) -> v1.CreateJobResponse:
        """Begin a detached job."""
        wish = await self._pipelines.prepare(wish_from_generate(request.generate))
        wish = replace(wish, policy=replace(wish.policy, detached=True))
        return v1.CreateJobResponse(job=codec.job_to_proto(await self._pipelines.create_detached(wish)))

    async def GetJob(self, request: v1.GetJobRequest, context: Context) -> v1.GetJobResponse:
        """One job."""
        return v1.GetJobResponse(job=codec.job_to_proto(await self._jobs.get(request.job_id)))

    async def ListJobs(self, request: v1.ListJobsRequest, context: Context) -> v1.ListJobsResponse:
        """Jobs, newest first."""
        size = page_size(request.page_size, _JOBS_ON_A_PAGE)
        before = decode_token(request.page_token, str) if request.page_token else None
        states = _states(request.states)
        found = await self._jobs.list(page_size=size + 1, before=before, states=states)
        page = found[:size]
        token = encode_token(page[-1].id) if len(found) > size else ""
        return v1.ListJobsResponse(jobs=[codec.job_to_proto(job) for job in page], next_page_token=token)

    async def WatchJob(
        self, request: v1.WatchJobRequest, context: Context
    ) -> AsyncIterator[v1.WatchJobResponse]:
        """A job's log from any place."""
        if request.after_sequence < 0:
            raise InvalidRequestError("after_sequence is negative")
        heartbeat_s = _heartbeat_s(request)
        events = self._jobs.watch(
            request.job_id,
            request.after_sequence,
            heartbeat_s,
            with_data=not request.without_artifact_data,
        )
        async for event in events:
            response = v1.WatchJobResponse()
            codec.write_job_event(event, response.event)
            yield response

    async def CancelJob(self, request: v1.CancelJobRequest, context: Context) -> v1.CancelJobResponse:
        """Ask a job to end."""
        return v1.CancelJobResponse(job=codec.job_to_proto(await self._jobs.cancel(request.job_id, "caller")))

    async def GetArtifact(
        self, request: v1.GetArtifactRequest, context: Context
    ) -> AsyncIterator[v1.GetArtifactResponse]:
        """An artifact from an offset on."""
        if request.offset_bytes < 0:
            raise InvalidRequestError("offset_bytes is negative")
        async with aclosing(self._artifacts.chunks(request.artifact_id, request.offset_bytes)) as chunks:
            async for chunk in chunks:
                yield v1.GetArtifactResponse(chunk=codec.artifact_chunk_to_proto(chunk))

    async def Embed(self, request: v1.EmbedRequest, context: Context) -> v1.EmbedResponse:
        """Vectors for texts."""
        return codec.embeddings_to_proto(await self._pipelines.embed(wish_from_embed(request)))

    async def Predict(self, request: v1.PredictRequest, context: Context) -> v1.PredictResponse:
        """Classes, numbers or series, predicted from examples."""
        found = await self._pipelines.predict(
            task_from_predict(request),
            model=request.model,
            policy=codec.policy_from_proto(request.policy),
            request_id=request.request_id,
        )
        return codec.predictions_to_proto(found)

    async def ListModels(self, request: v1.ListModelsRequest, context: Context) -> v1.ListModelsResponse:
        """Names that a request may use."""
        return v1.ListModelsResponse(
            models=[codec.model_to_proto(found) for found in self._pipelines.models()]
        )

    async def ListWorkflows(
        self, request: v1.ListWorkflowsRequest, context: Context
    ) -> v1.ListWorkflowsResponse:
        """Templates that pictures are drawn from."""
        return v1.ListWorkflowsResponse(
            workflows=[codec.workflow_to_proto(each) for each in self._workflows.listed()]
        )

    async def ExplainRoute(
        self, request: v1.ExplainRouteRequest, context: Context
    ) -> v1.ExplainRouteResponse:
        """Who would answer."""
        wish = await self._pipelines.prepare(wish_from_generate(request.generate))
        return codec.route_explanation_to_proto(self._pipelines.explain(wish))


def _states(numbers: Collection[int]) -> frozenset[JobState]:
    known: dict[int, JobState] = {number: state for state, number in codec.JOB_STATES.to_proto.items()}
    strange = [number for number in numbers if number not in known]
    if strange:
        raise InvalidRequestError(f"states has {strange[0]}, which is not a state of jobs")
    return frozenset(known[number] for number in numbers)


def _heartbeat_s(request: v1.WatchJobRequest) -> float:
    if not request.HasField("heartbeat_interval"):
        return HEARTBEAT_S
    seconds = codec.duration_from_proto(request.heartbeat_interval)
    least_s, most_s = _HEARTBEAT_BOUNDS_S
    if not least_s <= seconds <= most_s:
        raise InvalidRequestError(
            f"heartbeat_interval is {seconds:g} s; it must be {least_s:g} to {most_s:g} s"
        )
    return seconds
