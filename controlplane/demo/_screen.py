"""How the demo speaks to its viewer, and the times that it takes."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console, RenderableType
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from rung.cli.views import format_duration


class Screen:
    """Headings, remarks and commands; and a table of what took how long."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self._start_s = time.monotonic()
        self._acts: list[tuple[str, str]] = []
        self._number = 0

    @contextmanager
    def act(self, title: str) -> Iterator[None]:
        """A numbered part."""
        self._number += 1
        self.console.print()
        self.console.rule(Text(f"{self._number}. {title}", style="bold cyan"), align="left", style="cyan")
        yield

    def say(self, words: str) -> None:
        """A remark of the demo itself."""
        self.console.print(Text(words, style="dim"))

    def command(self, line: str) -> None:
        """What a person would type for what comes next."""
        self.console.print(Text.assemble(("$ ", "dim"), (line, "bold")), soft_wrap=True)

    def show(self, thing: RenderableType) -> None:
        """Something to look at."""
        self.console.print(thing)

    def note(self, what: str, figure: str) -> None:
        """Keep a figure for the end."""
        self._acts.append((what, figure))

    def opening(self, real: str, simulated: str) -> None:
        """What is real and what is not, before anything else."""
        text = Text.assemble(
            ("Real: ", "bold green"), real, "\n\n", ("Simulated: ", "bold yellow"), simulated
        )
        self.console.print(
            Panel(text, title="rung demo", border_style="cyan", width=min(self.console.width, 100))
        )

    def closing(self) -> None:
        """The figures."""
        self.console.print()
        table = Table(box=None, show_header=False, padding=(0, 2, 0, 0), pad_edge=False)
        for what, figure in self._acts:
            table.add_row(what, Text(figure, style="bold"))
        table.add_row(
            "everything so far took", Text(format_duration(time.monotonic() - self._start_s), "bold")
        )
        self.console.print(table)
