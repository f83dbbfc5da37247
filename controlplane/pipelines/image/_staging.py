"""The stages of a wish, under way while its target is made ready."""

from __future__ import annotations

import asyncio
from types import TracebackType
from typing import Protocol

from controlplane.stages import Enhanced, StageRequest, Verdict

_UNNOTICED_S = 0.05


class StagesPort(Protocol):
    """The stages, as `controlplane.stages.Stages` has them: what fails in them is contained there."""

    async def check(self, request: StageRequest) -> Verdict:
        """Whether a wish may be carried out."""
        ...

    async def enhance(self, request: StageRequest) -> Enhanced:
        """The prompt to go on with."""
        ...


class Staging:
    """Checks a wish once for all attempts, and then enhances its prompt, as long as its context lasts.

    Attributes:
        enhancing_s: how long the enhancement took, once it is over; None if nothing was enhanced.
    """

    def __init__(self, stages: StagesPort, request: StageRequest) -> None:
        self._stages = stages
        self._request = request
        self.enhancing_s: float | None = None

    async def __aenter__(self) -> Staging:
        self._checking = asyncio.create_task(self._stages.check(self._request), name="safety-filter")
        self._enhancing = asyncio.create_task(self._enhance(), name="prompt-enhance")
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for task in (self._checking, self._enhancing):
            task.cancel()
        await asyncio.gather(self._checking, self._enhancing, return_exceptions=True)

    async def verdict(self) -> Verdict:
        """Whether the wish may be carried out."""
        return await asyncio.shield(self._checking)

    @property
    def is_enhanced(self) -> bool:
        """Whether `enhanced` returns at once."""
        return self._enhancing.done()

    async def is_enhanced_soon(self) -> bool:
        """Whether `enhanced` returns before anybody would notice."""
        await asyncio.wait([self._enhancing], timeout=_UNNOTICED_S)
        return self.is_enhanced

    async def enhanced(self) -> Enhanced:
        """The prompt to go on with, of a wish that is allowed."""
        return await asyncio.shield(self._enhancing)

    async def _enhance(self) -> Enhanced:
        verdict = await self.verdict()
        if not verdict.allowed:
            return Enhanced(prompt=self._request.prompt, detail=verdict.detail)
        began_s = asyncio.get_running_loop().time()
        enhanced = await self._stages.enhance(self._request)
        if enhanced.prompt != self._request.prompt:
            self.enhancing_s = asyncio.get_running_loop().time() - began_s
        return enhanced
