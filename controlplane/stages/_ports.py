"""What a stage before a generation is given, and what it gives back."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, Protocol

import msgspec
from msgspec import Struct

from rung.errors import InvalidRequestError
from rung.types import JobKind, Priority

#: What a chat is asked of where nothing else is said: the ladder, with an effort.
AUTO_MODEL = "rung/auto"


class StageRequest(Struct, frozen=True, kw_only=True):
    """A wish, as the stages look at it.

    Attributes:
        kind: what is to be made.
        prompt: what the caller wants, or the text that is to be spoken.
        negative_prompt: what the caller does not want to see.
        tier: of a picture: `lightning`, `quality`, `ultra`; empty where there are none.
        priority: the caller's; what is asked for this wish is asked with it.
        local_only: nothing of it may leave owned hardware.
    """

    kind: JobKind
    prompt: str
    negative_prompt: str = ""
    tier: str = ""
    priority: Priority = Priority.AGENT
    local_only: bool = False


class Verdict(Struct, frozen=True, kw_only=True):
    """What a safety filter says of a wish.

    Attributes:
        allowed: whether it may be carried out.
        detail: for a person: the policy, and what was found; never words of a list.
        category: what it is refused for; empty if it is allowed.
    """

    allowed: bool
    detail: str
    category: str = ""

    def require_allowed(self) -> None:
        """Raises InvalidRequestError with the detail if the wish is refused."""
        if not self.allowed:
            raise InvalidRequestError(self.detail, category=self.category)


class Enhanced(Struct, frozen=True, kw_only=True):
    """The prompt to go on with, and for a person where it is from. Never empty if the original was not."""

    prompt: str
    detail: str


class SafetyFilter(Protocol):
    """Says whether a wish may be carried out. A plugin of the group `rung.safety_filters` makes one."""

    async def check(self, request: StageRequest) -> Verdict:
        """The verdict; whatever is raised counts as a refusal."""
        ...


class PromptEnhancer(Protocol):
    """Writes prompts that say more. A plugin of the group `rung.prompt_enhancers` makes one."""

    async def enhance(self, request: StageRequest) -> Enhanced:
        """The prompt to go on with; whatever is raised leaves the caller's as it is."""
        ...


class Message(Struct, frozen=True):
    """One turn of a small chat."""

    role: Literal["system", "user"]
    content: str


def as_data(**fields: str) -> Message:
    """Texts of a caller as a turn of a chat: as JSON, so that they cannot pose as anything else."""
    whole = {name: text.encode(errors="replace").decode() for name, text in fields.items()}
    return Message("user", msgspec.json.encode(whole).decode())


class Answer(Struct, frozen=True, kw_only=True):
    """What a small chat was answered, and by which target."""

    text: str
    target: str


class Ask(Protocol):
    """Asks a chat model one thing, through the ladder and without a job of its own."""

    async def __call__(
        self,
        messages: Sequence[Message],
        *,
        local_only: bool,
        priority: Priority,
        model: str = AUTO_MODEL,
        effort: int | None = None,
        most_tokens: int = 256,
        timeout_s: float = 15.0,
        ready_only: bool = False,
    ) -> Answer:
        """The answer, at temperature 0.

        Args:
            messages: the chat.
            local_only: ask nobody but owned hardware.
            priority: among the demands for a node.
            model: a model or chain by name; the ladder if nothing is said.
            effort: 1 to 10, for the ladder.
            most_tokens: length of the answer.
            timeout_s: until the whole answer is there.
            ready_only: ask nobody who would have to be made awake first.

        Raises:
            RungError: nobody answered, or not in time.
        """
        ...
