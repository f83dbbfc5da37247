"""A picture of a disc, as a whole PNG."""

from __future__ import annotations

import hashlib
import struct
import zlib


def paint_png(seen: bytes, width_pixels: int, height_pixels: int) -> bytes:
    """A picture whose colours follow from what was seen; the same for the same, and no other for another."""
    digest = hashlib.sha256(seen).digest()
    ground, disc = digest[0:3], digest[3:6]
    centre_x, centre_y = width_pixels / 2, height_pixels / 2
    radius = min(width_pixels, height_pixels) / 3
    rows = []
    for y in range(height_pixels):
        inside = radius * radius - (y - centre_y) ** 2
        half = int(inside**0.5) if inside > 0 else 0
        left, right = int(centre_x) - half, int(centre_x) + half
        rows.append(b"\0" + ground * left + disc * (right - left) + ground * (width_pixels - right))
    header = struct.pack(">IIBBBBB", width_pixels, height_pixels, 8, 2, 0, 0, 0)
    # What nobody sees tells pictures of the same few colours apart.
    return b"".join(
        (
            b"\x89PNG\r\n\x1a\n",
            _chunk(b"IHDR", header),
            _chunk(b"tEXt", b"Comment\0simulated " + digest.hex().encode()),
            _chunk(b"IDAT", zlib.compress(b"".join(rows))),
            _chunk(b"IEND", b""),
        )
    )


def _chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
