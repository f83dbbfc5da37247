"""A simulation's report as a person reads it, and its progress."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

from controlplane.simulation._report import PolicyReport, SimulationReport
from controlplane.simulation._simulate import OnProgress
from rung.cli.views import format_duration

_RUNG = "rung"


def print_report(console: Console, report: SimulationReport) -> None:
    """The policies side by side, and then kind by kind."""
    console.print(
        Text.assemble(
            (report.trace, "bold"), f": {report.title}; {report.requests:,} requests, seed {report.seed}"
        )
    )
    console.print(_policies_table(report))
    console.print(_kinds_table(report))
    for each in report.policies:
        if each.refusals:
            why = ", ".join(f"{count} {reason}" for reason, count in each.refusals.items())
            console.print(Text(f"{each.policy} refused {why}", style="yellow"))
    console.print(
        Text(
            "no swap: nothing had to give way, be woken, started or loaded. swaps: weights brought in."
            "\ngrades: requests for which nobody / sleepers / also caches gave way. total: waiting of all."
            "\nbusy: of the time, that in which at least one request ran. VRAM: how full it was on average.",
            style="dim",
        )
    )


@contextmanager
def show_progress(console: Console) -> Iterator[OnProgress]:
    """A bar for each policy on a terminal, and a line when it is done elsewhere."""
    if not console.is_terminal:
        yield _lines(console)
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.completed:>5.0f} requests"),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=console, transient=True) as progress:
        tasks = {}

        def tell(policy: str, ended: int, requests: int) -> None:
            if policy not in tasks:
                tasks[policy] = progress.add_task(policy, total=requests)
            progress.update(tasks[policy], completed=ended)

        yield tell


def _lines(console: Console) -> OnProgress:
    def tell(policy: str, ended: int, requests: int) -> None:
        if ended == requests:
            console.print(Text(f"{policy}: {requests:,} requests have ended"))

    return tell


def _policies_table(report: SimulationReport) -> Table:
    table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False, header_style="dim")
    table.add_column("policy")
    for title in ("no swap", "swaps", "p50", "p95", "p99", "total", "÷ rung", "grades", "refused"):
        table.add_column(title, justify="right")
    table.add_column("busy", justify="right")
    table.add_column("VRAM", justify="right")
    baseline_s = next((each.waits.total_s for each in report.policies if each.policy == _RUNG), 0.0)
    for each in report.policies:
        waits = each.waits
        table.add_row(
            each.policy,
            f"{each.no_swap_share:.1%}",
            f"{each.swaps:,}",
            format_duration(waits.p50_s),
            format_duration(waits.p95_s),
            format_duration(waits.p99_s),
            format_duration(waits.total_s),
            f"{waits.total_s / baseline_s:.2f}" if baseline_s else "-",
            " / ".join(str(count) for count in each.grades.values()),
            str(sum(each.refusals.values())),
            f"{each.busy_share:.0%}",
            f"{each.vram_share:.0%}",
            style="bold" if each.policy == _RUNG else "",
        )
    return table


def _kinds_table(report: SimulationReport) -> Table:
    """Waits of each kind of request: p50 / p95 / p99 in seconds."""
    table = Table(
        box=None,
        padding=(0, 2, 0, 0),
        pad_edge=False,
        header_style="dim",
        title="waits by kind: p50 / p95 / p99 in seconds",
        title_justify="left",
        title_style="dim",
    )
    table.add_column("kind")
    table.add_column("requests", justify="right")
    for each in report.policies:
        table.add_column(each.policy, justify="right")
    for kind in report.policies[0].kinds:
        requests = report.policies[0].kinds[kind].requests
        table.add_row(kind, f"{requests:,}", *(_percentiles(each, kind) for each in report.policies))
    return table


def _percentiles(report: PolicyReport, kind: str) -> str:
    waits = report.kinds[kind]
    return f"{waits.p50_s:.1f} / {waits.p95_s:.1f} / {waits.p99_s:.1f}"
