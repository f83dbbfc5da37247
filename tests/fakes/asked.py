"""A chat model that stages ask, which says what a test tells it."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass, field

from controlplane.stages import AUTO_MODEL, Answer, Message
from rung.errors import RungError
from rung.types import Priority


@dataclass(frozen=True)
class Question:
    """What was asked, and how."""

    system: str
    user: str
    local_only: bool
    priority: Priority
    model: str
    effort: int | None
    most_tokens: int
    timeout_s: float
    ready_only: bool


@dataclass
class FakeAsk:
    """An `Ask` that answers with `says`, fails with it if it is an error, or never answers."""

    says: str | RungError | None = "safe"
    asked: list[Question] = field(default_factory=list)

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
        system, user = messages
        assert (system.role, user.role) == ("system", "user")
        self.asked.append(
            Question(
                system.content,
                user.content,
                local_only,
                priority,
                model,
                effort,
                most_tokens,
                timeout_s,
                ready_only,
            )
        )
        if self.says is None:
            await asyncio.get_running_loop().create_future()
        if isinstance(self.says, RungError):
            raise self.says
        return Answer(text=str(self.says), target="small-1")
