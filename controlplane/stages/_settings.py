"""How an operator wants the stages."""

from __future__ import annotations

from collections.abc import Mapping
from enum import StrEnum
from typing import Any

from msgspec import Struct

from controlplane.stages._ports import AUTO_MODEL


class SafetyPolicy(StrEnum):
    """How much is refused."""

    UNRESTRICTED = "unrestricted"
    MODERATE = "moderate"
    STRICT = "strict"


class Blocked(Struct, frozen=True, kw_only=True):
    """What an operator refuses under one category, at every policy.

    Attributes:
        words: words and phrases; a `*` at the end of a word stands for any ending.
        regexes: for what words cannot say.
    """

    words: tuple[str, ...] = ()
    regexes: tuple[str, ...] = ()


class Moderation(Struct, frozen=True, kw_only=True):
    """A model that has a say.

    Attributes:
        model: a model or a chain by name.
        timeout_s: until it has answered.
        blocks_on_failure: whether a wish is refused when it cannot be asked; None for what the policy says.
    """

    model: str
    timeout_s: float = 10.0
    blocks_on_failure: bool | None = None


class SafetySettings(Struct, frozen=True, kw_only=True):
    """How wishes are filtered.

    Attributes:
        filter: the plugin's name.
        policy: how much is refused.
        blocked: what an operator refuses beside that, by category.
        allowed: phrases that are harmless here.
        moderation: a model that has a say; None for none.
        timeout_s: a verdict takes so long at most; a wish without one is refused.
        options: for a plugin from elsewhere.
    """

    filter: str = "rules"
    policy: SafetyPolicy = SafetyPolicy.UNRESTRICTED
    blocked: Mapping[str, Blocked] = {}
    allowed: tuple[str, ...] = ()
    moderation: Moderation | None = None
    timeout_s: float = 20.0
    options: Mapping[str, Any] = {}


class EnhancementSettings(Struct, frozen=True, kw_only=True):
    """How prompts are enhanced.

    Attributes:
        enabled: whether they are.
        enhancer: the plugin's name.
        model: who is asked; the ladder if nothing is said.
        effort: 1 to 10, for the ladder.
        skip_tiers: tiers that are not worth the wait.
        timeout_s: an enhancement takes so long at most; without one the prompt is kept.
        options: for a plugin from elsewhere.
    """

    enabled: bool = True
    enhancer: str = "ladder"
    model: str = AUTO_MODEL
    effort: int = 2
    skip_tiers: tuple[str, ...] = ("lightning",)
    timeout_s: float = 15.0
    options: Mapping[str, Any] = {}
