"""Pictures and their sizes as texts of HTTP requests."""

from __future__ import annotations

import base64
import binascii
import re

from controlplane.pipelines import check_side, picture_of
from rung.errors import InvalidRequestError
from rung.types import ImagePart

_SIZE = re.compile(r"(\d{1,6})x(\d{1,6})")
_DATA_URL = re.compile(r"data:[^,]*;base64,", re.ASCII)


def picture_from_text(text: str, name: str) -> ImagePart:
    """A picture from base64 or a `data:` URL. Raises InvalidRequestError, as `picture_of`."""
    if text.startswith(("http://", "https://")):
        raise InvalidRequestError(
            f"{name} is an address; pictures are not fetched from anywhere: send base64 or a data: URL",
            param=name,
        )
    head = _DATA_URL.match(text)
    try:
        data = base64.b64decode(text[head.end() :] if head else text, validate=True)
    except (binascii.Error, ValueError):
        raise InvalidRequestError(f"{name} is not valid base64", param=name) from None
    return picture_of(data, name)


def read_size(text: str) -> tuple[int, int]:
    """Width and height from `1024x1024`; 0 and 0 for `auto`. Raises InvalidRequestError."""
    if text in ("", "auto"):
        return 0, 0
    found = _SIZE.fullmatch(text)
    if found is None:
        raise InvalidRequestError(
            f"size is {text[:40]!r}; it must be WIDTHxHEIGHT, such as 1024x1024, or auto", param="size"
        )
    width, height = int(found[1]), int(found[2])
    check_side("size", width)
    check_side("size", height)
    return width, height
