"""The schedulers of the nodes, and what they see and do of the fleet.

A deployment on a GPU becomes awake through its node's scheduler, which makes room for it first. One on a
node that has none, and one that somebody else runs, is left to its agent.
"""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import AsyncGenerator, Callable, Iterator, Mapping, Sequence
from contextlib import aclosing, contextmanager

import structlog

from controlplane.fleet._division import utilization_of
from controlplane.fleet._fleet import Fleet
from controlplane.fleet._marks import Marks, NodeSwaps, NoMarks
from controlplane.fleet._operations import KEEP_ALIVE_S, LifecycleAction
from controlplane.fleet._pools import is_scheduled, ledger_of, pool_of
from controlplane.fleet._raising import RaisingProgress, progress_of_event, progress_of_lifecycle
from controlplane.fleet._view import DeploymentView
from controlplane.vram import (
    GRADES,
    Measured,
    Measurement,
    NodeScheduler,
    PlacedDeployment,
    ReclaimAction,
    ReclaimStep,
    Reserve,
    VramAlert,
    reserved_bytes,
)
from rung import error_of_failure
from rung.errors import RungError, UnknownNodeError
from rung.types import (
    DeploymentSpec,
    LifecycleDone,
    LifecycleEvent,
    LifecycleFailed,
    NodeState,
    Phase,
    Priority,
    ReclaimGrade,
    Residency,
    VllmEngine,
)

_log = structlog.get_logger("rung.vram")

_ACTIONS = {
    ReclaimAction.SLEEP: LifecycleAction.SLEEP,
    ReclaimAction.STOP: LifecycleAction.STOP,
    ReclaimAction.FREE: LifecycleAction.FREE,
    ReclaimAction.SHRINK: LifecycleAction.SHRINK,
}
_RISING = frozenset({Residency.STARTING, Residency.WAKING})
#: How long to wait for a measurement of after a step.
_FRESH_S = 4.0
_RESERVE = Reserve()
_NO_MARKS = NoMarks()
_NO_RESERVES: Mapping[str, Reserve] = {}
_NO_GRADES: Mapping[str, ReclaimGrade] = {}


