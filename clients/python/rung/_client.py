"""The asynchronous client of a control plane."""

from __future__ import annotations

import os
import uuid
from collections.abc import AsyncGenerator, Callable, Collection, Sequence
from contextlib import AbstractAsyncContextManager
from pathlib import Path
from types import TracebackType

from rung import codec, v1
from rung._client_artifacts import get_artifact, save_artifact
from rung._client_calls import Connection
from rung._client_fleet import operate, watch_snapshots
from rung._client_generation import (
    Messages,
    OpenAiBody,
    conversation_of,
    generate_request,
)
from rung._client_jobs import JobStream, watch_events
from rung._client_leases import HeldLease, LeaseStep, acquire, held, release, renew
from rung._client_prediction import PredictionCalls
from rung._client_profiles import list_profiles, switch
from rung._client_speech import SpeechCalls
from rung.errors import InvalidRequestError
from rung.transport import ChannelOptions, TlsOptions
from rung.types import (
    Deployment,
    Embeddings,
    FleetSnapshot,
    Footprint,
    GenerationInput,
    Infeasible,
    Job,
    JobEvent,
    JobState,
    Lease,
    LifecycleEvent,
    Model,
    Node,
    PhaseProgress,
    Policy,
    Priority,
    ProfileEvent,
    ProfileList,
    ReclaimGrade,
    ReclaimPlan,
    RouteExplanation,
    Tool,
    Workflow,
)

DEFAULT_ADDRESS = "127.0.0.1:8151"
#: Deadline of unary calls.
DEFAULT_TIMEOUT_S = 30.0
#: A watch gives up after this long without a connection: a restart of the control plane is over by then.
DEFAULT_RECONNECT_S = 120.0
#: An engine may have to start before it can embed.
EMBED_TIMEOUT_S = 600.0


