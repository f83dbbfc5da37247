"""Listening so that callers who come together do not wait for each other for long."""

from __future__ import annotations

import socket

from aiohttp import web

#: A listener takes one caller each time round the event loop (libuv does not accept in a loop since 1.45),
#: and a round relays for all who are there already. With four of them, all on the same port, the last of 64
#: who came at once has its first chunk after 39 to 49 ms, with two after 53 to 80 (tests/benchmarks); with
#: sixteen, each of the 64 waits for all others at every step, and most first chunks come later.
_LISTENERS = 4
#: Callers who wait to be taken.
_BACKLOG = 1024


async def listen(runner: web.AppRunner, host: str, port: int) -> int:
    """Serve on a port of every address of `host`, until the runner is cleaned up; returns the port.

    Args:
        runner: set up, and not yet serving.
        host: name or address.
        port: 0 for one that is free.

    Raises:
        OSError: the port is taken, or the host has no address here.
    """
    for family, _, _, _, address in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM):
        # The addresses of one name have the same port, also where any was wanted.
        with socket.create_server((address[0], port), family=family, backlog=_BACKLOG) as bound:
            port = int(bound.getsockname()[1])
            for _ in range(_LISTENERS):
                await web.SockSite(runner, bound.dup(), backlog=_BACKLOG).start()
    return port
