"""Following jobs: the stream of a generation, and watching by id."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from types import TracebackType
from typing import TYPE_CHECKING, Self

from rung import codec, v1
from rung._client_calls import Connection, Reconnect
from rung._failure import error_of_failure
from rung.errors import JobCancelledError, RungError, UnavailableError
from rung.types import (
    TERMINAL_EVENTS,
    ChatResult,
    JobCancelled,
    JobDone,
    JobEvent,
    JobFailed,
    Routed,
    Served,
    Terminal,
    TokenDelta,
    ToolCall,
    ToolCallDelta,
    Usage,
    UsageReported,
)

if TYPE_CHECKING:
    from rung._client_calls import AnyCall


class _Answer:
    """What the events of a job add up to. Choices other than the first are left out."""

    def __init__(self) -> None:
        self._text: list[str] = []
        self._reasoning: list[str] = []
        self._calls: dict[int, tuple[str, str, list[str]]] = {}
        self._usage: Usage | None = None
        self._served: Served | None = None

    def add(self, event: JobEvent) -> None:
        match event.payload:
            case TokenDelta(content, reasoning, 0):
                self._text.append(content)
                self._reasoning.append(reasoning)
            case ToolCallDelta(index, call_id, name, arguments, 0):
                before_id, before_name, pieces = self._calls.get(index, ("", "", []))
                pieces.append(arguments)
                self._calls[index] = (call_id or before_id, name or before_name, pieces)
            case Routed(served):
                self._served = served
            case UsageReported(usage):
                self._usage = usage
            case _:
                pass

    def result(self, job_id: str, finish_reason: str, served: Served | None) -> ChatResult:
        return ChatResult(
            job_id=job_id,
            text="".join(self._text),
            reasoning="".join(self._reasoning),
            tool_calls=tuple(
                ToolCall(id=call_id, name=name, arguments="".join(pieces))
                for _, (call_id, name, pieces) in sorted(self._calls.items())
            ),
            usage=self._usage,
            served=served or self._served,
            finish_reason=finish_reason,
        )


class EventStream:
    """The events of one job, as they come.

    The request is sent when the stream is first read. Read it once: by `async for` or by `result`; the
    latter also works after a part was read by `async for`. Leave it early through `aclose` (or `async
    with`), which cancels the job unless its policy says `detached`.

    A lost connection is an `UnavailableError`, except for a detached job, which is followed again
    from where its stream broke.

    Raises, while it is read:
        UnknownModelError, QueueFullError, NoTargetError: the job was not accepted.
        RequestTooLargeError: the request is larger than the server takes.
        UnavailableError: no connection.
        JobCancelledError: the client was closed.
    """

    def __init__(self, connection: Connection, request: v1.GenerateRequest) -> None:
        self._connection = connection
        self._call: AnyCall | None = None
        self._closed = False
        self._reading = False
        self._job_id = ""
        self._last_sequence = 0
        self._end: Terminal | None = None
        self._detached = request.policy.detached
        self._events = self._follow(request)

    @property
    def job_id(self) -> str:
        """Id of the job; empty before its first event."""
        return self._job_id

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> JobEvent:
        if self._closed:
            raise StopAsyncIteration
        self._reading = True
        try:
            event = await anext(self._events)
        except RungError:
            if self._closed:
                raise StopAsyncIteration from None
            raise
        finally:
            self._reading = False
        if isinstance(event.payload, TERMINAL_EVENTS):
            self._end = event.payload
        self._take(event)
        return event

    def _take(self, event: JobEvent) -> None:
        """Note what an event adds to the result."""

    async def _finish(self) -> JobDone:
        """Read to the end.

        Raises:
            JobCancelledError: the job was cancelled, or this stream closed.
            RungError: the job failed, by the reason of its last event; or as the stream itself.
        """
        async for _ in self:
            pass
        match self._end:
            case JobDone() as done:
                return done
            case JobFailed() as failed:
                raise error_of_failure(failed)
            case JobCancelled(by):
                raise JobCancelledError(f"the job was cancelled by {by}", by=by)
            case None:
                raise JobCancelledError("the stream was closed before the job ended")

    async def aclose(self) -> None:
        """Stop reading, from any task. Cancels the job unless it is detached."""
        self._closed = True
        if self._call is not None:
            self._call.cancel()
        if not self._reading:
            await self._events.aclose()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.aclose()

    async def _follow(self, request: v1.GenerateRequest) -> AsyncGenerator[JobEvent, None]:
        try:
            responses = self._connection.stream(
                self._connection.stubs.inference.Generate, request, on_call=self._called
            )
            async with aclosing(responses):
                async for response in responses:
                    event = codec.job_event_from_proto(response.event)
                    if event is None:
                        continue
                    self._job_id = event.job_id
                    self._last_sequence = event.sequence or self._last_sequence
                    yield event
                    if isinstance(event.payload, TERMINAL_EVENTS):
                        return
            raise UnavailableError("the stream of the job ended before its last event")
        except UnavailableError as lost:
            if not self._detached or not self._job_id:
                raise
            reconnect = Reconnect(self._connection.reconnect_s, was_connected=True)
            await reconnect.pause(lost)
        resumed = watch_events(
            self._connection, self._job_id, self._last_sequence, reconnect=reconnect, on_call=self._called
        )
        async with aclosing(resumed):
            async for event in resumed:
                yield event

    def _called(self, call: AnyCall) -> None:
        self._call = call
        if self._closed:
            call.cancel()


class JobStream(EventStream):
    """The events of an answer to a conversation, as they come; see `EventStream`."""

    def __init__(self, connection: Connection, request: v1.GenerateRequest) -> None:
        super().__init__(connection, request)
        self._answer = _Answer()

    async def text(self) -> str:
        """The text of the whole answer. Raises as `result`."""
        return (await self.result()).text

    async def result(self) -> ChatResult:
        """Read to the end.

        Raises:
            JobCancelledError: the job was cancelled, or this stream closed.
            RungError: the job failed, by the reason of its last event; or as the stream itself.
        """
        done = await self._finish()
        return self._answer.result(self._job_id, done.finish_reason, done.served)

    def _take(self, event: JobEvent) -> None:
        self._answer.add(event)


async def watch_events(
    connection: Connection,
    job_id: str,
    after_sequence: int,
    *,
    heartbeats: bool = False,
    artifact_data: bool = True,
    reconnect: Reconnect | None = None,
    on_call: Callable[[AnyCall], None] | None = None,
) -> AsyncGenerator[JobEvent, None]:
    """The events of a job after a sequence, through lost connections, to the terminal one."""
    reconnect = reconnect or Reconnect(connection.reconnect_s)
    while True:
        request = v1.WatchJobRequest(
            job_id=job_id, after_sequence=after_sequence, without_artifact_data=not artifact_data
        )
        try:
            responses = connection.stream(connection.stubs.inference.WatchJob, request, on_call=on_call)
            async with aclosing(responses):
                async for response in responses:
                    reconnect.connected()
                    event = codec.job_event_from_proto(response.event)
                    if event is None:
                        continue
                    if event.sequence == 0:
                        if heartbeats:
                            yield event
                    elif event.sequence > after_sequence:
                        after_sequence = event.sequence
                        yield event
                        if isinstance(event.payload, TERMINAL_EVENTS):
                            return
            raise UnavailableError(f"the stream of job {job_id} ended before its last event")
        except UnavailableError as lost:
            await reconnect.pause(lost)
