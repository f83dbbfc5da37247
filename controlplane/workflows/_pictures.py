"""What the first bytes of a picture tell. Pure."""

from __future__ import annotations

_SUFFIXES = {"image/jpeg": ".jpg", "image/png": ".png", "image/webp": ".webp", "image/gif": ".gif"}

_PNG = b"\x89PNG\r\n\x1a\n"
_PNG_COLOUR_TYPE = 25
_PNG_WITH_ALPHA = (4, 6)
#: Chunks that may stand before the pixels are few; a palette's transparency is one of them.
_PNG_HEAD_BYTES = 4096


def suffix_of(content_type: str) -> str:
    """How the name of a file of this media type ends; `.png` for one that is not known."""
    return _SUFFIXES.get(content_type.partition(";")[0].strip().lower(), ".png")


def has_alpha(data: bytes) -> bool:
    """Whether a picture has transparency, as far as PNG and WebP say so in their heads."""
    if data.startswith(_PNG) and len(data) > _PNG_COLOUR_TYPE:
        return data[_PNG_COLOUR_TYPE] in _PNG_WITH_ALPHA or b"tRNS" in data[:_PNG_HEAD_BYTES]
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP" and len(data) > 24:
        if data[12:16] == b"VP8X":
            return bool(data[20] & 0x10)
        if data[12:16] == b"VP8L":
            return bool(data[24] & 0x10)
    return False
