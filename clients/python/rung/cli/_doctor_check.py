"""The outcome of one of the doctor's checks."""

from __future__ import annotations

from enum import StrEnum

from msgspec import Struct


class CheckStatus(StrEnum):
    """How it looks."""

    OK = "ok"
    WARN = "warn"
    FAIL = "fail"


class Check(Struct, frozen=True, kw_only=True):
    """What was found, and what to do about it (or "")."""

    name: str
    status: CheckStatus
    detail: str
    hint: str = ""
