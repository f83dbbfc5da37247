"""Jobs on disk: SQLite in WAL mode, written by one thread, read by others meanwhile."""

from __future__ import annotations

import asyncio
import fcntl
import os
from collections.abc import Callable, Collection, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache, partial
from itertools import chain
from pathlib import Path
from typing import IO, Any, TypeVar

import alembic.command
import alembic.config
import alembic.util
import msgspec
from msgspec import Struct
from sqlalchemy import Connection, Engine, Row, Table, create_engine, delete, event, literal, select
from sqlalchemy.exc import SQLAlchemyError

from controlplane.store._tables import job_segments, jobs
from rung.errors import FailedPreconditionError, UnavailableError
from rung.types import Job, JobState

T = TypeVar("T")

_READERS = 4
#: Rows of one statement at most; SQLite takes 32,766 values in one.
_MAX_ROWS = 512

_job_encoder = msgspec.msgpack.Encoder()
_job_decoder = msgspec.msgpack.Decoder(Job)


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
            FailedPreconditionError: another process has it, or a later version made it.
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
        except alembic.util.CommandError as error:
            engine.dispose()
            lock.close()
            raise FailedPreconditionError(
                f"the store {path} was made by a later version of Rung ({error}); run that one, "
                "or give this one another server.state_dir"
            ) from error
        return cls(engine, lock)

    async def write(self, jobs: Sequence[Job], segments: Sequence[StoredSegment]) -> None:
        """Upsert jobs and add segments, each of one of these jobs, in one transaction.

        A segment that is there already is left as it is, so that a write may be repeated.

        Raises:
            UnavailableError: it was not stored, for instance because the disk is full.
        """
        await self._run(self._writer, partial(self._write, jobs, segments))

    def _write(self, written: Sequence[Job], segments: Sequence[StoredSegment]) -> None:
        first = {each.job_id: each for each in segments if each.first_sequence == 1}
        rows = [_job_row(job, first.get(job.id)) for job in written]
        later = [msgspec.structs.astuple(each) for each in segments if each.first_sequence != 1]
        with self._engine.begin() as connection:
            _insert(connection, _upsert_jobs_sql, rows)
            _insert(connection, _insert_segments_sql, later)

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
        in_job = select(
            jobs.c.id.label("job_id"),
            literal(1).label("first_sequence"),
            jobs.c.first_segment_end.label("last_sequence"),
            jobs.c.first_segment.label("events"),
        ).where(jobs.c.id == job_id, jobs.c.first_segment_end > after_sequence)
        later = select(job_segments).where(
            job_segments.c.job_id == job_id, job_segments.c.last_sequence > after_sequence
        )
        query = in_job.union_all(later).order_by("first_sequence").limit(limit)
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

    async def read_with(self, work: Callable[[Connection], T]) -> T:
        """Read what other parts keep in this file. Raises UnavailableError."""

        def read() -> T:
            with self._engine.connect() as connection:
                return work(connection)

        return await self._run(self._readers, read)

    async def write_with(self, work: Callable[[Connection], T]) -> T:
        """Write it, in one transaction. Raises UnavailableError: nothing was stored."""

        def write() -> T:
            with self._engine.begin() as connection:
                return work(connection)

        return await self._run(self._writer, write)

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
    """Many rows in few statements, each of a power of two of rows: SQLite has to parse each text once only.

    Not `executemany`: SQLite's driver lets go of the interpreter lock for each row, and takes it back
    from a busy event loop only after the switch interval; a batch would take seconds.
    """
    start = 0
    while start < len(rows):
        count = min(_MAX_ROWS, 1 << ((len(rows) - start).bit_length() - 1))
        part = rows[start : start + count]
        connection.exec_driver_sql(sql(count), tuple(chain.from_iterable(part)))
        start += count


@cache
def _upsert_jobs_sql(rows: int) -> str:
    # A first segment stays as it was first stored.
    changes = ", ".join(f"{name} = excluded.{name}" for name in ("state", "end_time_s", "record"))
    return f"{_insert_sql(jobs, rows)} ON CONFLICT (id) DO UPDATE SET {changes}"


@cache
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


def _job_row(job: Job, first: StoredSegment | None) -> tuple[Any, ...]:
    """In the order of the table's columns."""
    return (
        job.id,
        job.request_id,
        job.state.value,
        job.end_time_s,
        _job_encoder.encode(job),
        first.last_sequence if first else 0,
        first.events if first else b"",
    )


def _job(row: Row[Any]) -> Job:
    return _job_decoder.decode(row.record)
