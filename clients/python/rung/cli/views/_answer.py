"""A generation on a terminal: progress while it is under way, then the text as it comes."""

from __future__ import annotations

import time
from collections.abc import AsyncIterable, Callable
from types import TracebackType

from msgspec import Struct
from rich.console import Console
from rich.status import Status
from rich.text import Text

from rung._failure import error_of_failure
from rung.cli.views._jobs import phase_words, served_name
from rung.cli.views._words import format_duration, printable, spinner_name, without_time
from rung.errors import JobCancelledError, UnavailableError
from rung.types import (
    JobCancelled,
    JobDone,
    JobEvent,
    JobFailed,
    Phase,
    PhaseProgress,
    Routed,
    Served,
    TokenDelta,
    Usage,
    UsageReported,
)

Clock = Callable[[], float]
#: Phases during which tokens come; what they say would be between the words.
_SPEAKING = frozenset({Phase.GENERATING, Phase.DONE})


class Answer(Struct, frozen=True, kw_only=True):
    """What was said, and how. Durations are as this client saw them; None where nothing came."""

    job_id: str
    text: str
    finish_reason: str
    served: Served | None
    usage: Usage | None
    first_token_s: float | None
    tokens_per_s: float | None
    took_s: float

    def summary(self) -> str:
        """`orchestrator on workstation (nemotron-8b) · 96 tokens · first after 0.21 s · 42.0 tok/s`."""
        parts = []
        if self.served is not None:
            model = f" ({self.served.model})" if self.served.model else ""
            parts.append(f"{served_name(self.served)}{model}")
        if self.usage is not None:
            parts.append(f"{self.usage.prompt_tokens} tokens in, {self.usage.completion_tokens} out")
        if self.first_token_s is not None:
            parts.append(f"first after {format_duration(self.first_token_s)}")
        if self.tokens_per_s is not None:
            parts.append(f"{self.tokens_per_s:.1f} tok/s")
        if self.finish_reason == "length":
            parts.append("cut off at the most tokens allowed")
        parts.append(f"job {self.job_id}")
        return " · ".join(parts)


async def print_answer(
    events: AsyncIterable[JobEvent], *, out: Console, err: Console, clock: Clock = time.monotonic
) -> Answer:
    """Write the text of a generation to `out` as it comes, and what happens meanwhile to `err`.

    Args:
        events: of one job, from its first to its terminal one.
        out: for the answer and nothing else.
        err: for progress and thoughts.
        clock: in seconds.

    Raises:
        RungError: the job failed, by its reason; or its stream did.
        JobCancelledError: it was cancelled.
    """
    writer = _AnswerWriter(out, err, clock)
    with writer:
        async for event in events:
            writer.job_id = event.job_id
            match event.payload:
                case PhaseProgress() as progress:
                    writer.progress(progress)
                case Routed(served):
                    writer.served = served
                case TokenDelta(content, reasoning, 0):
                    writer.token(content, reasoning)
                case UsageReported(usage):
                    writer.usage = usage
                case JobDone(finish_reason, served):
                    writer.served = served or writer.served
                    return writer.answer(finish_reason)
                case JobFailed() as failed:
                    raise error_of_failure(failed)
                case JobCancelled(by):
                    raise JobCancelledError(f"the job was cancelled by {by}", by=by)
                case _:
                    pass
    raise UnavailableError("the stream of the job ended before its last event")


class _AnswerWriter:
    """Keeps progress and text apart: the live line is gone before the first token is written."""

    def __init__(self, out: Console, err: Console, clock: Clock) -> None:
        self._out = out
        self._err = err
        self._clock = clock
        self._start_s = clock()
        self._first_s: float | None = None
        self._last_s = self._start_s
        self._deltas = 0
        self._text: list[str] = []
        self._thinking = False
        self._line_open = False
        self._news = ""
        self._reasoned = False
        self._live: Status | None = None
        self.job_id = ""
        self.served: Served | None = None
        self.usage: Usage | None = None

    def __enter__(self) -> _AnswerWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._hide_progress()
        self._end_thoughts()
        if self._line_open:
            self._write("\n")

    def progress(self, progress: PhaseProgress) -> None:
        self._reasoned = self._reasoned or progress.phase is Phase.REASONING
        if self._first_s is not None or progress.phase in _SPEAKING:
            return
        words = phase_words(progress)
        if self._err.is_terminal:
            if self._live is None:
                self._live = self._err.status(Text(words), spinner=spinner_name(self._err))
                self._live.start()
            self._live.update(Text(words))
        elif progress.phase is not Phase.ROUTE:
            news = f"{progress.phase.value} {without_time(progress.detail)}"
            if news != self._news:
                self._news = news
                self._err.print(Text(words, style="dim"))

    def token(self, content: str, reasoning: str) -> None:
        if not content and not reasoning:
            return
        self._hide_progress()
        self._last_s = self._clock()
        if self._first_s is None:
            self._first_s = self._last_s
        self._deltas += 1
        if reasoning:
            self._thinking = True
            self._err.print(Text(printable(reasoning), style="dim italic"), end="", soft_wrap=True)
        if content:
            self._end_thoughts()
            self._text.append(content)
            self._write(content)

    def answer(self, finish_reason: str) -> Answer:
        rate = None
        # What is counted after a reasoning is not only what came here since the first token.
        if not self._reasoned and self._first_s is not None and self._last_s > self._first_s:
            tokens = self.usage.completion_tokens if self.usage else self._deltas
            rate = max(tokens - 1, 0) / (self._last_s - self._first_s)
        return Answer(
            job_id=self.job_id,
            text="".join(self._text),
            finish_reason=finish_reason,
            served=self.served,
            usage=self.usage,
            first_token_s=None if self._first_s is None else self._first_s - self._start_s,
            tokens_per_s=rate,
            took_s=self._clock() - self._start_s,
        )

    def _write(self, text: str) -> None:
        # Not through the console: it would wrap and style what is not its own.
        self._out.file.write(printable(text) if self._out.is_terminal else text)
        self._out.file.flush()
        self._line_open = not text.endswith("\n")

    def _end_thoughts(self) -> None:
        if self._thinking:
            self._thinking = False
            self._err.print("\n")

    def _hide_progress(self) -> None:
        if self._live is not None:
            self._live.stop()
            self._live = None
