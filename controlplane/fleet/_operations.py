"""Operations on deployments: one task each, followed by any number of readers.

An operation outlives its readers and the connection to the agent. The agent knows it by its id, so
attaching again after a lost connection joins what already runs there.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from contextlib import AbstractAsyncContextManager, aclosing, asynccontextmanager
from enum import StrEnum
from functools import partial
from typing import Protocol

import structlog
from msgspec.structs import replace

from controlplane.fleet._agent_client import AgentClient
from controlplane.fleet._node_session import NodeSession, backoff_s
from controlplane.fleet._raising import RaisingProgress
from controlplane.fleet._view import DeploymentView, FleetView
from rung import reason_of_error
from rung.errors import (
    AlreadyExistsError,
    DrainingError,
    FailedPreconditionError,
    NodeUnreachableError,
    RungError,
    UnavailableError,
    UnknownDeploymentError,
)
from rung.service import Signal
from rung.types import (
    Deployment,
    FailureReason,
    LifecycleDone,
    LifecycleEvent,
    LifecycleFailed,
    LifecyclePayload,
    LifecycleProgress,
    Residency,
)

_log = structlog.get_logger("rung.fleet")

#: Readers hear something at least once a second.
KEEP_ALIVE_S = 0.9
#: A node may be away this long in mid-operation before the operation fails with NODE_LOST.
REATTACH_S = 60.0
#: Beyond what the deployment itself allows for its start or stop.
_MARGIN_S = 60.0
#: For a model that is pulled first. A pull that stands still is ended by its agent, long before this.
_PULL_PATIENCE_S = 24 * 3600.0
#: Whoever starts something waits for room no longer: a model that comes up hours later surprises.
_ROOM_PATIENCE_S = 600.0
_KEPT_OPERATIONS = 512
_KEPT_EVENTS = 2000
#: The agent's watch tells of a residency a moment after the operation that changed it has ended.
_WATCH_LAG_S = 2.0


class LifecycleAction(StrEnum):
    """What can be done to a deployment."""

    START = "start"
    STOP = "stop"
    SLEEP = "sleep"
    WAKE = "wake"
    FREE = "free"
    SHRINK = "shrink"


#: What ends or harms requests that run.
_TAKING = frozenset(
    {LifecycleAction.STOP, LifecycleAction.SLEEP, LifecycleAction.FREE, LifecycleAction.SHRINK}
)


class Operation:
    """The log of one operation, from its first event to its last, and those who read it.

    A keep-alive repeats what is under way whenever nothing else was said for `KEEP_ALIVE_S`.

    Attributes:
        scheduled: it waits for the node's scheduler, which makes room and has another operation carried out.
    """

    def __init__(
        self,
        operation_id: str,
        action: LifecycleAction,
        deployment_id: str,
        now: Callable[[], Deployment | None],
        *,
        scheduled: bool,
    ) -> None:
        self.id = operation_id
        self.scheduled = scheduled
        self.action = action
        self.deployment_id = deployment_id
        self.ended = False
        self.failed_with: RungError | None = None
        self._now = now
        self._loop = asyncio.get_running_loop()
        self._began_s = self._loop.time()
        self._events: list[LifecycleEvent] = []
        self._sequence = 0
        self._signal = Signal()
        self._said: tuple[LifecycleProgress, float] | None = None
        self._timer = self._loop.call_later(KEEP_ALIVE_S, self._keep_alive)

    @property
    def outcome(self) -> LifecyclePayload | None:
        """The newest payload; the outcome once the operation has ended."""
        return self._events[-1].payload if self._events else None

    def append(self, payload: LifecyclePayload) -> None:
        """Add an event; `LifecycleDone` and `LifecycleFailed` end the operation."""
        if self.ended:
            return
        if isinstance(payload, LifecycleProgress):
            self._said = (payload, self._loop.time())
        self._add(payload)

    def say(self, detail: str, *, percent: float | None, remaining_s: float | None) -> None:
        """Add what is under way while the deployment is as it is."""
        self.append(LifecycleProgress(self._residency(), detail, percent, remaining_s))

    def refuse(self, error: RungError) -> None:
        """End the operation with an error that is raised to its readers."""
        if not self.ended:
            self.failed_with = error
            self._end()

    async def events(self) -> AsyncGenerator[LifecycleEvent, None]:
        """All events from the first one, then new ones as they come, to the end of the operation.

        Raises:
            RungError: the operation was refused.
        """
        sequence = 0
        while True:
            first = self._events[0].sequence if self._events else 1
            for event in self._events[max(0, sequence + 1 - first) :]:
                yield event
                sequence = event.sequence
            if sequence < self._sequence:
                continue
            if self.failed_with is not None:
                raise type(self.failed_with)(self.failed_with.message, **self.failed_with.metadata)
            if self.ended:
                return
            await self._signal.wait()

    def _add(self, payload: LifecyclePayload) -> None:
        self._sequence += 1
        elapsed_s = self._loop.time() - self._began_s
        self._events.append(LifecycleEvent(self.id, self._sequence, elapsed_s, payload))
        if len(self._events) > _KEPT_EVENTS:
            # Only progress that nobody needs any more; a late reader begins a little later.
            del self._events[: _KEPT_EVENTS // 2]
        self._timer.cancel()
        if isinstance(payload, LifecycleProgress):
            self._timer = self._loop.call_later(KEEP_ALIVE_S, self._keep_alive)
            self._signal.fire()
        else:
            self._end()

    def _end(self) -> None:
        self.ended = True
        self._timer.cancel()
        self._signal.fire()

    def _keep_alive(self) -> None:
        residency = self._residency()
        if self._said is None:
            self._add(
                LifecycleProgress(residency, f"waiting for the agent to {self.action} {self.deployment_id}")
            )
            return
        said, when_s = self._said
        remaining_s = said.remaining_s
        if remaining_s is not None:
            remaining_s = max(0.0, remaining_s - (self._loop.time() - when_s))
        self._add(replace(said, residency=residency, remaining_s=remaining_s))

    def _residency(self) -> Residency:
        deployment = self._now()
        return deployment.residency if deployment is not None else Residency.UNKNOWN


class OperatedFleet(Protocol):
    """What operations need of the fleet."""

    @property
    def view(self) -> FleetView:
        """The fleet now."""
        ...

    @property
    def load(self) -> Callable[[str], tuple[int, int]]:
        """Active and queued requests of a deployment."""
        ...

    @property
    def drained(self) -> Callable[[str], AbstractAsyncContextManager[None]]:
        """Lets no request of a deployment begin, and is entered once those that run have ended."""
        ...

    def session(self, node_id: str) -> NodeSession:
        """The session of a node."""
        ...

    async def wait_changed(self, timeout_s: float) -> bool:
        """Wait for the next change of the view."""
        ...


class Operations:
    """All operations by id: those that run, and the newest of those that ended."""

    def __init__(self, fleet: OperatedFleet, *, epoch: int, rng: random.Random) -> None:
        self._fleet = fleet
        self._epoch = epoch
        self._rng = rng
        self._operations: dict[str, Operation] = {}
        self._tasks: dict[str, asyncio.Task[None]] = {}

    def find(self, operation_id: str, action: LifecycleAction, deployment_id: str) -> Operation | None:
        """The operation with this id, if there is one.

        Raises:
            AlreadyExistsError: the id belongs to another action or deployment.
        """
        found = self._operations.get(operation_id)
        if found is not None and (found.action, found.deployment_id) != (action, deployment_id):
            raise AlreadyExistsError(
                f"operation {operation_id} is already a {found.action} of {found.deployment_id}; "
                "choose another id",
                operation=operation_id,
            )
        return found

    def running_on(self, deployment_id: str) -> Operation | None:
        """The newest operation that is carried out on a deployment, and has not ended."""
        for operation_id in reversed(self._tasks):
            operation = self._operations[operation_id]
            if operation.deployment_id == deployment_id and not (operation.ended or operation.scheduled):
                return operation
        return None

    def call_off(self, deployment_id: str, by: LifecycleAction) -> None:
        """End the starts of a deployment that wait for its scheduler, because of another action."""
        for operation_id, task in tuple(self._tasks.items()):
            operation = self._operations[operation_id]
            if operation.deployment_id == deployment_id and operation.scheduled:
                called_off = f"the {operation.action} of {deployment_id} was called off: it was told to {by}"
                operation.refuse(FailedPreconditionError(called_off))
                task.cancel()

    @property
    def busy(self) -> set[str]:
        """Deployments with an operation under way."""
        return {self._operations[operation_id].deployment_id for operation_id in self._tasks}

    def begin(
        self,
        action: LifecycleAction,
        target: DeploymentView,
        operation_id: str,
        *,
        force: bool = False,
        level: int = 0,
        raising: AsyncGenerator[RaisingProgress, None] | None = None,
    ) -> Operation:
        """Begin an operation, or join the one with this id.

        Args:
            action: what to do.
            target: to what.
            operation_id: the caller's own id of the operation.
            force: do it to a pinned deployment too.
            level: vLLM's sleep level; 0 lets the agent choose.
            raising: makes it awake through its node's scheduler; None leaves the action to the agent.
        """
        deployment_id = target.deployment.spec.id
        found = self.find(operation_id, action, deployment_id)
        if found is not None:
            return found

        def now() -> Deployment | None:
            view = self._fleet.view.deployments.get(deployment_id)
            return view.deployment if view is not None else None

        operation = Operation(operation_id, action, deployment_id, now, scheduled=raising is not None)
        self._operations[operation_id] = operation
        self._forget_old()
        if raising is None:
            carry_out = partial(self._through_agent, operation, target, force=force, level=level)
        else:
            carry_out = partial(self._through_scheduler, operation, raising)
        drive = self._drive(operation, target, carry_out)
        task = asyncio.create_task(drive, name=f"{action}-{deployment_id}")
        self._tasks[operation_id] = task
        task.add_done_callback(lambda _: self._tasks.pop(operation_id, None))
        return operation

    async def aclose(self) -> None:
        """Let go of all operations; what runs at the agents goes on there."""
        tasks = list(self._tasks.values())
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def _forget_old(self) -> None:
        surplus = len(self._operations) - _KEPT_OPERATIONS
        if surplus > 0:
            ended = [key for key, operation in self._operations.items() if operation.ended]
            for key in ended[:surplus]:
                del self._operations[key]

    async def _drive(
        self, operation: Operation, target: DeploymentView, carry_out: Callable[[], Awaitable[None]]
    ) -> None:
        limit_s = _limit_s(operation.action, target) + (_ROOM_PATIENCE_S if operation.scheduled else 0.0)
        try:
            async with asyncio.timeout(limit_s):
                await carry_out()
        except TimeoutError:
            detail = f"{operation.action} of {operation.deployment_id} did not end within {limit_s:g} s"
            operation.append(LifecycleFailed(FailureReason.TIMEOUT, detail))
        except RungError as error:
            operation.refuse(error)
        except Exception as error:  # noqa: BLE001 - readers must learn of the end of every operation
            _log.error("operation_defect", operation=operation.id, exc_info=error)
            detail = (
                f"{operation.action} of {operation.deployment_id} failed; the server's log has the details"
            )
            operation.append(LifecycleFailed(FailureReason.INTERNAL, detail))
        finally:
            operation.refuse(
                DrainingError("the control plane is shutting down; the operation goes on at the node's agent")
            )

    async def _through_scheduler(
        self, operation: Operation, raising: AsyncGenerator[RaisingProgress, None]
    ) -> None:
        """Follow how a deployment is made awake: room is made for it, then it is started or woken."""
        said: RaisingProgress | None = None
        try:
            async with aclosing(raising) as steps:
                async for step in steps:
                    if step != said:
                        said = step
                        operation.say(step.detail, percent=step.percent, remaining_s=step.remaining_s)
        except DrainingError:
            raise
        except UnavailableError as error:
            operation.append(LifecycleFailed(reason_of_error(error), error.message))
            return
        found = self._fleet.view.deployments.get(operation.deployment_id)
        if found is None:
            raise UnknownDeploymentError(f"{operation.deployment_id} is gone")
        operation.append(LifecycleDone(found.deployment))

    async def _through_agent(
        self, operation: Operation, target: DeploymentView, *, force: bool, level: int
    ) -> None:
        """Have the agent carry it out, once nothing is served any more by what is to be taken away."""
        async with self._drained(operation, target, force=force):
            await self._attach_until_ended(operation, target, force=force, level=level)

    @asynccontextmanager
    async def _drained(
        self, operation: Operation, target: DeploymentView, *, force: bool
    ) -> AsyncIterator[None]:
        """Let no request begin, and wait for those that run, before something is taken from an engine.

        Requests that go straight to an engine are known here only, and not to its agent.
        """
        if operation.action not in _TAKING or force:
            yield
            return
        deployment_id = operation.deployment_id
        active, _ = self._fleet.load(deployment_id)
        if active:
            waits = f"waiting for {active} request{'' if active == 1 else 's'} to end"
            operation.append(LifecycleProgress(target.deployment.residency, waits))
        async with self._fleet.drained(deployment_id):
            yield

    async def _attach_until_ended(
        self, operation: Operation, target: DeploymentView, *, force: bool, level: int
    ) -> None:
        """Follow the operation at the agent, attaching again for as long as `REATTACH_S` permits."""
        loop = asyncio.get_running_loop()
        node_id = target.node.id
        session = self._fleet.session(node_id)
        lost_s: float | None = None
        seen: tuple[str, int] = ("", 0)
        attempts = 0
        while True:
            cause = "the agent ended the stream of the operation"
            call = _call(session.client, operation, target, epoch=self._epoch, force=force, level=level)
            instance_id = session.report.agent_instance_id
            try:
                async with aclosing(call) as events:
                    async for event in events:
                        lost_s, attempts = None, 0
                        # An agent that was not restarted replays what was heard before.
                        repeated = seen[0] == instance_id and event.sequence <= seen[1]
                        if await self._relay(operation, event, repeated=repeated):
                            return
                        seen = (instance_id, max(event.sequence, seen[1] if repeated else 0))
            except NodeUnreachableError as error:
                cause = error.message
            lost_s = loop.time() if lost_s is None else lost_s
            left_s = lost_s + REATTACH_S - loop.time()
            if left_s <= 0:
                detail = (
                    f"{node_id} was lost while {operation.deployment_id} was to {operation.action}: {cause}"
                )
                operation.append(LifecycleFailed(FailureReason.NODE_LOST, detail))
                return
            detail = f"{node_id} is not reachable; {operation.action} may go on there ({cause})"
            operation.append(LifecycleProgress(Residency.UNKNOWN, detail))
            attempts += 1
            await asyncio.sleep(min(left_s, backoff_s(attempts, self._rng)))
            await session.wait_connected(left_s)

    async def _relay(self, operation: Operation, event: LifecycleEvent, *, repeated: bool) -> bool:
        """Pass an event of the agent on to the readers; True if it was the last."""
        payload = event.payload
        if isinstance(payload, LifecycleProgress):
            if not repeated:
                operation.append(payload)
            return False
        if isinstance(payload, LifecycleDone):
            settled = await self._settled(operation.deployment_id, payload.deployment)
            payload = replace(payload, deployment=settled)
        operation.append(payload)
        return True

    async def _settled(self, deployment_id: str, done: Deployment) -> Deployment:
        """The deployment once the view shows what the agent says was reached.

        So whoever reads the view after an operation sees its effect.
        """
        loop = asyncio.get_running_loop()
        deadline_s = loop.time() + _WATCH_LAG_S
        while True:
            found = self._fleet.view.deployments.get(deployment_id)
            if found is None:
                raise UnknownDeploymentError(f"{deployment_id} is gone", deployment=deployment_id)
            shown = found.deployment
            if shown.residency is done.residency and shown.generation >= done.generation:
                return shown
            if loop.time() >= deadline_s:
                return replace(done, spec=shown.spec, adopted=shown.adopted)
            await self._fleet.wait_changed(deadline_s - loop.time())


def _limit_s(action: LifecycleAction, target: DeploymentView) -> float:
    engine = target.deployment.spec.engine
    if action in (LifecycleAction.START, LifecycleAction.WAKE):
        pull_s = _PULL_PATIENCE_S if action is LifecycleAction.START and engine.pulls else 0.0
        return engine.start_timeout_s + pull_s + _MARGIN_S
    return engine.stop_grace_s + 2 * _MARGIN_S


def _call(
    client: AgentClient,
    operation: Operation,
    target: DeploymentView,
    *,
    epoch: int,
    force: bool,
    level: int,
) -> AsyncGenerator[LifecycleEvent, None]:
    agent_id = target.agent_id
    match operation.action:
        case LifecycleAction.START:
            spec = replace(target.deployment.spec, id=agent_id)
            return client.start_engine(spec, operation_id=operation.id, epoch=epoch)
        case LifecycleAction.STOP:
            return client.stop_engine(agent_id, operation_id=operation.id, epoch=epoch, force=force)
        case LifecycleAction.SLEEP:
            return client.sleep_engine(
                agent_id, operation_id=operation.id, epoch=epoch, level=level, force=force
            )
        case LifecycleAction.WAKE:
            return client.wake_engine(agent_id, operation_id=operation.id, epoch=epoch)
        case LifecycleAction.FREE:
            return client.free_engine(agent_id, operation_id=operation.id, epoch=epoch)
        case LifecycleAction.SHRINK:
            return client.shrink_engine(agent_id, operation_id=operation.id, epoch=epoch)
