"""GPU memory as a bar: who holds how much of it."""

from __future__ import annotations

from collections.abc import Sequence

from msgspec import Struct
from rich.text import Text

from rung.cli.views._words import format_bytes, format_part
from rung.types import Deployment, Gpu

_COLOURS = ("cyan", "magenta", "yellow", "green", "blue", "red")
_OTHERS_COLOUR = "bright_black"
#: Deployment, others, free; and the same for terminals that know ASCII only.
_BLOCKS = ("█", "▒", "░")
_ASCII_BLOCKS = ("#", "+", ".")


class VramShare(Struct, frozen=True):
    """What one deployment holds on a GPU. No `deployment_id`: memory of nobody we know."""

    deployment_id: str
    memory_bytes: int


def vram_shares(gpu: Gpu, deployments: Sequence[Deployment], *, gpu_count: int = 1) -> tuple[VramShare, ...]:
    """Who holds the used memory of `gpu`, by deployment id, others last; they sum up to what is used.

    The processes on the GPU count where the platform tells their memory. Where it does not (unified
    memory, WSL2) a deployment's own figure is taken, if its node has no other GPU that it may be on.

    Args:
        gpu: the device.
        deployments: those of its node.
        gpu_count: how many GPUs the node has.
    """
    held: dict[str, int] = {}
    for process in gpu.processes:
        if process.deployment_id and process.memory_bytes:
            held[process.deployment_id] = held.get(process.deployment_id, 0) + process.memory_bytes
    if gpu_count == 1:
        for deployment in deployments:
            if deployment.spec.id not in held and deployment.vram_bytes:
                held[deployment.spec.id] = deployment.vram_bytes
    shares: list[VramShare] = []
    left = gpu.memory_used_bytes
    for deployment_id, memory_bytes in sorted(held.items()):
        # Samples of a moment ago may add up to more than what is used now.
        taken = min(memory_bytes, left)
        if taken > 0:
            shares.append(VramShare(deployment_id, taken))
            left -= taken
    if left > 0:
        shares.append(VramShare("", left))
    return tuple(shares)


def bar_cells(shares: Sequence[VramShare], total_bytes: int, width: int) -> tuple[int, ...]:
    """How many of `width` cells each share gets: rounded so that the sum is right, and never past `width`.

    A share that is there gets one cell at least while there are cells, so that it is not overlooked.
    """
    if total_bytes <= 0 or width <= 0:
        return (0,) * len(shares)
    cells: list[int] = []
    reached_bytes = 0
    reached_cells = 0
    for place, share in enumerate(shares):
        reached_bytes += share.memory_bytes
        still_to_come = len(shares) - place - 1
        end = round(width * min(reached_bytes / total_bytes, 1.0))
        end = max(end, reached_cells + 1)
        end = min(end, max(width - still_to_come, reached_cells))
        cells.append(end - reached_cells)
        reached_cells = end
    return tuple(cells)


def share_colours(shares: Sequence[VramShare]) -> tuple[str, ...]:
    """A colour for each share."""
    return tuple(
        _COLOURS[place % len(_COLOURS)] if share.deployment_id else _OTHERS_COLOUR
        for place, share in enumerate(shares)
    )


def vram_bar(gpu: Gpu, shares: Sequence[VramShare], *, width: int, ascii_only: bool = False) -> Text:
    """A bar of `width` cells and the figures: `████▒░░░░ 12.3 / 31.8 GiB`."""
    full, others, free = _ASCII_BLOCKS if ascii_only else _BLOCKS
    bar = Text()
    used_cells = 0
    cells = bar_cells(shares, gpu.memory_total_bytes, width)
    for share, colour, count in zip(shares, share_colours(shares), cells, strict=True):
        bar.append((full if share.deployment_id else others) * count, style=colour)
        used_cells += count
    bar.append(free * (width - used_cells), style="dim")
    bar.append(f" {format_part(gpu.memory_used_bytes, gpu.memory_total_bytes)}")
    return bar


def vram_legend(shares: Sequence[VramShare], *, ascii_only: bool = False) -> Text:
    """Which part of the bar is whose: `█ nemotron-8b 9.3 GiB  ▒ others 1.2 GiB`."""
    full, others, _ = _ASCII_BLOCKS if ascii_only else _BLOCKS
    legend = Text()
    for share, colour in zip(shares, share_colours(shares), strict=True):
        if legend:
            legend.append("  ")
        legend.append(full if share.deployment_id else others, style=colour)
        legend.append(f" {share.deployment_id or 'others'} ")
        legend.append(format_bytes(share.memory_bytes), style="dim")
    return legend
