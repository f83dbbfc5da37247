"""Tables of numbers that commands read: CSV, from a file or stdin."""

from __future__ import annotations

import csv
import io
import math
import sys
from collections.abc import Sequence
from pathlib import Path

import typer
from msgspec import Struct

_STDIN = "-"
_DELIMITERS = ",;\t"


class Line(Struct, frozen=True):
    """A row of a file, with the number of its line."""

    number: int
    cells: list[str]


class Table(Struct, frozen=True):
    """The rows of a CSV file, and the names of its columns: of the first line, or their numbers from 1."""

    names: list[str]
    lines: list[Line]
    delimiter: str
    has_header: bool

    def index(self, column: str) -> int:
        """Where a column is. Raises typer.BadParameter: there is none of that name, or several."""
        found = [at for at, name in enumerate(self.names) if name == column]
        if len(found) == 1:
            return found[0]
        if found:
            raise typer.BadParameter(f"{len(found)} columns have the name {column!r}; rename all but one")
        raise typer.BadParameter(f"there is no column {column!r}; there are {', '.join(self.names)}")

    def is_numeric(self, index: int) -> bool:
        """Whether a column has numbers, and nothing else in those of its cells that are not empty."""
        cells = [line.cells[index] for line in self.lines if line.cells[index]]
        return bool(cells) and all(_number(cell) is not None for cell in cells)

    def numbers(self, index: int) -> tuple[float, ...]:
        """A column. Raises typer.BadParameter naming the line of what is no number."""
        return tuple(self.number(line, index) for line in self.lines)

    def number(self, line: Line, index: int) -> float:
        """A cell. Raises typer.BadParameter."""
        cell = line.cells[index]
        value = _number(cell)
        if value is None:
            what = repr(cell) if cell else "nothing"
            raise typer.BadParameter(
                f"line {line.number} has {what} in the column {self.names[index]}; it must be a number"
            )
        return value


def read_table(path: str) -> Table:
    """A CSV file, or stdin for `-`; separated by commas, semicolons or tabs.

    The first line has names if one of its cells is no number.

    Raises:
        typer.BadParameter: it cannot be read, has no rows, or rows of different lengths.
    """
    text = _text(path)
    first = text.split("\n", 1)[0]
    delimiter = max(_DELIMITERS, key=first.count)
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    try:
        lines = [Line(reader.line_num, [cell.strip() for cell in cells]) for cells in reader if any(cells)]
    except csv.Error as error:
        raise typer.BadParameter(f"line {reader.line_num} is no CSV: {error}") from None
    if not lines:
        raise typer.BadParameter("the file is empty; give a CSV file with a row for each value")
    has_header = any(cell and _number(cell) is None for cell in lines[0].cells)
    names = lines[0].cells if has_header else [str(at) for at in range(1, len(lines[0].cells) + 1)]
    rows = lines[1:] if has_header else lines
    if not rows:
        raise typer.BadParameter(f"there are no rows under the names {', '.join(names)}")
    for row in rows:
        if len(row.cells) != len(names):
            raise typer.BadParameter(
                f"line {row.number} has {len(row.cells)} columns, and line {lines[0].number} has {len(names)}"
            )
    return Table(names=names, lines=rows, delimiter=delimiter, has_header=has_header)


def format_numbers(values: Sequence[float]) -> list[str]:
    """Numbers with as many decimals as their size deserves, the same for all: `1204`, `12.04`, `0.1204`."""
    largest = max(map(abs, values), default=0.0)
    decimals = 0 if largest >= 1000 or not largest else min(max(3 - math.floor(math.log10(largest)), 0), 9)
    if all(value.is_integer() for value in values):
        decimals = 0
    return [f"{value:.{decimals}f}" for value in values]


def _text(path: str) -> str:
    if path == _STDIN and sys.stdin.isatty():
        raise typer.BadParameter("give a CSV file, or pipe one in")
    try:
        data = sys.stdin.buffer.read() if path == _STDIN else Path(path).read_bytes()
        return data.decode("utf-8-sig")
    except OSError as error:
        raise typer.BadParameter(f"{path} cannot be read: {error.strerror}") from None
    except UnicodeDecodeError:
        raise typer.BadParameter(f"{path} is no text in UTF-8") from None


def _number(cell: str) -> float | None:
    try:
        value = float(cell)
    except ValueError:
        return None
    return value if math.isfinite(value) else None
