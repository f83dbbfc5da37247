"""What the agent asks of an engine adapter: the dialect of one kind of engine.

An adapter knows command lines, health and the shape of requests; it runs no process.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import AbstractAsyncContextManager
from enum import StrEnum
from typing import Protocol

from msgspec import Struct

from rung.types import DeploymentSpec


class RunKind(StrEnum):
    """Which of OpenAI's routes a generation uses. A closed set: no request chooses a path."""

    CHAT_COMPLETIONS = "chat_completions"
    COMPLETIONS = "completions"
    EMBEDDINGS = "embeddings"


class EngineHealth(StrEnum):
    """What a probe found."""

    #: Nothing listens.
    ABSENT = "absent"
    #: It listens and is loading.
    LOADING = "loading"
    #: It answers requests.
    READY = "ready"
    #: It listens and is not well.
    UNWELL = "unwell"


class Probe(Struct, frozen=True, kw_only=True):
    """The outcome of a probe. `models` are the names that the engine serves, if it tells."""

    health: EngineHealth
    detail: str = ""
    models: tuple[str, ...] = ()
    context_tokens: int = 0


class LoadProgress(Struct, frozen=True):
    """How far loading is, read off a line of output. `percent` is 0 to 100, None if not known."""

    detail: str
    percent: float | None = None


class CommandLine(Struct, frozen=True, kw_only=True):
    """Arguments after the executable, and environment, of an engine."""

    arguments: tuple[str, ...]
    environment: dict[str, str] = {}


class EngineStream(Protocol):
    """An engine's answer in the shape of OpenAI's routes: head at once, body as it comes."""

    status: int
    content_type: str
    retry_after: str

    def chunks(self) -> AsyncIterator[bytes]:
        """The body. Raises EngineTimeoutError and EngineProtocolError."""
        ...


class EngineAdapter(Protocol):
    """Speaks the dialect of one kind of engine."""

    def command_line(self, spec: DeploymentSpec, *, listen_host: str, listen_port: int) -> CommandLine:
        """How to start the engine so that it listens there.

        Raises:
            InvalidRequestError: the spec cannot be served by this kind of engine.
        """
        ...

    async def probe(self, base_url: str, spec: DeploymentSpec) -> Probe:
        """Ask the engine how it is. Never raises; takes 2 s at most."""
        ...

    def load_progress(self, line: str) -> LoadProgress | None:
        """What a line of the engine's output says about loading, or None."""
        ...

    def run(
        self, base_url: str, spec: DeploymentSpec, kind: RunKind, body: bytes, *, idle_timeout_s: float
    ) -> AbstractAsyncContextManager[EngineStream]:
        """Carry one generation to the engine. Leaving the context early cancels it in the engine.

        Raises:
            EngineUnreachableError, EngineTimeoutError: as the engine client does.
            InvalidRequestError: this kind of engine has no such route.
        """
        ...
