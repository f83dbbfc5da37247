"""Engines that somebody else runs: they are looked at, never started or stopped."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import suppress
from urllib.parse import urlsplit

from nodeagent.runtimes._base import EngineExit, LaunchPlan, OnProgress, RunningEngine, RuntimeProgress
from rung.errors import InvalidRequestError, NotOursError
from rung.types import ExternalRuntime

_CONNECT_TIMEOUT_S = 1.0
_LOOK_INTERVAL_S = 1.0


class ExternalEngineRuntime:
    """Adopts engines by their URL."""

    def check(self, plan: LaunchPlan) -> None:
        """Refuse a plan for another runtime. See `EngineRuntime.check`."""
        if not isinstance(plan.runtime, ExternalRuntime):
            raise InvalidRequestError(f"{plan.deployment_id} is not run by somebody else")

    async def start(self, plan: LaunchPlan, on_progress: OnProgress) -> RunningEngine:
        """Adopt the engine: nothing is started. See `EngineRuntime.start`."""
        self.check(plan)
        assert isinstance(plan.runtime, ExternalRuntime)
        on_progress(RuntimeProgress(f"looking for an engine at {plan.runtime.base_url}"))
        return RunningEngine(
            deployment_id=plan.deployment_id,
            generation=plan.generation,
            spec_hash=plan.spec_hash,
            base_url=plan.runtime.base_url,
        )

    async def find(self, record: RunningEngine) -> bool:
        """Whether something accepts connections there."""
        parts = urlsplit(record.base_url)
        try:
            async with asyncio.timeout(_CONNECT_TIMEOUT_S):
                _, writer = await asyncio.open_connection(parts.hostname, parts.port or 80)
        except (OSError, TimeoutError):
            return False
        writer.close()
        with suppress(OSError):
            await writer.wait_closed()
        return True

    async def wait(self, record: RunningEngine) -> EngineExit:
        """Return when nothing accepts connections there any more, at two looks in a row."""
        missed = 0
        while missed < 2:
            await asyncio.sleep(_LOOK_INTERVAL_S)
            missed = 0 if await self.find(record) else missed + 1
        return EngineExit(exit_code=None, detail=f"nothing answers at {record.base_url}")

    async def stop(self, record: RunningEngine, grace_s: float) -> None:
        """Refuse. Raises NotOursError."""
        raise NotOursError(
            f"{record.deployment_id} is run by somebody else; stop it where it was started",
            deployment=record.deployment_id,
        )

    async def log(self, record: RunningEngine, *, tail_lines: int, follow: bool) -> AsyncIterator[str]:
        """Nothing: its output is with whoever runs it."""
        lines: tuple[str, ...] = ()
        for line in lines:
            yield line

    async def pids(self, record: RunningEngine) -> frozenset[int]:
        """Not known."""
        return frozenset()

    async def strays(self, known: frozenset[str]) -> tuple[RunningEngine, ...]:
        """None: what is not ours cannot stray."""
        return ()

    async def aclose(self) -> None:
        """Nothing is held."""
