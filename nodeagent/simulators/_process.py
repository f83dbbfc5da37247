"""Running a simulated engine: its port, its signals, its memory, its end."""

from __future__ import annotations

import asyncio
import signal
import sys
from collections.abc import Callable, Coroutine
from typing import Any

from aiohttp import web

from nodeagent.simulators._http import Counters
from nodeagent.simulators._memory import GpuMemory

#: Streams get so long to end after SIGTERM; real engines cut them, too.
_SHUTDOWN_S = 1.0
_BUSY_INTERVAL_S = 0.5


def run_to_end(serve: Callable[[], Coroutine[Any, Any, int]], refusal: str) -> int:
    """Run a simulated engine; returns its exit code.

    Args:
        serve: what it does; a ValueError or a FileNotFoundError of it is about how it was started.
        refusal: what such an error is told after, on stderr, such as `vllm: error`.
    """
    try:
        return asyncio.run(serve())
    except (ValueError, FileNotFoundError) as error:
        sys.stderr.write(f"{refusal}: {error}\n")
        return 1


class LoadFailedError(Exception):
    """The engine cannot load its model, or go on, and will exit; what it has to say was said."""


class Listener:
    """The port of a simulated engine, opened when its dialect wants it open."""

    def __init__(self, app: web.Application, host: str, port: int) -> None:
        # Without handler cancellation a caller that leaves would go unnoticed between two tokens.
        self._runner = web.AppRunner(
            app, handler_cancellation=True, access_log=None, shutdown_timeout=_SHUTDOWN_S
        )
        self._host = host
        self._port = port

    async def open(self) -> str:
        """Listen; returns the base URL, which tells the port that port 0 became.

        Raises:
            OSError: the port is taken.
        """
        await self._runner.setup()
        await web.TCPSite(self._runner, self._host, self._port).start()
        host, port = self._runner.addresses[0][:2]
        return f"http://{host}:{port}"

    async def aclose(self) -> None:
        """Stop listening and end what is under way."""
        await self._runner.cleanup()


def say(line: str) -> None:
    """Write a line of output, at once: the agent reads it while the engine loads."""
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


async def run_until_stopped(
    live: Callable[[], Coroutine[Any, Any, None]],
    *,
    listener: Listener,
    counters: Counters,
    memory: GpuMemory | None,
) -> int:
    """Run `live` and then wait for SIGTERM or SIGINT; returns the exit code.

    `live` loads, opens the listener and returns when the engine is ready, or stays until it dies.
    """
    loop = asyncio.get_running_loop()
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    living = asyncio.create_task(live())
    stopping = asyncio.create_task(stop.wait())
    heating = asyncio.create_task(_show_work(counters, memory))
    try:
        await asyncio.wait({living, stopping}, return_when=asyncio.FIRST_COMPLETED)
        if living.done():
            living.result()
            await stopping
        return 0
    except LoadFailedError:
        return 1
    finally:
        await _cancel(living, stopping, heating)
        await listener.aclose()
        if memory is not None:
            memory.free()


async def _show_work(counters: Counters, memory: GpuMemory | None) -> None:
    while memory is not None:
        await asyncio.sleep(_BUSY_INTERVAL_S)
        if counters.active:
            memory.touch_busy()


async def _cancel(*tasks: asyncio.Task[Any]) -> None:
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
