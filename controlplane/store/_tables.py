"""The tables. A change here needs a migration; a test compares the two.

A job is one row, with the first segment of its log in it: most jobs are short, and end with one write.
Ids of jobs sort by time, so that the primary key serves paging: an index of all jobs would be a second
write for each. The two that there are hold few rows.
"""

from __future__ import annotations

from sqlalchemy import BigInteger, Column, Double, Index, Integer, LargeBinary, MetaData, String, Table, text

metadata = MetaData()

jobs = Table(
    "jobs",
    metadata,
    Column("id", String(64), primary_key=True),
    Column("request_id", String(128), nullable=False),
    Column("state", String(32), nullable=False),
    Column("end_time_s", Double),
    # The whole `Job`, as MessagePack; the columns above are those of its fields that are searched.
    Column("record", LargeBinary, nullable=False),
    Column("first_segment_end", BigInteger, nullable=False),
    Column("first_segment", LargeBinary, nullable=False),
    Index("jobs_by_request_id", "request_id", sqlite_where=text("request_id != ''")),
    Index("jobs_unfinished", "id", sqlite_where=text("end_time_s IS NULL")),
    sqlite_with_rowid=False,
)

job_segments = Table(
    "job_segments",
    metadata,
    Column("job_id", String(64), primary_key=True),
    Column("first_sequence", BigInteger, primary_key=True),
    Column("last_sequence", BigInteger, nullable=False),
    Column("events", LargeBinary, nullable=False),
    sqlite_with_rowid=False,
)

#: One row: the `ProfileState`, as MessagePack.
profile_state = Table(
    "profile_state",
    metadata,
    Column("id", Integer, primary_key=True),
    Column("record", LargeBinary, nullable=False),
)

#: Calls to cloud models, by the day of UTC on which they were made; `spent` is unknown while they run.
cloud_calls = Table(
    "cloud_calls",
    metadata,
    Column("day", String(10), primary_key=True),
    Column("id", String(64), primary_key=True),
    Column("provider", String(64), nullable=False),
    Column("model", String(256), nullable=False),
    Column("reserved_micro_usd", BigInteger, nullable=False),
    Column("spent_micro_usd", BigInteger),
    sqlite_with_rowid=False,
)

#: What of the fleet has to survive a restart: drained nodes, swaps under way.
fleet_marks = Table(
    "fleet_marks",
    metadata,
    Column("kind", String(32), primary_key=True),
    Column("key", String(128), primary_key=True),
    Column("record", LargeBinary, nullable=False),
    sqlite_with_rowid=False,
)

#: Files that jobs made. Ids sort by time.
artifacts = Table(
    "artifacts",
    metadata,
    Column("id", String(64), primary_key=True),
    Column("job_id", String(64), nullable=False),
    Column("content_type", String(128), nullable=False),
    Column("size_bytes", BigInteger, nullable=False),
    Column("sha256", String(64), nullable=False),
    Column("create_time_s", Double, nullable=False),
    Column("seed", BigInteger, nullable=True),
    Index("artifacts_by_job", "job_id", "id"),
    sqlite_with_rowid=False,
)

#: How long steps took at deployments: the last `Observations` of each, as MessagePack.
estimates = Table(
    "estimates",
    metadata,
    Column("deployment_id", String(128), primary_key=True),
    Column("step", String(128), primary_key=True),
    Column("observed_time_s", Double, nullable=False),
    Column("seconds_per_unit", LargeBinary, nullable=False),
    sqlite_with_rowid=False,
)
