"""Listening on real sockets, under the event loop that serves."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable, Coroutine
from contextlib import ExitStack
from typing import Any

import pytest
import uvloop
from aiohttp import web

from controlplane.gateway import _listen
from controlplane.gateway._listen import listen

#: Times round the loop in which callers who came together are taken: once for each step of taking one.
ROUNDS = 4


def under_uvloop(test: Callable[[], Coroutine[Any, Any, None]]) -> None:
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(test())


async def serving(host: str = "127.0.0.1") -> tuple[web.AppRunner, int]:
    runner = web.AppRunner(web.Application())
    await runner.setup()
    return runner, await listen(runner, host, 0)


async def taken_within(rounds: int, callers: int) -> int:
    """How many of so many who came together are taken when the loop has been round so often."""
    runner, port = await serving()
    assert runner.server is not None
    with ExitStack() as stack:
        for _ in range(callers):
            stack.enter_context(socket.create_connection(("127.0.0.1", port)))
        for _ in range(rounds):
            await asyncio.sleep(0)
        taken = len(runner.server.connections)
    await runner.cleanup()
    return taken


@pytest.mark.parametrize(("listeners", "least", "most"), [(1, 1, ROUNDS), (16, 16, 16)])
def test_each_listener_takes_one_caller_a_round(
    listeners: int, least: int, most: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_listen, "_LISTENERS", listeners)

    async def test() -> None:
        assert least <= await taken_within(ROUNDS, 16) <= most

    under_uvloop(test)


def test_there_is_more_than_one_listener() -> None:
    async def test() -> None:
        assert await taken_within(ROUNDS, 16) > ROUNDS

    under_uvloop(test)


def test_a_port_that_is_given_back_is_closed() -> None:
    async def test() -> None:
        runner, port = await serving("localhost")
        socket.create_connection(("127.0.0.1", port)).close()
        await runner.cleanup()
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection(("127.0.0.1", port))

    under_uvloop(test)


def test_a_port_that_is_taken_is_refused() -> None:
    async def test() -> None:
        first, port = await serving()
        second = web.AppRunner(web.Application())
        await second.setup()
        with pytest.raises(OSError, match="in use"):
            await listen(second, "127.0.0.1", port)
        await second.cleanup()
        await first.cleanup()

    under_uvloop(test)
