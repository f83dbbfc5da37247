"""Jobs on disk: SQLite in WAL mode, written by one thread, read by others meanwhile."""

from __future__ import annotations

import asyncio
import fcntl
import os
from collections.abc import Callable, Collection, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import IO, Any, TypeVar

import alembic.command
import alembic.config
import msgspec
from msgspec import Struct
from sqlalchemy import Connection, Engine, Row, and_, create_engine, delete, event, or_, select
from sqlalchemy.dialects.sqlite import insert
from sqlalchemy.exc import SQLAlchemyError

from controlplane.store._tables import job_segments, jobs
from rung.errors import FailedPreconditionError, UnavailableError
from rung.types import FailureReason, Job, JobKind, JobState, Policy, Served, Usage

T = TypeVar("T")

_READERS = 4
_UNENDED = (JobState.PENDING.value, JobState.RUNNING.value)
_encode = msgspec.json.encode
_DEFAULT_POLICY = _encode(Policy()).decode()

# What may change after a job was first stored.
_MUTABLE = ("state", "served", "end_time_s", "last_sequence", "failure_reason", "detail", "usage")
_insert_jobs = insert(jobs)
_upsert_jobs = _insert_jobs.on_conflict_do_update(
    index_elements=[jobs.c.id], set_={name: _insert_jobs.excluded[name] for name in _MUTABLE}
)
_insert_segments = insert(job_segments).on_conflict_do_nothing()


class StoredSegment(Struct, frozen=True):
    """Consecutive events of one job, encoded by whoever wrote them."""

    job_id: str
    first_sequence: int
    last_sequence: int
    events: bytes


class JobStore:
    """Jobs and their logs. What `write` has returned from survives the death of the process."""

    def __init__(self, engine: Engine, lock: IO[str]) -> None:
        self._engine = engine
        self._lock = lock
        self._writer = ThreadPoolExecutor(1, thread_name_prefix="store-write")
        self._readers = ThreadPoolExecutor(_READERS, thread_name_prefix="store-read")

    @classmethod
    async def open(cls, path: Path) -> JobStore:
        """Open the file, made and migrated as needed.

        Raises:
            FailedPreconditionError: another process has it.
            UnavailableError: it cannot be read or written.
        """
        return await asyncio.to_thread(cls._open, path)

    @classmethod
    def _open(cls, path: Path) -> JobStore:
        try:
            path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            lock = _lock(path.with_name(f"{path.name}.lock"))
        except OSError as error:
            raise UnavailableError(f"the store {path} cannot be used: {error}") from error
        engine = create_engine(f"sqlite:///{path}", pool_size=_READERS + 1, max_overflow=0)
        event.listen(engine, "connect", _set_pragmas)
        try:
            with engine.begin() as connection:
                migrate(connection)
        except SQLAlchemyError as error:
            engine.dispose()
            lock.close()
            raise UnavailableError(f"the store {path} cannot be used: {_cause(error)}") from error
        return cls(engine, lock)

    async def write(self, jobs: Sequence[Job], segments: Sequence[StoredSegment]) -> None:
        """Upsert jobs and add segments, in one transaction.

        A segment that is there already is left as it is, so that a write may be repeated.

        Raises:
            UnavailableError: it was not stored, for instance because the disk is full.
        """
        await self._run(self._writer, partial(self._write, jobs, segments))

    def _write(self, jobs: Sequence[Job], segments: Sequence[StoredSegment]) -> None:
        with self._engine.begin() as connection:
            if jobs:
                connection.execute(_upsert_jobs, [_job_row(job) for job in jobs])
            if segments:
                connection.execute(
                    _insert_segments,
                    [
                        {
                            "job_id": segment.job_id,
                            "first_sequence": segment.first_sequence,
                            "last_sequence": segment.last_sequence,
                            "events": segment.events,
                        }
                        for segment in segments
                    ],
                )

    async def get(self, job_id: str) -> Job | None:
        """One job."""
        found = await self._read(select(jobs).where(jobs.c.id == job_id))
        return _job(found[0]) if found else None

    async def by_request_id(self, request_id: str) -> Job | None:
        """The newest job with that request id."""
        query = select(jobs).where(jobs.c.request_id == request_id)
        found = await self._read(query.order_by(jobs.c.create_time_s.desc()).limit(1))
        return _job(found[0]) if found else None

    async def list(
        self, *, page_size: int, before: tuple[float, str] | None, states: Collection[JobState]
    ) -> Sequence[Job]:
        """Jobs, newest first by `(create_time_s, id)`, before a place in that order."""
        query = select(jobs).order_by(jobs.c.create_time_s.desc(), jobs.c.id.desc()).limit(page_size)
        if before is not None:
            time_s, job_id = before
            query = query.where(
                or_(
                    jobs.c.create_time_s < time_s,
                    and_(jobs.c.create_time_s == time_s, jobs.c.id < job_id),
                )
            )
        if states:
            query = query.where(jobs.c.state.in_([state.value for state in states]))
        return [_job(row) for row in await self._read(query)]

    async def segments(self, job_id: str, after_sequence: int, limit: int = 100) -> Sequence[StoredSegment]:
        """Segments that hold events after a sequence, in order."""
        query = (
            select(job_segments)
            .where(job_segments.c.job_id == job_id, job_segments.c.last_sequence > after_sequence)
            .order_by(job_segments.c.first_sequence)
            .limit(limit)
        )
        return [StoredSegment(**row._mapping) for row in await self._read(query)]

    async def unfinished(self) -> Sequence[Job]:
        """Jobs without a terminal event."""
        return [_job(row) for row in await self._read(select(jobs).where(jobs.c.state.in_(_UNENDED)))]

    async def delete_ended_before(self, time_s: float) -> int:
        """Delete jobs that ended before a Unix time, with their logs; returns how many."""

        def remove() -> int:
            with self._engine.begin() as connection:
                return connection.execute(delete(jobs).where(jobs.c.end_time_s < time_s)).rowcount

        return await self._run(self._writer, remove)

    async def aclose(self) -> None:
        """Finish what is being written and let go of the file."""
        await asyncio.to_thread(self._writer.shutdown)
        await asyncio.to_thread(self._readers.shutdown)
        self._engine.dispose()
        self._lock.close()

    async def _read(self, query: Any) -> Sequence[Row[Any]]:
        def read() -> Sequence[Row[Any]]:
            with self._engine.connect() as connection:
                return connection.execute(query).all()

        return await self._run(self._readers, read)

    @staticmethod
    async def _run(pool: ThreadPoolExecutor, work: Callable[[], T]) -> T:
        try:
            return await asyncio.get_running_loop().run_in_executor(pool, work)
        except SQLAlchemyError as error:
            raise UnavailableError(f"the store cannot be used: {_cause(error)}") from error


