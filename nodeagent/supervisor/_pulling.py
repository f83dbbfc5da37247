"""Waiting for an engine that fetches its model, and saying how far it is."""

from __future__ import annotations

import asyncio

from nodeagent.engines import PullControl, PullProgress
from nodeagent.runtimes import EngineRuntime, RunningEngine, environment_of
from nodeagent.supervisor._loading import exit_of
from nodeagent.supervisor._planning import last_words
from nodeagent.supervisor._progress import Progress
from rung.errors import EngineStartFailedError, RungError
from rung.types import DeploymentSpec


async def until_pulled(
    running: RunningEngine,
    spec: DeploymentSpec,
    *,
    runtime: EngineRuntime,
    control: PullControl,
    progress: Progress,
) -> None:
    """Return once the engine has its model. However long that takes: it ends when nothing comes any more.

    Raises:
        EngineStartFailedError: the engine has ended, or cannot get the model. It may still run.
    """

    def tell(found: PullProgress) -> None:
        progress.expect(found.remaining_s)
        progress.say(found.detail, percent=found.percent)

    environment = environment_of(running.pid) if running.pid else {}
    exit_task = asyncio.ensure_future(exit_of(running, runtime))
    pull_task = asyncio.ensure_future(control.pull(running.base_url, spec, tell, environment=environment))
    try:
        await asyncio.wait([exit_task, pull_task], return_when=asyncio.FIRST_COMPLETED)
        if exit_task.done():
            ended = exit_task.result()
            raise EngineStartFailedError(
                f"{spec.id} {ended.detail} while it was pulling its model{last_words(ended.log_tail)}",
                deployment=spec.id,
            )
        pull_task.result()
    except EngineStartFailedError:
        raise
    except RungError as error:
        raise EngineStartFailedError(error.message, deployment=spec.id) from error
    finally:
        exit_task.cancel()
        pull_task.cancel()
        await asyncio.gather(exit_task, pull_task, return_exceptions=True)
