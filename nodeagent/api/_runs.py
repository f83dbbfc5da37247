"""The generations of one `Run` call: each a task of its own, all over one stream of messages."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextlib import aclosing
from typing import Any, TypeAlias

from nodeagent.api._drain import Drain
from rung import v1
from rung.codec import RUN_MESSAGE_BYTES, RUN_WINDOW_BYTES, run_error_to_proto
from rung.errors import InvalidRequestError
from rung.service import refusal_of

#: Carries out one generation: the head of its answer, then the bytes of the body.
Generate: TypeAlias = Callable[[v1.RunBegin], AsyncGenerator[v1.RunHead | bytes, None]]


class _Run:
    """One generation, and what is to be sent of it."""

    __slots__ = ("credited", "data", "head", "last", "run_id", "task", "window_bytes")
    task: asyncio.Task[None]

    def __init__(self, run_id: int) -> None:
        self.run_id = run_id
        self.head: v1.RunHead | None = None
        self.data: list[bytes] = []
        self.last: v1.RunEvent | None = None
        self.window_bytes = RUN_WINDOW_BYTES
        self.credited = asyncio.Event()


class Runs:
    """Carries out what one caller wants of its generations, and says what comes of them.

    While a message is on its way, and for a pause after it, what the generations give is collected, so that
    many of them cost few messages. One whose caller takes nothing waits at the end of its window; the
    others go on.

    Args:
        generate: carries out one generation; closed when its caller cancels it.
        pause_s: least time between two messages, asked for after each.
        drain: says whether generations are begun, and when there are to be no more.
    """

    def __init__(self, generate: Generate, *, pause_s: Callable[[], float], drain: Drain) -> None:
        self._generate = generate
        self._pause_s = pause_s
        self._drain = drain
        self._runs: dict[int, _Run] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._last_id = 0
        #: Generations of which there is something to send, the one that waited longest first.
        self._unsent: dict[int, _Run] = {}
        self._changed = asyncio.Event()

    async def responses(self, requests: AsyncIterator[v1.RunRequest]) -> AsyncIterator[v1.RunResponse]:
        """What happens, until the caller asks for nothing more and has everything. Leaving cancels all.

        Once the drain is over it ends when it has said all: callers leave it open for what they ask later.

        Raises:
            InvalidRequestError: an instruction that cannot be understood.
        """
        reading = asyncio.create_task(self._read(requests), name="run-instructions")
        draining = asyncio.create_task(self._drain.over.wait(), name="run-drain")
        for waiting in (reading, draining):
            waiting.add_done_callback(lambda _: self._changed.set())
        try:
            while True:
                if self._unsent:
                    yield self._take()
                    if pause_s := self._pause_s():
                        await asyncio.sleep(pause_s)
                    continue
                if reading.done():
                    reading.result()
                if not self._runs and (reading.done() or draining.done()):
                    return
                self._changed.clear()
                await self._changed.wait()
        finally:
            ending: tuple[asyncio.Task[Any], ...] = (reading, draining, *self._tasks)
            for task in ending:
                task.cancel()
            await asyncio.gather(*ending, return_exceptions=True)

    async def _read(self, requests: AsyncIterator[v1.RunRequest]) -> None:
        async for request in requests:
            for instruction in request.instructions:
                self._instructed(instruction)

    def _instructed(self, instruction: v1.RunInstruction) -> None:
        run_id = instruction.run_id
        kind = instruction.WhichOneof("instruction")
        if kind == "begin":
            if run_id <= self._last_id:
                raise InvalidRequestError(f"run {run_id} does not come after run {self._last_id}")
            self._last_id = run_id
            self._begin(_Run(run_id), instruction.begin)
            return
        run = self._runs.get(run_id)
        if kind is None or run_id > self._last_id:
            raise InvalidRequestError(f"run {run_id} has an instruction that this version does not know")
        if run is None:
            # It has ended; its caller did not know yet.
            return
        if kind == "credit_bytes":
            run.window_bytes += instruction.credit_bytes
            run.credited.set()
        else:
            del self._runs[run_id]
            self._unsent.pop(run_id, None)
            run.task.cancel()

    def _begin(self, run: _Run, begin: v1.RunBegin) -> None:
        self._runs[run.run_id] = run
        run.task = asyncio.create_task(self._carry_out(run, begin), name=f"run-{begin.job_id}")
        self._tasks.add(run.task)
        run.task.add_done_callback(self._tasks.discard)

    async def _carry_out(self, run: _Run, begin: v1.RunBegin) -> None:
        try:
            async with self._drain.generation(), aclosing(self._generate(begin)) as answer:
                async for piece in answer:
                    if isinstance(piece, bytes):
                        await self._send(run, piece)
                    else:
                        run.head = piece
                        self._tell(run)
            run.last = v1.RunEvent(run_id=run.run_id, end=v1.RunEnd())
        except Exception as error:  # noqa: BLE001 - the boundary: whatever it is becomes an error of this run
            refusal = refusal_of(error, "Run")
            run.last = v1.RunEvent(run_id=run.run_id, error=run_error_to_proto(refusal))
        self._tell(run)
        self._runs.pop(run.run_id, None)

    async def _send(self, run: _Run, data: bytes) -> None:
        """Have bytes sent, as many as the caller has room for; the rest waits for it."""
        while len(data) > run.window_bytes:
            if run.window_bytes:
                run.data.append(data[: run.window_bytes])
                data = data[run.window_bytes :]
                run.window_bytes = 0
                self._tell(run)
            run.credited.clear()
            await run.credited.wait()
        run.data.append(data)
        run.window_bytes -= len(data)
        self._tell(run)

    def _tell(self, run: _Run) -> None:
        # One that was cancelled has nothing more to say.
        if run.run_id in self._runs:
            self._unsent[run.run_id] = run
            self._changed.set()

    def _take(self) -> v1.RunResponse:
        """A message of what is there; that of one generation more than its size, at most."""
        response = v1.RunResponse()
        size_bytes = 0
        while self._unsent and size_bytes < RUN_MESSAGE_BYTES:
            run_id = next(iter(self._unsent))
            run = self._unsent.pop(run_id)
            if run.head is not None:
                response.events.add(run_id=run_id, head=run.head)
                run.head = None
            if run.data:
                data = run.data[0] if len(run.data) == 1 else b"".join(run.data)
                response.events.add(run_id=run_id, data=data)
                size_bytes += len(data)
                run.data.clear()
            if run.last is not None:
                response.events.append(run.last)
        return response
