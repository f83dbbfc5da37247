"""Figures as people read them."""

from __future__ import annotations

import math
import re
import unicodedata

from rich.console import Console

_KIB = 1024
_BINARY_UNITS = ("B", "KiB", "MiB", "GiB", "TiB")
_MINUTE_S = 60
_HOUR_S = 60 * _MINUTE_S
_DAY_S = 24 * _HOUR_S
_TIME_AT_END = re.compile(r" \(\d+ s\)$")


def format_bytes(size_bytes: float | None) -> str:
    """`12.3 GiB`; `-` if the size is not known."""
    if size_bytes is None:
        return "-"
    size = float(size_bytes)
    for unit in _BINARY_UNITS[:-1]:
        if abs(size) < _KIB:
            return f"{size:.1f} {unit}" if unit == "GiB" else f"{size:.0f} {unit}"
        size /= _KIB
    return f"{size:.1f} {_BINARY_UNITS[-1]}"


def format_part(used_bytes: float, total_bytes: float) -> str:
    """`12.3 / 31.8 GiB`: two sizes in the unit of the larger."""
    total = format_bytes(total_bytes)
    unit = total.rsplit(" ", 1)[-1]
    used = used_bytes / _KIB ** _BINARY_UNITS.index(unit)
    return f"{used:.1f} / {total}" if "." in total else f"{used:.0f} / {total}"


def format_duration(duration_s: float | None) -> str:
    """`0.42 s`, `7.1 s`, `3 min 20 s`, `5 h 02 min`, `2 d 3 h`; `-` if it is not known."""
    if duration_s is None:
        return "-"
    if duration_s < 1:
        return f"{max(duration_s, 0.0):.2f} s"
    if duration_s < _MINUTE_S:
        return f"{duration_s:.1f} s"
    whole = int(duration_s)
    if whole < _HOUR_S:
        return f"{whole // _MINUTE_S} min {whole % _MINUTE_S:02d} s"
    if whole < _DAY_S:
        return f"{whole // _HOUR_S} h {whole % _HOUR_S // _MINUTE_S:02d} min"
    return f"{whole // _DAY_S} d {whole % _DAY_S // _HOUR_S} h"


def format_left(remaining_s: float) -> str:
    """`3 s left`, `2 min 05 s left`: an estimate, so in whole seconds."""
    if remaining_s < _MINUTE_S:
        return f"{max(math.ceil(remaining_s), 1)} s left"
    return f"{format_duration(remaining_s)} left"


def format_age(time_s: float | None, now_s: float) -> str:
    """How long ago something was: `just now`, `12 s ago`, `3 min ago`; `-` if it never was."""
    if time_s is None:
        return "-"
    age_s = int(max(now_s - time_s, 0.0))
    if age_s < 2:
        return "just now"
    if age_s < _MINUTE_S:
        return f"{age_s} s ago"
    if age_s < _HOUR_S:
        return f"{age_s // _MINUTE_S} min ago"
    if age_s < _DAY_S:
        return f"{age_s // _HOUR_S} h ago"
    return f"{age_s // _DAY_S} d ago"


def without_time(detail: str) -> str:
    """A detail without the `(12 s)` at its end: the same for as long as the same thing goes on."""
    return _TIME_AT_END.sub("", detail)


def printable(text: str) -> str:
    """Text without control characters other than line ends and tabs.

    What a model or an engine says goes to a terminal; escape sequences in it would be obeyed.
    """
    if text.isprintable():
        return text
    return "".join(
        character
        for character in text
        if character in "\n\t"
        or unicodedata.category(character) not in ("Cc", "Cf", "Cs")
        # Joiners make up emoji and several scripts; they move no cursor.
        or character in "\u200c\u200d"
    )


def spinner_name(console: Console) -> str:
    """The spinner that a console can draw."""
    return "line" if console.options.ascii_only else "dots"
