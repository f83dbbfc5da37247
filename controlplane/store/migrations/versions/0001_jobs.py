"""Jobs and the segments of their event logs."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Apply."""
    op.create_table(
        "jobs",
        sa.Column("id", sa.String(64), primary_key=True),
        sa.Column("request_id", sa.String(128), nullable=False),
        sa.Column("state", sa.String(32), nullable=False),
        sa.Column("end_time_s", sa.Double),
        sa.Column("record", sa.LargeBinary, nullable=False),
        sa.Column("first_segment_end", sa.BigInteger, nullable=False),
        sa.Column("first_segment", sa.LargeBinary, nullable=False),
        sqlite_with_rowid=False,
    )
    op.create_index("jobs_by_request_id", "jobs", ["request_id"], sqlite_where=sa.text("request_id != ''"))
    op.create_index("jobs_unfinished", "jobs", ["id"], sqlite_where=sa.text("end_time_s IS NULL"))
    op.create_table(
        "job_segments",
        sa.Column("job_id", sa.String(64), primary_key=True),
        sa.Column("first_sequence", sa.BigInteger, primary_key=True),
        sa.Column("last_sequence", sa.BigInteger, nullable=False),
        sa.Column("events", sa.LargeBinary, nullable=False),
        sqlite_with_rowid=False,
    )
