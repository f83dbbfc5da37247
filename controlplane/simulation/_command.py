"""`rung simulate`: what it prints, for each of its options."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import msgspec
from rich.console import Console
from rich.table import Table

from controlplane.simulation._simulate import POLICIES, simulate
from controlplane.simulation._trace import find_trace, load_trace, shipped_traces
from controlplane.simulation._view import print_report, show_progress


def run_simulate(
    name: str,
    *,
    policies: Sequence[str],
    seed: int | None,
    as_json: bool,
    out: Console,
    err: Console,
) -> None:
    """Simulate a trace and print the report; progress goes to the other console.

    Raises:
        NotFoundError: there is no such trace, or no such policy.
        ConfigError: the trace cannot be used.
    """
    trace = load_trace(find_trace(name))
    with show_progress(err) as tell:
        report = simulate(name, trace, policies=policies or tuple(POLICIES), seed=seed, on_progress=tell)
    if as_json:
        _print_json(out, report)
    else:
        print_report(out, report)


def print_traces(out: Console, *, as_json: bool) -> None:
    """The traces that come with Rung, and the policies."""
    traces = {
        name: f"{trace.title}. {trace.description}"
        for name, path in shipped_traces().items()
        for trace in (load_trace(path),)
    }
    policies = {name: (policy.__doc__ or "").strip().split("\n", 1)[0] for name, policy in POLICIES.items()}
    if as_json:
        _print_json(out, {"traces": traces, "policies": policies})
        return
    out.print(_table("trace", "what it is", traces))
    out.print()
    out.print(_table("policy", "what it does", policies))


def _table(name: str, meaning: str, rows: Mapping[str, str]) -> Table:
    table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False, header_style="dim")
    table.add_column(name)
    table.add_column(meaning)
    for row in rows.items():
        table.add_row(*row)
    return table


def _print_json(out: Console, value: object) -> None:
    out.file.write(msgspec.json.format(msgspec.json.encode(value), indent=2).decode() + "\n")
