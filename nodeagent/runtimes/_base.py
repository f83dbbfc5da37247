"""What the agent asks of a runtime: run an engine's process, know it again, and end it.

A runtime knows nothing of models or dialects. Engines outlive the agent: a runtime's `find` is how
a restarted agent learns which of its records are still true.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from typing import Protocol, TypeAlias, runtime_checkable

from msgspec import Struct

from rung.types import Runtime


class LaunchPlan(Struct, frozen=True, kw_only=True):
    """What to run for a deployment.

    `arguments` follow the executable (process) or the image's entry point (docker). The engine will
    listen on `listen_port`; it is to be reached at `127.0.0.1:port` of the node. For a process both
    ports are the same; for a container `listen_port` is published as `port`.
    """

    deployment_id: str
    generation: int
    spec_hash: str
    runtime: Runtime
    arguments: tuple[str, ...]
    environment: dict[str, str]
    port: int
    listen_port: int
    gpus: tuple[str, ...] = ()


class RunningEngine(Struct, frozen=True, kw_only=True):
    """The identity of a started engine; stored, so that a restarted agent knows it again.

    A process is the same one only if PID, start time (field 22 of `/proc/PID/stat`, in clock ticks
    since boot) and boot id agree. A container is the same one if its id does.
    """

    deployment_id: str
    generation: int
    spec_hash: str
    base_url: str
    pid: int = 0
    start_time_ticks: int = 0
    boot_id: str = ""
    container_id: str = ""
    log_path: str = ""


class EngineExit(Struct, frozen=True, kw_only=True):
    """How an engine ended: exit code (negative for a signal; None if not known) and its last words."""

    exit_code: int | None
    detail: str
    log_tail: tuple[str, ...] = ()


class RuntimeProgress(Struct, frozen=True):
    """What a start is doing, such as pulling an image. `percent` is 0 to 100, None if not known."""

    detail: str
    percent: float | None = None


OnProgress: TypeAlias = Callable[[RuntimeProgress], None]


class EngineRuntime(Protocol):
    """Runs engines one way: as processes, in containers, or not at all (external)."""

    def check(self, plan: LaunchPlan) -> None:
        """Refuse what `start` would refuse, before anything is done.

        Raises:
            NotAllowedError: executable, image or mount is not on the allow-list.
            InvalidRequestError: the plan is for another runtime.
        """
        ...

    async def start(self, plan: LaunchPlan, on_progress: OnProgress) -> RunningEngine:
        """Start the engine and return as soon as its process exists.

        If starting fails, or the call is cancelled, nothing is left running.

        Raises:
            NotAllowedError, InvalidRequestError: as `check`.
            EngineStartFailedError: it could not be started.
        """
        ...

    async def find(self, record: RunningEngine) -> bool:
        """Whether exactly this engine still runs."""
        ...

    async def wait(self, record: RunningEngine) -> EngineExit:
        """Return when the engine has ended, however it did."""
        ...

    async def stop(self, record: RunningEngine, grace_s: float) -> None:
        """End the engine and all it started: politely, then by force; return when they are gone."""
        ...

    def log(self, record: RunningEngine, *, tail_lines: int, follow: bool) -> AsyncIterator[str]:
        """The newest lines of the engine's output, without line ends; with `follow` until it ends."""
        ...

    async def pids(self, record: RunningEngine) -> frozenset[int]:
        """Process ids of the engine and its descendants as the host sees them; empty if not known."""
        ...

    async def aclose(self) -> None:
        """Let go of the engines; they go on."""
        ...

    async def strays(self, known: frozenset[str]) -> tuple[RunningEngine, ...]:
        """Engines that carry this agent's mark but whose deployment id is not in `known`."""
        ...


@runtime_checkable
class HealthReport(Protocol):
    """What a runtime that looks after its engines' health offers beside `EngineRuntime`."""

    def complaint(self, record: RunningEngine) -> str:
        """What it finds wrong with an engine that runs and is waited for; "" if nothing."""
        ...
