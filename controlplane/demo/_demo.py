"""The demo from its first word to its last."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from contextlib import AsyncExitStack

from rich.console import Console
from rich.text import Text

from controlplane.demo._layout import ORCHESTRATOR, DemoOptions
from controlplane.demo._screen import Screen
from controlplane.demo._stage import Stage, StageFailedError, last_words, open_stage
from controlplane.demo._story import open_story, tell
from controlplane.demo._sweeper import leftovers
from controlplane.local import ChildDiedError, StopRequestedError, Watch
from rung import AsyncClient
from rung.cli import ExitCode
from rung.errors import RungError

#: `make demo` takes about a minute; this is for a computer that is much slower than any we know.
_STORY_TIMEOUT_S = 180.0


def run_demo(options: DemoOptions, console: Console) -> int:
    """Show the demo; returns the exit code. Nothing of it is left behind, however it ends.

    Raises:
        FailedPreconditionError: a real llama.cpp is wanted and there is none.
        OSError: processes cannot be started, or files not be written.
    """
    screen = Screen(console)
    open_story(screen, options)
    return asyncio.run(_run(screen, options))


async def _run(screen: Screen, options: DemoOptions) -> int:
    stage: Stage | None = None
    code = ExitCode.OK
    async with Watch() as watch, AsyncExitStack() as stack:
        try:
            with screen.console.status("starting a control plane and two agents"):
                stage = await stack.enter_async_context(open_stage(options, watch))
            client = await stack.enter_async_context(AsyncClient(stage.ports.address))
            async with asyncio.timeout(_STORY_TIMEOUT_S):
                await watch.during(tell(screen, stage, client))
            screen.closing()
            if options.serve:
                _invite(screen, stage)
                await watch.until_stopped()
        except StopRequestedError:
            code = ExitCode.INTERRUPTED
        except StageFailedError as error:
            _fail(screen, str(error), error.last_words)
            code = ExitCode.FAILED
        except (ChildDiedError, RungError, TimeoutError) as error:
            _fail(screen, str(error) or "it took too long", last_words(stage.children) if stage else {})
            code = ExitCode.FAILED
        screen.show("")
        screen.say("Stopping everything and removing the demo's folder.")
    if stage is not None and (left := leftovers(stage.layout.folder)):
        screen.show(Text(f"Still here: {', '.join(left)}", style="bold red"))
        return ExitCode.FAILED
    if code is ExitCode.OK:
        screen.say("All of it is gone again: processes, ports, files.")
    return code


def _invite(screen: Screen, stage: Stage) -> None:
    screen.show("")
    screen.show(Text("It keeps running. In another terminal:", style="bold"))
    screen.command(f"export RUNG_ADDRESS={stage.ports.address} RUNG_HTTP={stage.ports.url}")
    for line in (
        "rung status --watch",
        f"rung chat --model {stage.layout.thinker_model}",
        f"rung stop {ORCHESTRATOR}        # refused: it is pinned",
        "rung jobs list",
        f"curl {stage.ports.url}/v1/models",
    ):
        screen.command(line)
    screen.say(
        f"OpenAI base URL: {stage.ports.url}/v1    logs: {stage.layout.log_path('controlplane').parent}"
    )
    screen.say("Ctrl-C ends it and removes everything.")


def _fail(screen: Screen, why: str, said: Mapping[str, Sequence[str]]) -> None:
    screen.show("")
    screen.show(Text(f"The demo failed: {why}", style="bold red"))
    for name, lines in said.items():
        screen.show(Text(f"Last words of {name}:", style="bold"))
        for line in lines:
            screen.console.print(Text(f"  {line}", style="dim"), soft_wrap=True)
