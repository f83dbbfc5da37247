"""The least that an agent in Python can do: gRPC to the engine and back. `bare_agent PORT ENGINE_URL`."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import AsyncIterator
from typing import Any

import aiohttp
import grpc
import grpc.aio
import uvloop

from rung import v1


def bare_run(channel: grpc.aio.Channel) -> Any:
    """The call that the least agent answers."""
    return channel.unary_stream(
        "/bare.Agent/Run",
        request_serializer=v1.RunBegin.SerializeToString,
        response_deserializer=v1.RunEvent.FromString,
    )


class BareAgent:
    """Relays a Run, and nothing else."""

    def __init__(self, session: aiohttp.ClientSession, engine: str) -> None:
        self._session = session
        self._url = engine + "/v1/chat/completions"

    async def run(self, request: v1.RunBegin, context: Any) -> AsyncIterator[v1.RunEvent]:
        """One generation."""
        headers = {"Content-Type": "application/json"}
        async with self._session.post(self._url, data=request.body, headers=headers) as response:
            content_type = response.headers["Content-Type"]
            yield v1.RunEvent(head=v1.RunHead(status_code=response.status, content_type=content_type))
            async for chunk in response.content.iter_any():
                yield v1.RunEvent(data=chunk)


async def main() -> None:
    """Serve until killed."""
    connector = aiohttp.TCPConnector(limit=0)
    async with aiohttp.ClientSession(connector=connector, auto_decompress=False) as session:
        server = grpc.aio.server()
        handler: Any = grpc.unary_stream_rpc_method_handler(
            BareAgent(session, sys.argv[2]).run,
            v1.RunBegin.FromString,
            v1.RunEvent.SerializeToString,
        )
        server.add_generic_rpc_handlers(
            (grpc.method_handlers_generic_handler("bare.Agent", {"Run": handler}),)
        )
        server.add_insecure_port(f"127.0.0.1:{sys.argv[1]}")
        await server.start()
        await asyncio.Event().wait()


if __name__ == "__main__":
    uvloop.run(main())
