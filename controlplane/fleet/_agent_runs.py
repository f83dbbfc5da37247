"""Generations through an agent: many over one `Run` stream, each with an answer of its own."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from types import TracebackType
from typing import TYPE_CHECKING, Any, TypeAlias

import grpc.aio

from rung import v1
from rung.codec import RUN_MESSAGE_BYTES, RUN_WINDOW_BYTES, run_error_from_proto
from rung.errors import EngineProtocolError, EngineTimeoutError, NodeUnreachableError, RungError

if TYPE_CHECKING:
    RunCall: TypeAlias = grpc.aio.StreamStreamCall[v1.RunRequest, v1.RunResponse]

#: The agent enforces the idle timeout of a generation; this long after it the agent itself is given up.
AGENT_MARGIN_S = 10.0
#: The agent is told of what was taken in portions of so much.
_CREDIT_BYTES = RUN_WINDOW_BYTES // 2


class RunStream:
    """One `Run` call to an agent, and the generations that it carries, until it breaks or is closed.

    Args:
        node_id: of the agent, for messages.
        call: it, just opened.
        error: what its failure means.
        left: called whenever somebody has left a generation.
        lasts: whether it stays open after the first generation.
    """

    def __init__(
        self,
        node_id: str,
        call: RunCall,
        *,
        error: Callable[[grpc.aio.AioRpcError], RungError],
        left: Callable[[], None],
        lasts: bool,
    ) -> None:
        self.node_id = node_id
        self.is_open = True
        self._call: Any = call
        self._error = error
        self._left = left
        self._lasts = lasts
        self._runs: dict[int, AgentRun] = {}
        self._last_id = 0
        self._instructions: list[v1.RunInstruction] = []
        self._instructed = asyncio.Event()
        self._tasks = (
            asyncio.create_task(self._read(), name=f"run-events-{node_id}"),
            asyncio.create_task(self._write(), name=f"run-instructions-{node_id}"),
        )

    def begin(self, run: AgentRun, begin: v1.RunBegin) -> int:
        """Begin a generation; returns its number. What comes of it goes to `run`."""
        self._last_id += 1
        self._runs[self._last_id] = run
        self._instruct(v1.RunInstruction(run_id=self._last_id, begin=begin))
        return self._last_id

    def taken(self, run_id: int, size_bytes: int) -> None:
        """So much of an answer has found its reader: as much more may come."""
        self._instruct(v1.RunInstruction(run_id=run_id, credit_bytes=size_bytes))

    def leave(self, run_id: int, *, complete: bool) -> None:
        """Nobody wants to hear of a generation any more; one that is not complete is cancelled."""
        if self._runs.pop(run_id, None) is not None and not complete:
            self._instruct(v1.RunInstruction(run_id=run_id, cancel=v1.RunCancel()))
        if not self._lasts:
            self.close()
        self._left()

    def close(self) -> None:
        """End the call, and with it all generations."""
        self.is_open = False
        self._call.cancel()
        for task in self._tasks:
            task.cancel()

    async def aclose(self) -> None:
        """As `close`; returns once nothing of it is left."""
        self.close()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def _instruct(self, instruction: v1.RunInstruction) -> None:
        self._instructions.append(instruction)
        self._instructed.set()

    async def _write(self) -> None:
        """Send instructions; those that come while a message is on its way go together."""
        try:
            while True:
                await self._instructed.wait()
                self._instructed.clear()
                while self._instructions:
                    await self._call.write(_request(self._instructions))
        except (grpc.aio.AioRpcError, asyncio.InvalidStateError):
            # The call is over; whoever reads finds out why.
            return

    async def _read(self) -> None:
        # What it is if this task is cancelled, which it is with the channel.
        broken: RungError = NodeUnreachableError(
            f"the channel to {self.node_id} was closed", node=self.node_id
        )
        try:
            async for response in self._call:
                for event in response.events:
                    run = self._runs.get(event.run_id)
                    if run is not None:
                        run.heard(event)
            broken = NodeUnreachableError(
                f"the agent of {self.node_id} takes no more generations", node=self.node_id
            )
        except grpc.aio.AioRpcError as failure:
            broken = self._error(failure)
        finally:
            self.close()
            for run in self._runs.values():
                # Each its own: an error is changed by being raised.
                run.broke(type(broken)(broken.message, **broken.metadata))
            self._runs.clear()


class AgentRun:
    """A generation through the agent, in the shape of `rung.service.EngineReply`.

    Enter it to send the request: `status`, `content_type` and `retry_after` are there then. Leaving
    it before the end of the body cancels the generation in the engine.

    Args:
        open_stream: gives a stream to the agent.
        begin: what to begin.
        idle_timeout_s: longest silence of the engine.

    Raises, when it is entered:
        NotAwakeError, UnknownDeploymentError, EngineUnreachableError: as the agent says.
        NodeUnreachableError: the agent does not answer.
        EngineTimeoutError: no head within the idle timeout.
    """

    __slots__ = (
        "_begin",
        "_complete",
        "_data",
        "_deployment_id",
        "_failure",
        "_idle_s",
        "_last_s",
        "_loop",
        "_open_stream",
        "_run_id",
        "_stream",
        "_uncredited_bytes",
        "_waiter",
        "_watchdog",
        "content_type",
        "retry_after",
        "status",
    )

    def __init__(
        self,
        open_stream: Callable[[], RunStream],
        begin: v1.RunBegin,
        idle_timeout_s: float,
    ) -> None:
        self._open_stream = open_stream
        self._begin = begin
        self._deployment_id = begin.deployment_id
        self._idle_s = idle_timeout_s + AGENT_MARGIN_S
        self._stream: RunStream | None = None
        self._run_id = 0
        self._data: list[bytes] = []
        self._uncredited_bytes = 0
        self._complete = False
        self._failure: RungError | None = None
        self._waiter: asyncio.Future[None] | None = None
        self._watchdog: asyncio.TimerHandle | None = None
        self.status = 0
        self.content_type = ""
        self.retry_after = ""

    async def __aenter__(self) -> AgentRun:
        self._loop = asyncio.get_running_loop()
        self._stream = self._open_stream()
        self._last_s = self._loop.time()
        self._watchdog = self._loop.call_later(self._idle_s, self._look)
        self._run_id = self._stream.begin(self, self._begin)
        try:
            while not self.content_type:
                if self._failure is not None:
                    raise self._failure
                if self._complete:
                    raise EngineProtocolError(
                        f"the agent of {self._stream.node_id} ended the answer of {self._deployment_id} "
                        "before its head",
                        engine=self._deployment_id,
                    )
                await self._event()
        except BaseException:
            self._end()
            raise
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._end()

    async def chunks(self, interval_s: Callable[[], float] | None = None) -> AsyncIterator[bytes]:
        """The body, piece by piece, as it comes: the agent sees to it that these are not too many.

        Raises:
            EngineTimeoutError: nothing came for the idle timeout.
            EngineProtocolError: the engine's answer broke or was not understood.
            EngineUnreachableError: the engine is gone.
            NodeUnreachableError: the agent is gone.
        """
        while True:
            if self._data:
                yield self._take()
            elif self._failure is not None:
                raise self._failure
            elif self._complete:
                return
            else:
                await self._event()

    async def read(self) -> bytes:
        """The whole body. Raises as `chunks`."""
        return b"".join([chunk async for chunk in self.chunks()])

    def heard(self, event: v1.RunEvent) -> None:
        """Take what the agent says. Called by the stream."""
        self._last_s = self._loop.time()
        kind = event.WhichOneof("event")
        if kind == "data":
            self._data.append(event.data)
        elif kind == "head":
            head = event.head
            self.status = head.status_code
            self.content_type = head.content_type or "application/json"
            self.retry_after = head.retry_after
        elif kind == "end":
            self._complete = True
        elif kind == "error":
            self._failure = run_error_from_proto(event.error)
        self._wake()

    def broke(self, error: RungError) -> None:
        """Nothing more comes. Called by the stream."""
        if not self._complete and self._failure is None:
            self._failure = error
        self._wake()

    def _take(self) -> bytes:
        data = self._data[0] if len(self._data) == 1 else b"".join(self._data)
        self._data.clear()
        self._uncredited_bytes += len(data)
        if self._uncredited_bytes >= _CREDIT_BYTES and self._stream is not None and not self._complete:
            self._stream.taken(self._run_id, self._uncredited_bytes)
            self._uncredited_bytes = 0
        return data

    async def _event(self) -> None:
        self._waiter = self._loop.create_future()
        try:
            await self._waiter
        finally:
            self._waiter = None

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    def _look(self) -> None:
        # Looks at the time of the last event now and then, so that an event costs no timer.
        now_s = self._loop.time()
        if self._data:
            # It waits for its reader.
            self._last_s = now_s
        left_s = self._last_s + self._idle_s - now_s
        if left_s > 0:
            self._watchdog = self._loop.call_later(left_s, self._look)
            return
        node = self._stream.node_id if self._stream is not None else "the node"
        self.broke(
            EngineTimeoutError(
                f"{self._deployment_id} on {node} said nothing for {self._idle_s:g} s",
                engine=self._deployment_id,
            )
        )

    def _end(self) -> None:
        stream, self._stream = self._stream, None
        if stream is None:
            return
        if self._watchdog is not None:
            self._watchdog.cancel()
        stream.leave(self._run_id, complete=self._complete)


def _request(instructions: list[v1.RunInstruction]) -> v1.RunRequest:
    """A message of the first of them, which are taken from the list."""
    count = size_bytes = 0
    for instruction in instructions:
        size_bytes += len(instruction.begin.body)
        if count and size_bytes > RUN_MESSAGE_BYTES:
            break
        count += 1
    request = v1.RunRequest(instructions=instructions[:count])
    del instructions[:count]
    return request
