"""What the Docker Engine streams, for the event loop: left at any moment, and ended when it is left."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncGenerator, Callable, Iterator
from contextlib import suppress
from typing import Any, Generic, TypeVar

import docker
import docker.errors
from docker.types import CancellableStream
from msgspec import Struct
from requests import Response  # noqa: TID251 - what the Docker SDK reads

T = TypeVar("T")

#: Pieces that wait for their reader; a slow one slows the daemon, and nothing piles up.
_QUEUED_PIECES = 256


async def read_stream(
    connect: Callable[[], docker.DockerClient], read: Callable[[docker.DockerClient], Iterator[T]]
) -> AsyncGenerator[T, None]:
    """What a blocking iterator gives, read in a thread of its own.

    Leaving (by `aclose`, or cancelled while waiting) ends the request, and with it what the daemon
    does for it: a pull goes no further.

    Args:
        connect: gives a client that nobody else uses. Called in the thread, which closes the client.
        read: makes the iterator. Called in the thread.

    Raises:
        Exception: whatever `connect`, `read` or the iterator raises.
    """
    reader = _Reader(connect, read)
    # Not in a pool: it may have to wait for as long as an engine runs. A daemon thread, since one
    # that waits for an engine must not hold up the end of the agent.
    threading.Thread(target=reader.run, name="docker-stream", daemon=True).start()
    try:
        while not isinstance(found := await reader.next(), _End):
            yield found.value
        if found.error is not None:
            raise found.error
    finally:
        reader.leave()


class _Piece(Struct, Generic[T], frozen=True):
    value: T


class _End(Struct, frozen=True):
    error: Exception | None


class _Reader(Generic[T]):
    """The thread's side: `run` is the thread, the rest is for the event loop it was made in."""

    def __init__(
        self,
        connect: Callable[[], docker.DockerClient],
        read: Callable[[docker.DockerClient], Iterator[T]],
    ) -> None:
        self._connect = connect
        self._read = read
        self._loop = asyncio.get_running_loop()
        self._queue: asyncio.Queue[_Piece[T] | _End] = asyncio.Queue()
        self._room = threading.Semaphore(_QUEUED_PIECES)
        self._left = threading.Event()
        self._responses: list[Response] = []

    async def next(self) -> _Piece[T] | _End:
        found = await self._queue.get()
        self._room.release()
        return found

    def leave(self) -> None:
        """End the thread, wherever it waits. A request that has no answer yet ends with its first byte."""
        self._left.set()
        self._room.release()
        for response in self._responses:
            _shut(response)

    def run(self) -> None:
        error: Exception | None = None
        try:
            client = self._connect()
            client.api.hooks["response"].append(self._on_response)
            try:
                for value in self._read(client):
                    self._put(_Piece(value))
                    if self._left.is_set():
                        break
            finally:
                for response in self._responses:
                    response.close()
                client.close()
        except Exception as failure:  # noqa: BLE001 - its reader gets it, and would wait for ever without
            error = failure
        self._put(_End(error))

    def _put(self, found: _Piece[T] | _End) -> None:
        self._room.acquire()
        if not self._left.is_set():
            # The loop may be closed: nobody reads any more.
            with suppress(RuntimeError):
                self._loop.call_soon_threadsafe(self._queue.put_nowait, found)

    def _on_response(self, response: Response, *_: Any, **__: Any) -> None:
        self._responses.append(response)
        if self._left.is_set():
            _shut(response)


def _shut(response: Response) -> None:
    """Wake the thread that reads a response: it finds the end of it."""
    # One that is read to its end has no socket any more; one through SSH cannot be woken.
    with suppress(OSError, AttributeError, docker.errors.DockerException):
        CancellableStream(iter(()), response).close()
