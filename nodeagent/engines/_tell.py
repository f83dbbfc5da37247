"""Telling an engine something that is no generation, and hearing what it says to that."""

from __future__ import annotations

import asyncio

from nodeagent.engines._openai_relay import Answer
from rung.errors import EngineTimeoutError
from rung.service import EngineClient


async def tell(
    client: EngineClient, base_url: str, path: str, body: bytes, *, what: str, timeout_s: float
) -> Answer:
    """POST a JSON body and read the answer to its end; `timeout_s` bounds all of it.

    Raises:
        EngineUnreachableError, EngineTimeoutError, EngineProtocolError: as the engine client does.
    """
    url = base_url.rstrip("/") + path
    try:
        async with asyncio.timeout(timeout_s):
            reply = await client.post(url, body, what=what, idle_timeout_s=timeout_s)
            async with reply:
                return Answer(reply.status, await reply.read())
    except TimeoutError as error:
        raise EngineTimeoutError(f"{what} has not answered {path} within {timeout_s:g} s") from error


async def drop(client: EngineClient, base_url: str, path: str, *, what: str, timeout_s: float) -> Answer:
    """DELETE, and read the answer to its end. As `tell`."""
    reply = await client.delete(base_url.rstrip("/") + path, what=what, timeout_s=timeout_s)
    async with reply:
        return Answer(reply.status, await reply.read())
