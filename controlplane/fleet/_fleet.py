"""The fleet: what there is, what is true of it, and how to change it."""

from __future__ import annotations

import asyncio
import random
import uuid
from collections import Counter
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import AbstractAsyncContextManager, nullcontext
from typing import Protocol

from msgspec.structs import replace

from controlplane.fleet._agent_runs import AgentRun
from controlplane.fleet._division import Division, divided
from controlplane.fleet._marks import DrainMarks, NoMarks
from controlplane.fleet._node_session import NodeSession
from controlplane.fleet._operations import KEEP_ALIVE_S, LifecycleAction, Operation, Operations
from controlplane.fleet._permits import (
    AWAY,
    RAISING,
    is_external,
    require_permitted,
    start_error,
    start_refused,
)
from controlplane.fleet._pools import is_scheduled
from controlplane.fleet._raising import RaisingProgress
from controlplane.fleet._reconcile import Reconciler
from controlplane.fleet._view import DeploymentView, FleetView, build_view, replace_node
from rung.codec import GenerationEvent
from rung.errors import (
    ConfigError,
    EngineStartFailedError,
    InvalidRequestError,
    RungError,
    UnknownDeploymentError,
    UnknownNodeError,
)
from rung.service import Signal, host_id
from rung.types import (
    DeploymentSpec,
    EngineInput,
    JobKind,
    LifecycleEvent,
    LifecycleFailed,
    LifecycleProgress,
    MemoryAlert,
    Node,
    NodeOwnership,
    NodeState,
    Residency,
    Voice,
)

#: Residencies on the way out: they are waited for, since what comes after them decides what to do.
_LEAVING = frozenset({Residency.FALLING_ASLEEP, Residency.STOPPING})
_RESTING = frozenset({LifecycleAction.STOP, LifecycleAction.SLEEP})
_SLEEPING = frozenset({Residency.FALLING_ASLEEP, Residency.ASLEEP, Residency.WAKING})
#: How often `ensure_awake` looks again when others change the deployment at the same time.
_ENSURE_ROUNDS = 4
_SETTLING_PATIENCE_S = 120.0


class ConfiguredNode(Protocol):
    """A node as configured."""

    @property
    def id(self) -> str:
        """Name."""
        ...

    @property
    def address(self) -> str:
        """`host:port` of its agent."""
        ...

    @property
    def ownership(self) -> NodeOwnership:
        """Whose it is."""
        ...


