"""A caller that notes what it hears and when, for handlers that are called without a network."""

from __future__ import annotations

import asyncio
import json
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any
from unittest.mock import Mock

import aiohttp
from aiohttp import web
from aiohttp.abc import AbstractStreamWriter
from aiohttp.test_utils import make_mocked_request
from multidict import CIMultiDict


@dataclass
class Heard(AbstractStreamWriter):
    """What a caller hears, and when by the clock of the loop."""

    began_s: float = field(default_factory=lambda: asyncio.get_running_loop().time())
    told: list[tuple[float, bytes]] = field(default_factory=list)
    #: Those of the answer, once it has begun.
    headers: CIMultiDict[str] | None = None
    #: How long the head takes to be sent.
    head_takes_s: float = 0.0
    #: While it is clear, the caller takes nothing: a write waits, once what it writes is held for the caller.
    takes: asyncio.Event = field(default_factory=asyncio.Event)
    #: The caller has gone, which is noticed by writing to it.
    has_gone: bool = False

    def __post_init__(self) -> None:
        self.takes.set()

    async def write(self, chunk: bytes | bytearray | memoryview) -> None:
        if self.has_gone:
            raise aiohttp.ClientConnectionResetError("Cannot write to closing transport")
        assert self.headers is not None, "the body comes after the head"
        self.told.append((asyncio.get_running_loop().time(), bytes(chunk)))
        await self.takes.wait()

    async def write_eof(self, chunk: bytes = b"") -> None:
        if chunk:
            await self.write(chunk)

    async def drain(self) -> None:
        pass

    def enable_compression(self, encoding: str = "deflate", strategy: int | None = None) -> None:
        raise AssertionError("what is compressed waits for more")

    def enable_chunking(self) -> None:
        pass

    async def write_headers(self, status_line: str, headers: CIMultiDict[str]) -> None:
        assert "200" in status_line
        assert self.headers is None, "there is one head"
        if self.head_takes_s:
            await asyncio.sleep(self.head_takes_s)
        self.headers = headers

    @property
    def gaps_s(self) -> list[float]:
        """How long it was silent each time, from the request on."""
        return [after - before for before, after in pairwise([self.began_s, *(at for at, _ in self.told)])]

    @property
    def lines(self) -> list[dict[str, Any]]:
        """What was told, as JSON, whichever the route."""
        texts = [line for _, chunk in self.told for line in chunk.decode().splitlines() if "{" in line]
        return [json.loads(text[text.index("{") :]) for text in texts]


class _Transport(asyncio.Transport):
    """Holds what its caller does not take."""

    def __init__(self, heard: Heard) -> None:
        super().__init__()
        self._heard = heard

    def get_write_buffer_size(self) -> int:
        return 0 if self._heard.takes.is_set() else 1

    def set_write_buffer_limits(self, high: int | None = None, low: int | None = None) -> None:
        pass


def request_with(
    heard: Heard, body: bytes, headers: dict[str, str], match_info: dict[str, str] | None = None
) -> web.Request:
    """A request of such a caller."""
    payload = aiohttp.StreamReader(Mock(_reading_paused=False), 2**16, loop=asyncio.get_running_loop())
    payload.feed_data(body)
    payload.feed_eof()
    return make_mocked_request(
        "POST",
        "/",
        headers=headers,
        payload=payload,
        writer=heard,
        transport=_Transport(heard),
        match_info=match_info or {},
        app=web.Application(),
    )
