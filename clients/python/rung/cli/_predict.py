"""`rung forecast`, `rung classify` and `rung regress`: predictions from a CSV file."""

from __future__ import annotations

import csv
import sys
from collections.abc import Sequence
from typing import Annotated

import typer
from rich.table import Table as RichTable
from rich.text import Text

from rung import ClassifyTask, ForecastTask, Policy, Predictions, RegressTask
from rung.cli._models import Json
from rung.cli._session import Session, session_of
from rung.cli._tables import Line, Table, format_numbers, read_table
from rung.cli.views import served_name, sparkline
from rung.types import PredictionTask, Priority

_KNOWN_CELLS = 48

File = Annotated[str, typer.Argument(metavar="FILE", help="A CSV file; - or nothing reads stdin.")]
Model = Annotated[str, typer.Option("--model", "-m", help="A name from `rung models`.")]
LocalOnly = Annotated[bool, typer.Option("--local-only", help="Never leave your own hardware.")]
Features = Annotated[
    list[str] | None,
    typer.Option("--feature", "-f", metavar="COLUMN", help="Column to predict from; all others by default."),
]


def add_to(app: typer.Typer) -> None:
    """Add the commands of this module."""
    app.command()(forecast)
    app.command()(classify)
    app.command()(regress)


def forecast(
    context: typer.Context,
    file: File = "-",
    column: Annotated[
        list[str] | None,
        typer.Option("--column", "-c", help="Column to continue; may be given more than once."),
    ] = None,
    horizon: Annotated[
        int, typer.Option("--horizon", "-n", min=1, max=1024, help="How many values to forecast.")
    ] = 12,
    model: Model = "",
    local_only: LocalOnly = False,
    as_json: Json = False,
) -> None:
    """Continue a column of numbers, the oldest first.

    The numbers go to stdout; a small curve, and who forecast them, to stderr. A range should hold four
    values in five.

    Examples: rung forecast sales.csv --column sales --horizon 12

    seq 1 20 | rung forecast -n 5 --json
    """
    session = session_of(context)
    table = read_table(file)
    columns = _columns(table, column or [])
    series = tuple(table.numbers(at) for at in columns)
    found = _predict(session, ForecastTask(series=series, horizon=horizon), model, local_only)
    names = [table.names[at] for at in columns]
    if as_json:
        session.print_json(_forecast_fields(names, found))
        return
    for name, known, ahead in zip(names, series, found.forecasts, strict=True):
        before, after = sparkline(known[-_KNOWN_CELLS:], ahead)
        session.err.print(Text.assemble(f"{name}  ", (before, "dim"), after))
    session.out.print(_forecast_table(names, found, first=len(table.lines) + 1))
    _tell(session, found)


def classify(
    context: typer.Context,
    column: Annotated[str, typer.Option("--column", "-c", help="Column of the classes.")],
    file: File = "-",
    feature: Features = None,
    model: Model = "",
    local_only: LocalOnly = False,
    as_json: Json = False,
) -> None:
    """Fill in the classes that a column lacks, from the rows that have one; 2 to 10 classes.

    The whole table goes to stdout as CSV, with no class missing.

    Example: rung classify irises.csv --column species > filled.csv
    """
    session = session_of(context)
    table = read_table(file)
    target, features = table.index(column), _features(table, column, feature or [])
    known, missing = _split(table, target)
    task = ClassifyTask(
        context=_rows(table, known, features),
        labels=tuple(line.cells[target] for line in known),
        rows=_rows(table, missing, features),
    )
    found = _predict(session, task, model, local_only)
    _fill(session, table, target, missing, found.labels, found, as_json=as_json)


def regress(
    context: typer.Context,
    column: Annotated[str, typer.Option("--column", "-c", help="Column of the numbers.")],
    file: File = "-",
    feature: Features = None,
    model: Model = "",
    local_only: LocalOnly = False,
    as_json: Json = False,
) -> None:
    """Fill in the numbers that a column lacks, from the rows that have one.

    The whole table goes to stdout as CSV, with no number missing.

    Example: rung regress flats.csv --column rent > filled.csv
    """
    session = session_of(context)
    table = read_table(file)
    target, features = table.index(column), _features(table, column, feature or [])
    known, missing = _split(table, target)
    task = RegressTask(
        context=_rows(table, known, features),
        targets=tuple(table.number(line, target) for line in known),
        rows=_rows(table, missing, features),
    )
    found = _predict(session, task, model, local_only)
    values: Sequence[object] = found.values if as_json else format_numbers(found.values)
    _fill(session, table, target, missing, values, found, as_json=as_json)


