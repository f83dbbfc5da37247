"""Which artifacts there are; their bytes are files elsewhere."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

import msgspec
from sqlalchemy import Connection, Row, Select, delete, insert, select

from controlplane.store._store import JobStore
from controlplane.store._tables import artifacts, jobs
from rung.types import Artifact

#: Ids in one statement at most; SQLite takes 32,766 values in one.
_MAX_IDS = 512


class ArtifactRows:
    """Artifacts in the file of a `JobStore`. Each method raises UnavailableError as it does."""

    def __init__(self, store: JobStore) -> None:
        self._store = store

    async def add(self, artifact: Artifact) -> None:
        """Keep a new one."""
        new = insert(artifacts).values(msgspec.structs.asdict(artifact))
        await self._store.write_with(lambda connection: connection.execute(new).rowcount)

    async def get(self, artifact_id: str) -> Artifact | None:
        """One artifact."""
        found = await self._read(select(artifacts).where(artifacts.c.id == artifact_id))
        return found[0] if found else None

    async def of_job(self, job_id: str) -> Sequence[Artifact]:
        """What a job made, in the order in which it did."""
        return await self._read(
            select(artifacts).where(artifacts.c.job_id == job_id).order_by(artifacts.c.id)
        )

    async def all(self) -> Sequence[Artifact]:
        """All there are, oldest first."""
        return await self._read(select(artifacts).order_by(artifacts.c.id))

    async def orphans(self) -> Sequence[Artifact]:
        """Those whose job is not stored, oldest first."""
        stored = select(jobs.c.id).where(jobs.c.id == artifacts.c.job_id).exists()
        return await self._read(select(artifacts).where(~stored).order_by(artifacts.c.id))

    async def delete(self, artifact_ids: Collection[str]) -> None:
        """Forget some; nothing happens for those that are not there."""
        ids = list(artifact_ids)
        parts = [ids[start : start + _MAX_IDS] for start in range(0, len(ids), _MAX_IDS)]

        def work(connection: Connection) -> None:
            for part in parts:
                connection.execute(delete(artifacts).where(artifacts.c.id.in_(part)))

        await self._store.write_with(work)

    async def _read(self, query: Select[Any]) -> Sequence[Artifact]:
        rows = await self._store.read_with(lambda connection: connection.execute(query).all())
        return [_artifact(row) for row in rows]


def _artifact(row: Row[Any]) -> Artifact:
    return Artifact(**row._mapping)
