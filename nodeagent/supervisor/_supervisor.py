"""All deployments of this node: commands, their fence, and what a restart finds."""

from __future__ import annotations

import asyncio
import re
import uuid
from collections.abc import Callable, Mapping

import structlog
from msgspec import Struct

from nodeagent.engines import EngineAdapter
from nodeagent.runtimes import EngineRuntime
from nodeagent.supervisor._engine import EngineSupervisor
from nodeagent.supervisor._gpus import GpuTurns
from nodeagent.supervisor._measuring import Look
from nodeagent.supervisor._operations import Operation, Operations
from nodeagent.supervisor._progress import Emit
from nodeagent.supervisor._records import EngineRecord, Records
from rung import error_of_failure
from rung.errors import (
    InvalidRequestError,
    RungError,
    StaleEpochError,
    UnavailableError,
    UnknownDeploymentError,
)
from rung.service import Signal
from rung.types import (
    Deployment,
    DeploymentSpec,
    EndpointScope,
    Engine,
    LifecycleDone,
    LifecycleFailed,
    NodeStatus,
    Residency,
    Runtime,
)

_log = structlog.get_logger("rung.agent")

#: An id is part of file names, of container names and of the mark in an engine's environment.


def _do_not_look() -> None:
    """Nothing can be measured."""


_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")


class Command(Struct, frozen=True):
    """Identity and fence of a mutation."""

    operation_id: str
    epoch: int


