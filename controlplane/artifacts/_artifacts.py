"""All artifacts: files in one directory, and a row for each that is whole."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import AsyncGenerator, Callable, Collection, Coroutine, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing
from functools import partial
from pathlib import Path
from typing import Any, Protocol, TypeVar

import structlog
from msgspec.structs import replace

from controlplane.artifacts import _files
from controlplane.artifacts._collector import PIECE_BYTES, Collector
from controlplane.jobs import LiveJob
from rung.errors import OutOfRangeError, RungError, UnavailableError, UnknownArtifactError
from rung.types import Artifact, ArtifactChunk

T = TypeVar("T")

_log = structlog.get_logger("rung.artifacts")

_THREADS = 4

DEFAULT_RETENTION_S = 7 * 24 * 3600.0
DEFAULT_MAX_BYTES = 20 * 1024**3

#: Deleting for room goes on to this share of the limit, so that not every new artifact has to.
_DELETE_TO = 0.95


class Rows(Protocol):
    """What artifacts need of the store. Each method raises UnavailableError."""

    async def add(self, artifact: Artifact) -> None:
        """Keep a new one."""
        ...

    async def get(self, artifact_id: str) -> Artifact | None:
        """One artifact."""
        ...

    async def of_job(self, job_id: str) -> Sequence[Artifact]:
        """What a job made, in the order in which it did."""
        ...

    async def all(self) -> Sequence[Artifact]:
        """All there are, oldest first."""
        ...

    async def orphans(self) -> Sequence[Artifact]:
        """Those whose job is not stored, oldest first."""
        ...

    async def delete(self, artifact_ids: Collection[str]) -> None:
        """Forget some."""
        ...


class Artifacts:
    """Artifacts on disk.

    One is whole once it has a row, which comes after its file was made durable; what has no row is swept
    at the next start. Deleting goes the other way round: first the row, then the file.

    Args:
        directory: of the files; made if it is not there.
        rows: what the store keeps of them.
        retention_s: they are deleted at this age.
        max_bytes: of all of them together, and so of one; the oldest are deleted beyond it.
        now_s: Unix time.
    """

    def __init__(
        self,
        directory: Path,
        rows: Rows,
        *,
        retention_s: float = DEFAULT_RETENTION_S,
        max_bytes: int = DEFAULT_MAX_BYTES,
        now_s: Callable[[], float] = time.time,
    ) -> None:
        self.directory = directory
        self.max_bytes = max_bytes
        self.now_s = now_s
        self._rows = rows
        self._retention_s = retention_s
        self._total_bytes = 0
        self._makers: dict[str, LiveJob] = {}
        self._expiring = asyncio.Lock()
        self._tasks: set[asyncio.Task[None]] = set()
        # Apart from each other: whoever makes an artifact does not queue behind those who read.
        self._readers = ThreadPoolExecutor(_THREADS, thread_name_prefix="artifacts-read")
        self._writers = ThreadPoolExecutor(_THREADS, thread_name_prefix="artifacts-write")

    async def start(self) -> None:
        """Sweep what an earlier process left half.

        Raises:
            UnavailableError: the directory or the store cannot be used.
        """
        rows = await self._rows.all()
        try:
            swept, widowed = await self.write(partial(_files.sweep, self.directory, rows))
        except OSError as error:
            raise UnavailableError(f"artifacts cannot be kept in {self.directory}: {error}") from error
        if widowed:
            await self._rows.delete(widowed)
        if swept or widowed:
            _log.warning("artifacts_swept", files=len(swept), rows=len(widowed))
        gone = frozenset(widowed)
        self._total_bytes = sum(row.size_bytes for row in rows if row.id not in gone)

    def collector(self, job: LiveJob, seed: int | None = None) -> Collector:
        """What keeps the artifacts of one attempt at a job; an async context manager.

        Args:
            job: told of each piece.
            seed: what they are made with; None if with none, or nobody knows it.
        """
        self._making()
        self._makers[job.id] = job
        return Collector(self, job, seed)

    async def get(self, artifact_id: str) -> Artifact:
        """One artifact that is whole. Raises UnknownArtifactError, UnavailableError."""
        found = await self._rows.get(artifact_id)
        if found is None:
            raise _unknown(artifact_id)
        return found

    async def of_job(self, job_id: str) -> Sequence[Artifact]:
        """What a job made and is still there, in order. Raises UnavailableError."""
        return await self._rows.of_job(job_id)

    async def read(self, artifact_id: str, offset_bytes: int, length_bytes: int) -> bytes:
        """Some bytes of an artifact, also of one that is being written; fewer at its end.

        Raises:
            UnknownArtifactError: there is none, or no longer.
            UnavailableError: the disk does not give it.
        """
        path = self._path(artifact_id)
        return await self._from_disk(artifact_id, partial(_files.read_at, path, offset_bytes, length_bytes))

    async def pieces(
        self, artifact_id: str, offset_bytes: int = 0, length_bytes: int | None = None
    ) -> AsyncGenerator[bytes, None]:
        """The bytes from a place on, in pieces of `PIECE_BYTES`; to the end also if it is deleted meanwhile.

        Raises:
            UnknownArtifactError: there is none; with the first piece.
            UnavailableError: the disk does not give it, or less than `length_bytes`.
        """
        path = self._path(artifact_id)
        descriptor = await self._from_disk(
            artifact_id, partial(_files.open_artifact, path), unwanted=os.close
        )
        try:
            left = length_bytes if length_bytes is not None else self.max_bytes
            while left > 0:
                read = partial(os.pread, descriptor, min(PIECE_BYTES, left), offset_bytes)
                piece = await self._from_disk(artifact_id, read)
                if not piece and length_bytes is None:
                    return
                if not piece:
                    raise UnavailableError(f"artifact {artifact_id} was cut short on disk")
                yield piece
                offset_bytes += len(piece)
                left -= len(piece)
        finally:
            os.close(descriptor)

    async def chunks(self, artifact_id: str, offset_bytes: int = 0) -> AsyncGenerator[ArtifactChunk, None]:
        """A whole artifact from a place on, at least one piece; the last one has the SHA-256 and the seed.

        Raises:
            UnknownArtifactError: there is none; with the first piece.
            OutOfRangeError: it has no such place.
            UnavailableError: the disk does not give it.
        """
        artifact = await self.get(artifact_id)
        size_bytes = artifact.size_bytes
        if offset_bytes > size_bytes:
            raise OutOfRangeError(
                f"artifact {artifact_id} has {size_bytes} bytes; there is no byte {offset_bytes}",
                size_bytes=str(size_bytes),
            )
        begun = ArtifactChunk(
            artifact_id=artifact_id, content_type=artifact.content_type, size_bytes=size_bytes
        )
        ended = replace(begun, sha256=artifact.sha256, seed=artifact.seed)
        async with aclosing(self.pieces(artifact_id, offset_bytes, size_bytes - offset_bytes)) as pieces:
            async for data in pieces:
                end = offset_bytes + len(data)
                is_last = end == size_bytes
                piece = replace(ended if is_last else begun, offset_bytes=offset_bytes)
                yield replace(piece, data=data, length_bytes=len(data))
                offset_bytes = end
                if is_last:
                    return
        yield replace(ended, offset_bytes=offset_bytes)

    async def expire(self) -> None:
        """Delete what is too old, or whose job was deleted; then the oldest, while they are too large.

        Those of jobs that run are left alone. Raises UnavailableError.
        """
        async with self._expiring:
            making = self._making()
            rows = [row for row in await self._rows.all() if row.job_id not in making]
            orphans = {row.id for row in await self._rows.orphans()}
            oldest_s = self.now_s() - self._retention_s
            doomed = [row for row in rows if row.create_time_s < oldest_s or row.id in orphans]
            total = self._total_bytes - sum(row.size_bytes for row in doomed)
            if total > self.max_bytes:
                gone = {row.id for row in doomed}
                for row in rows:
                    if total <= self.max_bytes * _DELETE_TO:
                        break
                    if row.id not in gone:
                        doomed.append(row)
                        total -= row.size_bytes
            await self._delete(doomed)

    async def aclose(self) -> None:
        """Wait for what is being written, discarded or read."""
        while self._tasks:
            await asyncio.wait(self._tasks)
        for pool in (self._readers, self._writers):
            await asyncio.to_thread(pool.shutdown)

    async def write(self, work: Callable[[], T]) -> T:
        """Do what blocks. For collectors. Raises OSError."""
        return await asyncio.get_running_loop().run_in_executor(self._writers, work)

    async def keep(self, artifact: Artifact) -> None:
        """Note one whose file is durable. For collectors. Raises UnavailableError."""
        await self._rows.add(artifact)
        self._total_bytes += artifact.size_bytes
        if self._total_bytes > self.max_bytes:
            self.aside(self._expire_aside())

    async def forget(self, draft: _files.Draft, artifact_id: str, *, has_row: bool) -> None:
        """Leave nothing of one that is not to be. For collectors."""
        try:
            if has_row:
                await self._rows.delete([artifact_id])
            await self.write(draft.discard)
        except (RungError, OSError) as error:
            _log.error("artifact_not_discarded", artifact=artifact_id, error=str(error))

    def aside(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        """Begin what is finished even if who began it is cancelled. For collectors."""
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    async def _expire_aside(self) -> None:
        try:
            await self.expire()
        except RungError as error:
            _log.error("artifacts_not_expired", error=error.message)

    async def _delete(self, doomed: Sequence[Artifact]) -> None:
        if not doomed:
            return
        ids = [row.id for row in doomed]
        await self._rows.delete(ids)
        self._total_bytes -= sum(row.size_bytes for row in doomed)
        try:
            await self.write(partial(_files.delete, self.directory, ids))
        except OSError as error:
            raise UnavailableError(f"artifacts cannot be deleted: {error}") from error
        _log.info("artifacts_deleted", artifacts=len(ids))

    def _making(self) -> frozenset[str]:
        """Jobs that may still make artifacts, or are not stored to their end yet."""
        for job in list(self._makers.values()):
            if job.terminal is not None and job.stored_sequence == job.last_sequence:
                del self._makers[job.id]
        return frozenset(self._makers)

    def _path(self, artifact_id: str) -> Path:
        if not _files.is_artifact_id(artifact_id):
            raise _unknown(artifact_id)
        return self.directory / artifact_id

    async def _from_disk(
        self, artifact_id: str, work: Callable[[], T], *, unwanted: Callable[[T], object] | None = None
    ) -> T:
        """Do it in a thread. What comes after the caller was cancelled goes to `unwanted`."""
        thread = asyncio.get_running_loop().run_in_executor(self._readers, work)
        try:
            return await asyncio.shield(thread)
        except asyncio.CancelledError:
            if unwanted is not None:
                thread.add_done_callback(lambda done: done.exception() or unwanted(done.result()))
            raise
        except FileNotFoundError:
            raise _unknown(artifact_id) from None
        except OSError as error:
            raise UnavailableError(f"artifact {artifact_id} cannot be read: {error}") from error


def _unknown(artifact_id: str) -> UnknownArtifactError:
    return UnknownArtifactError(
        f"there is no artifact {artifact_id[:80]}; artifacts are kept for a while only",
        artifact=artifact_id[:80],
    )
