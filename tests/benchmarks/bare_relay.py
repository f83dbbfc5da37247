"""The least that a relay in Python can do: the baseline. Run by uvicorn.

`ENGINE` is the base URL of the engine; with `AGENT` (host:port of `bare_agent`) the bytes go through it.
"""

from __future__ import annotations

import os
from collections.abc import Awaitable, Callable
from typing import Any

import aiohttp
import grpc.aio

from rung import v1
from tests.benchmarks.bare_agent import bare_run

Receive = Callable[[], Awaitable[dict[str, Any]]]
Send = Callable[[dict[str, Any]], Awaitable[None]]

_session: list[aiohttp.ClientSession] = []
_run: list[Any] = []


async def app(scope: dict[str, Any], receive: Receive, send: Send) -> None:
    """Relay a POST."""
    if scope["type"] != "http":
        return
    body = b""
    more = True
    while more:
        message = await receive()
        body += message.get("body", b"")
        more = message.get("more_body", False)
    if os.environ.get("AGENT"):
        await _through_agent(body, send)
    else:
        await _straight(body, send)


async def _straight(body: bytes, send: Send) -> None:
    if not _session:
        _session.append(aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0), auto_decompress=False))
    url = os.environ["ENGINE"] + "/v1/chat/completions"
    headers = {"Content-Type": "application/json"}
    async with _session[0].post(url, data=body, headers=headers) as response:
        content_type = response.headers["Content-Type"].encode()
        await _head(send, response.status, content_type)
        async for chunk in response.content.iter_any():
            await send({"type": "http.response.body", "body": chunk, "more_body": True})
    await send({"type": "http.response.body"})


async def _through_agent(body: bytes, send: Send) -> None:
    if not _run:
        _run.append(bare_run(grpc.aio.insecure_channel(os.environ["AGENT"])))
    async for message in _run[0](v1.RunBegin(body=body)):
        if message.HasField("head"):
            await _head(send, message.head.status_code, message.head.content_type.encode())
        else:
            await send({"type": "http.response.body", "body": message.data, "more_body": True})
    await send({"type": "http.response.body"})


async def _head(send: Send, status: int, content_type: bytes) -> None:
    await send(
        {"type": "http.response.start", "status": status, "headers": [(b"content-type", content_type)]}
    )
