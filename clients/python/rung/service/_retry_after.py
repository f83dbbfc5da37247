"""When an HTTP server wants to be asked again. Pure."""

from __future__ import annotations

import math
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime


def parse_retry_after(text: str, now_s: float) -> float | None:
    """Seconds from a `Retry-After`: a number of them, or an HTTP date; None for neither.

    Args:
        text: the header's value; empty if there was none.
        now_s: Unix time, for a date.
    """
    text = text.strip()
    seconds = parse_seconds(text)
    return seconds_until(_http_date(text), now_s) if seconds is None else seconds


def parse_seconds(text: str) -> float | None:
    """A number of seconds, never below 0; None for what is no finite number."""
    try:
        value = float(text)
    except ValueError:
        return None
    return max(0.0, value) if math.isfinite(value) else None


def seconds_until(when: datetime | None, now_s: float) -> float | None:
    """Seconds until a time, UTC unless it says otherwise, never below 0; None for none that exists."""
    if when is None:
        return None
    if when.tzinfo is None:
        when = when.replace(tzinfo=UTC)
    try:
        return max(0.0, when.timestamp() - now_s)
    except (OverflowError, ValueError):
        return None


def _http_date(text: str) -> datetime | None:
    try:
        return parsedate_to_datetime(text)
    except ValueError:
        return None
