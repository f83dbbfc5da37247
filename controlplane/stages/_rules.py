"""The built-in safety filter: rules, and a model that has a say where one is configured."""

from __future__ import annotations

import asyncio

from msgspec.structs import replace

from controlplane.stages import _minors, _moderation, _words
from controlplane.stages._matching import RuleError, compile_matcher, compile_terms
from controlplane.stages._ports import Ask, StageRequest, Verdict
from controlplane.stages._reading import Reading, read
from controlplane.stages._settings import SafetyPolicy, SafetySettings
from rung.errors import ConfigError, RungError

#: What is longer is refused unread, so that no text holds up the others.
MOST_CHARACTERS = 100_000
#: To read that takes a few milliseconds.
_MOST_AT_ONCE = 2_000


class RuleFilter:
    """Refuses by rule. The plugin `rules`.

    What an operator blocks holds at every policy. Negative prompts are not searched: what somebody does not
    want to see is no offence.

    Args:
        settings: the policy and rules.
        ask: asks the moderation model.

    Raises:
        ConfigError: a rule cannot be used.
    """

    def __init__(self, settings: SafetySettings, ask: Ask) -> None:
        self._policy = settings.policy
        self._moderator = (
            _moderation.Moderator(settings.moderation, settings.policy, ask) if settings.moderation else None
        )
        try:
            self._allowed = compile_terms(settings.allowed)
            self._rules = [
                (category, compile_matcher(blocked.words, blocked.regexes))
                for category, blocked in settings.blocked.items()
            ]
        except RuleError as error:
            raise ConfigError(f"safety: {error}") from None
        levels = {
            SafetyPolicy.UNRESTRICTED: (),
            SafetyPolicy.MODERATE: (_words.MODERATE,),
            SafetyPolicy.STRICT: (_words.MODERATE, _words.STRICT),
        }[settings.policy]
        self._rules += [
            (category, compile_matcher(words)) for level in levels for category, words in level.items()
        ]

    async def check(self, request: StageRequest) -> Verdict:
        """The verdict: by rule, then by the moderation model."""
        if len(request.prompt) + len(request.negative_prompt) > MOST_CHARACTERS:
            return Verdict(
                allowed=False,
                detail=f"Safety: refused unread, as it has more than {MOST_CHARACTERS:,} characters",
                category="length",
            )
        if len(request.prompt) + len(request.negative_prompt) > _MOST_AT_ONCE:
            # It would hold up for too long whoever else is served meanwhile.
            refused = await asyncio.to_thread(self._by_rule, request)
        else:
            refused = self._by_rule(request)
        if refused is not None:
            return refused
        if self._moderator is None:
            return Verdict(allowed=True, detail=f"Safety: {self._policy}")
        return await self._moderated(self._moderator, request)

    def _by_rule(self, request: StageRequest) -> Verdict | None:
        """The verdict if the rules refuse a wish; else None."""
        reading = read(request.prompt)
        if _minors.about_minors(request.kind, reading, request.negative_prompt):
            return Verdict(
                allowed=False,
                detail=f"Safety: no policy allows this ({_minors.CATEGORY})",
                category=_minors.CATEGORY,
            )
        category = self._category(reading)
        return self._refused(category) if category else None

    def _category(self, reading: Reading) -> str:
        if self._allowed.may_be_in(reading):
            allowed = self._allowed.pattern
            reading = replace(
                reading,
                plain=tuple(allowed.sub("-", f" {each} ") for each in reading.plain),
                words=tuple(allowed.sub("-", each) for each in reading.words),
            )
        return next((category for category, matcher in self._rules if matcher.matches(reading)), "")

    async def _moderated(self, moderator: _moderation.Moderator, request: StageRequest) -> Verdict:
        try:
            found = await moderator.ask(request)
        except RungError as error:
            why = f"the moderation model could not be asked ({error.message})"
            if moderator.blocks_on_failure:
                return self._refused("unchecked", f": {why}")
            return Verdict(allowed=True, detail=f"Safety: {self._policy}; {why}")
        if found.category:
            return self._refused(found.category, f", says {found.target}")
        return Verdict(allowed=True, detail=f"Safety: {self._policy}; {found.target} sees no harm")

    def _refused(self, category: str, more: str = "") -> Verdict:
        return Verdict(
            allowed=False,
            detail=f"Safety: the policy {self._policy} does not allow this ({category}){more}",
            category=category,
        )
