"""Fetching artifacts: whole or into a file, through lost connections, checked by their SHA-256."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import AsyncGenerator
from contextlib import aclosing
from pathlib import Path
from typing import BinaryIO

from rung import codec, v1
from rung._client_calls import Connection, Reconnect
from rung.errors import (
    ArtifactDamagedError,
    OutOfRangeError,
    RungError,
    UnavailableError,
    UnknownArtifactError,
)
from rung.types import ArtifactChunk, artifact_file_name

#: After these nobody can go on with what was written.
_NO_PART_OF_IT = (ArtifactDamagedError, OutOfRangeError, UnknownArtifactError)


async def get_artifact(connection: Connection, artifact_id: str) -> bytes:
    """The whole of an artifact, in memory."""
    content = bytearray()
    sha256 = ""
    async with aclosing(_chunks(connection, artifact_id, 0)) as chunks:
        async for chunk in chunks:
            content += chunk.data
            sha256 = chunk.sha256
    whole = bytes(content)
    _check(artifact_id, await asyncio.to_thread(lambda: hashlib.sha256(whole).hexdigest()), sha256)
    return whole


async def save_artifact(connection: Connection, artifact_id: str, path: Path) -> Path:
    """Write an artifact to a file, going on where an earlier attempt stopped."""
    into_folder = await asyncio.to_thread(path.is_dir)
    part = (path if into_folder else path.parent) / f"{artifact_id}.part"
    file, digest = await asyncio.to_thread(_open_part, part)
    try:
        last = await _receive(connection, artifact_id, file, digest)
        _check(artifact_id, digest.hexdigest(), last.sha256)
    except RungError as error:
        if isinstance(error, _NO_PART_OF_IT) or file.tell() == 0:
            await asyncio.to_thread(part.unlink, missing_ok=True)
        raise
    finally:
        await asyncio.to_thread(file.close)
    target = path / artifact_file_name(artifact_id, last.content_type) if into_folder else path
    await asyncio.to_thread(part.replace, target)
    return target


async def _receive(
    connection: Connection, artifact_id: str, file: BinaryIO, digest: hashlib._Hash
) -> ArtifactChunk:
    """The last piece; all are in the file then."""

    def append(data: bytes) -> None:
        file.write(data)
        digest.update(data)

    last: ArtifactChunk | None = None
    async with aclosing(_chunks(connection, artifact_id, file.tell())) as chunks:
        async for last in chunks:
            await asyncio.to_thread(append, last.data)
    assert last is not None, "a stream of pieces ends with the last one, or raises"
    return last


async def _chunks(
    connection: Connection, artifact_id: str, offset_bytes: int
) -> AsyncGenerator[ArtifactChunk, None]:
    """The pieces from a place on, to the one with the SHA-256."""
    reconnect = Reconnect(connection.reconnect_s)
    while True:
        request = v1.GetArtifactRequest(artifact_id=artifact_id, offset_bytes=offset_bytes)
        try:
            responses = connection.stream(connection.stubs.inference.GetArtifact, request)
            async with aclosing(responses):
                async for response in responses:
                    reconnect.connected()
                    chunk = codec.artifact_chunk_from_proto(response.chunk)
                    offset_bytes += len(chunk.data)
                    yield chunk
                    if chunk.sha256:
                        return
            raise UnavailableError(f"the stream of artifact {artifact_id} ended before its last piece")
        except UnavailableError as lost:
            await reconnect.pause(lost)


def _open_part(part: Path) -> tuple[BinaryIO, hashlib._Hash]:
    """What is there of a file, ready to be appended to, and the hash of it."""
    digest = hashlib.sha256()
    part.touch()
    file = part.open("r+b")
    while piece := file.read(1024 * 1024):
        digest.update(piece)
    return file, digest


def _check(artifact_id: str, actual: str, expected: str) -> None:
    if actual != expected:
        raise ArtifactDamagedError(
            f"artifact {artifact_id} arrived damaged: its SHA-256 is {actual}, not {expected}; fetch it again"
        )
