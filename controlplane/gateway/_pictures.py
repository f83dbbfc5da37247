"""Pictures that callers send, and sizes that they ask for: what is none is refused, by its name."""

from __future__ import annotations

import base64
import binascii
import re

from rung.errors import InvalidRequestError
from rung.types import ImagePart

#: Neither a picture that is sent nor one that is asked for may be longer on a side: decoding a few bytes of
#: PNG may otherwise cost an engine all its memory.
MAX_SIDE_PIXELS = 8192
MIN_SIDE_PIXELS = 16
_SIZE = re.compile(r"(\d{1,6})x(\d{1,6})")
_DATA_URL = re.compile(r"data:[^,]*;base64,", re.ASCII)
#: JPEG's frame headers: what begins a scan's size. C4, C8 and CC are tables and extensions.
_JPEG_FRAMES = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}
#: JPEG's markers without a length: restarts, the start and the end of the picture.
_JPEG_BARE = frozenset(range(0xD0, 0xDA)) | {0x01}


def picture_of(data: bytes, name: str) -> ImagePart:
    """A picture from a file.

    Args:
        data: the file.
        name: what the caller knows it by, for the error.

    Raises:
        InvalidRequestError: it is no PNG, JPEG or WebP, or too large to be decoded.
    """
    if not data:
        raise InvalidRequestError(f"{name} is empty; send a PNG, JPEG or WebP file", param=name)
    found = _png(data) or _jpeg(data) or _webp(data)
    if found is None:
        raise InvalidRequestError(f"{name} is not an image; send a PNG, JPEG or WebP file", param=name)
    content_type, width, height = found
    if not (1 <= width <= MAX_SIDE_PIXELS and 1 <= height <= MAX_SIDE_PIXELS):
        raise InvalidRequestError(
            f"{name} is {width}x{height} pixels; each side must be 1 to {MAX_SIDE_PIXELS}", param=name
        )
    return ImagePart(content_type=content_type, data=data)


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


def check_side(name: str, pixels: int) -> None:
    """Refuse a side that no engine makes; 0 leaves it to the tier. Raises InvalidRequestError."""
    if pixels and not MIN_SIDE_PIXELS <= pixels <= MAX_SIDE_PIXELS:
        raise InvalidRequestError(
            f"{name} has a side of {pixels} pixels; it must be {MIN_SIDE_PIXELS} to {MAX_SIDE_PIXELS}",
            param=name,
        )


def _png(data: bytes) -> tuple[str, int, int] | None:
    if data[:8] != b"\x89PNG\r\n\x1a\n" or data[12:16] != b"IHDR" or len(data) < 24:
        return None
    return "image/png", int.from_bytes(data[16:20]), int.from_bytes(data[20:24])


def _jpeg(data: bytes) -> tuple[str, int, int] | None:
    """The size is in the first frame header; the segments before it are skipped by their lengths."""
    if data[:3] != b"\xff\xd8\xff":
        return None
    place = 2
    while place + 9 <= len(data) and data[place] == 0xFF:
        marker = data[place + 1]
        if marker in _JPEG_FRAMES:
            height, width = data[place + 5 : place + 7], data[place + 7 : place + 9]
            return "image/jpeg", int.from_bytes(width), int.from_bytes(height)
        if marker == 0xFF:
            place += 1
        elif marker in _JPEG_BARE:
            place += 2
        else:
            place += 2 + int.from_bytes(data[place + 2 : place + 4])
    return None


def _webp(data: bytes) -> tuple[str, int, int] | None:
    if data[:4] != b"RIFF" or data[8:12] != b"WEBP" or len(data) < 30:
        return None
    match data[12:16]:
        case b"VP8X":
            width = int.from_bytes(data[24:27], "little") + 1
            height = int.from_bytes(data[27:30], "little") + 1
        case b"VP8L":
            bits = int.from_bytes(data[21:25], "little")
            width, height = (bits & 0x3FFF) + 1, (bits >> 14 & 0x3FFF) + 1
        case b"VP8 ":
            width = int.from_bytes(data[26:28], "little") & 0x3FFF
            height = int.from_bytes(data[28:30], "little") & 0x3FFF
        case _:
            return None
    return "image/webp", width, height