def migrate(connection: Connection) -> None:
    """Bring the tables of a database up to date."""
    config = alembic.config.Config()
    config.set_main_option("script_location", str(Path(__file__).parent / "migrations"))
    config.set_main_option("path_separator", "os")
    config.attributes["connection"] = connection
    alembic.command.upgrade(config, "head")


def _lock(path: Path) -> IO[str]:
    """Take the store for this process: SQLite would let two write, and neither would know of the other."""
    file = open(path, "a+", encoding="ascii")  # noqa: SIM115 - held until the store is closed
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.seek(0)
        owner = file.read().strip() or "unknown"
        file.close()
        raise FailedPreconditionError(
            f"another control plane (pid {owner}) uses {path.with_suffix('')}; stop it, "
            "or give this one another server.state_dir",
            pid=owner,
        ) from None
    file.truncate(0)
    file.write(str(os.getpid()))
    file.flush()
    return file


def _set_pragmas(connection: Any, _record: object) -> None:
    cursor = connection.cursor()
    # NORMAL: a commit survives the death of the process, though perhaps not of the power.
    for pragma in ("journal_mode=WAL", "synchronous=NORMAL", "busy_timeout=5000", "foreign_keys=ON"):
        cursor.execute(f"PRAGMA {pragma}")
    cursor.close()


def _cause(error: SQLAlchemyError) -> str:
    return str(getattr(error, "orig", None) or error)


def _json(value: object | None) -> str | None:
    return None if value is None else _encode(value).decode()


def _job_row(job: Job) -> dict[str, Any]:
    return {
        "id": job.id,
        "request_id": job.request_id,
        "kind": job.kind.value,
        "state": job.state.value,
        "model": job.model,
        "served": _json(job.served),
        "create_time_s": job.create_time_s,
        "end_time_s": job.end_time_s,
        "last_sequence": job.last_sequence,
        "failure_reason": job.failure_reason.value if job.failure_reason else None,
        "detail": job.detail,
        "usage": _json(job.usage),
        "policy": _DEFAULT_POLICY if job.policy == Policy() else _encode(job.policy).decode(),
    }


def _job(row: Row[Any]) -> Job:
    return Job(
        id=row.id,
        request_id=row.request_id,
        kind=JobKind(row.kind),
        state=JobState(row.state),
        model=row.model,
        served=msgspec.json.decode(row.served, type=Served) if row.served else None,
        create_time_s=row.create_time_s,
        end_time_s=row.end_time_s,
        last_sequence=row.last_sequence,
        failure_reason=FailureReason(row.failure_reason) if row.failure_reason else None,
        detail=row.detail,
        usage=msgspec.json.decode(row.usage, type=Usage) if row.usage else None,
        policy=msgspec.json.decode(row.policy, type=Policy),
    )
