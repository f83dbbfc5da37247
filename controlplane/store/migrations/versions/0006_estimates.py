"""How long steps took at deployments."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0006"
down_revision = "0005"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Apply."""
    op.create_table(
        "estimates",
        sa.Column("deployment_id", sa.String(128), primary_key=True),
        sa.Column("step", sa.String(128), primary_key=True),
        sa.Column("observed_time_s", sa.Double, nullable=False),
        sa.Column("seconds_per_unit", sa.LargeBinary, nullable=False),
        sqlite_with_rowid=False,
    )
