"""Cloud providers in the configuration: who they are, what their models cost, how much may be spent."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Annotated, Any, Self
from urllib.parse import urlsplit

from pydantic import AfterValidator, Field, model_validator

from controlplane.cloud import (
    CloudDrawing,
    CloudModel,
    CloudProvider,
    Dialect,
    ModelPrices,
    Thinking,
    sides_of,
)
from controlplane.config._engines import require_port
from rung.errors import LoopbackOnlyError
from rung.service import ConfigModel, FieldError, require_loopback

_ID = r"^[a-z0-9][a-z0-9._-]{0,62}$"

_IMAGE = "image"
#: What answers with tokens cannot do without.
_OF_TOKENS = ("max_output_tokens", "usd_per_million_prompt_tokens", "usd_per_million_completion_tokens")

#: What need not be written of providers that are known by their ids.
_KNOWN: dict[str, dict[str, str]] = {
    "openai": {"base_url": "https://api.openai.com/v1", "api_key_env": "OPENAI_API_KEY"},
    "anthropic": {
        "dialect": "anthropic",
        "base_url": "https://api.anthropic.com/v1",
        "api_key_env": "ANTHROPIC_API_KEY",
    },
    "deepseek": {"base_url": "https://api.deepseek.com", "api_key_env": "DEEPSEEK_API_KEY"},
    "google": {
        "base_url": "https://generativelanguage.googleapis.com/v1beta/openai",
        "api_key_env": "GEMINI_API_KEY",
    },
}


def _size(text: str) -> str:
    sides_of(text)
    return text


def _base_url(url: str) -> str:
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ValueError(f"{url!r} is not an https:// URL such as https://api.openai.com/v1")
    if parts.query or parts.fragment or parts.username or parts.password:
        raise ValueError("a base URL has scheme, host, port and path, and nothing else")
    require_port(parts)
    if parts.scheme == "http":
        try:
            require_loopback(parts.hostname, "a cloud provider")
        except LoopbackOnlyError:
            raise ValueError(f"{url!r} would send the key in the clear; use https://") from None
    return url.rstrip("/")


class CloudDrawingConfig(ConfigModel):
    """How a cloud model draws, and what its pictures cost, in US dollars. Defaults are gpt-image-1's."""

    usd_per_image: float = Field(ge=0)
    """The dearest picture's, or any where `prices` has none: so much is reserved for each."""
    prices: dict[str, Annotated[float, Field(ge=0)]] = Field(default={})
    """By quality and size, such as `low 1024x1024`, or by one of the two."""
    sizes: tuple[Annotated[str, AfterValidator(_size)], ...] = ("1024x1024", "1536x1024", "1024x1536")
    """All that it draws; the nearest in shape is asked for. An empty list: any."""
    qualities: dict[str, str] = Field(default={"lightning": "low", "quality": "medium", "ultra": "high"})
    """What it calls the quality of each tier."""
    most: int = Field(default=10, ge=1, le=10)
    """Pictures of one request."""
    edits: bool = True
    """Whether it draws from pictures, too."""
    asks_for_data: bool = False
    """Send `response_format`, which most need to send no links, and gpt-image-1 refuses."""

    def value(self) -> CloudDrawing:
        """As the rest of the system has it."""
        return CloudDrawing(**{name: getattr(self, name) for name in CloudDrawing.__struct_fields__})