def _columns(table: Table, wanted: Sequence[str]) -> list[int]:
    """Those to forecast. Raises typer.BadParameter."""
    if wanted:
        return [table.index(name) for name in wanted]
    numeric = [at for at in range(len(table.names)) if table.is_numeric(at)]
    if len(numeric) == 1:
        return numeric
    there = ", ".join(table.names[at] for at in numeric)
    if not numeric:
        raise typer.BadParameter("no column has numbers only; --column says which one is to be forecast")
    raise typer.BadParameter(f"several columns have numbers; say which with --column: {there}")


def _features(table: Table, target: str, wanted: Sequence[str]) -> list[int]:
    """Columns to predict from. Raises typer.BadParameter: one has something else than numbers."""
    if target in wanted:
        raise typer.BadParameter(f"{target} is what is predicted; it cannot be a --feature, too")
    found = [table.index(name) for name in wanted or table.names if name != target]
    if not found:
        raise typer.BadParameter(f"there is nothing to predict {target} from: it is the only column")
    for at in found:
        if not wanted and not table.is_numeric(at):
            names = [table.names[each] for each in found if table.is_numeric(each)]
            use = " ".join(f"--feature {name}" for name in names)
            hint = f"; {use} leaves it out" if use else ""
            raise typer.BadParameter(f"the column {table.names[at]} has something else than numbers{hint}")
    return found


def _split(table: Table, target: int) -> tuple[list[Line], list[Line]]:
    """The rows that have a value, and those that lack it. Raises typer.BadParameter."""
    name = table.names[target]
    known = [line for line in table.lines if line.cells[target]]
    missing = [line for line in table.lines if not line.cells[target]]
    if not missing:
        raise typer.BadParameter(f"no row lacks its {name}; leave those empty that are to be predicted")
    if not known:
        raise typer.BadParameter(f"no row has its {name}; some are needed to predict the others from")
    return known, missing


def _rows(table: Table, lines: Sequence[Line], features: Sequence[int]) -> tuple[tuple[float, ...], ...]:
    return tuple(tuple(table.number(line, at) for at in features) for line in lines)


def _predict(session: Session, task: PredictionTask, model: str, local_only: bool) -> Predictions:
    policy = Policy(local_only=local_only, priority=Priority.USER)
    with session.err.status("predicting; a model that sleeps is woken first"):
        return session.run(lambda client: client.predict(task, model=model, policy=policy))


def _forecast_fields(names: Sequence[str], found: Predictions) -> dict[str, object]:
    columns = [
        {
            "column": name,
            "forecast": found.forecasts[at],
            "quantiles": [{"level": each.level, "values": each.forecasts[at]} for each in found.quantiles],
        }
        for at, name in enumerate(names)
    ]
    return {"columns": columns, "served": found.served, "job_id": found.job_id}


def _forecast_table(names: Sequence[str], found: Predictions, *, first: int) -> RichTable:
    """A row for each step, which goes on counting where the known ones ended."""
    table = RichTable(box=None, header_style="bold")
    table.add_column("step", justify="right")
    shown: list[list[str]] = []
    by_level = {each.level: each.forecasts for each in found.quantiles}
    low, high = by_level.get(0.1), by_level.get(0.9)
    for at, name in enumerate(names):
        table.add_column(Text(name), justify="right")
        ahead = found.forecasts[at]
        every = format_numbers([*ahead, *low[at], *high[at]] if low and high else ahead)
        shown.append(every[: len(ahead)])
        if low and high:
            table.add_column("range", style="dim")
            lows, highs = every[len(ahead) : 2 * len(ahead)], every[2 * len(ahead) :]
            shown.append([f"{below} … {above}" for below, above in zip(lows, highs, strict=True)])
    for step, cells in enumerate(zip(*shown, strict=True), start=first):
        table.add_row(str(step), *cells)
    return table


def _fill(
    session: Session,
    table: Table,
    target: int,
    missing: Sequence[Line],
    values: Sequence[object],
    found: Predictions,
    *,
    as_json: bool,
) -> None:
    """Print what was predicted: the whole table, or the lines and their values."""
    if as_json:
        rows = [{"line": line.number, "value": value} for line, value in zip(missing, values, strict=True)]
        session.print_json(
            {"column": table.names[target], "rows": rows, "served": found.served, "job_id": found.job_id}
        )
        return
    filled = {line.number: value for line, value in zip(missing, values, strict=True)}
    writer = csv.writer(sys.stdout, delimiter=table.delimiter, lineterminator="\n")
    if table.has_header:
        writer.writerow(table.names)
    for line in table.lines:
        cells = list[object](line.cells)
        cells[target] = filled.get(line.number, cells[target])
        writer.writerow(cells)
    _tell(session, found)


def _tell(session: Session, found: Predictions) -> None:
    session.err.print(Text(f"{served_name(found.served)} · job {found.job_id}", style="dim"))