class NodeWorld:
    """A node as its scheduler sees it: the port `Pools`, and the port `Executor`.

    Args:
        fleet: the fleet.
        node_id: the node.
        idle_s: time since a deployment was last used.
        reserve: what is never granted.
        max_grades: by capability, the most that others may be disturbed to raise what has it.
        own_grades: the same by deployment, for those that have one of their own.
    """

    def __init__(
        self,
        fleet: Fleet,
        node_id: str,
        *,
        idle_s: Callable[[str], float],
        reserve: Reserve = _RESERVE,
        max_grades: Mapping[str, ReclaimGrade] = _NO_GRADES,
        own_grades: Mapping[str, ReclaimGrade] = _NO_GRADES,
    ) -> None:
        self._fleet = fleet
        self._max_grades = max_grades
        self._own_grades = own_grades
        self._node_id = node_id
        self._idle_s = idle_s
        self._reserve = reserve
        #: By deployment and the share that its engine was started with.
        self._seen_bytes: dict[tuple[str, float], int] = {}

    async def measure(self, pool_id: str) -> Measurement:
        """The pool as the agent last said. Raises as `ledger_of`."""
        ledger = ledger_of(
            self._fleet.view, pool_id, load=self._fleet.load, idle_s=self._idle_s, reserve=self._reserve
        )
        return Measurement(ledger=ledger, measured_s=self._fleet.session(self._node_id).measured_s)

    def deployments(self) -> Sequence[PlacedDeployment]:
        """Those of the node that are on a GPU and are ours to start."""
        placed: list[PlacedDeployment] = []
        for deployment_id, found in self._fleet.view.deployments.items():
            if found.node.id != self._node_id:
                continue
            pool_id = pool_of(found)
            if pool_id is None or not is_scheduled(found):
                continue
            placed.append(
                PlacedDeployment(
                    deployment_id=deployment_id,
                    pool_id=pool_id,
                    awake_bytes=self._awake_bytes(found, pool_id),
                    idle_timeout_s=found.deployment.spec.idle_timeout_s,
                    warm=self._is_warm(found),
                    swap_slot=found.deployment.spec.swap_slot,
                    pulls=found.deployment.spec.engine.pulls,
                    max_grade=self._max_grade(found.deployment.spec),
                )
            )
        return placed

    def _max_grade(self, spec: DeploymentSpec) -> ReclaimGrade:
        own = self._own_grades.get(spec.id)
        if own is not None:
            return own
        grades = [self._max_grades[each] for each in spec.capabilities if each in self._max_grades]
        return max(grades, key=GRADES.index, default=ReclaimGrade.FULL)

    def _is_warm(self, found: DeploymentView) -> bool:
        """Whether it is to come up by itself: not where a profile, an operator or a drain says otherwise."""
        spec = found.deployment.spec
        return (
            spec.warm
            and not found.hold
            and found.node.state is NodeState.READY
            and spec.id not in self._fleet.put_to_rest
        )

    def _awake_bytes(self, found: DeploymentView, pool_id: str) -> int:
        """What it holds when awake: as measured the last time, else as declared, else 0 for not known."""
        deployment = found.deployment
        spec = deployment.spec
        key = (spec.id, utilization_of(spec))
        seen_bytes = self._seen_bytes.get(key)
        if deployment.residency is Residency.AWAKE and deployment.vram_bytes:
            # The most of it: what has just come up may not have taken all yet.
            seen_bytes = self._seen_bytes[key] = max(seen_bytes or 0, deployment.vram_bytes)
        if seen_bytes is not None:
            return seen_bytes
        if deployment.residency is Residency.ASLEEP and deployment.shrunk and deployment.kv_cache_bytes:
            return max(spec.vram_bytes, (deployment.vram_bytes or 0) + deployment.kv_cache_bytes)
        engine = spec.engine.engine
        if spec.vram_bytes or not isinstance(engine, VllmEngine) or found.node.status is None:
            return spec.vram_bytes
        total_bytes = next(
            (gpu.memory_total_bytes for gpu in found.node.status.gpus if pool_id.endswith(f"/{gpu.index}")), 0
        )
        return reserved_bytes(engine.gpu_memory_utilization, total_bytes)

    async def carry_out(self, pool_id: str, step: ReclaimStep) -> Measured:
        """Change it, once it is drained, and measure.

        Raises:
            RungError: it did not work.
        """
        with _only_rung_errors():
            return await self._carry_out(pool_id, step)

    async def _carry_out(self, pool_id: str, step: ReclaimStep) -> Measured:
        action = _ACTIONS[step.action]
        before = await self.measure(pool_id)
        operation_id = f"reclaim-{step.deployment_id}-{uuid.uuid4().hex[:12]}"
        freed_bytes = await freed_by(
            self._fleet.lifecycle(action, step.deployment_id, operation_id, level=step.level, makes_room=True)
        )
        if freed_bytes is not None:
            # The agent measured it. What is free now is measured once more before anything is granted.
            after = await self.measure(pool_id)
            return Measured(freed_bytes=freed_bytes, free_bytes=after.ledger.free_bytes)
        after = await self._measured_after(pool_id, asyncio.get_running_loop().time())
        free_bytes = after.ledger.free_bytes
        return Measured(freed_bytes=max(0, free_bytes - before.ledger.free_bytes), free_bytes=free_bytes)

    async def _measured_after(self, pool_id: str, time_s: float) -> Measurement:
        loop = asyncio.get_running_loop()
        while True:
            measurement = await self.measure(pool_id)
            left_s = time_s + _FRESH_S - loop.time()
            if measurement.measured_s > time_s or left_s <= 0:
                return measurement
            await self._fleet.wait_changed(left_s)

    async def bring_up(self, pool_id: str, deployment_id: str) -> None:
        """Start or wake. Raises as `Fleet.ensure_awake`."""
        with _only_rung_errors():
            async with aclosing(self._fleet.ensure_awake(deployment_id)) as progress:
                async for _ in progress:
                    pass


async def freed_by(steps: AsyncGenerator[LifecycleEvent, None]) -> int | None:
    """Follow an operation that gives memory back to its end.

    Returns:
        The bytes that it freed, as the agent measured them; None if that is not known.

    Raises:
        RungError: it failed.
    """
    freed_bytes: int | None = None
    async with aclosing(steps) as events:
        async for event in events:
            if isinstance(event.payload, LifecycleFailed):
                raise error_of_failure(event.payload)
            if isinstance(event.payload, LifecycleDone):
                freed_bytes = event.payload.freed_bytes
    return freed_bytes


@contextmanager
def _only_rung_errors() -> Iterator[None]:
    """A defect on the way fails the step or the raise, and not the scheduler of the node."""
    try:
        yield
    except RungError:
        raise
    except Exception as error:
        _log.error("vram_defect", exc_info=error)
        raise RungError("internal error; the server's log has the details") from error


