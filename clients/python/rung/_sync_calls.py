"""What a blocking client stands on: an event loop in a thread of its own, and streams read through it."""

from __future__ import annotations

import asyncio
import concurrent.futures
import threading
from collections.abc import AsyncGenerator, AsyncIterator, Coroutine, Iterator
from types import TracebackType
from typing import Any, Generic, Protocol, Self, TypeVar

from rung._client_generation import GenerationStream
from rung._client_jobs import EventStream, JobStream
from rung._result import GenerationResult
from rung.errors import JobCancelledError
from rung.types import ChatResult, JobEvent

T = TypeVar("T")
S = TypeVar("S", bound=EventStream)


class _Ended:
    """What a stream gives after its last item."""


_ENDED = _Ended()


async def _next(source: AsyncIterator[T]) -> T | _Ended:
    return await anext(source, _ENDED)


def _unless_ended(item: T | _Ended) -> T:
    if isinstance(item, _Ended):
        raise StopIteration
    return item


class Closing(Protocol):
    """A client that can be closed."""

    async def aclose(self) -> None:
        """Close it."""
        ...


class LoopThread:
    """An event loop in a daemon thread. gRPC's objects are made and used in that loop only."""

    def __init__(self) -> None:
        self._loop = asyncio.new_event_loop()
        self._lock = threading.Lock()
        self._stopped = False
        self._thread = threading.Thread(target=self._serve, name="rung-client", daemon=True)
        self._thread.start()

    def _serve(self) -> None:
        asyncio.set_event_loop(self._loop)
        try:
            self._loop.run_forever()
        finally:
            asyncio.set_event_loop(None)
            self._loop.close()

    def run(self, coroutine: Coroutine[Any, Any, T]) -> T:
        """Run in the loop and wait. An interrupt of the waiting thread cancels the coroutine."""
        with self._lock:
            if self._stopped:
                coroutine.close()
                raise JobCancelledError("this client is closed")
            future = asyncio.run_coroutine_threadsafe(coroutine, self._loop)
        try:
            return future.result()
        except concurrent.futures.CancelledError:
            raise JobCancelledError("this client was closed") from None
        except BaseException:
            future.cancel()
            raise

    def stop(self, client: Closing) -> None:
        """Close the client, cancel what still waits, end the thread. Again does nothing."""
        with self._lock:
            if self._stopped:
                return
            self._stopped = True
            if threading.current_thread() is self._thread:
                # A collected client, found by the garbage collector in our own thread: waiting
                # for the loop here would be for ever. The channel goes with its last reference.
                self._loop.stop()
                return
            future = asyncio.run_coroutine_threadsafe(self._finish(client), self._loop)
        future.result()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()

    async def _finish(self, client: Closing) -> None:
        await client.aclose()
        waiting = asyncio.all_tasks() - {asyncio.current_task()}
        for task in waiting:
            task.cancel()
        await asyncio.gather(*waiting, return_exceptions=True)
        await self._loop.shutdown_asyncgens()


class Stream(Generic[T]):
    """A blocking iterator over a stream. Close it, or use it as a context manager, to leave it early."""

    def __init__(self, thread: LoopThread, source: AsyncGenerator[T, None]) -> None:
        self._thread = thread
        self._source = source

    def __iter__(self) -> Iterator[T]:
        return self

    def __next__(self) -> T:
        return _unless_ended(self._thread.run(_next(self._source)))

    def close(self) -> None:
        """Leave the stream; the server is told."""
        self._thread.run(self._source.aclose())

    def __enter__(self) -> Stream[T]:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class SyncEventStream(Generic[S]):
    """The events of one job; see `EventStream`, of which this is the blocking form."""

    def __init__(self, thread: LoopThread, source: S) -> None:
        self._thread = thread
        self._source = source

    @property
    def job_id(self) -> str:
        """Id of the job; empty before its first event."""
        return self._source.job_id

    def __iter__(self) -> Iterator[JobEvent]:
        return self

    def __next__(self) -> JobEvent:
        return _unless_ended(self._thread.run(_next(self._source)))

    def close(self) -> None:
        """Stop reading, from any thread. Cancels the job unless it is detached."""
        self._thread.run(self._source.aclose())

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class SyncJobStream(SyncEventStream[JobStream]):
    """The events of an answer to a conversation; see `JobStream`."""

    def text(self) -> str:
        """The text of the whole answer. Raises as `result`."""
        return self._thread.run(self._source.text())

    def result(self) -> ChatResult:
        """Read to the end. Raises as `JobStream.result`."""
        return self._thread.run(self._source.result())


class SyncGenerationStream(SyncEventStream[GenerationStream]):
    """The events of a generation; see `GenerationStream`."""

    def result(self) -> GenerationResult:
        """Read to the end. Raises as `GenerationStream.result`."""
        return self._thread.run(self._source.result())