class Fleet:
    """One session for each node, and the view that they make up together.

    Args:
        nodes: nodes as configured.
        deployments: deployments as configured; each on one of these nodes.
        epoch: fencing number of this control plane; agents refuse a lower one than they have seen.
        load: active and queued requests of a deployment, for draining and for what is shown.
        drained: lets no request of a deployment begin, and is entered once those that run have ended.
        own_host_id: which loopback interface is ours; None finds out.
        drain_marks: remembers which nodes were drained; None remembers nothing.

    Raises:
        ConfigError: an id is used twice, or a deployment is on a node that is not there.
    """

    def __init__(
        self,
        *,
        nodes: Sequence[ConfiguredNode],
        deployments: Sequence[DeploymentSpec],
        epoch: int,
        load: Callable[[str], tuple[int, int]] = lambda _: (0, 0),
        drained: Callable[[str], AbstractAsyncContextManager[None]] = lambda _: nullcontext(),
        own_host_id: str | None = None,
        drain_marks: DrainMarks | None = None,
    ) -> None:
        _check(nodes, deployments)
        rng = random.SystemRandom()
        self.load = load
        self.drained = drained
        self.epoch = epoch
        self._drain_marks = drain_marks or DrainMarks(NoMarks())
        #: How a deployment on a GPU is made awake, with room made for it; None leaves it to its agent.
        self.make_awake: Callable[[str], AsyncGenerator[RaisingProgress, None]] | None = None
        self._nodes = {node.id: node for node in nodes}
        self._configured = tuple(deployments)
        self._deployments = self._configured
        self._division = Division()
        self._own_host_id = host_id() if own_host_id is None else own_host_id
        self._sessions = {
            node.id: NodeSession(
                node_id=node.id, address=node.address, epoch=epoch, on_change=self._on_change, rng=rng
            )
            for node in nodes
        }
        self._draining: set[str] = set()
        self._alerts: dict[str, MemoryAlert] = {}
        self._held: set[str] = set()
        self._put_to_rest: set[str] = set()
        self._changed = Signal()
        self._operations = Operations(self, epoch=epoch, rng=rng)
        self._reconciler = Reconciler(self)
        self._tasks: list[asyncio.Task[None]] = []
        self._stopped = False
        self._view = FleetView()
        self._rebuild()

    @property
    def view(self) -> FleetView:
        """The fleet now: immutable, replaced when something changes."""
        return self._view

    @property
    def held(self) -> set[str]:
        """Those that an operator stopped, or a profile: they stay so until somebody needs or starts them."""
        return self._held | self._division.down

    @property
    def configured(self) -> tuple[DeploymentSpec, ...]:
        """The deployments as configured, whatever a profile asks."""
        return self._configured

    @property
    def division(self) -> Division:
        """What a profile asks of the fleet now."""
        return self._division

    def divide(self, division: Division) -> None:
        """Let a profile's division hold from now on. Nothing that runs is changed by that."""
        self._division = division
        self._deployments = divided(self._configured, division)
        self._rebuild()

    def require_raisable(self, deployment_id: str) -> None:
        """Raise EngineStartFailedError if a profile wants a deployment that is down to stay so."""
        found = self._view.deployments.get(deployment_id)
        if found is not None and found.hold and found.deployment.residency is not Residency.AWAKE:
            raise EngineStartFailedError(f"{deployment_id}: {found.hold}", deployment=deployment_id)

    @property
    def put_to_rest(self) -> set[str]:
        """Deployments that an operator stopped or put to sleep, and that nobody has needed since."""
        return self._put_to_rest

    @property
    def busy(self) -> set[str]:
        """Deployments with an operation under way."""
        return self._operations.busy

    @property
    def alerts(self) -> dict[str, MemoryAlert]:
        """The newest alert of each GPU that had one; replaced when another one comes."""
        return self._alerts

    def note_alert(self, alert: MemoryAlert) -> None:
        """The memory of a GPU runs low, or has recovered: those who watch are told."""
        self._alerts = self._alerts | {alert.gpu: alert}
        self._changed.fire()

    def progress_of(self, deployment_id: str) -> LifecycleProgress | None:
        """The newest word of the operation that is under way on a deployment, if there is one."""
        operation = self._operations.running_on(deployment_id)
        newest = operation.outcome if operation is not None else None
        return newest if isinstance(newest, LifecycleProgress) else None

    def session(self, node_id: str) -> NodeSession:
        """The session of a node. Raises UnknownNodeError."""
        session = self._sessions.get(node_id)
        if session is None:
            raise UnknownNodeError(f"there is no node {node_id}", node=node_id)
        return session

    async def start(self) -> None:
        """Begin to dial the nodes, with those drained that were. `changes` tells when they answer.

        Raises:
            UnavailableError: what was drained cannot be read.
        """
        self._draining |= await self._drain_marks.read() & self._sessions.keys()
        self._rebuild()
        self._tasks = [
            asyncio.create_task(session.run(), name=f"node-{session.node_id}")
            for session in self._sessions.values()
        ]
        self._tasks.append(asyncio.create_task(self._reconciler.run(), name="reconcile"))

    async def aclose(self) -> None:
        """Let go of the nodes. Their engines, and operations under way there, go on."""
        self._stopped = True
        await self._operations.aclose()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self._changed.fire()

    async def changes(self) -> AsyncGenerator[FleetView, None]:
        """The view now, then the newest one after each change; a slow reader skips some."""
        seen: FleetView | None = None
        while not self._stopped:
            if self._view is not seen:
                seen = self._view
                yield seen
            else:
                await self._changed.wait()

    async def wait_changed(self, timeout_s: float) -> bool:
        """Wait for the next change of the view; False when there was none within `timeout_s`."""
        return await self._changed.wait(timeout_s)

    async def lifecycle(
        self,
        action: LifecycleAction,
        deployment_id: str,
        operation_id: str,
        *,
        force: bool = False,
        level: int = 0,
        makes_room: bool = False,
    ) -> AsyncGenerator[LifecycleEvent, None]:
        """Carry out an operation and follow it from its first event.

        The same operation id joins the operation, or repeats its events. A reader that leaves ends
        nothing. What is to come up on a GPU goes through its node's scheduler, which makes room for it
        first and tells of that; a stop or a sleep that was asked for calls off starts that wait there.

        Args:
            action: what to do.
            deployment_id: to what.
            operation_id: the caller's own id of the operation.
            force: do it to a pinned deployment too.
            level: vLLM's sleep level; 0 lets the agent choose.
            makes_room: the scheduler wants it, for another deployment or a lease.

        Raises:
            InvalidRequestError: no operation id.
            UnknownDeploymentError: no such deployment.
            AlreadyExistsError: the id belongs to another operation.
            NotOursError: the engine is run by somebody else.
            PinnedDeploymentError: it is pinned and `force` is not set.
            NodeUnreachableError: its node does not answer.
            HeldByProfileError: it is to come up, and the profile wants it down.
            FailedPreconditionError: its node drains, the agent refuses, or it was called off.
            VramInfeasibleError: there is no room for it, and waiting does not help.
        """
        if not operation_id:
            raise InvalidRequestError("an operation needs an operation_id of the caller's choice")
        operation = self._operations.find(operation_id, action, deployment_id)
        if operation is None:
            target = self._target(deployment_id)
            require_permitted(action, target, force=force)
            if action is LifecycleAction.STOP:
                self._held.add(deployment_id)
            elif action in RAISING:
                self._needed(deployment_id)
            if action in _RESTING and not makes_room:
                self._put_to_rest.add(deployment_id)
                self._operations.call_off(deployment_id, action)
            raising = self._raising(action, target)
            operation = self._operations.begin(
                action, target, operation_id, force=force, level=level, raising=raising
            )
        async for event in operation.events():
            yield event

    def start_kept(self, deployment_id: str) -> AsyncGenerator[LifecycleEvent, None]:
        """Start a deployment that is to be kept running, or tell its agent of one that somebody else runs."""
        operation_id = _new_id("keep", deployment_id)
        target = self._target(deployment_id)
        if is_external(target.deployment.spec):
            return self._operations.begin(LifecycleAction.START, target, operation_id).events()
        return self.lifecycle(LifecycleAction.START, deployment_id, operation_id)

    def _raising(
        self, action: LifecycleAction, target: DeploymentView
    ) -> AsyncGenerator[RaisingProgress, None] | None:
        """How an action goes through the node's scheduler; None if it is for the agent alone.

        One that is awake needs no room. Waking one that does not sleep is for its agent to refuse.
        """
        residency = target.deployment.residency
        if self.make_awake is None or action not in RAISING or not is_scheduled(target):
            return None
        asleep = residency in _SLEEPING
        if residency is Residency.AWAKE or (action is LifecycleAction.WAKE and not asleep):
            return None
        return self.make_awake(target.deployment.spec.id)

    async def ensure_awake(self, deployment_id: str) -> AsyncGenerator[LifecycleProgress, None]:
        """Start or wake a deployment unless it is awake, and say how far that is; ends once it is awake.

        Callers that ask at the same time share one operation, which goes on when they leave.

        Raises:
            UnknownDeploymentError: no such deployment.
            EngineStartFailedError: it did not come up, or may not be started now.
            NodeUnreachableError: its node does not answer, or was lost on the way.
        """
        for _ in range(_ENSURE_ROUNDS):
            target = self._target(deployment_id)
            if target.deployment.residency is Residency.AWAKE:
                return
            operation = self._operations.running_on(deployment_id)
            if operation is None:
                async for waiting in self._until_settled(deployment_id):
                    yield waiting
                operation = self._operations.running_on(deployment_id) or self._begin_raising(deployment_id)
                if operation is None:
                    return
            try:
                async for event in operation.events():
                    if isinstance(event.payload, LifecycleProgress):
                        yield event.payload
            except RungError as error:
                if operation.action in RAISING:
                    raise start_refused(deployment_id, error) from None
            if operation.action in RAISING and isinstance(operation.outcome, LifecycleFailed):
                raise start_error(deployment_id, target.node.id, operation.outcome)
        raise EngineStartFailedError(
            f"{deployment_id} was started {_ENSURE_ROUNDS} times and is not awake; "
            f"it is {self._target(deployment_id).deployment.residency}",
            deployment=deployment_id,
        )

    async def drain_node(self, node_id: str) -> None:
        """Send no new work to a node and start nothing there, also after a restart of this process.

        Raises:
            UnknownNodeError: there is no such node.
            UnavailableError: it could not be stored; nothing has changed.
        """
        self.session(node_id)
        await self._drain_marks.write(node_id, drained=True)
        self._draining.add(node_id)
        self._rebuild()

    async def resume_node(self, node_id: str) -> None:
        """Take a drained node back. Raises as `drain_node`."""
        self.session(node_id)
        await self._drain_marks.write(node_id, drained=False)
        self._draining.discard(node_id)
        self._rebuild()

    def run_through_agent(
        self, deployment_id: str, job_id: str, kind: JobKind, body: bytes, idle_timeout_s: float
    ) -> AgentRun:
        """One generation through the node's agent; enter the result to begin it (see `AgentRun`).

        Raises:
            UnknownDeploymentError: no such deployment.
            NotImplementedYetError: this kind of job has no route through an agent.
        """
        found = self._target(deployment_id)
        client = self._sessions[found.node.id].client
        return client.run(found.agent_id, job_id=job_id, kind=kind, body=body, idle_timeout_s=idle_timeout_s)

    def generate_through_agent(
        self, deployment_id: str, job_id: str, wanted: EngineInput, idle_timeout_s: float
    ) -> AsyncGenerator[GenerationEvent, None]:
        """One generation by an engine with a dialect of its own (see `AgentClient.generate`).

        Raises:
            UnknownDeploymentError: no such deployment.
        """
        found = self._target(deployment_id)
        client = self._sessions[found.node.id].client
        return client.generate(found.agent_id, job_id=job_id, wanted=wanted, idle_timeout_s=idle_timeout_s)

    async def voices(self, deployment_id: str) -> tuple[Voice, ...]:
        """The voices of a deployment that speaks.

        Raises:
            UnknownDeploymentError: no such deployment.
            RungError: as `AgentClient.voices`.
        """
        found = self._target(deployment_id)
        return await self._sessions[found.node.id].client.voices(found.agent_id)

    def _target(self, deployment_id: str) -> DeploymentView:
        found = self._view.deployments.get(deployment_id)
        if found is None:
            raise UnknownDeploymentError(
                f"there is no deployment {deployment_id}; `rung status` lists them", deployment=deployment_id
            )
        return found

    async def _until_settled(self, deployment_id: str) -> AsyncGenerator[LifecycleProgress, None]:
        """Wait while a deployment is on the way out, or is being loaded by somebody else."""
        loop = asyncio.get_running_loop()
        deadline_s = loop.time() + _SETTLING_PATIENCE_S
        while loop.time() < deadline_s:
            deployment = self._target(deployment_id).deployment
            loading_elsewhere = is_external(deployment.spec) and deployment.residency is Residency.STARTING
            if deployment.residency not in _LEAVING and not loading_elsewhere:
                return
            yield LifecycleProgress(deployment.residency, deployment.detail)
            await self._changed.wait(KEEP_ALIVE_S)

    def _begin_raising(self, deployment_id: str) -> Operation | None:
        """Begin to start or wake a deployment; None if it is awake."""
        target = self._target(deployment_id)
        residency = target.deployment.residency
        if residency is Residency.AWAKE:
            return None
        asleep = residency in (Residency.ASLEEP, Residency.WAKING)
        action = LifecycleAction.WAKE if asleep else LifecycleAction.START
        if not asleep and target.node.state not in AWAY and is_external(target.deployment.spec):
            raise EngineStartFailedError(
                f"{deployment_id} is run by somebody else and does not answer; start it there",
                deployment=deployment_id,
            )
        try:
            require_permitted(action, target, force=False)
        except RungError as error:
            raise start_refused(deployment_id, error) from None
        self._needed(deployment_id)
        return self._operations.begin(action, target, _new_id("ensure", deployment_id))

    def _on_change(self, session: NodeSession, only_status: bool) -> None:
        if only_status:
            self._view = replace_node(self._view, self._node(session))
            self._changed.fire()
        else:
            self._rebuild()

    def _rebuild(self) -> None:
        nodes = {node_id: self._node(session) for node_id, session in self._sessions.items()}
        reported = {node_id: session.report.deployments for node_id, session in self._sessions.items()}
        old = {node_id for node_id, session in self._sessions.items() if session.report.measurements_are_old}
        self._view = build_view(nodes, self._deployments, reported, self._own_host_id, self._division, old)
        if self._held or self._put_to_rest:
            # A stop that was refused, or a start by somebody else: nothing is held any more.
            busy = self.busy
            awake = {key for key in self._held | self._put_to_rest if key not in busy and self._is_awake(key)}
            self._held -= awake
            self._put_to_rest -= awake
        self._changed.fire()

    def _needed(self, deployment_id: str) -> None:
        """Somebody needs a deployment, whatever an operator wanted before."""
        self._held.discard(deployment_id)
        self._put_to_rest.discard(deployment_id)

    def _is_awake(self, deployment_id: str) -> bool:
        found = self._view.deployments.get(deployment_id)
        return found is not None and found.deployment.residency is Residency.AWAKE

    def _node(self, session: NodeSession) -> Node:
        report = session.report
        configured = self._nodes[session.node_id]
        node = Node(
            id=session.node_id,
            address=session.address,
            state=report.state,
            detail=report.detail or ("its measurements are old" if report.measurements_are_old else ""),
            ownership=configured.ownership,
            status=report.status,
            last_seen_time_s=report.last_seen_time_s,
            epoch=self.epoch,
        )
        if session.node_id not in self._draining or report.state is not NodeState.READY:
            return node
        requests = sum(
            sum(self.load(key)) for key, found in self._view.deployments.items() if found.node.id == node.id
        )
        if requests:
            return replace(node, state=NodeState.DRAINING, detail=f"{requests} requests are left to finish")
        return replace(node, state=NodeState.DRAINED)


def _check(nodes: Sequence[ConfiguredNode], deployments: Sequence[DeploymentSpec]) -> None:
    for what, counted in (
        ("node", Counter(node.id for node in nodes)),
        ("deployment", Counter(spec.id for spec in deployments)),
    ):
        twice = [name for name, count in counted.items() if count > 1]
        if twice:
            raise ConfigError(f"the {what} id {twice[0]} is used more than once")
    known = {node.id for node in nodes}
    for spec in deployments:
        if spec.node_id not in known:
            raise ConfigError(f"deployment {spec.id} is on the node {spec.node_id}, which is not configured")


def _new_id(purpose: str, deployment_id: str) -> str:
    return f"{purpose}-{deployment_id}-{uuid.uuid4().hex[:12]}"
