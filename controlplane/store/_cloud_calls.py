"""What calls to cloud models may cost and have cost."""

from __future__ import annotations

from collections.abc import Mapping

from sqlalchemy import delete, func, insert, select, update

from controlplane.store._store import JobStore
from controlplane.store._tables import cloud_calls


class CloudCalls:
    """Reservations of money, in the file of a `JobStore`. Each method raises UnavailableError as it does."""

    def __init__(self, store: JobStore) -> None:
        self._store = store

    async def add_cloud_call(
        self, call_id: str, *, day: str, provider: str, model: str, reserved_micro_usd: int
    ) -> None:
        """Keep a call that is about to be made."""
        values = {
            "id": call_id,
            "day": day,
            "provider": provider,
            "model": model,
            "reserved_micro_usd": reserved_micro_usd,
        }
        new = insert(cloud_calls).values(values)
        await self._store.write_with(lambda connection: connection.execute(new).rowcount)

    async def settle_cloud_call(self, call_id: str, *, day: str, spent_micro_usd: int) -> None:
        """Keep what a call has cost."""
        change = (
            update(cloud_calls)
            .where(cloud_calls.c.day == day, cloud_calls.c.id == call_id)
            .values(spent_micro_usd=spent_micro_usd)
        )
        await self._store.write_with(lambda connection: connection.execute(change).rowcount)

    async def cloud_spending(self, day: str) -> Mapping[str, int]:
        """Millionths of a dollar of a day by provider; calls that were not settled count in full."""
        cost = func.coalesce(cloud_calls.c.spent_micro_usd, cloud_calls.c.reserved_micro_usd)
        query = (
            select(cloud_calls.c.provider, func.sum(cost))
            .where(cloud_calls.c.day == day)
            .group_by(cloud_calls.c.provider)
        )
        rows = await self._store.read_with(lambda connection: connection.execute(query).all())
        return {provider: int(spent) for provider, spent in rows}

    async def delete_cloud_calls_before(self, day: str) -> int:
        """Forget calls of earlier days; returns how many."""
        old = delete(cloud_calls).where(cloud_calls.c.day < day)
        return await self._store.write_with(lambda connection: connection.execute(old).rowcount)