class Supervisor:
    """Owns the engines of a node. Make it inside the running event loop, then `resume`.

    Args:
        node_id: name of the node.
        records: what earlier agents left.
        runtimes: what runs engines.
        adapter_for: finds what speaks an engine's dialect.
        scope: from where engines can be reached.
        look: takes a sample of the node now, for what is to be measured; None if nothing can be.
        look_soon: has one taken without waiting for it: whoever asked for an operation wants its effect seen.
    """

    def __init__(
        self,
        *,
        node_id: str,
        records: Records,
        runtimes: Mapping[type[Runtime], EngineRuntime],
        adapter_for: Callable[[Engine], EngineAdapter],
        scope: EndpointScope = EndpointScope.LOOPBACK,
        look: Look | None = None,
        look_soon: Callable[[], None] = _do_not_look,
    ) -> None:
        self.node_id = node_id
        self.epoch = records.load_epoch()
        self.changed = Signal()
        self._records = records
        self._runtimes = runtimes
        self._adapter_for = adapter_for
        self._scope = scope
        self._look = look
        self._gpu_turns = GpuTurns()
        self._engines: dict[str, EngineSupervisor] = {}
        self._operations = Operations(look_soon)
        #: Engines whose processes their runtime could not tell at the last look: logged once.
        self._not_attributed: set[str] = set()

    async def resume(self) -> None:
        """Take back what still runs, and end what carries our mark but nobody remembers."""
        for record in self._records.load():
            self._engines[record.spec.id] = self._make(record)
        for runtime in dict.fromkeys(self._runtimes.values()):
            try:
                await self._sort_out_strays(runtime)
            except UnavailableError as error:
                # Docker is away, say: what it runs is looked for again, and nothing else waits for it.
                _log.warning("strays_not_looked_for", error=error.message)
        for engine in self._engines.values():
            await engine.resume()
            _log.info("engine_resumed", deployment=engine.id, residency=engine.residency)

    async def _sort_out_strays(self, runtime: EngineRuntime) -> None:
        known = set()
        for engine in self._engines.values():
            running = engine.running
            if engine.runtime is runtime and running is not None and await runtime.find(running):
                known.add(engine.id)
        for stray in await runtime.strays(frozenset(known)):
            engine_of_stray = self._engines.get(stray.deployment_id)
            if engine_of_stray is None and self._records.unreadable:
                _log.warning("stray_left", deployment=stray.deployment_id, pid=stray.pid)
                continue
            if engine_of_stray is not None:
                engine_of_stray.adopt_stray(stray)
                running = engine_of_stray.running
                if running is not None and await runtime.find(running):
                    continue
                if engine_of_stray.pinned:
                    _log.warning("stray_left", deployment=stray.deployment_id, pid=stray.pid)
                    continue
            _log.warning("stray_stopped", deployment=stray.deployment_id, pid=stray.pid)
            await runtime.stop(stray, 1.0)

    def adopt(self, spec: DeploymentSpec) -> None:
        """Take up an engine that was found running; one that is known already is left as it is."""
        if spec.id in self._engines or not _ID.fullmatch(spec.id):
            return
        self._engines[spec.id] = self._make(_new_record(spec, adopted=True))
        operation_id = f"adopt-{spec.id}-{uuid.uuid4().hex}"
        self._operations.join_or_begin(operation_id, "adopt", lambda emit: self._start(spec, emit))

    @property
    def deployments(self) -> tuple[Deployment, ...]:
        """All deployments as they are."""
        return tuple(engine.deployment for engine in self._engines.values())

    def engine(self, deployment_id: str) -> EngineSupervisor:
        """One deployment. Raises UnknownDeploymentError."""
        found = self._engines.get(deployment_id)
        if found is None:
            raise UnknownDeploymentError(
                f"the agent of {self.node_id} knows no deployment {deployment_id}", deployment=deployment_id
            )
        return found

    def raise_epoch(self, epoch: int) -> None:
        """Note the epoch of a caller. Raises StaleEpochError if a higher one was seen."""
        if epoch < self.epoch:
            raise StaleEpochError(
                f"epoch {epoch} is over; {self.node_id} belongs to a control plane with epoch {self.epoch}",
                epoch=str(self.epoch),
            )
        if epoch > self.epoch:
            self._records.save_epoch(epoch)
            self.epoch = epoch

    def start(self, command: Command, spec: DeploymentSpec) -> Operation:
        """Start an engine. Raises as `raise_epoch`, and InvalidRequestError for a spec of another node."""
        self.raise_epoch(command.epoch)
        if not _ID.fullmatch(spec.id):
            raise InvalidRequestError(f"{spec.id!r} is not an id: letters, digits and . _ - are")
        if spec.node_id not in ("", self.node_id):
            raise InvalidRequestError(
                f"deployment {spec.id!r} is for the node {spec.node_id}, and this is {self.node_id}"
            )
        return self._operations.join_or_begin(
            command.operation_id, f"start {spec.id}", lambda emit: self._start(spec, emit)
        )

    async def _start(self, spec: DeploymentSpec, emit: Emit) -> LifecycleDone:
        """Start with the runtime and the adapter that the spec needs. Raises as `EngineSupervisor.start`."""
        runtime, adapter = self._runtime(spec), self._adapter_for(spec.engine.engine)
        engine = self._engines.get(spec.id)
        if engine is None:
            engine = self._engines[spec.id] = self._make(_new_record(spec, adopted=False))
        try:
            return await engine.start(spec, emit, runtime=runtime, adapter=adapter)
        except RungError:
            # Refused: what was not known before is not known now.
            if engine.untouched and self._engines.get(spec.id) is engine:
                del self._engines[spec.id]
                self.changed.fire()
            raise

    def stop(self, command: Command, deployment_id: str, *, force: bool) -> Operation:
        """Stop an engine. Raises as `raise_epoch`; an operation on an unknown deployment is refused."""
        self.raise_epoch(command.epoch)
        return self._operations.join_or_begin(
            command.operation_id,
            f"stop {deployment_id}",
            lambda emit: self.engine(deployment_id).stop(emit, force=force),
        )

    def sleep(
        self, command: Command, deployment_id: str, *, level: int, force: bool, drain_timeout_s: float
    ) -> Operation:
        """Put an engine to sleep. Raises as `stop`."""
        self.raise_epoch(command.epoch)
        return self._operations.join_or_begin(
            command.operation_id,
            f"sleep {deployment_id}",
            lambda emit: self.engine(deployment_id).sleep(
                emit, level=level, force=force, drain_timeout_s=drain_timeout_s
            ),
        )

    def shrink(self, command: Command, deployment_id: str, *, drain_timeout_s: float) -> Operation:
        """Have an engine give up its KV cache. Raises as `stop`."""
        self.raise_epoch(command.epoch)
        return self._operations.join_or_begin(
            command.operation_id,
            f"shrink {deployment_id}",
            lambda emit: self.engine(deployment_id).shrink(emit, drain_timeout_s=drain_timeout_s),
        )

    def wake(self, command: Command, deployment_id: str) -> Operation:
        """Wake an engine. Raises as `stop`."""
        self.raise_epoch(command.epoch)
        return self._operations.join_or_begin(
            command.operation_id, f"wake {deployment_id}", lambda emit: self.engine(deployment_id).wake(emit)
        )

    def free(self, command: Command, deployment_id: str) -> Operation:
        """Have an engine give back its cache. Raises as `stop`."""
        self.raise_epoch(command.epoch)
        return self._operations.join_or_begin(
            command.operation_id, f"free {deployment_id}", lambda emit: self.engine(deployment_id).free(emit)
        )

    async def forget(self, command: Command, deployment_id: str) -> None:
        """Remove a deployment whose engine does not run.

        Raises:
            StaleEpochError, InvalidRequestError, AlreadyExistsError: the command.
            UnknownDeploymentError: there is none of that id.
            FailedPreconditionError: its engine runs, or may run.
            UnavailableError: its runtime cannot tell.
        """
        self.raise_epoch(command.epoch)
        operation = self._operations.join_or_begin(
            command.operation_id, f"forget {deployment_id}", lambda _: self._forget(deployment_id)
        )
        async for event in operation.events():
            if isinstance(event.payload, LifecycleFailed):
                raise error_of_failure(event.payload)

    async def _forget(self, deployment_id: str) -> LifecycleDone:
        engine = self.engine(deployment_id)
        await engine.forget()
        # Nothing is awaited in between: whoever comes next makes a new one.
        del self._engines[deployment_id]
        self.changed.fire()
        return LifecycleDone(engine.deployment)

    def measured(self, status: NodeStatus) -> None:
        """Take the memory of the engines, and which GPUs there are, from a sample."""
        self._gpu_turns.know(status.gpus)
        used: dict[str, int] = {}
        for gpu in status.gpus:
            for process in gpu.processes:
                if process.deployment_id and process.memory_bytes is not None:
                    used[process.deployment_id] = used.get(process.deployment_id, 0) + process.memory_bytes
        for engine in self._engines.values():
            engine.measured(used.get(engine.id))

    async def owners(self) -> dict[int, str]:
        """Process ids of engines, for the attribution of GPU memory; none of a runtime that is away."""
        found: dict[int, str] = {}
        for engine in tuple(self._engines.values()):
            running = engine.running
            if running is None or engine.external:
                continue
            try:
                pids = (running.pid,) if running.pid else await engine.runtime.pids(running)
            except UnavailableError as error:
                if engine.id not in self._not_attributed:
                    self._not_attributed.add(engine.id)
                    _log.warning("processes_not_known", deployment=engine.id, error=error.message)
                continue
            self._not_attributed.discard(engine.id)
            found.update(dict.fromkeys(pids, engine.id))
        return found

    async def aclose(self) -> None:
        """Let go of all engines; they go on."""
        for engine in self._engines.values():
            engine.closing()
        await self._operations.aclose()
        await asyncio.gather(*(engine.aclose() for engine in self._engines.values()))

    def _make(self, record: EngineRecord) -> EngineSupervisor:
        return EngineSupervisor(
            record,
            runtime=self._runtime(record.spec),
            adapter=self._adapter_for(record.spec.engine.engine),
            records=self._records,
            scope=self._scope,
            on_change=self.changed.fire,
            gpu_turns=self._gpu_turns,
            look=self._look,
        )

    def _runtime(self, spec: DeploymentSpec) -> EngineRuntime:
        return self._runtimes[type(spec.engine.runtime)]


def _new_record(spec: DeploymentSpec, *, adopted: bool) -> EngineRecord:
    return EngineRecord(
        spec=spec,
        residency=Residency.STOPPED,
        residency_class=spec.residency_class,
        generation=0,
        adopted=adopted,
    )
