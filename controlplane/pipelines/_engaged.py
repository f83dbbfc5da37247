"""An engine that answers, and what those who engage one are told."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from types import TracebackType
from typing import Protocol

from rung.errors import EngineProtocolError
from rung.types import Phase, Served

#: Takes bytes of a stream for the caller. Raises ConnectionError once the caller has gone.
OnBytes = Callable[[bytes], Awaitable[None]]
#: Called when there is progress while an engine is made awake or a slot is waited for: the job knows which.
OnWait = Callable[[], Awaitable[None]]


class EngagedJob(Protocol):
    """What is told of each step."""

    id: str
    model: str

    def progress(
        self,
        phase: Phase,
        detail: str = "",
        *,
        percent: float | None = None,
        remaining_s: float | None = None,
    ) -> None:
        """A phase began, or moved on."""
        ...

    def begin_generating(self, served: Served) -> None:
        """Who answers is known."""
        ...

    def spent(self, cost_usd: float) -> None:
        """A cloud model took so many US dollars."""
        ...


class Reply(Protocol):
    """An engine's answer, straight from the engine or through its agent."""

    status: int
    content_type: str
    retry_after: str

    def chunks(self, interval_s: Callable[[], float] | None = None) -> AsyncIterator[bytes]:
        """The body as it comes, with no less than `interval_s()` between two pieces."""
        ...

    async def read(self) -> bytes:
        """The whole body."""
        ...

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Let go; before the end of the body this cancels the generation in the engine."""
        ...


class PaidReply(Reply, Protocol):
    """The answer of a cloud model. `cost_usd` is known once it was left."""

    cost_usd: float


class CloudPort(Protocol):
    """What opens the answers of cloud models."""

    def model_name(self, target_id: str) -> str:
        """The provider's own name of a model."""
        ...

    async def open(self, target_id: str, body: bytes, *, stream: bool, idle_timeout_s: float) -> PaidReply:
        """Send a chat request in OpenAI's shape; its answer comes in that shape, whoever gives it.

        Raises:
            EngineRejectedError: the request is at fault.
            UnavailableError, EngineTimeoutError: the provider is.
        """
        ...


class Engaged:
    """An engine that answers, on a slot of ours; leaving the context lets go of both.

    A class and not a generator: this is on the path of every request.
    """

    __slots__ = ("_ended", "_release", "reply", "target")

    def __init__(
        self,
        target: str,
        reply: Reply,
        release: Callable[[str], None] | None,
        ended: Callable[[str, BaseException | None], None],
    ) -> None:
        self.target = target
        self.reply = reply
        self._release = release
        self._ended = ended

    def check_stream(self) -> None:
        """Raises EngineProtocolError if the answer is no stream."""
        content_type = self.reply.content_type
        if not content_type.startswith("text/event-stream"):
            raise EngineProtocolError(
                f"{self.target} answered a stream with {content_type or 'no content type'}",
                engine=self.target,
            )

    async def __aenter__(self) -> Engaged:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            await self.reply.__aexit__(None, None, None)
        finally:
            if self._release is not None:
                self._release(self.target)
            self._ended(self.target, error)
