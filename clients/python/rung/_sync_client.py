"""The blocking client: the asynchronous one, run by an event loop in a thread of its own."""

from __future__ import annotations

import os
import weakref
from collections.abc import (
    Callable,
    Collection,
    Iterator,
    Sequence,
)
from contextlib import AbstractAsyncContextManager, contextmanager
from pathlib import Path
from types import TracebackType
from typing import TypeVar

from rung._client import (
    DEFAULT_RECONNECT_S,
    DEFAULT_TIMEOUT_S,
    EMBED_TIMEOUT_S,
    AsyncClient,
)
from rung._client_generation import Messages, OpenAiBody
from rung._client_leases import HeldLease, LeaseStep
from rung._sync_calls import LoopThread, Stream, SyncJobStream
from rung._sync_client_prediction import SyncPredictionCalls
from rung._sync_client_speech import SyncSpeechCalls
from rung.transport import TlsOptions
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

T = TypeVar("T")


class Client(SyncSpeechCalls, SyncPredictionCalls):
    """A blocking client of one control plane: `AsyncClient`, method by method, without `await`.

    Close it, or use it as a context manager. It can be used from several threads; each stream by
    one at a time. Arguments, results and errors are those of `AsyncClient`.
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
        self._client = AsyncClient(
            address, tls=tls, token=token, timeout_s=timeout_s, reconnect_s=reconnect_s
        )
        self._thread = LoopThread()
        self._stop = weakref.finalize(self, self._thread.stop, self._client)

    @property
    def address(self) -> str:
        """Where the control plane is."""
        return self._client.address

    def close(self) -> None:
        """Close the connection and end the thread; calls that wait end with JobCancelledError."""
        self._stop()

    def __enter__(self) -> Client:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

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
    ) -> SyncJobStream:
        """See `AsyncClient.chat`."""
        source = self._client.chat(
            messages,
            model=model,
            effort=effort,
            tools=tools,
            max_tokens=max_tokens,
            temperature=temperature,
            policy=policy,
            request_id=request_id,
        )
        return SyncJobStream(self._thread, source)

    def generate_openai(
        self,
        body: OpenAiBody,
        *,
        model: str = "",
        effort: int | None = None,
        policy: Policy = Policy(),  # noqa: B008 - frozen
        request_id: str = "",
    ) -> SyncJobStream:
        """See `AsyncClient.generate_openai`."""
        source = self._client.generate_openai(
            body, model=model, effort=effort, policy=policy, request_id=request_id
        )
        return SyncJobStream(self._thread, source)

    def create_job(
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
        """See `AsyncClient.create_job`."""
        return self._thread.run(
            self._client.create_job(
                messages,
                body=body,
                wanted=wanted,
                model=model,
                effort=effort,
                tools=tools,
                max_tokens=max_tokens,
                temperature=temperature,
                policy=policy,
                request_id=request_id,
            )
        )

    def get_job(self, job_id: str) -> Job:
        """See `AsyncClient.get_job`."""
        return self._thread.run(self._client.get_job(job_id))

    def list_jobs(self, states: Collection[JobState] = (), page_size: int = 0) -> Stream[Job]:
        """See `AsyncClient.list_jobs`."""
        return Stream(self._thread, self._client.list_jobs(states, page_size))

    def watch_job(
        self,
        job_id: str,
        after_sequence: int = 0,
        *,
        heartbeats: bool = False,
        artifact_data: bool = True,
    ) -> Stream[JobEvent]:
        """See `AsyncClient.watch_job`."""
        events = self._client.watch_job(
            job_id, after_sequence, heartbeats=heartbeats, artifact_data=artifact_data
        )
        return Stream(self._thread, events)

    def cancel_job(self, job_id: str) -> Job:
        """See `AsyncClient.cancel_job`."""
        return self._thread.run(self._client.cancel_job(job_id))

    def get_artifact(self, artifact_id: str) -> bytes:
        """See `AsyncClient.get_artifact`."""
        return self._thread.run(self._client.get_artifact(artifact_id))

    def save_artifact(self, artifact_id: str, path: str | os.PathLike[str]) -> Path:
        """See `AsyncClient.save_artifact`."""
        return self._thread.run(self._client.save_artifact(artifact_id, path))

    def embed(
        self,
        inputs: str | Sequence[str],
        model: str = "",
        *,
        policy: Policy = Policy(),  # noqa: B008 - frozen
        request_id: str = "",
        timeout_s: float = EMBED_TIMEOUT_S,
    ) -> Embeddings:
        """See `AsyncClient.embed`."""
        return self._thread.run(
            self._client.embed(inputs, model, policy=policy, request_id=request_id, timeout_s=timeout_s)
        )

    def list_models(self) -> tuple[Model, ...]:
        """See `AsyncClient.list_models`."""
        return self._thread.run(self._client.list_models())

    def list_workflows(self) -> tuple[Workflow, ...]:
        """See `AsyncClient.list_workflows`."""
        return self._thread.run(self._client.list_workflows())

    def explain_route(
        self,
        messages: Messages = "",
        *,
        model: str = "",
        effort: int | None = None,
        policy: Policy = Policy(),  # noqa: B008 - frozen
    ) -> RouteExplanation:
        """See `AsyncClient.explain_route`."""
        return self._thread.run(
            self._client.explain_route(messages, model=model, effort=effort, policy=policy)
        )

    # The fleet.

    def list_nodes(self) -> tuple[Node, ...]:
        """See `AsyncClient.list_nodes`."""
        return self._thread.run(self._client.list_nodes())

    def get_node(self, node_id: str) -> Node:
        """See `AsyncClient.get_node`."""
        return self._thread.run(self._client.get_node(node_id))

    def list_deployments(self) -> tuple[Deployment, ...]:
        """See `AsyncClient.list_deployments`."""
        return self._thread.run(self._client.list_deployments())

    def get_deployment(self, deployment_id: str) -> Deployment:
        """See `AsyncClient.get_deployment`."""
        return self._thread.run(self._client.get_deployment(deployment_id))

    def watch_fleet(self) -> Stream[FleetSnapshot]:
        """See `AsyncClient.watch_fleet`."""
        return Stream(self._thread, self._client.watch_fleet())

    def start_deployment(self, deployment_id: str, *, operation_id: str = "") -> Stream[LifecycleEvent]:
        """See `AsyncClient.start_deployment`."""
        return Stream(self._thread, self._client.start_deployment(deployment_id, operation_id=operation_id))

    def stop_deployment(
        self, deployment_id: str, *, force: bool = False, operation_id: str = ""
    ) -> Stream[LifecycleEvent]:
        """See `AsyncClient.stop_deployment`."""
        source = self._client.stop_deployment(deployment_id, force=force, operation_id=operation_id)
        return Stream(self._thread, source)

    def sleep_deployment(
        self, deployment_id: str, *, force: bool = False, level: int = 0, operation_id: str = ""
    ) -> Stream[LifecycleEvent]:
        """See `AsyncClient.sleep_deployment`."""
        source = self._client.sleep_deployment(
            deployment_id, force=force, level=level, operation_id=operation_id
        )
        return Stream(self._thread, source)

    def wake_deployment(self, deployment_id: str, *, operation_id: str = "") -> Stream[LifecycleEvent]:
        """See `AsyncClient.wake_deployment`."""
        return Stream(self._thread, self._client.wake_deployment(deployment_id, operation_id=operation_id))

    def free_deployment(self, deployment_id: str, *, operation_id: str = "") -> Stream[LifecycleEvent]:
        """See `AsyncClient.free_deployment`."""
        return Stream(self._thread, self._client.free_deployment(deployment_id, operation_id=operation_id))

    # Profiles.

    def list_profiles(self) -> ProfileList:
        """See `AsyncClient.list_profiles`."""
        return self._thread.run(self._client.list_profiles())

    def switch_profile(
        self, name: str, *, dry_run: bool = False, operation_id: str = ""
    ) -> Stream[ProfileEvent]:
        """See `AsyncClient.switch_profile`."""
        source = self._client.switch_profile(name, dry_run=dry_run, operation_id=operation_id)
        return Stream(self._thread, source)

    # VRAM.

    def plan_reclaim(
        self, gpu: str, vram_bytes: int, *, max_grade: ReclaimGrade = ReclaimGrade.FULL
    ) -> ReclaimPlan | Infeasible:
        """See `AsyncClient.plan_reclaim`."""
        return self._thread.run(self._client.plan_reclaim(gpu, vram_bytes, max_grade=max_grade))

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
    ) -> Stream[LeaseStep]:
        """See `AsyncClient.acquire_lease`."""
        steps = self._client.acquire_lease(
            gpu,
            vram_bytes,
            max_grade=max_grade,
            priority=priority,
            holder=holder,
            deployment_id=deployment_id,
            ttl_s=ttl_s,
            operation_id=operation_id,
        )
        return Stream(self._thread, steps)

    @contextmanager
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
    ) -> Iterator[HeldLease]:
        """See `AsyncClient.lease`; it is renewed in the background, and `on_wait` is called from there."""
        manager = self._client.lease(
            gpu,
            vram_bytes,
            max_grade=max_grade,
            priority=priority,
            holder=holder,
            deployment_id=deployment_id,
            ttl_s=ttl_s,
            on_wait=on_wait,
        )
        holding = self._thread.run(_entered(manager))
        try:
            yield holding
        finally:
            self._thread.run(_left(manager))

    def renew_lease(self, lease_id: str) -> Lease:
        """See `AsyncClient.renew_lease`."""
        return self._thread.run(self._client.renew_lease(lease_id))

    def release_lease(self, lease_id: str) -> None:
        """See `AsyncClient.release_lease`."""
        self._thread.run(self._client.release_lease(lease_id))

    def list_leases(self) -> tuple[Lease, ...]:
        """See `AsyncClient.list_leases`."""
        return self._thread.run(self._client.list_leases())

    def estimate_footprint(
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
        """See `AsyncClient.estimate_footprint`."""
        return self._thread.run(
            self._client.estimate_footprint(
                parameters=parameters,
                bits_per_weight=bits_per_weight,
                layers=layers,
                key_value_heads=key_value_heads,
                head_size=head_size,
                kv_bits=kv_bits,
                context_tokens=context_tokens,
                sequences=sequences,
            )
        )

    def drain_node(self, node_id: str, *, operation_id: str = "") -> Node:
        """See `AsyncClient.drain_node`."""
        return self._thread.run(self._client.drain_node(node_id, operation_id=operation_id))

    def resume_node(self, node_id: str, *, operation_id: str = "") -> Node:
        """See `AsyncClient.resume_node`."""
        return self._thread.run(self._client.resume_node(node_id, operation_id=operation_id))


async def _entered(manager: AbstractAsyncContextManager[T]) -> T:
    return await manager.__aenter__()


async def _left(manager: AbstractAsyncContextManager[object]) -> None:
    await manager.__aexit__(None, None, None)
