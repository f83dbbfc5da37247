"""Tables and migrations: what survives a restart."""

from controlplane.store._store import JobStore, StoredSegment, migrate

__all__ = ["JobStore", "StoredSegment", "migrate"]