class NodeSchedulers:
    """One scheduler for each node; the way by which deployments become awake.

    Args:
        fleet: the fleet.
        idle_s: time since a deployment was last used.
        alert: told when a pool runs low, and when it has recovered.
        reserves: by node, what is never granted, where that is not as usual.
        max_grades: by capability, the most that others may be disturbed to raise what has it.
        own_grades: the same by deployment, for those that have one of their own.
        marks: remembers the swaps that are under way.
    """

    def __init__(
        self,
        fleet: Fleet,
        *,
        idle_s: Callable[[str], float],
        alert: Callable[[VramAlert], None],
        reserves: Mapping[str, Reserve] = _NO_RESERVES,
        max_grades: Mapping[str, ReclaimGrade] = _NO_GRADES,
        own_grades: Mapping[str, ReclaimGrade] = _NO_GRADES,
        marks: Marks = _NO_MARKS,
    ) -> None:
        self._fleet = fleet
        self._schedulers = {
            node_id: _make(
                NodeWorld(
                    fleet,
                    node_id,
                    idle_s=idle_s,
                    reserve=reserves.get(node_id, _RESERVE),
                    max_grades=max_grades,
                    own_grades=own_grades,
                ),
                alert,
                NodeSwaps(marks, node_id),
            )
            for node_id in fleet.view.nodes
        }
        self._tasks: list[asyncio.Task[None]] = []

    def of_node(self, node_id: str) -> NodeScheduler:
        """The scheduler of a node. Raises UnknownNodeError."""
        found = self._schedulers.get(node_id)
        if found is None:
            raise UnknownNodeError(f"there is no node {node_id}", node=node_id)
        return found

    @property
    def all(self) -> Sequence[NodeScheduler]:
        """The schedulers of all nodes."""
        return tuple(self._schedulers.values())

    def start(self) -> None:
        """Begin to own the nodes."""
        self._tasks = [
            asyncio.create_task(scheduler.run(), name=f"scheduler-{node_id}")
            for node_id, scheduler in self._schedulers.items()
        ]
        self._tasks.append(asyncio.create_task(self._tell(), name="scheduler-changes"))

    async def _tell(self) -> None:
        async with aclosing(self._fleet.changes()) as changes:
            async for _ in changes:
                for scheduler in self._schedulers.values():
                    scheduler.changed()

    async def aclose(self) -> None:
        """Let go of the nodes; whoever still waits is told so."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def make_awake(
        self, deployment_id: str, *, priority: Priority = Priority.USER
    ) -> AsyncGenerator[RaisingProgress, None]:
        """Make a deployment awake, with room made for it first; says at least once a second how far that is.

        Raises:
            VramInfeasibleError: there is no room for it, and waiting does not help.
            UnknownDeploymentError, EngineStartFailedError, NodeUnreachableError: as `Fleet.ensure_awake`.
        """
        self._fleet.require_raisable(deployment_id)
        found = self._fleet.view.deployments.get(deployment_id)
        if found is None or not is_scheduled(found):
            async with aclosing(self._fleet.ensure_awake(deployment_id)) as steps:
                async for step in steps:
                    yield progress_of_lifecycle(step)
            return
        latest = [RaisingProgress(Phase.VRAM_ACQUIRE, "looking at the memory of the GPU")]
        scheduler = self.of_node(found.node.id)

        async def follow() -> None:
            async with aclosing(scheduler.raise_deployment(deployment_id, priority=priority)) as events:
                async for event in events:
                    latest[0] = progress_of_event(event) or latest[0]

        task = asyncio.create_task(follow(), name=f"raise-{deployment_id}")
        try:
            async with aclosing(self._until_done(task, deployment_id, latest)) as steps_:
                async for each in steps_:
                    yield each
            await task
        finally:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)

    async def _until_done(
        self, task: asyncio.Task[None], deployment_id: str, latest: list[RaisingProgress]
    ) -> AsyncGenerator[RaisingProgress, None]:
        loop = asyncio.get_running_loop()
        said: RaisingProgress | None = None
        said_s = 0.0
        rising: RaisingProgress | None = None
        while not task.done():
            progress = self._fleet.progress_of(deployment_id)
            if progress is not None and progress.residency in _RISING:
                rising = progress_of_lifecycle(progress)
            # Once it is on its way there is nothing more to be said of memory.
            now = rising or latest[0]
            if now != said or loop.time() - said_s >= KEEP_ALIVE_S:
                said, said_s = now, loop.time()
                yield now
            await self._fleet.wait_changed(KEEP_ALIVE_S / 3)


def _make(world: NodeWorld, alert: Callable[[VramAlert], None], swaps: NodeSwaps) -> NodeScheduler:
    return NodeScheduler(
        pools=world,
        executor=world,
        new_lease_id=lambda: f"lease-{uuid.uuid4().hex[:16]}",
        alert=alert,
        journal=swaps,
    )
