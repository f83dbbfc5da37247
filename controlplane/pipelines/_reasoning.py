"""A chat with the `reason` tool: the orchestrator answers, and hands on what is too hard for it."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable

import structlog
from msgspec.structs import replace

from controlplane.jobs import LiveJob
from controlplane.pipelines._begun import Begun
from controlplane.pipelines._engage import Engager
from controlplane.pipelines._engaged import Engaged, OnBytes, OnWait
from controlplane.pipelines._openai import AnswerReader
from controlplane.pipelines._reason_tool import ReasonCall, ReasonFilter, ReasonTalk, reasoner_body
from controlplane.pipelines._router import Router
from rung.errors import EngineTimeoutError, NoTargetError, RungError, UnavailableError
from rung.types import Phase, Served, TokenDelta, ToolCallDelta, Usage

_log = structlog.get_logger("rung.pipelines")

#: So often may one answer call the tool; then the orchestrator has to finish by itself.
MAX_CALLS = 3
#: Time for all calls of one answer together; what is not there by then is not waited for.
MAX_REASONING_S = 900.0
#: A result is cut to this length before the orchestrator, whose context is small, reads it.
_MAX_RESULT_CHARACTERS = 24_000
_SAY_S = 1.0
#: After these another target reasons.
_MOVES_ON = (UnavailableError, EngineTimeoutError)


class _SideJob:
    """What a call of the tool tells its job: progress, and nothing of the answer itself."""

    def __init__(self, job: LiveJob, on_wait: OnWait | None) -> None:
        self.id = job.id
        self.model = "reason"
        self.content: list[str] = []
        self.usage: Usage | None = None
        self.served: Served | None = None
        self._job = job
        self._on_wait = on_wait
        self._characters = 0
        self._said_s = time.monotonic()

    def progress(
        self,
        phase: Phase,
        detail: str = "",
        *,
        percent: float | None = None,
        remaining_s: float | None = None,
    ) -> None:
        """Pass a step on."""
        self._job.progress(phase, f"reason: {detail}", percent=percent, remaining_s=remaining_s)

    def begin_generating(self, served: Served) -> None:
        """Say who reasons; what another one began is forgotten."""
        self.served = served
        self.content.clear()
        self._characters = 0
        self._job.progress(Phase.REASONING, f"{served.target} is reasoning")

    def text(self, delta: TokenDelta) -> None:
        """Keep the answer; thoughts are counted."""
        self.content.append(delta.content)
        self._characters += len(delta.content) + len(delta.reasoning)

    def tool_call(self, delta: ToolCallDelta) -> None:
        """It was offered no tools."""

    def consumed(self, usage: Usage) -> None:
        """Keep what it took."""
        self.usage = usage

    def spent(self, cost_usd: float) -> None:
        """Pass on what it cost."""
        self._job.spent(cost_usd)

    async def say(self) -> None:
        """Say how far it is, about once a second."""
        now_s = time.monotonic()
        if now_s - self._said_s < _SAY_S:
            return
        self._said_s = now_s
        target = self.served.target if self.served else "the reasoner"
        detail = f"{target} is reasoning: {self._characters:,} characters so far"
        self._job.progress(Phase.REASONING, detail)
        if self._on_wait is not None:
            await self._on_wait()


class Reasoning:
    """Answers chats whose rung offers the `reason` tool.

    Args:
        router: who may reason.
        engager: opens answers.
    """

    def __init__(self, router: Router, engager: Engager) -> None:
        self._router = router
        self._engager = engager

    async def stream(
        self,
        begun: Begun,
        on_bytes: OnBytes | None,
        *,
        keep_usage: bool,
        on_wait: OnWait | None,
        mark: Callable[[], bytes] | None,
    ) -> str:
        """Answer as one stream, whatever lies between its parts; returns the finish reason.

        Raises:
            RungError: the orchestrator failed; a failure of the reasoner is told to it instead.
        """
        job, talk = begun.job, ReasonTalk(begun.wish.body)
        filtered = ReasonFilter(talk.tool_name)
        calls = _Calls(talk)
        while True:
            reader = AnswerReader(job, "the orchestrator", keep_usage=keep_usage, mark=mark)
            filtered.begin()
            async with await self._ask(begun, talk, calls, on_wait, stream=True) as engaged:
                engaged.check_stream()
                async for chunk in engaged.reply.chunks():
                    whole = reader.feed(filtered.feed(chunk))
                    if whole and on_bytes is not None:
                        await on_bytes(whole)
                    if reader.failed:
                        break
                left = reader.feed(filtered.rest())
                if reader.failed or not filtered.calls:
                    left += reader.finish()
                if left and on_bytes is not None:
                    await on_bytes(left)
            if not filtered.calls:
                return reader.finish_reason
            await self._reason(begun, talk, filtered, calls, on_wait)

    async def answer(self, begun: Begun) -> tuple[bytes, str]:
        """Answer in one piece: the body, and the finish reason. Raises as `stream`."""
        job, talk = begun.job, ReasonTalk(begun.wish.body)
        filtered = ReasonFilter(talk.tool_name)
        calls = _Calls(talk)
        while True:
            filtered.begin()
            async with await self._ask(begun, talk, calls, None, stream=False) as engaged:
                body = filtered.whole(await engaged.reply.read())
            if not filtered.calls:
                reader = AnswerReader(job, engaged.target, keep_usage=True)
                reader.whole(body)
                reader.finish()
                return body, reader.finish_reason
            await self._reason(begun, talk, filtered, calls, None)

    async def _ask(
        self, begun: Begun, talk: ReasonTalk, calls: _Calls, on_wait: OnWait | None, *, stream: bool
    ) -> Engaged:
        wish = replace(begun.wish, body=talk.body(offer=calls.may_call))
        # The first time the targets that the job was accepted with; later who is best by then.
        targets = begun.targets if calls.count == 0 else self._router.choose(begun.route)
        return await self._engager.engage(begun.job, wish, targets, on_wait, stream=stream)

    async def _reason(
        self,
        begun: Begun,
        talk: ReasonTalk,
        filtered: ReasonFilter,
        calls: _Calls,
        on_wait: OnWait | None,
    ) -> None:
        results = []
        for call in filtered.calls:
            calls.count += 1
            results.append(await self._result(begun, call, calls, on_wait))
        talk.add(filtered.content, filtered.calls, results)

    async def _result(self, begun: Begun, call: ReasonCall, calls: _Calls, on_wait: OnWait | None) -> str:
        """What the orchestrator is told of a call: the answer, or that there is none and why."""
        if calls.count > MAX_CALLS:
            return f"`{calls.tool_name}` was called {MAX_CALLS} times already; answer with what you have."
        side = _SideJob(begun.job, on_wait)
        try:
            async with asyncio.timeout(calls.left_s):
                await self._ask_reasoner(begun, call, side, on_wait)
        except TimeoutError:
            failure = f"it took longer than {MAX_REASONING_S:g} s"
        except RungError as error:
            failure = error.message
        else:
            if side.served is not None:
                begun.reasoned_by.append(side.served.target)
            return "".join(side.content)[:_MAX_RESULT_CHARACTERS]
        _log.warning("reason_failed", job=begun.job.id, error=failure)
        begun.job.progress(Phase.REASONING, f"no reasoner answered: {failure}")
        calls.refused = True
        return (
            f"No reasoner can answer now ({failure}). Answer as well as you can, and say what is uncertain."
        )

    async def _ask_reasoner(
        self, begun: Begun, call: ReasonCall, side: _SideJob, on_wait: OnWait | None
    ) -> None:
        """Have a problem reasoned about by the first target that comes to an end with it.

        Nobody has seen what a target began that breaks off: the next one begins anew.
        """
        route = begun.route.reasoning()
        assert route is not None  # else the tool was not offered
        wish = replace(begun.wish, body=reasoner_body(call.problem))
        failed: set[str] = set()
        while True:
            chosen = self._router.choose(route)
            targets = (each for each in chosen if each.id not in failed)
            engaged = await self._engager.engage(side, wish, targets, on_wait, stream=True)
            try:
                async with engaged:
                    await _read_reasoning(engaged, side)
                return
            except _MOVES_ON as error:
                failed.add(engaged.target)
                following = next((each for each in self._router.choose(route) if each.id not in failed), None)
                if following is None:
                    raise
                side.progress(Phase.ROUTE, f"{error.message}; trying {following.id}")


async def _read_reasoning(engaged: Engaged, side: _SideJob) -> None:
    """Read an answer into its side job. Raises RungError: it broke off, or it is none."""
    engaged.check_stream()
    reader = AnswerReader(side, engaged.target, keep_usage=False)
    async for chunk in engaged.reply.chunks():
        reader.feed(chunk)
        await side.say()
        if reader.failed:
            break
    reader.finish()
    if not "".join(side.content).strip():
        raise NoTargetError(f"{engaged.target} ended its reasoning without an answer")


class _Calls:
    """How often the tool was called in one answer, and whether it may be once more."""

    def __init__(self, talk: ReasonTalk) -> None:
        self.count = 0
        self.refused = False
        self.tool_name = talk.tool_name
        self._may_call = talk.may_call
        self._until_s = time.monotonic() + MAX_REASONING_S

    @property
    def left_s(self) -> float:
        """Time that is left for all calls together."""
        return max(0.0, self._until_s - time.monotonic())

    @property
    def may_call(self) -> bool:
        """Whether the tool is offered."""
        return self._may_call and not self.refused and self.count < MAX_CALLS and self.left_s > 0
