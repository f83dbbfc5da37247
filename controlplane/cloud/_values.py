"""Providers of cloud models and their models, as the rest of the system has them. No key is among them."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path

from msgspec import Struct

from controlplane.cloud._drawing import CloudDrawing

#: In US dollars, what one token costs at a price of one dollar for a million is one millionth: so micro
#: dollars are tokens times price.
MICRO_USD_PER_USD = 1_000_000


class Dialect(StrEnum):
    """How an API is spoken."""

    OPENAI = "openai"
    ANTHROPIC = "anthropic"


class Thinking(StrEnum):
    """How a model of Anthropic's dialect is told to think before it answers."""

    OFF = "off"
    BUDGET = "budget"
    ADAPTIVE = "adaptive"


class ModelPrices(Struct, frozen=True, kw_only=True):
    """US dollars for a million tokens."""

    prompt_usd: float
    completion_usd: float
    cached_usd: float


class CloudModel(Struct, frozen=True, kw_only=True):
    """One model of a provider, as a target.

    Attributes:
        id: of the target, `provider/name`.
        provider: id of its provider.
        model: the provider's name of it.
        aliases: other names that callers may ask for.
        capabilities: what it can do, such as `chat`, `tools`, `vision`, `reasoning`.
        context_tokens: longest prompt with its answer; 0 if nobody said.
        max_output_tokens: longest answer; asked for where a request sets no limit, and reserved.
        prices: what tokens cost.
        drop_fields: fields of a request that it refuses; they are left out.
        thinking: how it is told to think, where a request asks for it.
        drawing: how it draws; None if it does not.
    """

    id: str
    provider: str
    model: str
    aliases: tuple[str, ...]
    capabilities: tuple[str, ...]
    context_tokens: int
    max_output_tokens: int
    prices: ModelPrices
    drop_fields: frozenset[str] = frozenset()
    thinking: Thinking = Thinking.OFF
    drawing: CloudDrawing | None = None


class CloudProvider(Struct, frozen=True, kw_only=True):
    """An API that is paid for by tokens.

    Attributes:
        id: what it is called here.
        dialect: how it is spoken.
        base_url: up to and with the version, without a slash at its end.
        api_key_env: variable of the environment with the key; empty if it is in a file.
        api_key_file: file with the key; None if it is in the environment.
        daily_cap_usd: most that may be spent in one day of UTC.
        models: its models.
    """

    id: str
    dialect: Dialect
    base_url: str
    api_key_env: str
    api_key_file: Path | None
    daily_cap_usd: float
    models: tuple[CloudModel, ...]


class CloudUsage(Struct, frozen=True):
    """Tokens of one call as they are billed; those from the cache are among those of the prompt."""

    prompt_tokens: int = 0
    completion_tokens: int = 0
    cached_tokens: int = 0

    def cost_micro_usd(self, prices: ModelPrices) -> int:
        """What they cost, in millionths of a dollar, rounded up."""
        cached = min(self.cached_tokens, self.prompt_tokens)
        cost = (
            (self.prompt_tokens - cached) * prices.prompt_usd
            + cached * prices.cached_usd
            + self.completion_tokens * prices.completion_usd
        )
        # A billionth less, so that what is whole but for the last bit of a float is not rounded up.
        return max(0, -int(-(cost - 1e-9) // 1))
