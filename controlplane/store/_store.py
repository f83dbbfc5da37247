"""Jobs on disk: SQLite in WAL mode, written by one thread, read by others meanwhile."""

from __future__ import annotations

import asyncio
import fcntl
import os
from collections.abc import Callable, Collection, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache, partial
from pathlib import Path
from typing import IO, Any, TypeVar

import alembic.command
import alembic.config
import msgspec
from msgspec import Struct
from sqlalchemy import Connection, Engine, Row, Table, create_engine, delete, event, select
from sqlalchemy.exc import SQLAlchemyError

from controlplane.store._tables import job_segments, jobs
from rung.errors import FailedPreconditionError, UnavailableError
from rung.types import FailureReason, Job, JobKind, JobState, Policy, Served, Usage

T = TypeVar("T")

_READERS = 4
_encode = msgspec.json.encode
_POLICY = Policy()
_DEFAULT_POLICY = _encode(_POLICY).decode()

# What may change after a job was first stored.
_MUTABLE = ("state", "served", "end_time_s", "last_sequence", "failure_reason", "detail", "usage")
#: Rows of one statement; SQLite takes 32,766 values in one.
_MAX_ROWS = 512


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
            _insert(connection, _upsert_jobs_sql, [_job_row(job) for job in jobs])
            _insert(connection, _insert_segments_sql, [msgspec.structs.astuple(each) for each in segments])

    async def get(self, job_id: str) -> Job | None:
        """One job."""
        found = await self._read(select(jobs).where(jobs.c.id == job_id))
        return _job(found[0]) if found else None

    async def by_request_id(self, request_id: str) -> Job | None:
        """The newest job with that request id."""
        query = select(jobs).where(jobs.c.request_id == request_id, jobs.c.request_id != "")
        found = await self._read(query.order_by(jobs.c.id.desc()).limit(1))
        return _job(found[0]) if found else None

    async def list(
        self, *, page_size: int, before: str | None, states: Collection[JobState]
    ) -> Sequence[Job]:
        """Jobs, newest first (ids sort by time), before the id of one."""
        query = select(jobs).order_by(jobs.c.id.desc()).limit(page_size)
        if before is not None:
            query = query.where(jobs.c.id < before)
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
        return [_job(row) for row in await self._read(select(jobs).where(jobs.c.end_time_s.is_(None)))]

    async def delete_ended_before(self, time_s: float) -> int:
        """Delete jobs that ended before a Unix time, with their logs; returns how many."""

        def remove() -> int:
            # It looks at every job, which once an hour costs less than an index would at each job.
            old = select(jobs.c.id).where(jobs.c.end_time_s < time_s)
            with self._engine.begin() as connection:
                connection.execute(delete(job_segments).where(job_segments.c.job_id.in_(old)))
                return connection.execute(delete(jobs).where(jobs.c.id.in_(old))).rowcount

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


def _insert(connection: Connection, sql: Callable[[int], str], rows: Sequence[tuple[Any, ...]]) -> None:
    """Many rows in few statements.

    Not `executemany`: SQLite's driver lets go of the interpreter lock for each row, and takes it back
    from a busy event loop only after the switch interval; a batch would take seconds.
    """
    for start in range(0, len(rows), _MAX_ROWS):
        part = rows[start : start + _MAX_ROWS]
        connection.exec_driver_sql(sql(len(part)), tuple(value for row in part for value in row))


@lru_cache(maxsize=2 * _MAX_ROWS)
def _upsert_jobs_sql(rows: int) -> str:
    changes = ", ".join(f"{name} = excluded.{name}" for name in _MUTABLE)
    return f"{_insert_sql(jobs, rows)} ON CONFLICT (id) DO UPDATE SET {changes}"


@lru_cache(maxsize=2 * _MAX_ROWS)
def _insert_segments_sql(rows: int) -> str:
    return f"{_insert_sql(job_segments, rows)} ON CONFLICT DO NOTHING"


def _insert_sql(table: Table, rows: int) -> str:
    names = ", ".join(column.name for column in table.columns)
    row = f"({', '.join('?' * len(table.columns))})"
    return f"INSERT INTO {table.name} ({names}) VALUES {', '.join([row] * rows)}"  # noqa: S608 - our own names


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
    for pragma in ("journal_mode=WAL", "synchronous=NORMAL", "busy_timeout=5000", "wal_autocheckpoint=4000"):
        cursor.execute(f"PRAGMA {pragma}")
    cursor.close()


def _cause(error: SQLAlchemyError) -> str:
    return str(getattr(error, "orig", None) or error)


def _json(value: object | None) -> str | None:
    return None if value is None else _encode(value).decode()


def _job_row(job: Job) -> tuple[Any, ...]:
    """In the order of the table's columns."""
    return (
        job.id,
        job.request_id,
        job.kind.value,
        job.state.value,
        job.model,
        _json(job.served),
        job.create_time_s,
        job.end_time_s,
        job.last_sequence,
        job.failure_reason.value if job.failure_reason else None,
        job.detail,
        _json(job.usage),
        _DEFAULT_POLICY if job.policy == _POLICY else _encode(job.policy).decode(),
    )


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