class CloudModelConfig(ConfigModel):
    """A model of a provider. Prices are in US dollars for a million tokens."""

    id: str = Field(pattern=_ID)
    """The target is called provider/id."""
    model: str = ""
    """The provider's name of it; the id where it is left out."""
    aliases: tuple[str, ...] = ()
    """Further names that requests may use."""
    capabilities: tuple[str, ...] = ("chat",)
    """What it can do: chat, tools, vision, embedding, image; chat alone by default."""
    context_tokens: int = Field(default=0, ge=0)
    """Tokens of its context; 0 means that it is not known."""
    max_output_tokens: int | None = Field(default=None, ge=1)
    """Asked for where a request sets no limit; what is reserved follows from it. What only draws needs none,
    and no prices of tokens."""
    usd_per_million_prompt_tokens: float | None = Field(default=None, ge=0)
    """US dollars for a million tokens of prompt."""
    usd_per_million_completion_tokens: float | None = Field(default=None, ge=0)
    """US dollars for a million tokens of answer, thoughts included."""
    usd_per_million_cached_tokens: float | None = Field(default=None, ge=0)
    """US dollars for a million tokens of prompt from its cache; unset: as other tokens of the prompt."""
    drop_fields: tuple[str, ...] = ()
    """Fields of a request that the model refuses, such as temperature; reasoning_content stands for the
    thoughts in earlier turns."""
    thinking: Thinking = Thinking.OFF
    """Anthropic's dialect: how it is told to think where a request has reasoning_effort."""
    images: CloudDrawingConfig | None = None
    """For what has the capability image."""

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        draws = _IMAGE in self.capabilities
        if draws and self.images is None:
            raise FieldError(
                ("images",), "is missing: what a picture costs at most has to be known before it is drawn"
            )
        if self.images is not None and not draws:
            raise FieldError(("images",), "is for a model with the capability image")
        if set(self.capabilities) != {_IMAGE}:
            for name in _OF_TOKENS:
                if getattr(self, name) is None:
                    raise FieldError((name,), "is missing")
        return self

    def value(self, provider: str) -> CloudModel:
        """As the rest of the system has it."""
        prompt_usd = self.usd_per_million_prompt_tokens or 0.0
        cached = self.usd_per_million_cached_tokens
        return CloudModel(
            id=f"{provider}/{self.id}",
            provider=provider,
            model=self.model or self.id,
            aliases=self.aliases,
            capabilities=self.capabilities,
            context_tokens=self.context_tokens,
            max_output_tokens=self.max_output_tokens or 0,
            prices=ModelPrices(
                prompt_usd=prompt_usd,
                completion_usd=self.usd_per_million_completion_tokens or 0.0,
                cached_usd=prompt_usd if cached is None else cached,
            ),
            drop_fields=frozenset(self.drop_fields),
            thinking=self.thinking,
            drawing=self.images.value() if self.images is not None else None,
        )


class CloudProviderConfig(ConfigModel):
    """A cloud API. Of openai, anthropic, deepseek and google only the models need be written."""

    id: str = Field(pattern=_ID)
    """Name of the provider; openai, anthropic, deepseek and google are known by it."""
    dialect: Dialect = Dialect.OPENAI
    """How its API is spoken; `openai` by default."""
    base_url: Annotated[str, AfterValidator(_base_url)] = ""
    """https, with the version; http for a simulator on this machine."""
    api_key_env: str = ""
    """Variable of the environment that has the key."""
    api_key_file: Path | None = None
    """File with the key, readable by its owner only."""
    daily_cap_usd: float = Field(default=5.0, ge=0)
    """Most that is spent in a day of UTC, in US dollars; 5 by default."""
    models: tuple[CloudModelConfig, ...] = Field(min_length=1)
    """Its models that may be used."""

    @model_validator(mode="before")
    @classmethod
    def _known(cls, fields: Any) -> Any:
        """Fill in what is known of a provider by its id."""
        if not isinstance(fields, dict):
            return fields
        known = dict(_KNOWN.get(str(fields.get("id")), {}))
        if fields.get("api_key_file") is not None:
            known.pop("api_key_env", None)
        return known | fields

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if not self.base_url:
            known = ", ".join(sorted(_KNOWN))
            raise FieldError(("base_url",), f"is missing; only {known} are known without it")
        if bool(self.api_key_env) == (self.api_key_file is not None):
            raise FieldError(("api_key_env",), "give one of api_key_env and api_key_file")
        for place, model in enumerate(self.models):
            if model.images is not None and self.dialect is not Dialect.OPENAI:
                raise FieldError(("models", place, "images"), "are drawn in OpenAI's dialect only")
            if any(model.id == other.id for other in self.models[:place]):
                raise FieldError(("models", place, "id"), f"{model.id} is used twice")
        return self

    def value(self) -> CloudProvider:
        """As the rest of the system has it."""
        return CloudProvider(
            id=self.id,
            dialect=self.dialect,
            base_url=self.base_url,
            api_key_env=self.api_key_env,
            api_key_file=self.api_key_file.expanduser() if self.api_key_file else None,
            daily_cap_usd=self.daily_cap_usd,
            models=tuple(model.value(self.id) for model in self.models),
        )


def check_cloud(providers: Sequence[CloudProviderConfig], taken: Collection[str]) -> None:
    """Look for names that mean two things.

    Args:
        providers: all of them.
        taken: models and aliases of deployments.

    Raises:
        FieldError: a provider is there twice, or a model's alias is used for something else.
    """
    names = dict.fromkeys(taken, "a deployment")
    for place, provider in enumerate(providers):
        if any(provider.id == other.id for other in providers[:place]):
            raise FieldError(("cloud", place, "id"), f"{provider.id} is used twice")
        for at, model in enumerate(provider.models):
            target = f"{provider.id}/{model.id}"
            for name in (target, *model.aliases):
                other = names.setdefault(name, target)
                if other != target:
                    raise FieldError(
                        ("cloud", place, "models", at, "aliases"), f"{name} is a name of {other}"
                    )
