"""What a prompt made: which files are its result, what they are, and their bytes as they come."""

from __future__ import annotations

import hashlib
import mimetypes
from collections.abc import AsyncGenerator, Mapping
from contextlib import aclosing, suppress
from typing import Any

import msgspec

from nodeagent.engines._artifact import PIECE_BYTES
from nodeagent.engines._comfyui_http import ComfyUiHttp, FileReply, StoredFile
from rung.errors import EngineProtocolError
from rung.types import ArtifactChunk

_UNKNOWN = "application/octet-stream"
#: How files begin: offset, bytes, media type.
_SIGNATURES = (
    (0, b"\x89PNG\r\n\x1a\n", "image/png"),
    (0, b"\xff\xd8\xff", "image/jpeg"),
    (0, b"GIF8", "image/gif"),
    (8, b"WEBP", "image/webp"),
    (8, b"WAVE", "audio/wav"),
    (4, b"ftypavif", "image/avif"),
    (4, b"ftyp", "video/mp4"),
    (0, b"\x1aE\xdf\xa3", "video/webm"),
    (0, b"glTF", "model/gltf-binary"),
    (0, b"fLaC", "audio/flac"),
    (0, b"OggS", "audio/ogg"),
    (0, b"ID3", "audio/mpeg"),
)
#: A container does not say what is in it, nor that it is Matroska's; the name does.
_BY_NAME = {
    ".mov": "video/quicktime",
    ".mkv": "video/x-matroska",
    ".m4a": "audio/mp4",
    ".glb": "model/gltf-binary",
    ".webp": "image/webp",
    ".opus": "audio/ogg",
}


def files_of(outputs: Mapping[str, Any]) -> list[StoredFile]:
    """The files that are the result: those that were saved, or else those that were only shown.

    Nodes list them under `images`, `gifs`, `videos`, `audio`, …: whatever lists files counts. Each once, in
    the order of the nodes' ids.
    """
    found: dict[StoredFile, None] = {}
    for node_id in sorted(outputs, key=_node_order):
        shown = outputs[node_id]
        for rows in shown.values() if isinstance(shown, dict) else ():
            for row in rows if isinstance(rows, list) else ():
                # Some nodes show other things in lists.
                with suppress(msgspec.ValidationError):
                    found[msgspec.convert(row, StoredFile)] = None
    for kind in ("output", "temp"):
        chosen = [file for file in found if file.type == kind]
        if chosen:
            return chosen
    return []


def _node_order(node_id: str) -> tuple[int, str]:
    # Nodes of a group have ids such as 12:3.
    first = node_id.partition(":")[0]
    return (int(first) if first.isdecimal() else 2**31, node_id)


def content_type_of(filename: str, start: bytes, told: str) -> str:
    """The media type of a file, from how it begins, from its name, or else as it was told."""
    suffix = "." + filename.rpartition(".")[2].lower()
    sniffed = next((kind for offset, mark, kind in _SIGNATURES if start.startswith(mark, offset)), "")
    if sniffed in ("video/mp4", "video/webm", "audio/ogg", "") and suffix in _BY_NAME:
        return _BY_NAME[suffix]
    return sniffed or mimetypes.guess_type(filename)[0] or told or _UNKNOWN


async def pieces_of_file(
    http: ComfyUiHttp, artifact_id: str, file: StoredFile, *, idle_timeout_s: float
) -> AsyncGenerator[ArtifactChunk, None]:
    """A file as artifact, in pieces as it comes; the last one has its size and its SHA-256.

    Raises:
        EngineFailedError: ComfyUI does not have it.
        EngineUnreachableError, EngineTimeoutError, EngineProtocolError: as the engine client does.
    """
    async with http.view(file, idle_timeout_s=idle_timeout_s) as reply:
        content_type, offset_bytes = "", 0
        sha256 = hashlib.sha256()
        async with aclosing(_whole_pieces(reply)) as pieces:
            async for data, is_last in pieces:
                content_type = content_type or content_type_of(file.filename, data, reply.content_type)
                sha256.update(data)
                end = offset_bytes + len(data)
                if is_last and reply.size_bytes and end != reply.size_bytes:
                    raise EngineProtocolError(
                        f"{http.what}: {file.filename} has {reply.size_bytes} bytes, and {end} came"
                    )
                yield ArtifactChunk(
                    artifact_id=artifact_id,
                    content_type=content_type,
                    offset_bytes=offset_bytes,
                    data=data,
                    length_bytes=len(data),
                    sha256=sha256.hexdigest() if is_last else "",
                    size_bytes=end if is_last else reply.size_bytes,
                )
                offset_bytes = end


async def _whole_pieces(reply: FileReply) -> AsyncGenerator[tuple[bytes, bool], None]:
    """The bytes in pieces of one size but for the last one, and which that is."""
    held = bytearray()
    async for data in reply.pieces():
        held += data
        # One is held back: it may be the last.
        while len(held) > PIECE_BYTES:
            yield bytes(held[:PIECE_BYTES]), False
            del held[:PIECE_BYTES]
    yield bytes(held), True
