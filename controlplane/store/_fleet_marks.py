"""What of the fleet has to survive a restart: small records, by kind and key."""

from __future__ import annotations

from collections.abc import Mapping

from sqlalchemy import delete, select
from sqlalchemy.dialects.sqlite import insert

from controlplane.store._store import JobStore
from controlplane.store._tables import fleet_marks


class FleetMarks:
    """Marks in the file of a `JobStore`. Each method raises UnavailableError as it does."""

    def __init__(self, store: JobStore) -> None:
        self._store = store

    async def read(self, kind: str) -> Mapping[str, bytes]:
        """The records of a kind, by key."""
        query = select(fleet_marks.c.key, fleet_marks.c.record).where(fleet_marks.c.kind == kind)
        rows = await self._store.read_with(lambda connection: connection.execute(query).all())
        return {row.key: row.record for row in rows}

    async def put(self, kind: str, key: str, record: bytes) -> None:
        """Keep a record in place of another one of its key."""
        new = insert(fleet_marks).values(kind=kind, key=key, record=record)
        change = new.on_conflict_do_update(index_elements=["kind", "key"], set_={"record": record})
        await self._store.write_with(lambda connection: connection.execute(change).rowcount)

    async def remove(self, kind: str, key: str) -> None:
        """Forget a record; nothing happens if there is none."""
        old = delete(fleet_marks).where(fleet_marks.c.kind == kind, fleet_marks.c.key == key)
        await self._store.write_with(lambda connection: connection.execute(old).rowcount)
