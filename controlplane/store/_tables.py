"""The tables. A change here needs a migration; a test compares the two.

Ids of jobs sort by time, so that the primary key serves paging: an index of all jobs would be a second
write for each. The two that there are hold few rows.
"""

from __future__ import annotations

from sqlalchemy import BigInteger, Column, Double, Index, LargeBinary, MetaData, String, Table, Text, text

metadata = MetaData()

jobs = Table(
    "jobs",
    metadata,
    Column("id", String(64), primary_key=True),
    Column("request_id", String(128), nullable=False),
    Column("kind", String(32), nullable=False),
    Column("state", String(32), nullable=False),
    Column("model", Text, nullable=False),
    Column("served", Text),
    Column("create_time_s", Double, nullable=False),
    Column("end_time_s", Double),
    Column("last_sequence", BigInteger, nullable=False),
    Column("failure_reason", String(64)),
    Column("detail", Text, nullable=False),
    Column("usage", Text),
    Column("policy", Text, nullable=False),
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
