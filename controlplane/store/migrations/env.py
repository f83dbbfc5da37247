"""Run by Alembic: uses the connection that the store hands over."""

from __future__ import annotations

from alembic import context

from controlplane.store._tables import metadata

context.configure(
    connection=context.config.attributes["connection"], target_metadata=metadata, render_as_batch=True
)
with context.begin_transaction():
    context.run_migrations()
