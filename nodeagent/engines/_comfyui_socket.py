"""ComfyUI's WebSocket, joined again whenever it breaks."""

from __future__ import annotations

import asyncio
from contextlib import suppress
from types import TracebackType
from typing import Any, TypeAlias

import aiohttp
import msgspec
from msgspec import Struct

from nodeagent.engines._comfyui_http import ComfyUiHttp

#: What is told first, so that previews say whose they are.
_FEATURES = '{"type":"feature_flags","data":{"supports_preview_metadata":true}}'
#: What is not joined by then is followed without.
_FIRST_TRY_S = 10.0
_BROKEN = (aiohttp.ClientError, OSError, TimeoutError)


class TextEvent(Struct, frozen=True):
    """A text frame."""

    type: str
    data: dict[str, Any] = {}


#: A text frame, or a binary one as it is.
Event: TypeAlias = TextEvent | bytes


class EventStream:
    """What is told to one client id. An async context manager; it never fails, but may have nothing to say.

    ComfyUI tells of a prompt to the id that came with it, so that is the id to join again with: another one
    would hear nothing. If the connection before was not gone yet for ComfyUI, it forgets the new one with
    it, and nothing is told any more; `rejoin` is for that. Nothing is told twice, and what was told
    meanwhile is lost: ask for the history, too.

    Args:
        http: the routes.
        client_id: nobody else's.
        pause_s: before it is joined again.
    """

    def __init__(self, http: ComfyUiHttp, client_id: str, *, pause_s: float) -> None:
        self._http = http
        self._client_id = client_id
        self._pause_s = pause_s
        self._events: asyncio.Queue[Event] = asyncio.Queue()
        self._tried = asyncio.Event()
        self._socket: aiohttp.ClientWebSocketResponse | None = None
        self._task: asyncio.Task[None] | None = None

    async def __aenter__(self) -> EventStream:
        self._task = asyncio.create_task(self._listen())
        try:
            with suppress(TimeoutError):
                async with asyncio.timeout(_FIRST_TRY_S):
                    await self._tried.wait()
        except BaseException:
            self._task.cancel()
            raise
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)

    @property
    def joined(self) -> bool:
        """Whether there is a connection, as far as is known."""
        return self._socket is not None

    async def next(self, timeout_s: float) -> Event | None:
        """The next event; None if there is none for so long."""
        try:
            async with asyncio.timeout(timeout_s):
                return await self._events.get()
        except TimeoutError:
            return None

    async def rejoin(self) -> None:
        """Leave the connection, if there is one; it is joined again."""
        if self._socket is not None:
            await self._socket.close()

    async def _listen(self) -> None:
        while True:
            try:
                async with self._http.socket(self._client_id) as socket:
                    await socket.send_str(_FEATURES)
                    self._socket = socket
                    self._tried.set()
                    await self._take(socket)
            except _BROKEN:
                # The history tells what it does not.
                pass
            finally:
                self._socket = None
                self._tried.set()
            await asyncio.sleep(self._pause_s)

    async def _take(self, socket: aiohttp.ClientWebSocketResponse) -> None:
        async for message in socket:
            if isinstance(message.data, bytes):
                self._events.put_nowait(message.data)
            elif isinstance(message.data, str):
                # Custom nodes may send whatever they like.
                with suppress(msgspec.DecodeError):
                    self._events.put_nowait(msgspec.json.decode(message.data, type=TextEvent))
