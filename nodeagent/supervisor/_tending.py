"""Looking after an engine that runs: noticing that it ends, is not well, or is back."""

from __future__ import annotations

import asyncio
from contextlib import suppress

import structlog
from msgspec.structs import replace

from nodeagent.engines import EngineAdapter, EngineHealth, Probe, SleepControl
from nodeagent.runtimes import EngineExit, EngineRuntime, RunningEngine
from nodeagent.supervisor._loading import RETURN_INTERVAL_S, exit_of, with_complaint
from nodeagent.supervisor._planning import last_words
from nodeagent.supervisor._state import DeploymentState
from rung.errors import UnavailableError
from rung.types import ExternalRuntime, FailureReason, Residency

_log = structlog.get_logger("rung.agent")

#: How often an engine that is awake is asked how it is, and how often it may fail to answer.
_HEALTH_INTERVAL_S = 5.0
_HEALTH_TOLERANCE = 3


async def tend(state: DeploymentState, *, runtime: EngineRuntime, adapter: EngineAdapter) -> None:
    """Keep `state` true until the engine ends; for an engine of somebody else, which may return, for ever."""
    running = state.record.running
    if running is None:
        return
    external = isinstance(state.record.spec.engine.runtime, ExternalRuntime)
    while True:
        if state.residency in (Residency.AWAKE, Residency.ASLEEP):
            await _until_gone(running, state, runtime=runtime, adapter=adapter)
            if not external:
                return
        await asyncio.sleep(RETURN_INTERVAL_S)
        probe = await adapter.probe(running.base_url, state.record.spec)
        if probe.health is EngineHealth.READY:
            state.awake()
        elif probe.health is EngineHealth.ASLEEP:
            note_asleep(state, probe, adapter)


def note_asleep(state: DeploymentState, probe: Probe, adapter: EngineAdapter) -> None:
    """An engine sleeps without having been told to: note it, with its level if there is but one."""
    levels = adapter.sleep_levels(state.record.spec) if isinstance(adapter, SleepControl) else ()
    state.record = replace(state.record, sleep_level=levels[0] if len(levels) == 1 else 0, shrunk=False)
    state.asleep(f"asleep: {probe.detail or 'nobody here told it to'}")


async def _until_gone(
    running: RunningEngine,
    state: DeploymentState,
    *,
    runtime: EngineRuntime,
    adapter: EngineAdapter,
) -> None:
    exit_task = asyncio.ensure_future(exit_of(running, runtime))
    missed = 0
    try:
        while not exit_task.done():
            await asyncio.wait([exit_task], timeout=_HEALTH_INTERVAL_S)
            if exit_task.done():
                break
            probe = await adapter.probe(running.base_url, state.record.spec)
            if state.residency is Residency.ASLEEP:
                # That it does not answer is as it should be. One that does was woken by somebody else.
                if probe.health is EngineHealth.READY:
                    state.awake()
                continue
            if probe.health is EngineHealth.ASLEEP and state.idle.is_set():
                note_asleep(state, probe, adapter)
                continue
            missed = 0 if probe.health is EngineHealth.READY else missed + 1
            if missed == 0 and state.deployment.detail != "ready":
                state.show(Residency.AWAKE, "ready")
            elif missed >= _HEALTH_TOLERANCE:
                why = with_complaint(probe.detail or probe.health, running, runtime)
                state.show(Residency.AWAKE, f"not well: {why}")
    finally:
        exit_task.cancel()
        await asyncio.gather(exit_task, return_exceptions=True)
    await note_lost(running, exit_task.result(), state, runtime=runtime)


async def note_lost(
    running: RunningEngine, ended: EngineExit, state: DeploymentState, *, runtime: EngineRuntime
) -> str:
    """An engine has ended by itself: note that it FAILED; returns what happened."""
    detail = f"{state.id} {ended.detail}{last_words(ended.log_tail)}"
    _log.warning("engine_lost", deployment=state.id, detail=detail)
    if not isinstance(state.record.spec.engine.runtime, ExternalRuntime):
        # What it started goes with it, if its runtime is there to see to it.
        with suppress(UnavailableError):
            await runtime.stop(running, 0.0)
        state.ended()
    state.failed(FailureReason.ENGINE_LOST, detail)
    return detail
