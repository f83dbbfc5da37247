"""A curve in one line of text."""

from __future__ import annotations

from collections.abc import Sequence

_LEVELS = "▁▂▃▄▅▆▇█"


def sparkline(known: Sequence[float], ahead: Sequence[float]) -> tuple[str, str]:
    """A curve and how it goes on, in the same scale, one character a value."""
    least, most = min(*known, *ahead), max(*known, *ahead)
    scale = (len(_LEVELS) - 1) / (most - least) if most > least else 0.0

    def drawn(values: Sequence[float]) -> str:
        return "".join(_LEVELS[round((value - least) * scale)] for value in values)

    return drawn(known), drawn(ahead)
