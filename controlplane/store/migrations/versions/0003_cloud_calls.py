"""Calls to cloud models, and what they cost."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision = "0002"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Apply."""
    op.create_table(
        "cloud_calls",
        sa.Column("day", sa.String(10), primary_key=True),
        sa.Column("id", sa.String(64), primary_key=True),
        sa.Column("provider", sa.String(64), nullable=False),
        sa.Column("model", sa.String(256), nullable=False),
        sa.Column("reserved_micro_usd", sa.BigInteger, nullable=False),
        sa.Column("spent_micro_usd", sa.BigInteger),
        sqlite_with_rowid=False,
    )
