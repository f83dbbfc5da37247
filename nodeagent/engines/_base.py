"""What the agent asks of an engine adapter: the dialect of one kind of engine.

An adapter knows command lines, health and the shape of requests; it runs no process.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator, Callable, Mapping
from contextlib import AbstractAsyncContextManager
from enum import StrEnum
from typing import Protocol, runtime_checkable

from msgspec import Struct

from rung.codec import GenerationEvent
from rung.types import DeploymentSpec, EngineInput, Voice


class RunKind(StrEnum):
    """Which route a generation uses. A closed set: no request chooses a path."""

    CHAT_COMPLETIONS = "chat_completions"
    COMPLETIONS = "completions"
    EMBEDDINGS = "embeddings"
    PREDICTIONS = "predictions"


class EngineHealth(StrEnum):
    """What a probe found."""

    #: Nothing listens.
    ABSENT = "absent"
    #: It listens and is loading.
    LOADING = "loading"
    #: It answers requests.
    READY = "ready"
    #: It listens, and some of its memory was put to sleep: a request to it would hang until it is woken.
    ASLEEP = "asleep"
    #: It listens, and does not have the deployment's model on its disk.
    NO_MODEL = "no_model"
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


class PullProgress(Struct, frozen=True):
    """How far the pull of a model is. `percent` is 0 to 100; None where something is not known."""

    detail: str
    percent: float | None = None
    remaining_s: float | None = None


class CommandLine(Struct, frozen=True, kw_only=True):
    """Arguments after the executable, and environment, of an engine."""

    arguments: tuple[str, ...]
    environment: dict[str, str] = {}


class EngineStream(Protocol):
    """An engine's answer in the shape of OpenAI's routes: head at once, body as it comes."""

    status: int
    content_type: str
    retry_after: str

    def ready(self) -> bytes:
        """What of the body is there already, without waiting; `chunks` goes on after it."""
        ...

    def chunks(self, interval_s: Callable[[], float] | None = None) -> AsyncIterator[bytes]:
        """The body, with no less than `interval_s()` between two pieces, but its end at once.

        Raises:
            EngineTimeoutError, EngineProtocolError: as the engine client does.
        """
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


#: A level of sleep that is not known is taken for the one whose way back is right for all.
DEEPEST_LEVEL = 2


@runtime_checkable
class SleepControl(Protocol):
    """What an adapter has whose engine can leave the GPU and come back without being started anew.

    Each transition is one sequence of calls, with no policy: that no request runs meanwhile, that there
    is room on the GPU, and that the bytes have really moved is for the caller to see to. A call that is
    cancelled may go on in the engine; `EngineAdapter.probe` then tells how it is.
    """

    def sleep_levels(self, spec: DeploymentSpec) -> tuple[int, ...]:
        """The levels at which the engine of this spec can sleep; none if it was not started for it."""
        ...

    async def requests(self, base_url: str, spec: DeploymentSpec) -> int | None:
        """How many requests the engine has in hand, whoever sent them; None if it does not say.

        Raises:
            EngineUnreachableError, EngineTimeoutError, EngineProtocolError: as the engine client does.
        """
        ...

    async def sleep(self, base_url: str, spec: DeploymentSpec, level: int) -> None:
        """Put the engine to sleep, and return once it says that it sleeps.

        Raises:
            EngineUnreachableError, EngineTimeoutError, EngineProtocolError: as the engine client does.
            EngineFailedError: it refused, or says that it is not asleep.
        """
        ...

    async def wake(self, base_url: str, spec: DeploymentSpec, level: int) -> None:
        """Wake an engine that sleeps at `level`, and return once it says that it is awake.

        The same again finishes what a caller that is gone had begun. Raises as `sleep`.
        """
        ...


@runtime_checkable
class ShrinkControl(SleepControl, Protocol):
    """What an adapter has whose engine, where it can sleep, can also give up its KV cache alone.

    While it is shrunk it answers no request, and says that it sleeps; its weights stay on the GPU.
    """

    def kv_cache_bytes(self, line: str) -> int | None:
        """The size of its KV cache, if a line of the engine's output tells it."""
        ...

    async def shrink(self, base_url: str, spec: DeploymentSpec) -> None:
        """Have the engine give up its KV cache, and return once it says that it sleeps.

        On the way its weights are in host memory. One that breaks off half-way may leave them there.
        Raises as `sleep`.
        """
        ...

    async def grow(self, base_url: str, spec: DeploymentSpec) -> None:
        """Give a shrunk engine its KV cache again, and return once it says that it is awake.

        Also one whose weights a shrink left in host memory. Raises as `sleep`.
        """
        ...


