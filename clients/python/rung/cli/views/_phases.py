"""The phases of a job on a terminal: a line each, and a live one for what is under way."""

from __future__ import annotations

import time
from collections.abc import AsyncIterable, Callable

from msgspec import Struct
from rich.console import Console, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.spinner import Spinner
from rich.table import Table
from rich.text import Text

from rung.cli.views._jobs import served_name
from rung.cli.views._words import format_duration, format_left, printable, spinner_name, without_time
from rung.types import (
    TERMINAL_EVENTS,
    ArtifactChunk,
    JobCancelled,
    JobDone,
    JobEvent,
    JobFailed,
    Phase,
    PhaseProgress,
    Routed,
    Served,
)

_BAR_WIDTH = 24
_REFRESHES_PER_S = 8
#: A line for each tenth of the way is enough where lines stay.
_PERCENT_STEP = 10
#: What files are called, by the first part of their media type.
_NOUNS = {
    "audio": ("audio file", "audio files"),
    "image": ("image", "images"),
    "model": ("mesh", "meshes"),
    "video": ("video", "videos"),
}
_NAME_WIDTH = max(len(phase.value) for phase in Phase)

Clock = Callable[[], float]


async def show_phases(
    events: AsyncIterable[JobEvent], *, console: Console, clock: Clock = time.monotonic
) -> JobEvent | None:
    """Follow a job to its terminal event: live on a terminal, a line per news elsewhere.

    What went wrong is not printed: the caller has the event, or gets the error from its stream.

    Args:
        events: of one job; heartbeats are welcome.
        console: where to.
        clock: in seconds.

    Returns:
        The terminal event; None if the events ended before one.
    """
    display = _LiveDisplay(console, clock) if console.is_terminal else _LineDisplay(console)
    made = _Made()
    with display:
        async for event in events:
            match event.payload:
                case PhaseProgress(phase=Phase.DONE):
                    # The terminal event says it, with what was made.
                    pass
                case PhaseProgress() as progress:
                    display.progress(progress, event.elapsed_s)
                case Routed(served):
                    made.served = served
                case ArtifactChunk(preview=False, content_type=content_type, sha256=sha256) if sha256:
                    made.content_types.append(content_type)
                case JobDone(_, served):
                    made.served = served or made.served
                    display.done(made, event.elapsed_s)
                case JobFailed() | JobCancelled():
                    display.failed(event.elapsed_s)
                case _:
                    pass
            if isinstance(event.payload, TERMINAL_EVENTS):
                return event
    return None


class _Made:
    """What came of a job, and by whom."""

    def __init__(self) -> None:
        self.served: Served | None = None
        self.content_types: list[str] = []

    def words(self) -> str:
        """`2 images generated`."""
        count = len(self.content_types)
        if not count:
            return "Done"
        kinds = {content_type.partition("/")[0] for content_type in self.content_types}
        one, several = _NOUNS.get(kinds.pop() if len(kinds) == 1 else "", ("file", "files"))
        return f"{count} {one if count == 1 else several} generated"


