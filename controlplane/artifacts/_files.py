"""Files of artifacts. All of this blocks, and is called in threads."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Iterable
from pathlib import Path
from threading import Lock

from rung.types import Artifact

_OWN_NAME = re.compile(r"(artifact-[0-9a-f]{22})(\.part)?")


class Draft:
    """An artifact while it is written, under a temporary name beside its own.

    A cancelled caller leaves a thread behind that may still write: a lock, and no writing after
    `discard`, make that harmless.
    """

    def __init__(self, directory: Path, artifact_id: str) -> None:
        self._final = directory / artifact_id
        self._part = part_of(self._final)
        self._hash = hashlib.sha256()
        self._lock = Lock()
        self._descriptor = -1
        self._discarded = False

    def write(self, data: bytes) -> None:
        """Append. Raises OSError."""
        with self._lock:
            if self._discarded:
                return
            if self._descriptor < 0:
                self._descriptor = os.open(self._part, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
            self._hash.update(data)
            rest = memoryview(data)
            while rest:
                rest = rest[os.write(self._descriptor, rest) :]

    @property
    def sha256(self) -> str:
        """Of what was written so far, in hexadecimal."""
        return self._hash.hexdigest()

    def finish(self) -> None:
        """Make it durable under its own name. Raises OSError."""
        with self._lock:
            if self._discarded:
                return
            os.fsync(self._descriptor)
            self._close()
            self._part.rename(self._final)
            _sync_directory(self._final.parent)

    def discard(self) -> None:
        """Leave nothing, whatever was done before."""
        with self._lock:
            self._discarded = True
            self._close()
            self._part.unlink(missing_ok=True)
            self._final.unlink(missing_ok=True)

    def _close(self) -> None:
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1


def part_of(path: Path) -> Path:
    """Where the artifact of a path is while it is written."""
    return path.with_name(f"{path.name}.part")


def is_artifact_id(text: str) -> bool:
    """Whether a text may be the id of an artifact, and so the name of a file."""
    found = _OWN_NAME.fullmatch(text)
    return found is not None and found[2] is None


def open_artifact(path: Path) -> int:
    """Open for reading, also while it is written. Raises FileNotFoundError, OSError."""
    # It may get its own name between the first two looks.
    for candidate in (path, part_of(path)):
        try:
            return os.open(candidate, os.O_RDONLY)
        except FileNotFoundError:
            pass
    return os.open(path, os.O_RDONLY)


def read_at(path: Path, offset_bytes: int, length_bytes: int) -> bytes:
    """Some bytes, fewer at its end. Raises FileNotFoundError, OSError."""
    descriptor = open_artifact(path)
    try:
        return os.pread(descriptor, length_bytes, offset_bytes)
    finally:
        os.close(descriptor)


def delete(directory: Path, artifact_ids: Iterable[str]) -> None:
    """Delete files; who reads one still reads it to its end. Raises OSError."""
    for artifact_id in artifact_ids:
        (directory / artifact_id).unlink(missing_ok=True)


def sweep(directory: Path, rows: Iterable[Artifact]) -> tuple[list[str], list[str]]:
    """Delete files that are incomplete or have no row; files that are not ours are left alone.

    Returns:
        The names of deleted files, and the ids of rows that have no whole file.

    Raises:
        OSError: the directory cannot be read or written.
    """
    directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    sizes = {
        entry.name: entry.stat().st_size
        for entry in os.scandir(directory)
        if entry.is_file() and _OWN_NAME.fullmatch(entry.name)
    }
    whole: set[str] = set()
    widowed: list[str] = []
    for row in rows:
        if sizes.get(row.id) == row.size_bytes:
            whole.add(row.id)
        else:
            widowed.append(row.id)
    swept = [name for name in sizes if name not in whole]
    for name in swept:
        (directory / name).unlink(missing_ok=True)
    return swept, widowed


def _sync_directory(directory: Path) -> None:
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
