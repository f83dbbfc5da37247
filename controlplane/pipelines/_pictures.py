"""Pictures that callers send, by whatever way, and sizes that they ask for: what is none is refused. Pure."""

from __future__ import annotations

from msgspec.structs import replace

from rung.errors import InvalidRequestError
from rung.types import GenerationInput, ImageInput, ImagePart, MeshInput

#: Neither a picture that is sent nor one that is asked for may be longer on a side: decoding a few bytes of
#: PNG may otherwise cost an engine all its memory.
MAX_SIDE_PIXELS = 8192
MIN_SIDE_PIXELS = 16
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


def looked_into(wanted: GenerationInput, name: str) -> GenerationInput:
    """An input whose pictures are such, each with the media type that it has.

    Args:
        wanted: the input.
        name: what the caller knows it by, for the error.

    Raises:
        InvalidRequestError: as `picture_of`, for the first that is none.
    """
    match wanted:
        case ImageInput(images=images):
            pictures = tuple(
                picture_of(image.data, f"{name}.images[{place}]") for place, image in enumerate(images)
            )
            return replace(wanted, images=pictures)
        case MeshInput(image=ImagePart() as image):
            return replace(wanted, image=picture_of(image.data, f"{name}.image"))
        case _:
            return wanted


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