class _LineDisplay:
    """`[ 12.1s] Building quality workflow (1024x1024)` whenever there is something new."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._last = ""

    def __enter__(self) -> _LineDisplay:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def progress(self, progress: PhaseProgress, elapsed_s: float) -> None:
        words = without_time(printable(progress.detail)) or _phase_name(progress.phase).capitalize()
        news = f"{progress.phase} {words}"
        if progress.percent is not None:
            words = f"{words} {progress.percent:.0f}%"
            news += f" {progress.percent // _PERCENT_STEP}"
        if news != self._last:
            self._last = news
            self._print(words, elapsed_s)

    def done(self, made: _Made, elapsed_s: float) -> None:
        self._print(made.words(), elapsed_s)

    def failed(self, elapsed_s: float) -> None:
        pass

    def _print(self, words: str, elapsed_s: float) -> None:
        self._console.print(Text(f"[{elapsed_s:5.1f}s] {words}"), soft_wrap=True)


class _Running(Struct, frozen=True, kw_only=True):
    """The phase that is under way.

    Attributes:
        progress: the newest that was said of it.
        began_s: when it began, since the job did.
        told_s: when the newest was said, since the job began.
        seen_s: when that arrived here, by our clock.
    """

    progress: PhaseProgress
    began_s: float
    told_s: float
    seen_s: float


class _LiveDisplay:
    """Phases that are over as lines with a tick, above one line that moves."""

    def __init__(self, console: Console, clock: Clock) -> None:
        self._console = console
        self._clock = clock
        self._running: _Running | None = None
        self._spinner = Spinner(spinner_name(console), style="cyan")
        self._live = Live(
            console=console,
            get_renderable=self._line,
            refresh_per_second=_REFRESHES_PER_S,
            transient=True,
        )

    def __enter__(self) -> _LiveDisplay:
        self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._live.stop()

    def progress(self, progress: PhaseProgress, elapsed_s: float) -> None:
        running = self._running
        began_s = elapsed_s - progress.phase_elapsed_s
        if running is not None:
            if running.progress.phase is progress.phase:
                began_s = running.began_s
            else:
                self._end_phase(elapsed_s, well=True)
        self._running = _Running(progress=progress, began_s=began_s, told_s=elapsed_s, seen_s=self._clock())

    def done(self, made: _Made, elapsed_s: float) -> None:
        self._end_phase(elapsed_s, well=True)
        by = f", by {served_name(made.served)}" if made.served is not None else ""
        words = f" {made.words()} after {format_duration(elapsed_s)}{by}"
        self._print(Text.assemble(self._mark(well=True), (words, "bold")))

    def failed(self, elapsed_s: float) -> None:
        self._end_phase(elapsed_s, well=False)

    def _end_phase(self, elapsed_s: float, *, well: bool) -> None:
        running, self._running = self._running, None
        # Choosing who answers takes no time that a person would see.
        if running is None or (running.progress.phase is Phase.ROUTE and well):
            return
        row = _grid()
        row.add_row(
            self._mark(well=well),
            *_name_and_time(running.progress.phase, elapsed_s - running.began_s),
            Text(_detail(running.progress), style="dim"),
        )
        self._print(row)

    def _print(self, line: RenderableType) -> None:
        self._live.console.print(line)

    def _mark(self, *, well: bool) -> Text:
        if self._console.options.ascii_only:
            return Text("+", style="green") if well else Text("x", style="red")
        return Text("✓", style="green") if well else Text("✗", style="red")

    def _line(self) -> RenderableType:
        running = self._running
        if running is None:
            return self._spinner
        progress = running.progress
        passed_s = max(self._clock() - running.seen_s, 0.0)
        name = _name_and_time(progress.phase, running.told_s + passed_s - running.began_s)
        words = Text(without_time(printable(progress.detail)), style="dim")
        left = _left_words(progress, passed_s)
        row = _grid(bar=progress.percent is not None)
        if progress.percent is None:
            row.add_row(self._spinner, *name, Text.assemble(words, left))
        else:
            bar = ProgressBar(total=100, completed=progress.percent, width=_BAR_WIDTH)
            share = Text(f"{progress.percent:3.0f} %")
            row.add_row(self._spinner, *name, bar, Text.assemble(share, " ", words, left))
        return row


def _grid(*, bar: bool = False) -> Table:
    # All of the width, so that what is too narrow cuts the words, and not the name of the phase.
    grid = Table.grid(padding=(0, 1), expand=True)
    grid.add_column(width=1)
    grid.add_column(width=_NAME_WIDTH, no_wrap=True)
    grid.add_column(min_width=7, justify="right", no_wrap=True)
    if bar:
        grid.add_column(width=_BAR_WIDTH)
    grid.add_column(no_wrap=True, overflow="ellipsis", ratio=1)
    return grid


def _name_and_time(phase: Phase, took_s: float) -> tuple[Text, Text]:
    return Text(_phase_name(phase), style="bold"), Text(format_duration(max(took_s, 0.0)))


def _detail(progress: PhaseProgress) -> str:
    """What there is to say of a phase that is over."""
    if not progress.detail and progress.total:
        return f"{progress.step or 0} of {progress.total} steps"
    return without_time(printable(progress.detail))


def _phase_name(phase: Phase) -> str:
    return phase.value.replace("_", " ")


def _left_words(progress: PhaseProgress, passed_s: float) -> Text:
    """` 3 s left (41 s in all)`, of what is known and has not passed yet."""
    words = Text(style="cyan")
    if progress.remaining_s is not None and progress.remaining_s > passed_s:
        words.append(f"  {format_left(progress.remaining_s - passed_s)}")
    if progress.job_remaining_s is not None and progress.job_remaining_s > passed_s:
        words.append(f"  ({format_left(progress.job_remaining_s - passed_s)} in all)")
    return words
