"""How long steps took at deployments, as of the last time that it was written."""

from __future__ import annotations

from collections.abc import Collection, Sequence

import msgspec
from sqlalchemy import Connection, delete, select
from sqlalchemy.dialects.sqlite import insert

from controlplane.estimates import Key, Observations
from controlplane.store._store import JobStore
from controlplane.store._tables import estimates

_decoder = msgspec.msgpack.Decoder(tuple[float, ...])


class EstimateRows:
    """Observations in the file of a `JobStore`. Each method raises UnavailableError as it does."""

    def __init__(self, store: JobStore) -> None:
        self._store = store

    async def read(self) -> Sequence[Observations]:
        """All that were written, least recently observed first."""
        query = select(estimates).order_by(
            estimates.c.observed_time_s, estimates.c.deployment_id, estimates.c.step
        )
        rows = await self._store.read_with(lambda connection: connection.execute(query).all())
        return [
            Observations(
                deployment_id=row.deployment_id,
                step=row.step,
                seconds_per_unit=_decoder.decode(row.seconds_per_unit),
            )
            for row in rows
        ]

    async def write(
        self, changed: Sequence[Observations], forgotten: Sequence[Key], *, time_s: float
    ) -> None:
        """Replace those of some steps, observed at a Unix time, and remove those of others."""

        def work(connection: Connection) -> None:
            for each in changed:
                values = {
                    "observed_time_s": time_s,
                    "seconds_per_unit": msgspec.msgpack.encode(each.seconds_per_unit),
                }
                new = insert(estimates).values(deployment_id=each.deployment_id, step=each.step, **values)
                connection.execute(
                    new.on_conflict_do_update(index_elements=["deployment_id", "step"], set_=values)
                )
            for deployment_id, step in forgotten:
                connection.execute(
                    delete(estimates).where(
                        estimates.c.deployment_id == deployment_id, estimates.c.step == step
                    )
                )

        await self._store.write_with(work)

    async def delete_gone(self, deployments: Collection[str], *, before_s: float) -> int:
        """Forget those of other deployments than these that were last observed before a Unix time."""
        old = delete(estimates).where(
            estimates.c.deployment_id.not_in(sorted(deployments)), estimates.c.observed_time_s < before_s
        )
        return await self._store.write_with(lambda connection: connection.execute(old).rowcount)