@runtime_checkable
class FreeControl(Protocol):
    """What an adapter has whose engine keeps models as a cache, and gives their memory back when asked."""

    @property
    def frees_model(self) -> bool:
        """Whether that is the deployment's own model: freed, it sleeps at level 2 until it is woken.

        Such an adapter has `SleepControl`, too.
        """
        ...

    async def requests(self, base_url: str, spec: DeploymentSpec) -> int | None:
        """How much the engine has in hand, whoever asked; None if it does not say. Raises as `free`."""
        ...

    async def free(self, base_url: str, spec: DeploymentSpec) -> None:
        """Ask for it, and return once the engine has taken note: it may get round to it later.

        Raises:
            EngineUnreachableError, EngineTimeoutError, EngineProtocolError: as the engine client does.
            EngineFailedError: it refused.
        """
        ...


@runtime_checkable
class PullControl(Protocol):
    """What an adapter has whose engine fetches its models itself, once it runs."""

    def pulls(self, spec: DeploymentSpec) -> bool:
        """Whether a start of this spec is to fetch a model that the engine does not have."""
        ...

    async def pull(
        self,
        base_url: str,
        spec: DeploymentSpec,
        tell: Callable[[PullProgress], None],
        *,
        environment: Mapping[str, str],
    ) -> None:
        """Fetch the deployment's model, and return once the engine has it. Cancelled, the engine stops too.

        Args:
            base_url: where it listens.
            spec: the deployment.
            tell: is told how far it is, at once and at least once a second.
            environment: that of the engine's process; empty if it is not known.

        Raises:
            InvalidRequestError: the model would be answered for from the internet.
            EngineFailedError: there is no such model, no room for it, or no way to where it is.
        """
        ...


class Generation(Struct, frozen=True, kw_only=True):
    """One generation for an engine with a dialect of its own. Units are in the names.

    Attributes:
        job_id: the job it belongs to.
        input: what to generate from.
        idle_timeout_s: longest silence of the engine.
    """

    job_id: str
    input: EngineInput
    idle_timeout_s: float = 600.0


@runtime_checkable
class GenerateControl(Protocol):
    """What an adapter has whose engine makes pictures, speech, text or meshes in a dialect of its own."""

    def generate(
        self, base_url: str, spec: DeploymentSpec, generation: Generation
    ) -> AsyncGenerator[GenerationEvent, None]:
        """Have the engine generate, and say what happens; the end of the iteration is a complete result.

        Progress has its phase, and what is counted where anything is; the time since a phase began is for
        the caller to add. Pieces of an artifact are 256 KiB at most and in order; the last one has its size
        and SHA-256. Closing the iteration early cancels this generation in the engine, and no other.

        Raises:
            InvalidRequestError: this kind of engine has no such generation, or it refused this one; the
                message says what is wrong with what.
            EngineUnreachableError, EngineTimeoutError, EngineProtocolError: as the engine client does.
            VramInfeasibleError: it ran out of GPU memory, and may hold on to what it has.
            EngineFailedError: it tried, and failed otherwise.
        """
        ...


@runtime_checkable
class VoiceControl(Protocol):
    """What an adapter has whose engine speaks with voices that it can list."""

    async def voices(self, base_url: str, spec: DeploymentSpec) -> tuple[Voice, ...]:
        """The voices that it has now, by name.

        Raises:
            EngineUnreachableError, EngineTimeoutError, EngineProtocolError: as the engine client does.
        """
        ...
