"""How silent the streams of a picture are, how good its estimates are, and what watchers cost.

Real processes on a simulated GPU: a control plane, an agent, ComfyUI, and a reasoner that has to be put to
sleep for each picture. What a model takes to load and a step to compute is simulated; all between is not.

    python -m tests.benchmarks.streams [--pictures N] [--watchers N]
"""

from __future__ import annotations

import argparse
import asyncio
import tempfile
from collections.abc import Sequence
from pathlib import Path

from tests.integration.watching import (
    Prediction,
    bring_up,
    predictions,
    three_ways,
    watched_by,
    workstation,
)

_MIB = 1 << 20


async def cold_pictures(count: int) -> list[tuple[str, ...]]:
    """A row for each cold picture of `ultra`: its longest gaps, and what was said of its time."""
    rows: list[tuple[str, ...]] = []
    with tempfile.TemporaryDirectory() as folder:
        async with workstation(Path(folder)) as box:
            for number in range(1, count + 1):
                heard = await three_ways(box, request_id=f"picture-{number}", tier="ultra")
                gaps = [f"{each.longest_gap_s:.2f}" for each in heard]
                end_s = heard[0].lines[-1]["elapsed_s"]
                said = [_in_words(each) for each in predictions(heard[0])]
                rows.append((str(number), f"{end_s:.1f}", *gaps, *said))
                await bring_up(box, "reasoner")
    return rows


async def crowds(watchers: int) -> list[tuple[str, ...]]:
    """A row for a job without watchers, and with many of whom a twentieth reads nothing."""
    rows: list[tuple[str, ...]] = []
    stalled = watchers // 20
    with tempfile.TemporaryDirectory() as folder:
        async with workstation(Path(folder), speed=4, load_s=0.2) as box:
            wanted = {"tier": "lightning", "parameters": {"steps": 60}, "previews": True}
            await watched_by(box, 1, 0, **wanted)
            for readers, idle in ((1, 0), (watchers - stalled, stalled)):
                crowd = await watched_by(box, readers, idle, **wanted)
                rows.append(
                    (
                        f"{readers + idle} ({idle} stalled)",
                        str(crowd.events),
                        f"{crowd.took_s:.2f}",
                        f"{crowd.grew_bytes / _MIB:.1f}",
                    )
                )
    return rows


def _in_words(found: Prediction | None) -> str:
    if found is None:
        return "not known"
    return f"{found.said_s:.1f} of {found.took_s:.1f} ({100 * found.relative_error:.0f} %)"


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """As Markdown."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def main() -> None:
    """Measure, and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pictures", type=int, default=4)
    parser.add_argument("--watchers", type=int, default=200)
    options = parser.parse_args()
    rows = asyncio.run(cold_pictures(options.pictures))
    head = (
        "picture",
        "took, s",
        "gRPC gap, s",
        "NDJSON gap, s",
        "SSE gap, s",
        "job said, s",
        "sampling said, s",
    )
    print(table(head, rows))
    print()
    rows = asyncio.run(crowds(options.watchers))
    print(table(("watchers", "events", "took, s", "memory grew, MiB"), rows))


if __name__ == "__main__":
    main()
