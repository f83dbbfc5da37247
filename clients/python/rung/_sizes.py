"""Sizes as people write them."""

from __future__ import annotations

import re

_SIZE = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([kKMGT]i?)?B?\s*")
_SIZE_FACTORS = {"k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12}


def parse_size(value: object) -> object:
    """Bytes from `12.8GiB`, `20GB` or a number; other values are left for pydantic to refuse.

    Raises:
        ValueError: text that is not a size.
    """
    if not isinstance(value, str):
        return value
    found = _SIZE.fullmatch(value)
    if found is None:
        raise ValueError(f"{value!r} is not a size; write for instance 12GiB or 500MB")
    number, unit = float(found[1]), (found[2] or "")
    if not unit:
        return int(number)
    power = "kmgt".index(unit[0].lower()) + 1
    return int(number * (1024**power if unit.endswith("i") else _SIZE_FACTORS[unit[0].lower()]))
