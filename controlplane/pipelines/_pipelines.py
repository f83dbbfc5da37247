"""Generations: what happens between a wish and its last event."""

from __future__ import annotations

import asyncio
import random
from itertools import chain
from types import TracebackType
from typing import Protocol

import structlog
from msgspec.structs import replace
from prometheus_client import CollectorRegistry

from controlplane.fleet import Fleet, NodeSchedulers
from controlplane.jobs import Jobs, LiveJob
from controlplane.ladder import Circuits, Ladder
from controlplane.pipelines._asking import LadderAsk
from controlplane.pipelines._begun import Begun
from controlplane.pipelines._engage import Engager
from controlplane.pipelines._engaged import CloudPort, OnBytes, OnWait
from controlplane.pipelines._generation import GenerationPipeline
from controlplane.pipelines._judging import Judge, judge_by_rule
from controlplane.pipelines._metrics import PipelineMetrics
from controlplane.pipelines._openai import (
    AnswerReader,
    marked,
    read_embeddings,
    read_head,
    read_usage,
)
from controlplane.pipelines._prediction import prediction_body, read_predictions, suited
from controlplane.pipelines._reasoning import Reasoning
from controlplane.pipelines._router import CloudModels, Router
from controlplane.pipelines._slots import Slots
from controlplane.pipelines._wish import Wish
from rung import reason_of_error
from rung.errors import InvalidRequestError, JobCancelledError, RungError
from rung.service import EngineClient, StreamPacer
from rung.types import (
    Embeddings,
    FailureReason,
    Job,
    JobKind,
    Model,
    Phase,
    Policy,
    Predictions,
    PredictionTask,
    RouteExplanation,
)

_log = structlog.get_logger("rung.pipelines")

#: What comes of a stream within so long for each stream there is goes together: 20 ms at 64 streams, which
#: a reader does not see.
_UNPACED_STREAMS = 16
_INTERVAL_PER_STREAM_S = 0.0003


class Cloud(CloudModels, CloudPort, Protocol):
    """The cloud models: who they are, and how they are asked."""


