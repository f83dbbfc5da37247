"""The stages of a control plane: chosen by name among what is installed, and held to their contract."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from importlib.metadata import entry_points
from typing import Any, TypeVar

import structlog
from msgspec.structs import replace

from controlplane.stages._ports import (
    Ask,
    Enhanced,
    PromptEnhancer,
    SafetyFilter,
    StageRequest,
    Verdict,
)
from controlplane.stages._settings import EnhancementSettings, SafetySettings
from rung.errors import ConfigError

_log = structlog.get_logger("rung.stages")

T = TypeVar("T")

SAFETY_FILTERS = "rung.safety_filters"
PROMPT_ENHANCERS = "rung.prompt_enhancers"
#: An enhancer that keeps to its time can still say that nobody answered in it.
_GRACE_S = 1.0


class Stages:
    """The stages of a control plane. Neither method raises; a plugin that fails is contained."""

    def __init__(
        self,
        safety: SafetyFilter,
        enhancer: PromptEnhancer,
        *,
        safety_timeout_s: float = SafetySettings().timeout_s,
        enhancement_timeout_s: float = EnhancementSettings().timeout_s,
    ) -> None:
        self._safety = safety
        self._enhancer = enhancer
        self._safety_timeout_s = safety_timeout_s
        self._enhancement_timeout_s = enhancement_timeout_s

    async def check(self, request: StageRequest) -> Verdict:
        """Whether a wish may be carried out; it may not where the filter fails."""
        try:
            async with asyncio.timeout(self._safety_timeout_s):
                verdict = _is(Verdict, await self._safety.check(request))
        except Exception as error:  # noqa: BLE001 - a plugin may raise anything
            _log.error("safety_filter_failed", exc_info=error)
            return Verdict(
                allowed=False, detail="Safety: refused, as the safety filter failed", category="unchecked"
            )
        return verdict

    async def enhance(self, request: StageRequest) -> Enhanced:
        """The prompt to go on with: an enhanced one that is as safe as the caller's, or the caller's."""
        try:
            async with asyncio.timeout(self._enhancement_timeout_s):
                enhanced = _is(Enhanced, await self._enhancer.enhance(request))
        except Exception as error:  # noqa: BLE001 - a plugin may raise anything
            _log.error("prompt_enhancer_failed", exc_info=error)
            return _kept(request, "the prompt enhancer failed")
        if not enhanced.prompt.strip():
            return Enhanced(prompt=request.prompt, detail=enhanced.detail)
        if enhanced.prompt == request.prompt:
            return enhanced
        verdict = await self.check(replace(request, prompt=enhanced.prompt))
        return enhanced if verdict.allowed else _kept(request, "what came of it is not allowed")


def load_stages(safety: SafetySettings, enhancement: EnhancementSettings, ask: Ask) -> Stages:
    """The stages as configured.

    A plugin is an entry point of the group `rung.safety_filters` or `rung.prompt_enhancers`: something that
    is called with its settings and an `Ask`, and returns a `SafetyFilter` or a `PromptEnhancer`.

    Raises:
        ConfigError: there is no plugin of that name, or it cannot be loaded.
    """
    return Stages(
        _plugin(SAFETY_FILTERS, safety.filter, "safety filter", "safety.filter")(safety, ask),
        _plugin(PROMPT_ENHANCERS, enhancement.enhancer, "prompt enhancer", "prompt_enhancement.enhancer")(
            enhancement, ask
        ),
        safety_timeout_s=safety.timeout_s,
        enhancement_timeout_s=enhancement.timeout_s + _GRACE_S,
    )


def _plugin(group: str, name: str, what: str, field: str) -> Callable[..., Any]:
    found = {each.name: each for each in entry_points(group=group)}
    if name not in found:
        there = ", ".join(sorted(found)) or "none; Rung has to be installed anew after it was updated"
        raise ConfigError(f"{field}: there is no {what} {name!r}; installed are: {there}")
    try:
        plugin: Callable[..., Any] = found[name].load()
    except Exception as error:
        raise ConfigError(f"{field}: the {what} {name!r} cannot be loaded: {error}") from error
    return plugin


def _is(kind: type[T], given: object) -> T:
    if not isinstance(given, kind):
        raise TypeError(f"a plugin gave {type(given).__name__} instead of {kind.__name__}")
    return given


def _kept(request: StageRequest, why: str) -> Enhanced:
    return Enhanced(prompt=request.prompt, detail=f"Kept as it is: {why}")
