"""An engine's output in files: never a pipe, which would block the engine when nobody reads it."""

from __future__ import annotations

import asyncio
import os
from collections import deque
from collections.abc import AsyncIterator, Callable
from pathlib import Path

#: A file that has grown to this size is kept as `.1` and begun anew.
MAX_LOG_BYTES = 16 * 1024 * 1024
#: Older files that are kept.
KEPT_LOGS = 3
#: How often a followed file is looked at.
_POLL_S = 0.1
_TAIL_BYTES = 256 * 1024


def rotate(path: Path, max_bytes: int = MAX_LOG_BYTES) -> None:
    """Begin a log anew if it is large, and keep its last `max_bytes`. The engine appends to the same file.

    1. What is written between the copy and the cut is lost; an engine's output is not worth a pipe.
    2. Nobody does this while no agent runs: until one is back, the file of an engine that goes on is
       bounded by the disk alone. The first rotation then gives back all but the last `max_bytes`.
    """
    try:
        if path.stat().st_size < max_bytes:
            return
        for age in range(KEPT_LOGS, 1, -1):
            older = path.with_name(f"{path.name}.{age - 1}")
            if older.exists():
                older.replace(path.with_name(f"{path.name}.{age}"))
        with path.open("rb") as source, path.with_name(f"{path.name}.1").open("wb") as copy:
            source.seek(-max_bytes, os.SEEK_END)
            while block := source.read(1024 * 1024):
                copy.write(block)
        os.truncate(path, 0)
    except FileNotFoundError:
        return


def tail(path: Path, lines: int, end: int | None = None) -> list[str]:
    """The newest lines, of what stands before the byte `end`; none if there is no file."""
    try:
        with path.open("rb") as file:
            size = file.seek(0, os.SEEK_END) if end is None else end
            start = file.seek(max(0, size - _TAIL_BYTES))
            return list(deque(_decode(file.read(size - start)).splitlines(), lines)) if lines else []
    except FileNotFoundError:
        return []


async def follow(path: Path, lines: int, running: Callable[[], bool]) -> AsyncIterator[str]:
    """The newest lines, then each new one, until the engine has ended."""
    position = _size(path)
    for line in tail(path, lines, position):
        yield line
    partial = b""
    while True:
        alive = running()
        position, data = _read_on(path, position)
        *whole, partial = (partial + data).replace(b"\r", b"\n").split(b"\n")
        for found in whole:
            if found:
                yield _decode(found)
        if not alive and not data:
            if partial:
                yield _decode(partial)
            return
        if not data:
            await asyncio.sleep(_POLL_S)


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return 0


def _read_on(path: Path, position: int) -> tuple[int, bytes]:
    """What was written after a place, and the new place; a file that has shrunk was begun anew."""
    size = _size(path)
    if size < position:
        position = 0
    if size == position:
        return position, b""
    with path.open("rb") as file:
        file.seek(position)
        data = file.read(1024 * 1024)
    return position + len(data), data


def _decode(data: bytes) -> str:
    return data.decode("utf-8", "replace")
