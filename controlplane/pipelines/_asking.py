"""One small chat through the ladder, without a job of its own: for the judge, and for the stages."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Sequence
from itertools import chain

import msgspec
from msgspec import Struct

from controlplane.ladder import AUTO_MODEL, Candidate
from controlplane.pipelines._engage import Engager
from controlplane.pipelines._openai import AnswerReader
from controlplane.pipelines._router import Router
from controlplane.pipelines._wish import Wish
from controlplane.stages import Answer, Message
from rung.errors import DeadlineExceededError, NoTargetError
from rung.types import JobKind, Phase, Policy, Priority, Served, TokenDelta, ToolCallDelta, Usage


class Told(Struct, frozen=True):
    """The JSON of an OpenAI chat answer, and the target that gave it."""

    body: bytes
    target: str


class LadderAsk:
    """Asks chat models one thing. It is the `Ask` of the stages.

    Args:
        router: who may answer.
        engager: opens answers.
    """

    def __init__(self, router: Router, engager: Engager) -> None:
        self._router = router
        self._engager = engager

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
        """The answer, as `Ask` has it. Raises RungError."""
        body = msgspec.json.encode(
            {
                "model": model,
                "messages": [
                    Message(each.role, each.content.encode(errors="replace").decode()) for each in messages
                ],
                "temperature": 0,
                "max_tokens": most_tokens,
                "stream": False,
            }
        )
        wish = Wish(
            kind=JobKind.CHAT,
            model=model,
            body=body,
            policy=Policy(local_only=local_only, priority=priority),
            effort=effort,
        )
        told = await self.send(wish, timeout_s=timeout_s, ready_only=ready_only)
        text = _Text()
        AnswerReader(text, told.target, keep_usage=False).whole(told.body)
        return Answer(text="".join(text.content), target=told.target)

    async def send(self, wish: Wish, *, timeout_s: float, ready_only: bool = False) -> Told:
        """What the first target says that answers a chat.

        Args:
            wish: a chat that is not streamed; its policy says where it may go.
            timeout_s: until the whole answer is there.
            ready_only: ask nobody who would have to be made awake first.

        Raises:
            DeadlineExceededError: the answer took longer.
            RungError: nobody answered.
        """
        targets = self._router.choose(self._router.route(wish))
        if ready_only:
            targets = self._ready(targets)
        try:
            async with asyncio.timeout(timeout_s):
                # The time is short, and whoever asks goes on without an answer.
                engaging = self._engager.engage(_Silent(), wish, targets, stream=False, waits_for_gone=False)
                async with await engaging as engaged:
                    return Told(await engaged.reply.read(), engaged.target)
        except TimeoutError:
            raise DeadlineExceededError(f"no answer within {timeout_s:g} s") from None

    def _ready(self, targets: Iterator[Candidate]) -> Iterator[Candidate]:
        ready = (each for each in targets if self._router.is_ready(each))
        first = next(ready, None)
        if first is None:
            raise NoTargetError("nothing that could answer is ready")
        return chain((first,), ready)


class _Silent:
    """A job that nobody watches: what is asked so is no job of the caller's."""

    id = "ask"
    model = AUTO_MODEL

    def progress(
        self,
        phase: Phase,
        detail: str = "",
        *,
        percent: float | None = None,
        remaining_s: float | None = None,
    ) -> None:
        """Nothing."""

    def begin_generating(self, served: Served) -> None:
        """Nothing."""

    def spent(self, cost_usd: float) -> None:
        """It is in the provider's spending."""


class _Text:
    """Keeps the text of an answer; thoughts that an engine told apart are left out."""

    def __init__(self) -> None:
        self.content: list[str] = []

    def text(self, delta: TokenDelta) -> None:
        """Keep it."""
        self.content.append(delta.content)

    def tool_call(self, delta: ToolCallDelta) -> None:
        """It was offered no tools."""

    def consumed(self, usage: Usage) -> None:
        """It counts for nobody's job."""