class Pipelines:
    """Carries wishes out: in the caller's own task for HTTP, in a task of their own for the rest."""

    def __init__(
        self,
        *,
        jobs: Jobs,
        fleet: Fleet,
        schedulers: NodeSchedulers,
        slots: Slots,
        client: EngineClient,
        registry: CollectorRegistry,
        ladder: Ladder | None = None,
        ask_judge: bool = False,
        cloud: Cloud | None = None,
        engine_idle_timeout_s: float = 600.0,
    ) -> None:
        self._jobs = jobs
        circuits = Circuits(jitter=lambda: random.uniform(0.75, 1.25))  # noqa: S311 - no secret
        self._router = Router(
            fleet=fleet, slots=slots, circuits=circuits, ladder=ladder, cloud=cloud, classify=judge_by_rule
        )
        self._engager = Engager(
            fleet=fleet,
            schedulers=schedulers,
            slots=slots,
            client=client,
            router=self._router,
            circuits=circuits,
            cloud=cloud,
            engine_idle_timeout_s=engine_idle_timeout_s,
        )
        self._reasoning = Reasoning(self._router, self._engager)
        self._ask = LadderAsk(self._router, self._engager)
        self._judge = Judge(self._router, self._ask) if ask_judge else None
        #: By the kinds of jobs that they carry out, what makes something else than text or vectors.
        self._generations: dict[JobKind, GenerationPipeline] = {}
        self._metrics = PipelineMetrics(registry, jobs)
        self._tasks: set[asyncio.Task[None]] = set()
        self._pacer = StreamPacer(
            unpaced_streams=_UNPACED_STREAMS, interval_per_stream_s=_INTERVAL_PER_STREAM_S
        )

    @property
    def router(self) -> Router:
        """Finds who may answer: for pipelines that are added."""
        return self._router

    @property
    def engager(self) -> Engager:
        """Tries one target after the other: for pipelines that are added."""
        return self._engager

    @property
    def ask(self) -> LadderAsk:
        """Asks a chat model one thing through the ladder: for the stages."""
        return self._ask

    def add(self, pipeline: GenerationPipeline, *kinds: JobKind) -> None:
        """Have jobs of these kinds carried out by a pipeline."""
        for kind in kinds:
            self._generations[kind] = pipeline

    async def prepare(self, wish: Wish) -> Wish:
        """The wish as it is to be begun: with the effort that the orchestrator gives it, if it is asked.

        Raises:
            InvalidRequestError: as `begin`.
        """
        return wish if self._judge is None else await self._judge.prepare(wish)

    def begin(self, wish: Wish) -> Begun:
        """Accept a wish.

        Raises:
            InvalidRequestError: the body cannot be used, or this kind of job is not for this API.
            UnknownModelError, NoTargetError: nobody can answer; no job is made.
            DrainingError, UnavailableError: no jobs are taken now.
        """
        route = self._router.route(wish)
        targets = self._router.choose(route)
        first = next(targets)
        job = self._jobs.open(
            kind=wish.kind, model=wish.model, policy=wish.policy, request_id=wish.request_id
        )
        if route.rung:
            job.progress(Phase.ROUTE, f"effort {route.effort}, rung {route.rung}: {route.why}")
        return Begun(job, wish, route, chain((first,), targets))

    def start(self, wish: Wish) -> LiveJob:
        """Begin a generation whose answer is read from its job's log. Raises as `begin`."""
        return self.launch(wish).job

    def launch(self, wish: Wish) -> Begun:
        """As `start`, for who also tells its caller the route. Raises as `begin`."""
        if wish.input is None:
            read_head(wish.body)
        begun = self.begin(self._prepared(wish))
        task = asyncio.create_task(self._logged(begun), name=begun.job.id)
        self._tasks.add(task)

        def ended(task: asyncio.Task[None]) -> None:
            self._tasks.discard(task)
            # One that was cancelled before its first step has ended nothing.
            begun.job.cancelled(begun.job.cancel_requested_by or "drain")

        task.add_done_callback(ended)
        begun.job.on_cancel(task.cancel)
        return begun

    async def create_detached(self, wish: Wish) -> Job:
        """Begin a generation that outlives its caller; returns once its job is stored.

        The same request id returns the same job. Raises as `begin`.
        """
        if wish.request_id:
            found = await self._jobs.find_by_request_id(wish.request_id)
            if found is not None:
                return found
        job = self.start(wish)
        try:
            await self._jobs.store_now()
        except BaseException:
            job.request_cancel("caller")
            raise
        return job.record()

    def explain(self, wish: Wish) -> RouteExplanation:
        """Who would answer, and why; starts nothing. Raises UnknownModelError, InvalidRequestError."""
        return self._router.explain(self._prepared(wish))

    def models(self) -> tuple[Model, ...]:
        """What a request may ask for by name."""
        return self._router.models()

    async def stream(
        self, begun: Begun, on_bytes: OnBytes, *, keep_usage: bool, on_wait: OnWait | None = None
    ) -> None:
        """Generate a chat answer as a stream of whole server-sent events, without the last `[DONE]`.

        Raises:
            RungError: what went wrong; the job has ended with it. Bytes may have been delivered.
        """
        async with self._ends(begun):
            await self._stream(begun, on_bytes, keep_usage=keep_usage, on_wait=on_wait)

    async def answer(self, begun: Begun) -> bytes:
        """Generate an answer in one piece: the engine's JSON, and who it is from. Raises as `stream`."""
        async with self._ends(begun):
            return marked(await self._answer(begun), begun.mark())

    async def embed(self, wish: Wish) -> Embeddings:
        """Vectors for texts. Raises as `begin` and `stream`."""
        begun = self._begin_here(wish)
        async with self._ends(begun):
            body = await self._answer(begun)
            served = begun.job.served
            vectors, usage = read_embeddings(body, served.target if served else "the engine")
            return Embeddings(vectors=vectors, usage=usage, served=served, job_id=begun.job.id)

    async def predict(
        self, task: PredictionTask, *, model: str, policy: Policy, request_id: str = ""
    ) -> Predictions:
        """Classes, numbers or series, predicted from examples.

        Raises:
            InvalidRequestError: the task's numbers are at fault, and the message says which; or as `begin`.
            RungError: as `begin` and `stream`.
        """
        body = prediction_body(task)
        wish = Wish(kind=JobKind.PREDICTION, model=model, body=body, policy=policy, request_id=request_id)
        begun = self._begin_here(wish)
        job = begun.job
        async with self._ends(begun):
            engaging = self._engager.engage(job, wish, suited(begun.targets, task), stream=False)
            async with await engaging as engaged:
                found = read_predictions(await engaged.reply.read(), task, engaged.target)
            job.done("stop")
            return replace(found, served=job.served, job_id=job.id)

    async def aclose(self) -> None:
        """Cancel what still runs."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self._engager.aclose()

    def _begin_here(self, wish: Wish) -> Begun:
        """As `begin`, for what is done by the task that calls, which is cancelled with the job."""
        begun = self.begin(wish)
        task = asyncio.current_task()
        assert task is not None
        begun.job.on_cancel(task.cancel)
        return begun

    def _prepared(self, wish: Wish) -> Wish:
        """The wish as the pipeline of its kind wants to begin it. Raises InvalidRequestError."""
        if wish.input is None:
            return wish
        pipeline = self._generations.get(wish.kind)
        if pipeline is None:
            raise InvalidRequestError(f"this control plane has no pipeline for {wish.kind}")
        return pipeline.prepared(wish)

    async def _logged(self, begun: Begun) -> None:
        """Work whose outcome is read from the log of its job, and nowhere else."""
        wish = begun.wish
        try:
            async with self._ends(begun):
                if wish.input is not None:
                    begun.job.done(await self._generations[wish.kind].run(begun))
                elif wish.kind is JobKind.CHAT:
                    await self._stream(begun, None, keep_usage=False, on_wait=None)
                else:
                    await self._answer(begun)
        except RungError as error:
            _log.info("job_failed", job=begun.job.id, reason=error.reason, detail=error.message)

    async def _stream(
        self, begun: Begun, on_bytes: OnBytes | None, *, keep_usage: bool, on_wait: OnWait | None
    ) -> None:
        job = begun.job
        mark = None if on_bytes is None else begun.mark
        if begun.route.reason:
            job.done(
                await self._reasoning.stream(
                    begun, on_bytes, keep_usage=keep_usage, on_wait=on_wait, mark=mark
                )
            )
            return
        engaging = self._engager.engage(job, begun.wish, begun.targets, on_wait, stream=True)
        # Counted from here on: of many that are opened at once, the first do not keep the last from it.
        with self._pacer:
            async with await engaging as engaged:
                engaged.check_stream()
                reader = AnswerReader(job, engaged.target, keep_usage=keep_usage, mark=mark)
                async for chunk in engaged.reply.chunks(self._pacer.interval_s):
                    whole = reader.feed(chunk)
                    if whole and on_bytes is not None:
                        await on_bytes(whole)
                    if reader.failed:
                        break
                left = reader.finish()
                if left and on_bytes is not None:
                    await on_bytes(left)
        job.done(reader.finish_reason)

    async def _answer(self, begun: Begun) -> bytes:
        job, wish = begun.job, begun.wish
        if begun.route.reason:
            body, finish_reason = await self._reasoning.answer(begun)
            job.done(finish_reason)
            return body
        engaging = self._engager.engage(job, wish, begun.targets, stream=False)
        async with await engaging as engaged:
            body = await engaged.reply.read()
            if wish.kind is JobKind.CHAT:
                reader = AnswerReader(job, engaged.target, keep_usage=True)
                reader.whole(body)
                reader.finish()
                finish_reason = reader.finish_reason
            else:
                usage = read_usage(body)
                if usage is not None:
                    job.consumed(usage)
                finish_reason = "stop"
        job.done(finish_reason)
        return body

    def _ends(self, begun: Begun) -> _Ending:
        return _Ending(begun.job, self._metrics)


class _Ending:
    """Sees to it that the job has its terminal event, however the work in this context ends."""

    __slots__ = ("_job", "_metrics")

    def __init__(self, job: LiveJob, metrics: PipelineMetrics) -> None:
        self._job = job
        self._metrics = metrics

    async def __aenter__(self) -> None:
        return None

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if error is not None:
                self._end(error)
        finally:
            self._metrics.ended(self._job)

    def _end(self, error: BaseException) -> None:
        job = self._job
        if isinstance(error, asyncio.CancelledError):
            by = job.cancel_requested_by
            job.cancelled(by or "caller_disconnected")
            task = asyncio.current_task()
            if by and task is not None and task.uncancel() == 0:
                # Somebody asked for the job to end, not for this task: it still has to answer its caller.
                raise JobCancelledError(f"the job was cancelled by {by}", job=job.id) from None
        elif isinstance(error, ConnectionError):
            # Of its caller: what becomes of connections to engines is a RungError.
            job.cancelled(job.cancel_requested_by or "caller_disconnected")
        elif isinstance(error, RungError):
            job.failed(reason_of_error(error), error.message)
        elif isinstance(error, Exception):
            _log.error("pipeline_defect", job=job.id, exc_info=error)
            job.failed(FailureReason.INTERNAL, "internal error; the server's log has the details")
            raise RungError("internal error; the server's log has the details") from error
