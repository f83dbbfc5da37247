"""After a restart of the agent: taking back what still runs, whatever was being done to it."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from contextlib import AbstractAsyncContextManager, suppress
from typing import Any, Protocol

import structlog
from msgspec.structs import replace

from nodeagent.supervisor._lifecycle import EngineLifecycle
from nodeagent.supervisor._loading import RETURN_INTERVAL_S
from nodeagent.supervisor._progress import Emit, nobody
from nodeagent.supervisor._sleeping import EngineSleep
from nodeagent.supervisor._state import DeploymentState
from nodeagent.supervisor._turns import Start, Turns
from rung.errors import RungError, UnavailableError
from rung.types import FailureReason, Residency, ResidencyClass

_log = structlog.get_logger("rung.agent")

#: Where an engine sleeps, or may: only the engine knows.
_MAY_SLEEP = frozenset({Residency.FALLING_ASLEEP, Residency.ASLEEP, Residency.WAKING})
#: Where an engine runs that is gone for no reason of ours.
_MISSED = frozenset({Residency.STARTING, Residency.AWAKE, *_MAY_SLEEP})


class GpuTurn(Protocol):
    """Waits until nothing else is done on the deployment's GPUs."""

    def __call__(self, doing: str, emit: Emit) -> AbstractAsyncContextManager[None]:
        """See `GpuTurns.turn`."""
        ...


class Resumption:
    """Takes back the engine of one deployment, and finishes what an earlier agent had begun."""

    def __init__(
        self,
        state: DeploymentState,
        lifecycle: EngineLifecycle,
        sleep: EngineSleep,
        *,
        turns: Turns,
        gpu_turn: GpuTurn,
    ) -> None:
        self._state = state
        self._lifecycle = lifecycle
        self._sleep = sleep
        self._turns = turns
        self._gpu_turn = gpu_turn
        self._task: asyncio.Task[None] | None = None

    async def resume(self) -> None:
        """Find out what still runs; what takes time goes on after this returns."""
        running = self._state.record.running
        lifecycle = self._lifecycle
        try:
            found = running is not None and (lifecycle.external or await lifecycle.runtime.find(running))
        except UnavailableError as error:
            self._state.show(Residency.FAILED, f"it may still run: {error.message}")
            lifecycle.tending = asyncio.create_task(
                self._resume_later(), name=f"resume-later-{self._state.id}"
            )
            return
        self._resume(found=found)

    async def aclose(self) -> None:
        """Leave the rest to the next agent."""
        task, self._task = self._task, None
        if task is not None:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)

    async def _resume_later(self) -> None:
        """Look again for an engine whose runtime is away; its record stays as it was."""
        running = self._state.record.running
        assert running is not None
        while True:
            await asyncio.sleep(RETURN_INTERVAL_S)
            with suppress(UnavailableError):
                async with self._turns.turn("search for its engine", nobody):
                    self._resume(found=await self._lifecycle.runtime.find(running))
                return

    def _resume(self, *, found: bool) -> None:
        state, external = self._state, self._lifecycle.external
        record = state.record
        if not found:
            state.ended()
            if record.residency in _MISSED:
                state.failed(FailureReason.ENGINE_LOST, "it was no longer running when the agent came back")
            elif record.running is not None:
                state.stopped("it was no longer running when the agent came back")
            return
        state.deployment = replace(state.deployment, residency=Residency.STARTING)
        if record.residency is Residency.STOPPING:
            state.show(Residency.STOPPING, "finishing a stop that a restart of the agent broke off")
            self._go_on("stop", self._finish_stop())
        elif record.residency in _MAY_SLEEP and not external:
            state.deployment = replace(state.deployment, residency=record.residency)
            state.show(record.residency, "finding out whether it sleeps, after a restart of the agent")
            self._go_on("find-out", self._find_out())
        elif record.residency is Residency.STARTING or external:
            state.show(Residency.STARTING, "taking it back after a restart of the agent")
            self._go_on("resume", self._resume_loading())
        else:
            self._lifecycle.awake()

    def _go_on(self, what: str, work: Coroutine[Any, Any, None]) -> None:
        self._task = asyncio.create_task(work, name=f"{what}-{self._state.id}")

    async def _finish_stop(self) -> None:
        async with self._turns.turn("stop", nobody), self._gpu_turn("stop", nobody):
            try:
                await self._lifecycle.shut_down(nobody)
            except RungError as error:
                _log.warning("engine_not_stopped", deployment=self._state.id, error=error.message)

    async def _resume_loading(self) -> None:
        pinned = self._state.record.residency_class is ResidencyClass.PINNED
        with self._turns.asked_to_start(pinned=pinned) as start:
            async with self._turns.turn("start", nobody):
                try:
                    while not await self._bring_up(start):
                        await self._lifecycle.pull(start, nobody)
                except RungError as error:
                    _log.warning("engine_not_resumed", deployment=self._state.id, error=error.message)

    async def _bring_up(self, start: Start) -> bool:
        async with self._gpu_turn("start", nobody):
            return await self._lifecycle.bring_up(start, nobody, None)

    async def _find_out(self) -> None:
        turn = "search for what it does"
        async with self._turns.turn(turn, nobody), self._gpu_turn(turn, nobody):
            try:
                await self._sleep.find_out()
            except RungError as error:
                _log.warning("engine_not_resumed", deployment=self._state.id, error=error.message)