class AsyncClient(SpeechCalls, PredictionCalls):
    """A client of one control plane. Close it, or use it as an async context manager.

    It connects with its first call and belongs to the event loop of that call. All failures are
    `rung.errors`; reads are retried while the server cannot be reached, mutations are not.

    Args:
        address: `host:port`; None takes the environment's RUNG_ADDRESS, else 127.0.0.1:8151.
        tls: None connects without TLS.
        token: bearer token; None takes the environment's RUNG_TOKEN, if there is one. Without TLS it is sent
            to this machine alone.
        timeout_s: deadline of unary calls. Streams have none.
        reconnect_s: longest time without a connection before a watch gives up.
    """

    def __init__(
        self,
        address: str | None = None,
        *,
        tls: TlsOptions | None = None,
        token: str | None = None,
        timeout_s: float = DEFAULT_TIMEOUT_S,
        reconnect_s: float = DEFAULT_RECONNECT_S,
    ) -> None:
        options = ChannelOptions(
            address=address or os.environ.get("RUNG_ADDRESS") or DEFAULT_ADDRESS,
            tls=tls,
            token=token or os.environ.get("RUNG_TOKEN") or None,
        )
        self._connection = Connection(options, timeout_s=timeout_s, reconnect_s=reconnect_s)

    @property
    def address(self) -> str:
        """Where the control plane is."""
        return self._connection.options.address

    async def aclose(self) -> None:
        """Close the connection; streams that are open end with JobCancelledError."""
        await self._connection.aclose()

    async def __aenter__(self) -> AsyncClient:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.aclose()

    # Inference.

    def chat(
        self,
        messages: Messages,
        *,
        model: str = "",
        effort: int | None = None,
        tools: Sequence[Tool] = (),
        max_tokens: int | None = None,
        temperature: float | None = None,
        policy: Policy = Policy(),  # noqa: B008 - frozen
        request_id: str = "",
    ) -> JobStream:
        """Generate an answer to a conversation, or to one user message.

        Args:
            messages: turns, oldest first; a text is one turn of the user.
            model: a model, a deployment, or a name of the ladder; empty leaves the choice to it.
            effort: 1 to 10; None leaves it to the classifier.
            tools: functions that the model may call.
            max_tokens: most tokens to produce; None for the engine's default.
            temperature: of sampling; None for the engine's default.
            policy: where it may go and how it may be treated.
            request_id: the caller's own id; appears in logs.
        """
        conversation = conversation_of(messages, tools, max_tokens, temperature)
        return JobStream(
            self._connection,
            generate_request(conversation, model, effort=effort, policy=policy, request_id=request_id),
        )

    def generate_openai(
        self,
        body: OpenAiBody,
        *,
        model: str = "",
        effort: int | None = None,
        policy: Policy = Policy(),  # noqa: B008 - frozen
        request_id: str = "",
    ) -> JobStream:
        """Generate from the body of an OpenAI chat-completions request. Arguments as `chat`.

        Args:
            body: as JSON or as a mapping; passed on as it is.
            model: instead of the `model` of the body.
            effort: as `chat`.
            policy: as `chat`.
            request_id: as `chat`.

        Raises:
            InvalidRequestError: `body` is no JSON object.
        """
        return JobStream(
            self._connection,
            generate_request(body, model, effort=effort, policy=policy, request_id=request_id),
        )

    async def create_job(
        self,
        messages: Messages | None = None,
        *,
        body: OpenAiBody | None = None,
        wanted: GenerationInput | None = None,
        model: str = "",
        effort: int | None = None,
        tools: Sequence[Tool] = (),
        max_tokens: int | None = None,
        temperature: float | None = None,
        policy: Policy = Policy(),  # noqa: B008 - frozen
        request_id: str = "",
    ) -> Job:
        """Create a job that outlives this client; follow it with `watch_job`. Arguments as `chat`.

        Args:
            messages: as `chat`.
            body: an OpenAI chat-completions request instead of `messages`, `tools` and the rest.
            wanted: pictures, speech and so on instead, as `generate`.
            model: as `chat`.
            effort: as `chat`.
            tools: as `chat`.
            max_tokens: as `chat`.
            temperature: as `chat`.
            policy: as `chat`; taken as detached.
            request_id: the same id returns the same job.

        Raises:
            InvalidRequestError: not exactly one of `messages`, `body` and `wanted`.
        """
        conversation = None
        if messages is not None:
            conversation = conversation_of(messages, tools, max_tokens, temperature)
        given = [each for each in (conversation, body, wanted) if each is not None]
        if len(given) != 1:
            raise InvalidRequestError("give either messages, body or wanted")
        request = generate_request(given[0], model, effort=effort, policy=policy, request_id=request_id)
        response = await self._connection.unary(
            self._connection.stubs.inference.CreateJob, v1.CreateJobRequest(generate=request)
        )
        return codec.job_from_proto(response.job)

    async def get_job(self, job_id: str) -> Job:
        """One job. Raises UnknownJobError."""
        response = await self._connection.unary(
            self._connection.stubs.inference.GetJob, v1.GetJobRequest(job_id=job_id)
        )
        return codec.job_from_proto(response.job)

    async def list_jobs(
        self, states: Collection[JobState] = (), page_size: int = 0
    ) -> AsyncGenerator[Job, None]:
        """Jobs, newest first, page by page as they are read.

        Args:
            states: only jobs in these; empty for all.
            page_size: jobs fetched at a time, 1 to 1000; 0 for the server's default.
        """
        request = v1.ListJobsRequest(
            page_size=page_size, states=[codec.JOB_STATES.to_proto[state] for state in states]
        )
        while True:
            response = await self._connection.unary(self._connection.stubs.inference.ListJobs, request)
            for job in response.jobs:
                yield codec.job_from_proto(job)
            if not response.next_page_token:
                return
            request.page_token = response.next_page_token

    def watch_job(
        self,
        job_id: str,
        after_sequence: int = 0,
        *,
        heartbeats: bool = False,
        artifact_data: bool = True,
    ) -> AsyncGenerator[JobEvent, None]:
        """The events of a job, those to come included, to its terminal one.

        A connection that is lost on the way is made again, and no event is missed or doubled.

        Args:
            job_id: job.
            after_sequence: only events with a higher sequence.
            heartbeats: also pass on what the server says while nothing happens (sequence 0).
            artifact_data: pieces of artifacts and previews come with their data; without, they say where they
                are and how long, and `get_artifact` has the rest.

        Raises:
            UnknownJobError: there is no such job.
            OutOfRangeError: `after_sequence` is beyond the log.
            UnavailableError: the server cannot be reached, or not again.
        """
        return watch_events(
            self._connection,
            job_id,
            after_sequence,
            heartbeats=heartbeats,
            artifact_data=artifact_data,
        )

    async def cancel_job(self, job_id: str) -> Job:
        """End a job; its terminal event may still be on the way. Raises UnknownJobError."""
        response = await self._connection.unary(
            self._connection.stubs.inference.CancelJob, v1.CancelJobRequest(job_id=job_id)
        )
        return codec.job_from_proto(response.job)

    async def get_artifact(self, artifact_id: str) -> bytes:
        """The whole of an artifact, through lost connections, its SHA-256 checked.

        Raises:
            UnknownArtifactError: there is none, or no longer.
            ArtifactDamagedError: it did not arrive as it was stored.
            UnavailableError: the server cannot be reached, or not again.
        """
        return await get_artifact(self._connection, artifact_id)

    async def save_artifact(self, artifact_id: str, path: str | os.PathLike[str]) -> Path:
        """Write an artifact to a file, which is there once it is whole; returns its path.

        A piece at a time is in memory. What an earlier attempt left in `<artifact_id>.part` is not fetched
        again.

        Args:
            artifact_id: artifact.
            path: file to make or replace, or a folder to put one into, under a name of its kind.

        Raises:
            OSError: the file cannot be written.
            UnknownArtifactError, ArtifactDamagedError, UnavailableError: as `get_artifact`.
        """
        return await save_artifact(self._connection, artifact_id, Path(path))

    async def embed(
        self,
        inputs: str | Sequence[str],
        model: str = "",
        *,
        policy: Policy = Policy(),  # noqa: B008 - frozen
        request_id: str = "",
        timeout_s: float = EMBED_TIMEOUT_S,
    ) -> Embeddings:
        """Vectors for texts, in their order."""
        request = v1.EmbedRequest(
            request_id=request_id,
            model=model,
            inputs=[inputs] if isinstance(inputs, str) else inputs,
            policy=codec.policy_to_proto(policy),
        )
        response = await self._connection.unary(
            self._connection.stubs.inference.Embed, request, timeout_s=timeout_s
        )
        return codec.embeddings_from_proto(response)

    async def list_models(self) -> tuple[Model, ...]:
        """What can be asked for by name, by name."""
        response = await self._connection.unary(
            self._connection.stubs.inference.ListModels, v1.ListModelsRequest()
        )
        return tuple(codec.model_from_proto(model) for model in response.models)

    async def list_workflows(self) -> tuple[Workflow, ...]:
        """Templates that pictures are drawn from, by name; their names are operations of `ImageInput`."""
        response = await self._connection.unary(
            self._connection.stubs.inference.ListWorkflows, v1.ListWorkflowsRequest()
        )
        return tuple(codec.workflow_from_proto(workflow) for workflow in response.workflows)

    async def explain_route(
        self,
        messages: Messages = "",
        *,
        model: str = "",
        effort: int | None = None,
        policy: Policy = Policy(),  # noqa: B008 - frozen
    ) -> RouteExplanation:
        """Who would answer, and why. Starts nothing."""
        request = generate_request(
            conversation_of(messages, (), None, None), model, effort=effort, policy=policy, request_id=""
        )
        response = await self._connection.unary(
            self._connection.stubs.inference.ExplainRoute, v1.ExplainRouteRequest(generate=request)
        )
        return codec.route_explanation_from_proto(response)

    # The fleet.

    async def list_nodes(self) -> tuple[Node, ...]:
        """All nodes by id."""
        request = v1.ListNodesRequest()
        nodes: list[Node] = []
        while True:
            response = await self._connection.unary(self._connection.stubs.fleet.ListNodes, request)
            nodes += [codec.node_from_proto(node) for node in response.nodes]
            if not response.next_page_token:
                return tuple(nodes)
            request.page_token = response.next_page_token

    async def get_node(self, node_id: str) -> Node:
        """One node. Raises UnknownNodeError."""
        response = await self._connection.unary(
            self._connection.stubs.fleet.GetNode, v1.GetNodeRequest(node_id=node_id)
        )
        return codec.node_from_proto(response.node)

    async def list_deployments(self) -> tuple[Deployment, ...]:
        """All deployments by id."""
        request = v1.ListDeploymentsRequest()
        found: list[Deployment] = []
        while True:
            response = await self._connection.unary(self._connection.stubs.fleet.ListDeployments, request)
            found += [codec.deployment_from_proto(each) for each in response.deployments]
            if not response.next_page_token:
                return tuple(found)
            request.page_token = response.next_page_token

    async def get_deployment(self, deployment_id: str) -> Deployment:
        """One deployment. Raises UnknownDeploymentError."""
        response = await self._connection.unary(
            self._connection.stubs.fleet.GetDeployment, v1.GetDeploymentRequest(deployment_id=deployment_id)
        )
        return codec.deployment_from_proto(response.deployment)

    def watch_fleet(self) -> AsyncGenerator[FleetSnapshot, None]:
        """The whole fleet, again after every change and at least once a second; without an end.

        Raises:
            UnavailableError: the server cannot be reached, or not again.
        """
        return watch_snapshots(self._connection)

    def start_deployment(
        self, deployment_id: str, *, operation_id: str = ""
    ) -> AsyncGenerator[LifecycleEvent, None]:
        """Start an engine and follow its loading; the last event is `LifecycleDone` or `LifecycleFailed`.

        This and the other operations begin when they are first read, and go on when nobody reads
        any more. A connection that is lost on the way is made again.

        Args:
            deployment_id: deployment.
            operation_id: the same id joins the operation that runs, or repeats its outcome; empty
                makes a new one.

        Raises:
            UnknownDeploymentError: there is no such deployment.
            FailedPreconditionError: its state or its owner forbids it.
            UnavailableError: the server, or the node, cannot be reached.
        """
        request = v1.StartDeploymentRequest(
            operation_id=_operation(operation_id), deployment_id=deployment_id
        )
        return operate(self._connection, lambda stubs: stubs.fleet.StartDeployment, request)

    def stop_deployment(
        self, deployment_id: str, *, force: bool = False, operation_id: str = ""
    ) -> AsyncGenerator[LifecycleEvent, None]:
        """Stop an engine. As `start_deployment`; PinnedDeploymentError without `force`."""
        request = v1.StopDeploymentRequest(
            operation_id=_operation(operation_id), deployment_id=deployment_id, force=force
        )
        return operate(self._connection, lambda stubs: stubs.fleet.StopDeployment, request)

    def sleep_deployment(
        self, deployment_id: str, *, force: bool = False, level: int = 0, operation_id: str = ""
    ) -> AsyncGenerator[LifecycleEvent, None]:
        """Move weights to host memory. As `stop_deployment`; `level` 0 lets the server choose."""
        request = v1.SleepDeploymentRequest(
            operation_id=_operation(operation_id), deployment_id=deployment_id, force=force, level=level
        )
        return operate(self._connection, lambda stubs: stubs.fleet.SleepDeployment, request)

    def wake_deployment(
        self, deployment_id: str, *, operation_id: str = ""
    ) -> AsyncGenerator[LifecycleEvent, None]:
        """Move weights back to VRAM. As `start_deployment`."""
        request = v1.WakeDeploymentRequest(operation_id=_operation(operation_id), deployment_id=deployment_id)
        return operate(self._connection, lambda stubs: stubs.fleet.WakeDeployment, request)

    def free_deployment(
        self, deployment_id: str, *, operation_id: str = ""
    ) -> AsyncGenerator[LifecycleEvent, None]:
        """Ask a `cache` engine to give back its memory. As `start_deployment`."""
        request = v1.FreeDeploymentRequest(operation_id=_operation(operation_id), deployment_id=deployment_id)
        return operate(self._connection, lambda stubs: stubs.fleet.FreeDeployment, request)

    # Profiles.

    async def list_profiles(self) -> ProfileList:
        """The profiles by name, and which of them was applied and verified."""
        return await list_profiles(self._connection)

    def switch_profile(
        self, name: str, *, dry_run: bool = False, operation_id: str = ""
    ) -> AsyncGenerator[ProfileEvent, None]:
        """Apply a profile and follow its steps; the last event is `ProfileDone` or `ProfileFailed`.

        Leaving does not end the switch. If a step fails, it goes back to what was before.

        Args:
            name: the profile.
            dry_run: only say what would be done: one event, with the `ProfilePlan`.
            operation_id: the same id joins the same switch; empty makes a new one.

        Raises:
            UnknownProfileError: no such profile.
            FailedPreconditionError: another switch is under way.
            InvalidRequestError, VramInfeasibleError: it does not fit its GPU, or not now.
            UnavailableError: the server, or a node that it needs, cannot be reached.
        """
        request = v1.SwitchProfileRequest(operation_id=_operation(operation_id), name=name, dry_run=dry_run)
        return switch(self._connection, request)

    # VRAM.

    async def plan_reclaim(
        self, gpu: str, vram_bytes: int, *, max_grade: ReclaimGrade = ReclaimGrade.FULL
    ) -> ReclaimPlan | Infeasible:
        """What would be disturbed to make room on a GPU, or why it cannot be made. Changes nothing.

        Args:
            gpu: `node/index`.
            vram_bytes: how much is wanted.
            max_grade: the most that others may be disturbed.

        Raises:
            UnknownNodeError, NotFoundError: no such GPU.
            UnavailableError: its node is not heard.
        """
        demand = v1.Demand(gpu=gpu, vram_bytes=vram_bytes, max_grade=codec.RECLAIM_GRADES.to_proto[max_grade])
        response = await self._connection.unary(
            self._connection.stubs.vram.PlanReclaim, v1.PlanReclaimRequest(demand=demand)
        )
        if response.WhichOneof("outcome") == "plan":
            return codec.reclaim_plan_from_proto(response.plan)
        return codec.infeasible_from_proto(response.infeasible)

    def acquire_lease(
        self,
        gpu: str,
        vram_bytes: int,
        *,
        max_grade: ReclaimGrade = ReclaimGrade.FULL,
        priority: Priority = Priority.AGENT,
        holder: str = "",
        deployment_id: str = "",
        ttl_s: float = 60.0,
        operation_id: str = "",
    ) -> AsyncGenerator[LeaseStep, None]:
        """Wait for memory of a GPU and hear why it takes long; the `Lease` is the last that is yielded.

        Leaving before the grant withdraws the demand. The lease ends after `ttl_s` unless it is renewed;
        `lease` sees to that.

        Args:
            gpu: `node/index`.
            vram_bytes: how much.
            max_grade: the most that others may be disturbed.
            priority: order among those who wait.
            holder: one line for a person about who asks.
            deployment_id: the deployment whose engine will take the memory, such as a ComfyUI that a prompt
                is about to be sent to; empty for any other program.
            ttl_s: how long the lease lasts without a renewal.
            operation_id: the same id joins the same demand, or repeats its lease; empty makes a new one.

        Raises:
            VramInfeasibleError: it does not fit, and waiting does not help.
            UnknownNodeError, NotFoundError: no such GPU.
            UnknownDeploymentError: no such deployment on its node.
            UnavailableError: the server, or the node, cannot be reached.
        """
        request = _acquire(gpu, vram_bytes, max_grade, priority, holder, deployment_id, ttl_s, operation_id)
        return acquire(self._connection, request)

    def lease(
        self,
        gpu: str,
        vram_bytes: int,
        *,
        max_grade: ReclaimGrade = ReclaimGrade.FULL,
        priority: Priority = Priority.AGENT,
        holder: str = "",
        deployment_id: str = "",
        ttl_s: float = 60.0,
        on_wait: Callable[[PhaseProgress | ReclaimPlan], None] | None = None,
    ) -> AbstractAsyncContextManager[HeldLease]:
        """Hold memory of a GPU: `async with client.lease("workstation/0", 20 << 30): ...`.

        Entered once it is granted, renewed meanwhile, given back at the end. As `acquire_lease`; `on_wait`
        is called with what is heard until then.
        """
        request = _acquire(gpu, vram_bytes, max_grade, priority, holder, deployment_id, ttl_s, "")
        return held(self._connection, request, ttl_s, on_wait)

    async def renew_lease(self, lease_id: str) -> Lease:
        """Let a lease last its time again from now. Raises UnknownLeaseError once it has ended."""
        return await renew(self._connection, lease_id)

    async def release_lease(self, lease_id: str) -> None:
        """End a lease. Ending one that has ended changes nothing."""
        await release(self._connection, lease_id)

    async def list_leases(self) -> tuple[Lease, ...]:
        """Leases that are held, by the time of their grant."""
        response = await self._connection.unary(
            self._connection.stubs.vram.ListLeases, v1.ListLeasesRequest()
        )
        return tuple(codec.lease_from_proto(lease) for lease in response.leases)

    async def estimate_footprint(
        self,
        *,
        parameters: int,
        bits_per_weight: float,
        layers: int = 0,
        key_value_heads: int = 0,
        head_size: int = 0,
        kv_bits: float = 16.0,
        context_tokens: int = 0,
        sequences: int = 1,
    ) -> Footprint:
        """What a model would need, from its architecture. Raises InvalidRequestError."""
        response = await self._connection.unary(
            self._connection.stubs.vram.EstimateFootprint,
            v1.EstimateFootprintRequest(
                parameter_count=parameters,
                bits_per_weight=bits_per_weight,
                layers=layers,
                key_value_heads=key_value_heads,
                head_size=head_size,
                kv_bits=kv_bits,
                context_tokens=context_tokens,
                sequences=sequences,
            ),
        )
        return codec.footprint_from_proto(response)

    async def drain_node(self, node_id: str, *, operation_id: str = "") -> Node:
        """Send no new work to a node; what runs there finishes. Raises UnknownNodeError."""
        request = v1.DrainNodeRequest(operation_id=_operation(operation_id), node_id=node_id)
        response = await self._connection.unary(self._connection.stubs.fleet.DrainNode, request)
        return codec.node_from_proto(response.node)

    async def resume_node(self, node_id: str, *, operation_id: str = "") -> Node:
        """Take a drained node back. Raises UnknownNodeError."""
        request = v1.ResumeNodeRequest(operation_id=_operation(operation_id), node_id=node_id)
        response = await self._connection.unary(self._connection.stubs.fleet.ResumeNode, request)
        return codec.node_from_proto(response.node)


def _acquire(
    gpu: str,
    vram_bytes: int,
    max_grade: ReclaimGrade,
    priority: Priority,
    holder: str,
    deployment_id: str,
    ttl_s: float,
    operation_id: str,
) -> v1.AcquireLeaseRequest:
    return v1.AcquireLeaseRequest(
        operation_id=_operation(operation_id),
        demand=v1.Demand(
            gpu=gpu,
            vram_bytes=vram_bytes,
            max_grade=codec.RECLAIM_GRADES.to_proto[max_grade],
            priority=codec.PRIORITIES.to_proto[priority],
            holder=holder,
            deployment_id=deployment_id,
        ),
        time_to_live=codec.duration_to_proto(ttl_s),
    )


def _operation(operation_id: str) -> str:
    return operation_id or str(uuid.uuid4())
