"""What a wish passes before it is generated: `safety` and `prompt_enhancement` in the configuration."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any, Literal, Self

from pydantic import Field, model_validator

from controlplane.ladder import MAX_EFFORT, MIN_EFFORT, OWN_PREFIX, Ladder
from controlplane.stages import (
    AUTO_MODEL,
    Blocked,
    EnhancementSettings,
    Moderation,
    RuleError,
    SafetyPolicy,
    SafetySettings,
    compile_matcher,
)
from rung.service import ConfigModel, DurationS, FieldError


class BlockedConfig(ConfigModel):
    """What is refused under one category, at every policy."""

    words: tuple[str, ...] = ()
    """Words and phrases; a * at the end of a word stands for any ending."""
    regexes: tuple[str, ...] = ()
    """For what words cannot say, on the text in lower case without accents; repeats need a bound, such as
    {0,40}."""

    @model_validator(mode="after")
    def _usable(self) -> Self:
        for place, word in enumerate(self.words):
            _check(("words", place), (word,), ())
        for place, regex in enumerate(self.regexes):
            _check(("regexes", place), (), (regex,))
        return self

    def value(self) -> Blocked:
        """As the stages take it."""
        return Blocked(words=self.words, regexes=self.regexes)


class ModerationConfig(ConfigModel):
    """A model that has a say in what is generated."""

    model: str
    """A model, `node/model`, `provider/model`, or `rung/` and a chain."""
    timeout_s: DurationS = Field(default=10.0, gt=0, alias="timeout")
    """Longest wait for its verdict; 10 s by default."""
    on_failure: Literal["allow", "block"] | None = None
    """When it cannot be asked; unset means block for the policy strict, else allow."""

    def value(self) -> Moderation:
        """As the stages take it."""
        blocks = None if self.on_failure is None else self.on_failure == "block"
        return Moderation(model=self.model, timeout_s=self.timeout_s, blocks_on_failure=blocks)


class SafetyConfig(ConfigModel):
    """The safety filter of generations."""

    filter: str = "rules"
    """An installed plugin; `rules` is built in."""
    policy: SafetyPolicy = SafetyPolicy.UNRESTRICTED
    """How much is refused. Each refuses anything sexual about minors, and what is blocked."""
    blocked: dict[str, BlockedConfig] = Field(default={})
    """Rules of your own, by the category that a refusal names."""
    allowed: tuple[str, ...] = ()
    """Words and phrases that are harmless here."""
    moderation: ModerationConfig | None = None
    """A model that is asked, too; unset: rules alone."""
    timeout_s: DurationS = Field(default=20.0, gt=0, alias="timeout")
    """What has no verdict by then is refused; 20 s by default."""
    options: dict[str, Any] = Field(default={})
    """For a plugin from elsewhere."""

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        for place, phrase in enumerate(self.allowed):
            _check(("allowed", place), (phrase,), ())
        if self.moderation is not None and self.moderation.timeout_s >= self.timeout_s:
            raise FieldError(
                ("timeout",),
                f"is {self.timeout_s:g} s, which leaves no time to go on without the moderation model, for "
                f"which is waited {self.moderation.timeout_s:g} s; make it longer",
            )
        return self

    def value(self) -> SafetySettings:
        """As the stages take it."""
        return SafetySettings(
            filter=self.filter,
            policy=self.policy,
            blocked={category: each.value() for category, each in self.blocked.items()},
            allowed=self.allowed,
            moderation=None if self.moderation is None else self.moderation.value(),
            timeout_s=self.timeout_s,
            options=self.options,
        )


class PromptEnhancementConfig(ConfigModel):
    """Prompts for pictures that say more, by asking a chat model that is ready."""

    enabled: bool = True
    """Whether prompts for pictures are enhanced at all; on by default."""
    enhancer: str = "ladder"
    """An installed plugin; `ladder` is built in."""
    model: str = AUTO_MODEL
    """Who is asked; unset means the ladder."""
    effort: int = Field(default=2, ge=MIN_EFFORT, le=MAX_EFFORT)
    """Where on the ladder."""
    skip_tiers: tuple[str, ...] = ("lightning",)
    """Tiers of pictures that are not worth the wait."""
    timeout_s: DurationS = Field(default=15.0, gt=0, alias="timeout")
    """Without an answer by then the prompt is kept; 15 s by default."""
    options: dict[str, Any] = Field(default={})
    """For a plugin from elsewhere."""

    def value(self) -> EnhancementSettings:
        """As the stages take it."""
        names = EnhancementSettings.__struct_fields__
        return EnhancementSettings(**{name: getattr(self, name) for name in names})


def check_asked(
    safety: SafetyConfig,
    enhancement: PromptEnhancementConfig,
    targets: Collection[str],
    ladder: Ladder | None,
) -> None:
    """Refuse a stage that asks a model that nobody has.

    Args:
        safety: may ask a moderation model.
        enhancement: asks a chat model.
        targets: every name of one.
        ladder: its chains can be asked, too.

    Raises:
        FieldError: at its place in the file, from the root on.
    """
    chains = [OWN_PREFIX + name for name in ladder.chains] if ladder is not None else []
    efforts = [f"{OWN_PREFIX}{effort}" for effort in range(MIN_EFFORT, MAX_EFFORT + 1)]
    asked: dict[tuple[str | int, ...], str] = {("prompt_enhancement", "model"): enhancement.model}
    if safety.moderation is not None:
        asked["safety", "moderation", "model"] = safety.moderation.model
    for path, model in asked.items():
        if model not in {AUTO_MODEL, *targets, *chains, *efforts}:
            there = ", ".join(sorted({AUTO_MODEL, *targets, *chains}))
            raise FieldError(path, f"there is no model {model}; there are: {there}")


def _check(path: tuple[str | int, ...], words: tuple[str, ...], regexes: tuple[str, ...]) -> None:
    try:
        compile_matcher(words, regexes)
    except RuleError as error:
        raise FieldError(path, str(error)) from None
