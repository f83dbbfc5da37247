"""A whole file in the pieces in which a generation gives it."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator

from rung.types import ArtifactChunk

#: Most bytes of one piece.
PIECE_BYTES = 256 * 1024


def pieces_of(
    artifact_id: str, content_type: str, data: bytes, *, preview: bool = False
) -> Iterator[ArtifactChunk]:
    """The pieces of a file that is there as a whole, in order; the last one has its SHA-256.

    Args:
        artifact_id: unique within its generation.
        content_type: its media type.
        data: the file; an empty one is one empty piece.
        preview: it is no result.
    """
    size_bytes = len(data)
    for offset_bytes in range(0, max(size_bytes, 1), PIECE_BYTES):
        piece = data[offset_bytes : offset_bytes + PIECE_BYTES]
        last = offset_bytes + len(piece) == size_bytes
        yield ArtifactChunk(
            artifact_id=artifact_id,
            content_type=content_type,
            offset_bytes=offset_bytes,
            data=piece,
            length_bytes=len(piece),
            sha256=hashlib.sha256(data).hexdigest() if last else "",
            size_bytes=size_bytes,
            preview=preview,
        )
