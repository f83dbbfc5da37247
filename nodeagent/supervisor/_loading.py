"""Waiting for an engine that loads, and saying how far it is."""

from __future__ import annotations

import asyncio
from collections import deque

import structlog

from nodeagent.engines import (
    DEEPEST_LEVEL,
    EngineAdapter,
    EngineHealth,
    LoadProgress,
    Probe,
    PullControl,
    SleepControl,
)
from nodeagent.runtimes import EngineExit, EngineRuntime, HealthReport, RunningEngine
from nodeagent.supervisor._planning import last_words
from nodeagent.supervisor._progress import Progress
from rung.errors import EngineStartFailedError, RungError, UnavailableError
from rung.types import DeploymentSpec, ExternalRuntime

_log = structlog.get_logger("rung.agent")

#: How often an engine that loads is asked whether it is ready.
_READY_POLL_S = 0.25
#: An engine of somebody else that is adopted is given this long to answer.
_ADOPT_PATIENCE_S = 3.0
#: What is away, a runtime or an engine of somebody else, is looked for this often.
RETURN_INTERVAL_S = 2.0
#: Lines of output that are looked at for its last words.
_TAIL_LINES = 20


async def until_ready(
    running: RunningEngine,
    spec: DeploymentSpec,
    *,
    runtime: EngineRuntime,
    adapter: EngineAdapter,
    progress: Progress,
) -> Probe:
    """Return once the engine answers requests; one of somebody else may be found asleep.

    One whose server is up before its model is loaded is told to load it. One that is to fetch its model
    first is returned at once.

    Raises:
        EngineStartFailedError: it has ended, it cannot load, it has not its model and is not to fetch it, or
            its time is over. It may still run.
    """
    external = isinstance(spec.engine.runtime, ExternalRuntime)
    patience_s = _ADOPT_PATIENCE_S if external else spec.engine.start_timeout_s
    loading = _Loading()
    exit_task = asyncio.ensure_future(exit_of(running, runtime))
    log_task = asyncio.ensure_future(_follow(running, loading, runtime=runtime, adapter=adapter))
    load_task: asyncio.Task[None] | None = None
    try:
        while True:
            probe = await adapter.probe(running.base_url, spec)
            # First: another server on the same port would answer for an engine that has ended.
            if not exit_task.done():
                if probe.health is EngineHealth.READY or (probe.health is EngineHealth.ASLEEP and external):
                    return probe
                if probe.health is EngineHealth.ASLEEP and load_task is None:
                    load_task = _load(running, spec, adapter)
                if probe.health is EngineHealth.NO_MODEL:
                    if isinstance(adapter, PullControl) and adapter.pulls(spec):
                        return probe
                    raise EngineStartFailedError(f"{spec.id}: {probe.detail}", deployment=spec.id)
            if exit_task.done():
                ended = exit_task.result()
                how = f": {ended.detail}" if external else f" {ended.detail} while it was loading"
                raise EngineStartFailedError(
                    f"{spec.id}{how}{last_words(ended.log_tail)}", deployment=spec.id
                )
            if load_task is not None and load_task.done() and load_task.exception() is not None:
                words = last_words(await tail_of(running, runtime))
                raise EngineStartFailedError(
                    f"{spec.id} could not load its model: {load_task.exception()}{words}", deployment=spec.id
                )
            if progress.elapsed_s > patience_s:
                found_wrong = with_complaint(probe.detail, running, runtime)
                why = f": {found_wrong}" if found_wrong else ""
                words = last_words(await tail_of(running, runtime))
                raise EngineStartFailedError(
                    f"{spec.id} was not ready within {patience_s:g} s{why}{words}", deployment=spec.id
                )
            found = loading.progress
            waiting_for = _waiting_for(probe) if load_task is None else "loading its model"
            detail = with_complaint(found.detail or waiting_for, running, runtime)
            progress.say(detail, percent=found.percent)
            await asyncio.wait([exit_task], timeout=_READY_POLL_S)
    finally:
        tasks = [task for task in (exit_task, log_task, load_task) if task is not None]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def _load(running: RunningEngine, spec: DeploymentSpec, adapter: EngineAdapter) -> asyncio.Task[None] | None:
    if not isinstance(adapter, SleepControl):
        return None
    return asyncio.create_task(adapter.wake(running.base_url, spec, DEEPEST_LEVEL))


async def exit_of(running: RunningEngine, runtime: EngineRuntime) -> EngineExit:
    """How an engine ended, once it has; a runtime that is away meanwhile says nothing about it."""
    while True:
        try:
            return await runtime.wait(running)
        except UnavailableError as error:
            _log.warning("runtime_away", deployment=running.deployment_id, error=error.message)
            await asyncio.sleep(RETURN_INTERVAL_S)


def with_complaint(detail: str, running: RunningEngine, runtime: EngineRuntime) -> str:
    """What is said of an engine that is not ready, and what its runtime finds wrong with it."""
    complaint = runtime.complaint(running) if isinstance(runtime, HealthReport) else ""
    return "; ".join(text for text in (detail, complaint) if text)


class _Loading:
    """The newest that the engine's output said about loading."""

    def __init__(self) -> None:
        self.progress = LoadProgress("")


async def _follow(
    running: RunningEngine, loading: _Loading, *, runtime: EngineRuntime, adapter: EngineAdapter
) -> None:
    async for line in runtime.log(running, tail_lines=0, follow=True):
        found = adapter.load_progress(line)
        if found is not None:
            loading.progress = found


async def tail_of(running: RunningEngine, runtime: EngineRuntime) -> list[str]:
    """The end of an engine's output; what there is of it if its runtime goes away."""
    lines: deque[str] = deque(maxlen=_TAIL_LINES)
    try:
        async for line in runtime.log(running, tail_lines=_TAIL_LINES, follow=False):
            lines.append(line)
    except RungError as error:
        _log.warning("log_not_read", deployment=running.deployment_id, error=error.message)
    return list(lines)


def _waiting_for(probe: Probe) -> str:
    """What a probe of an engine that is not ready says to a person who waits."""
    if probe.health is EngineHealth.ABSENT:
        return "waiting for its port"
    return probe.detail or "waiting for the engine"
