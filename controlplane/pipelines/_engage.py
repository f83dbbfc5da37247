"""From a wish to an engine that answers: route, make it awake, take a slot, send the request."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping
from contextlib import aclosing, asynccontextmanager
from itertools import chain
from typing import TypeVar

import structlog

from controlplane.fleet import DeploymentView, Fleet, NodeSchedulers, is_external
from controlplane.ladder import Candidate, Circuits, TargetKind, awake_in
from controlplane.pipelines._engaged import CloudPort, Engaged, EngagedJob, OnWait, Reply
from controlplane.pipelines._generation import DeliveredError
from controlplane.pipelines._openai import check_status, engine_body
from controlplane.pipelines._order import TargetOrder
from controlplane.pipelines._router import Router
from controlplane.pipelines._slots import Slots
from controlplane.pipelines._wish import Wish
from rung.errors import (
    BudgetExhaustedError,
    EngineRejectedError,
    EngineStartFailedError,
    EngineTimeoutError,
    EngineUnreachableError,
    HeldByProfileError,
    NoTargetError,
    NotAwakeError,
    QueueFullError,
    RungError,
    UnavailableError,
    UnknownDeploymentError,
    UnsuitableTargetError,
    VramInfeasibleError,
)
from rung.service import EngineClient, parse_retry_after
from rung.types import DeploymentSpec, JobKind, Phase, Residency, Served

_log = structlog.get_logger("rung.pipelines")

T = TypeVar("T")

_PATHS = {
    JobKind.CHAT: "/v1/chat/completions",
    JobKind.EMBEDDING: "/v1/embeddings",
    JobKind.PREDICTION: "/predict",
}
_STARTING = frozenset({Residency.STOPPED, Residency.STARTING, Residency.FAILED, Residency.STOPPING})

#: How often a request makes its deployment awake that others make give way again.
_AWAKE_ROUNDS = 4

#: How long a request waits to hear what became of an engine that is gone. An agent notices at once when a
#: process or a container of its own ends; this is for what is slow on the way.
HEARD_WITHIN_S = 3.0

#: An engine that fails so, before it began to answer, may have ended, and its node's agent knows or will.
_GONE = (EngineUnreachableError, NotAwakeError)
#: A target that fails so is sick; its circuit is told.
_TARGETS_FAULT = (UnavailableError, EngineTimeoutError)
#: After these the next target is tried.
_MOVES_ON = (
    *_TARGETS_FAULT,
    BudgetExhaustedError,
    HeldByProfileError,
    NotAwakeError,
    QueueFullError,
    UnknownDeploymentError,
    UnsuitableTargetError,
    VramInfeasibleError,
)


class Engager:
    """Opens the answer of the first target that gives one.

    Args:
        fleet: where deployments are, and the way to their agents.
        schedulers: make deployments awake.
        slots: bound the requests at once.
        client: to engines that this process may reach itself.
        router: who may answer.
        circuits: told how each target fared.
        cloud: cloud models; None for none.
        engine_idle_timeout_s: longest silence of an engine.
        now_s: the clock of the circuits.
        unix_s: Unix time, for engines that say at what time they want to be asked again.
    """

    def __init__(
        self,
        *,
        fleet: Fleet,
        schedulers: NodeSchedulers,
        slots: Slots,
        client: EngineClient,
        router: Router,
        circuits: Circuits,
        cloud: CloudPort | None = None,
        engine_idle_timeout_s: float,
        now_s: Callable[[], float] = time.monotonic,
        unix_s: Callable[[], float] = time.time,
    ) -> None:
        self._fleet = fleet
        self._schedulers = schedulers
        self._slots = slots
        self._client = client
        self._router = router
        self._circuits = circuits
        self._cloud = cloud
        self._idle_timeout_s = engine_idle_timeout_s
        self._now_s = now_s
        self._unix_s = unix_s
        self._raising: dict[str, asyncio.Task[None]] = {}

    async def engage(
        self,
        job: EngagedJob,
        wish: Wish,
        targets: Iterator[Candidate],
        on_wait: OnWait | None = None,
        *,
        stream: bool,
        waits_for_gone: bool = True,
    ) -> Engaged:
        """Open the answer of the first target that gives one.

        A target that is away, full, does not start or answers with a server error is followed by the
        next. Nothing was delivered by then, so nothing is sent twice to the caller.

        An engine of ours that is gone, although it is said to be awake, has mostly just ended. Whoever asked
        wants an answer, and soon: where another target is ready that one is asked, as after any failure.
        Where none is, this one is waited for: once its agent has told that it is gone, which takes a few
        seconds at most, it is made awake as any that is stopped, and asked again, once. An engine that ends
        of what it is asked is so started once for each request, and not for ever.

        Args:
            job: told of each step.
            wish: what is wanted; its body is sent with the engine's own name of the model.
            targets: to be tried, best first; at least one.
            on_wait: told of each step while the caller waits.
            stream: whether the answer comes piece by piece.
            waits_for_gone: as above; False for what is better answered by nobody than late.

        Raises:
            EngineRejectedError: the engine refused the request.
            NoTargetError: several targets failed; it names each of them.
            RungError: as the only target failed.
        """
        order = TargetOrder(self._ordered(job, wish, targets), self._router.is_ready)

        async def attempt(target: Candidate) -> Engaged:
            if target.kind is TargetKind.CLOUD:
                return await self._try_cloud(job, wish, target, stream=stream)
            view = await self._take(job, wish, target.id, on_wait)
            try:
                return await self._ask(job, wish, view, stream=stream)
            except _GONE as error:
                may_wait = waits_for_gone and not is_external(view.deployment.spec)
                if not may_wait or not order.waits_for(target):
                    raise
                await self._until_heard(job, view, error)
            view = await self._take(job, wish, target.id, on_wait)
            return await self._ask(job, wish, view, stream=stream)

        return await self._first(job, order, attempt, complete=False)

    async def first(
        self,
        job: EngagedJob,
        wish: Wish,
        targets: Iterator[Candidate],
        attempt: Callable[[Candidate], Awaitable[T]],
    ) -> T:
        """What the first target gives that does not fail, best first. Nothing may have been delivered before.

        Args:
            job: told of each step.
            wish: what is wanted; its policy says whether a target that is not ready may be passed for now.
            targets: to be tried, best first; at least one.
            attempt: tries one of them; raises DeliveredError where it fails and nobody else is to be tried.

        Raises:
            EngineRejectedError: the request is at fault.
            NoTargetError: several targets failed; it names each of them.
            RungError: as the only target failed, or as the one did that had delivered a part of its result.
        """
        return await self._first(job, self._ordered(job, wish, targets), attempt, complete=True)

    async def _first(
        self,
        job: EngagedJob,
        targets: Iterator[Candidate],
        attempt: Callable[[Candidate], Awaitable[T]],
        *,
        complete: bool,
    ) -> T:
        """As `first`; unless it is `complete`, what an attempt gives is an answer that has only begun."""
        failures: dict[str, RungError] = {}
        for target in targets:
            if failures:
                failure = failures[next(reversed(failures))]
                _log.warning("target_failed", job=job.id, error=failure.message, next=target.id)
                job.progress(Phase.ROUTE, f"{failure.message}; trying {target.id}")
            self._circuits.begin(target.id, self._now_s())
            try:
                given = await attempt(target)
            except _MOVES_ON as error:
                self._failed(target.id, error)
                # One that is tried again fails as it did the last time.
                failures.pop(target.id, None)
                failures[target.id] = error
            except EngineRejectedError:
                self._circuits.succeeded(target.id)
                raise
            except DeliveredError as broken:
                self._failed(target.id, broken.error)
                raise broken.error from None
            except BaseException:
                self._circuits.abandoned(target.id)
                raise
            else:
                if complete:
                    self._circuits.succeeded(target.id)
                else:
                    self._circuits.answers(target.id)
                return given
        raise _failure_of_all(failures)

    @asynccontextmanager
    async def slot(self, job: EngagedJob, wish: Wish, deployment_id: str) -> AsyncIterator[DeploymentView]:
        """A deployment that is awake, with a slot of it held as long as the context lasts.

        Raises:
            RungError: it could not be made awake, or too many wait for it.
        """
        view = await self._take(job, wish, deployment_id, None)
        try:
            yield view
        finally:
            self._slots.release(deployment_id)

    async def aclose(self) -> None:
        """Stop making things awake that nobody waits for."""
        for task in self._raising.values():
            task.cancel()
        await asyncio.gather(*self._raising.values(), return_exceptions=True)

    def _ended(self, target: str, error: BaseException | None) -> None:
        """An answer came to its end, was cut by its target, or was left by its caller."""
        if error is None:
            self._circuits.succeeded(target)
        elif isinstance(error, _TARGETS_FAULT):
            self._failed(target, error)

    def _failed(self, target: str, error: RungError) -> None:
        if isinstance(error, _TARGETS_FAULT):
            self._circuits.failed(
                target,
                self._now_s(),
                error.message,
                retry_after_s=parse_retry_after(error.metadata.get("retry_after", ""), self._unix_s()),
            )
        else:
            # It is full, or does not fit now: that says nothing of its health.
            self._circuits.abandoned(target)

    def _ordered(self, job: EngagedJob, wish: Wish, targets: Iterator[Candidate]) -> Iterator[Candidate]:
        return self._bridged(job, targets) if wish.policy.bridge_allowed else targets

    def _bridged(self, job: EngagedJob, targets: Iterator[Candidate]) -> Iterator[Candidate]:
        """The same targets; one that would have to be made awake first is passed by one that is ready.

        It is made awake all the same, for the requests that come after this one.
        """
        first = next(targets)
        if first.kind is not TargetKind.DEPLOYMENT or first.rank == 0:
            return chain((first,), targets)
        others = list(targets)
        bridge = next((each for each in others if self._router.is_ready(each)), None)
        if bridge is None:
            return iter([first, *others])
        job.progress(Phase.ROUTE, f"{bridge.id} answers while {first.id} is made ready")
        self._raise(first.id)
        others.remove(bridge)
        return iter([bridge, first, *others])

    def _raise(self, deployment_id: str) -> None:
        """Make a deployment awake for those who come later; one at a time for each."""

        async def work() -> None:
            try:
                async with aclosing(self._schedulers.make_awake(deployment_id)) as steps:
                    async for _ in steps:
                        pass
            except RungError as error:
                _log.warning("not_made_awake", deployment=deployment_id, error=error.message)
            finally:
                del self._raising[deployment_id]

        if deployment_id not in self._raising:
            self._raising[deployment_id] = asyncio.create_task(work(), name=f"bridge-{deployment_id}")

    async def _ask(self, job: EngagedJob, wish: Wish, target: DeploymentView, *, stream: bool) -> Engaged:
        """Send the request to a deployment, on a slot that was taken; that is released if it fails."""
        spec = target.deployment.spec
        try:
            reply = await self._open(job, wish, target, stream=stream)
            if reply.status >= 400:
                try:
                    check_status(reply.status, await reply.read(), reply.retry_after, spec.id)
                finally:
                    await reply.__aexit__(None, None, None)
        except BaseException:
            self._slots.release(spec.id)
            raise
        return Engaged(spec.id, reply, self._slots.release, self._ended)

    async def _until_heard(self, job: EngagedJob, tried: DeploymentView, error: RungError) -> None:
        """Wait, with no slot held, to hear that a deployment is no longer what was asked in vain.

        Raises:
            RungError: `error`; nothing was heard of it within `HEARD_WITHIN_S`.
        """
        deployment_id = tried.deployment.spec.id
        _log.warning("engine_gone", job=job.id, deployment=deployment_id, error=error.message)
        waiting = f"waiting up to {HEARD_WITHIN_S:g} s to hear from {tried.node.id} what became of it"
        job.progress(Phase.HEALTH_CHECK, f"{error.message}; {waiting}")
        now_s = asyncio.get_running_loop().time
        deadline_s = now_s() + HEARD_WITHIN_S
        while _is_as_it_was(self._now(deployment_id), tried):
            if not await self._fleet.wait_changed(max(0.0, deadline_s - now_s())):
                raise error

    async def _take(
        self, job: EngagedJob, wish: Wish, deployment_id: str, on_wait: OnWait | None
    ) -> DeploymentView:
        """Make a deployment awake, and take a slot of it, which is for the caller to release."""
        target = self._now(deployment_id)
        spec = target.deployment.spec
        for _ in range(_AWAKE_ROUNDS):
            if target.deployment.residency is not Residency.AWAKE:
                target = await self._awake(job, wish, target, on_wait)
            if self._slots.try_acquire(spec.id, spec.slots):
                return target
            await self._slot(job, spec, on_wait)
            target = self._now(spec.id)
            if target.deployment.residency is Residency.AWAKE:
                return target
            # It was told to give way while this request waited.
            self._slots.release(spec.id)
        raise EngineStartFailedError(
            f"{spec.id} was made awake {_AWAKE_ROUNDS} times, and had to give way each time",
            deployment=spec.id,
        )

    async def _try_cloud(self, job: EngagedJob, wish: Wish, candidate: Candidate, *, stream: bool) -> Engaged:
        assert self._cloud is not None  # it has candidates
        model = self._cloud.model_name(candidate.id)
        job.begin_generating(Served(requested=job.model, target=candidate.id, model=model))
        body = _engine_body(wish, model, stream=stream)
        reply = await self._cloud.open(candidate.id, body, stream=stream, idle_timeout_s=self._idle_timeout_s)

        def ended(target: str, error: BaseException | None) -> None:
            job.progress(Phase.GENERATING, f"{target} cost ${reply.cost_usd:.6f}")
            job.spent(reply.cost_usd)
            self._ended(target, error)

        return Engaged(candidate.id, reply, None, ended)

    async def _awake(
        self, job: EngagedJob, wish: Wish, target: DeploymentView, on_wait: OnWait | None
    ) -> DeploymentView:
        deployment_id = target.deployment.spec.id
        residency = target.deployment.residency
        phase = Phase.ENGINE_START if residency in _STARTING else Phase.ENGINE_WAKE
        expected_s = target.deployment.awake_expected_s
        then = "making it ready" if expected_s is None else awake_in(expected_s)
        job.progress(phase, f"{deployment_id} is {residency}; {then}", remaining_s=expected_s)
        raising = self._schedulers.make_awake(deployment_id, priority=wish.policy.priority)
        async with aclosing(raising) as steps:
            async for step in steps:
                job.progress(step.phase, step.detail, percent=step.percent, remaining_s=step.remaining_s)
                if on_wait is not None:
                    await on_wait()
        return self._now(deployment_id)

    def _now(self, deployment_id: str) -> DeploymentView:
        found = self._fleet.view.deployments.get(deployment_id)
        if found is None:
            raise EngineStartFailedError(f"{deployment_id} is no longer deployed", deployment=deployment_id)
        return found

    async def _slot(self, job: EngagedJob, spec: DeploymentSpec, on_wait: OnWait | None) -> None:
        async for place in self._slots.acquire(spec.id):
            detail = f"waiting for one of {spec.slots} slots of {spec.id}; place {place} in the queue"
            job.progress(Phase.QUEUED, detail)
            if on_wait is not None:
                await on_wait()

    async def _open(self, job: EngagedJob, wish: Wish, target: DeploymentView, *, stream: bool) -> Reply:
        spec = target.deployment.spec
        model = spec.engine_model_name
        body = _engine_body(wish, model, stream=stream)
        job.begin_generating(Served(requested=job.model, target=spec.id, node=target.node.id, model=model))
        if target.direct_url is not None:
            return await self._client.post(
                target.direct_url + _PATHS[wish.kind], body, what=spec.id, idle_timeout_s=self._idle_timeout_s
            )
        run = self._fleet.run_through_agent(spec.id, job.id, wish.kind, body, self._idle_timeout_s)
        return await run.__aenter__()


def _is_as_it_was(now: DeploymentView, then: DeploymentView) -> bool:
    """Whether a deployment is still said to be awake, and was not started or woken anew meanwhile."""
    found, before = now.deployment, then.deployment
    return (found.residency, found.generation, found.residency_time_s) == (
        Residency.AWAKE,
        before.generation,
        before.residency_time_s,
    )


def _engine_body(wish: Wish, model: str, *, stream: bool) -> bytes:
    return engine_body(wish.body, model=model, stream=stream if wish.kind is JobKind.CHAT else None)


def _failure_of_all(failures: Mapping[str, RungError]) -> RungError:
    """What is said when each target failed, at least one."""
    *_, last = failures.values()
    if len(failures) == 1:
        return last
    named = "; ".join(f"{target}: {error.message}" for target, error in failures.items())
    error = NoTargetError(f"none of {len(failures)} targets could answer: {named}")
    error.__cause__ = last
    return error
