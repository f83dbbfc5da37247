"""What an engine says while it draws: told in order, and its pictures kept."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from contextlib import aclosing

from controlplane.artifacts import Collector
from controlplane.pipelines.image._pace import Pace
from controlplane.pipelines.image._telling import Telling
from rung.codec import GenerationEvent
from rung.types import ArtifactChunk, Phase, PhaseProgress


class Relay:
    """Takes the events of one generation.

    Args:
        telling: told of progress.
        collector: keeps pictures.
        pace: how fast it goes; None where that is not learnt.
    """

    def __init__(self, telling: Telling, collector: Collector, pace: Pace | None = None) -> None:
        self._telling = telling
        self._collector = collector
        self._pace = pace
        self._now_s = asyncio.get_running_loop().time

    async def all_of(self, events: AsyncGenerator[GenerationEvent, None]) -> None:
        """Take all events to the end; cancelled, or after an error, the generation is cancelled, too."""
        async with aclosing(events):
            async for event in events:
                await self.take(event)
        self.ended()

    def ended(self) -> None:
        """Nothing more comes: learn from it."""
        if self._pace is not None:
            self._pace.ended(self._now_s())
        self._telling.tell(Phase.ENCODING, "The result is stored")

    async def take(self, event: GenerationEvent) -> None:
        """Take one event."""
        if isinstance(event, ArtifactChunk):
            await self._collector.take(event)
        elif isinstance(event, PhaseProgress):
            self._progress(event)

    def _progress(self, event: PhaseProgress) -> None:
        left_s = event.remaining_s
        if (
            self._pace is not None
            and event.phase is Phase.SAMPLING
            and event.step is not None
            and event.total
        ):
            left_s = self._pace.sampled(event.step, event.total, event.percent, self._now_s())
            if left_s is None:
                self._telling.expect(Phase.SAMPLING, None)
        self._telling.tell(
            event.phase,
            event.detail,
            step=event.step,
            total=event.total,
            percent=event.percent,
            left_s=left_s,
        )
