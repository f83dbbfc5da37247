"""Operations on deployments as a progress bar."""

from __future__ import annotations

from collections.abc import AsyncIterable

from msgspec.structs import replace
from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TaskID, TextColumn, TimeElapsedColumn
from rich.text import Text

from rung._failure import error_of_failure
from rung.cli.views._words import format_duration, format_left, printable, without_time
from rung.errors import UnavailableError
from rung.types import Deployment, LifecycleDone, LifecycleEvent, LifecycleFailed, LifecycleProgress

_BAR_WIDTH = 30


def progress_words(progress: LifecycleProgress) -> str:
    """What an operation does: `starting: loading weights, 3.0 s left`."""
    words = progress.residency.value.replace("_", " ")
    # Some begin by saying no more than that.
    if progress.detail and progress.detail != words:
        words += f": {printable(progress.detail)}"
    if progress.remaining_s is not None:
        words += f", {format_left(progress.remaining_s)}"
    return words


async def show_operation(
    events: AsyncIterable[LifecycleEvent], *, console: Console, title: str
) -> Deployment:
    """Follow an operation to its end, with a bar on a terminal and a line per news elsewhere.

    Returns the deployment as the operation left it.

    Raises:
        RungError: the operation failed, by its reason; or the stream did.
    """
    display = _BarDisplay(console, title) if console.is_terminal else _LineDisplay(console, title)
    with display:
        async for event in events:
            match event.payload:
                case LifecycleProgress() as progress:
                    display.show(progress)
                case LifecycleDone(deployment):
                    display.done(f"{deployment.residency.value} after {format_duration(event.elapsed_s)}")
                    return deployment
                case LifecycleFailed() as failed:
                    raise error_of_failure(failed)
    raise UnavailableError(f"the stream of {title} ended before its last event")


class _LineDisplay:
    """A line whenever there is something new."""

    def __init__(self, console: Console, title: str) -> None:
        self._console = console
        self._title = title
        self._last = ""

    def __enter__(self) -> _LineDisplay:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def show(self, progress: LifecycleProgress) -> None:
        # Times are others in each event.
        news = progress_words(replace(progress, detail=without_time(progress.detail), remaining_s=None))
        if progress.percent is not None:
            # Every tenth of the way is news.
            news += f" {progress.percent // 10 * 10:.0f} %"
        if news != self._last:
            self._last = news
            self._console.print(Text(f"{self._title}: {news}"))

    def done(self, words: str) -> None:
        self._console.print(Text(f"{self._title}: {words}"))


class _BarDisplay:
    """A live bar: pulsing where nobody knows how far it is."""

    def __init__(self, console: Console, title: str) -> None:
        self._console = console
        self._title = title
        self._task: TaskID | None = None
        self._progress = Progress(
            SpinnerColumn(),
            TextColumn("{task.fields[title]}", markup=False, style="bold"),
            BarColumn(bar_width=_BAR_WIDTH),
            TextColumn("{task.fields[percent]:>5}"),
            TextColumn("{task.description}", markup=False),
            TimeElapsedColumn(),
            console=console,
            transient=True,
        )

    def __enter__(self) -> _BarDisplay:
        self._progress.start()
        self._task = self._progress.add_task("", total=None, title=self._title, percent="")
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def show(self, progress: LifecycleProgress) -> None:
        assert self._task is not None
        words = progress_words(progress)
        if progress.percent is None:
            self._progress.update(self._task, description=words, total=None, percent="")
        else:
            self._progress.update(
                self._task,
                description=words,
                total=100,
                completed=progress.percent,
                percent=f"{progress.percent:.0f} %",
            )

    def done(self, words: str) -> None:
        mark = "ok " if self._console.options.ascii_only else "✓ "
        self._progress.console.print(Text.assemble((mark, "green"), (self._title, "bold"), f" {words}"))
