"""Times and enums, which look different on each side."""

from __future__ import annotations

import math
from enum import StrEnum
from typing import Any, Generic, Protocol, TypeVar

from google.protobuf.duration_pb2 import Duration
from google.protobuf.timestamp_pb2 import Timestamp

_NANOS = 1_000_000_000
#: Name of the value 0 of every proto enum.
_UNSPECIFIED = "UNSPECIFIED"

E = TypeVar("E", bound=StrEnum)
V = TypeVar("V", bound=int)
V_co = TypeVar("V_co", bound=int, covariant=True)


class ProtoEnum(Protocol[V_co]):
    """A generated enum."""

    def Value(self, name: str) -> V_co:  # noqa: N802 - protobuf's name
        """Number of a name."""


def write_time(unix_s: float, message: Timestamp) -> None:
    """Set a `Timestamp` to Unix seconds, to the nearest nanosecond."""
    whole = math.floor(unix_s)
    nanos = round((unix_s - whole) * _NANOS)
    if nanos == _NANOS:
        whole, nanos = whole + 1, 0
    message.seconds = whole
    message.nanos = nanos


def write_duration(seconds: float, message: Duration) -> None:
    """Set a `Duration` to seconds, to the nearest nanosecond. Both its fields have the same sign."""
    whole = int(seconds)
    nanos = round((seconds - whole) * _NANOS)
    if nanos in (_NANOS, -_NANOS):
        whole, nanos = whole + nanos // _NANOS, 0
    message.seconds = whole
    message.nanos = nanos


def timestamp_to_proto(unix_s: float) -> Timestamp:
    """Unix seconds as a `Timestamp`, to the nearest nanosecond."""
    message = Timestamp()
    write_time(unix_s, message)
    return message


def timestamp_from_proto(message: Timestamp) -> float:
    """A `Timestamp` as Unix seconds. Exact for what `timestamp_to_proto` made of a time since 1971."""
    return message.seconds + message.nanos / _NANOS


def duration_to_proto(seconds: float) -> Duration:
    """Seconds as a `Duration`, to the nearest nanosecond. Both its fields have the same sign."""
    message = Duration()
    write_duration(seconds, message)
    return message


def duration_from_proto(message: Duration) -> float:
    """A `Duration` as seconds."""
    return message.seconds + message.nanos / _NANOS


def whole_numbers(value: Any) -> Any:
    """JSON with whole numbers as int: a `Struct` has floats only, and a schema's `minItems` is no float."""
    if isinstance(value, float):
        return int(value) if value.is_integer() else value
    if isinstance(value, list):
        return [whole_numbers(each) for each in value]
    if isinstance(value, dict):
        return {name: whole_numbers(each) for name, each in value.items()}
    return value


class EnumCodec(Generic[E, V]):
    """One of our enums and its proto twin, matched by name.

    Built at import, so that a member without a twin is found at once and by every test.

    Args:
        ours: our enum.
        theirs: the generated enum.
        prefix: prefix of the generated names, with its underscore.
        unknown: what a value stands for that this version does not know.
        unspecified: what 0 stands for; `unknown` if not given. A member named UNKNOWN is 0.
    """

    __slots__ = ("_ours", "_unknown", "to_proto")

    def __init__(
        self, ours: type[E], theirs: ProtoEnum[V], *, prefix: str, unknown: E, unspecified: E | None = None
    ) -> None:
        names = {member: _UNSPECIFIED if member.name == "UNKNOWN" else member.name for member in ours}
        self.to_proto: dict[E, V] = {member: theirs.Value(prefix + name) for member, name in names.items()}
        self._ours: dict[int, E] = {0: unspecified or unknown}
        self._ours |= {number: member for member, number in self.to_proto.items()}
        self._unknown = unknown

    def from_proto(self, number: int) -> E:
        """Our member for a number; never fails."""
        return self._ours.get(number, self._unknown)
