"""Holding memory of a GPU: wait for it, keep it, give it back."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextlib import aclosing, asynccontextmanager, suppress
from typing import TypeAlias

from rung import codec, v1
from rung._client_calls import Connection
from rung.errors import NotFoundError, RungError, UnavailableError
from rung.types import Lease, PhaseProgress, ReclaimPlan

#: A lease is renewed so often within its time to live, so that two renewals may fail.
_RENEWALS = 3

#: What is heard while a lease is waited for; the lease is the last.
LeaseStep: TypeAlias = PhaseProgress | ReclaimPlan | Lease


class HeldLease:
    """A lease that is renewed for as long as it is held."""

    def __init__(self, lease: Lease) -> None:
        self.lease = lease
        #: Set once the lease has ended although nobody gave it back: the memory may be somebody else's.
        self.lost = asyncio.Event()


async def acquire(connection: Connection, request: v1.AcquireLeaseRequest) -> AsyncGenerator[LeaseStep, None]:
    """Wait for a lease, and hear why it takes long. Leaving before the grant withdraws the demand."""
    responses = connection.stream(connection.stubs.vram.AcquireLease, request)
    async with aclosing(responses):
        async for response in responses:
            kind = response.WhichOneof("event")
            if kind == "progress":
                yield codec.phase_progress_from_proto(response.progress)
            elif kind == "plan":
                yield codec.reclaim_plan_from_proto(response.plan)
            elif kind == "granted":
                yield codec.lease_from_proto(response.granted)


async def renew(connection: Connection, lease_id: str) -> Lease:
    """Let a lease last its time again from now."""
    response = await connection.unary(
        connection.stubs.vram.RenewLease, v1.RenewLeaseRequest(lease_id=lease_id)
    )
    return codec.lease_from_proto(response.lease)


async def release(connection: Connection, lease_id: str) -> None:
    """End a lease."""
    await connection.unary(connection.stubs.vram.ReleaseLease, v1.ReleaseLeaseRequest(lease_id=lease_id))


@asynccontextmanager
async def held(
    connection: Connection,
    request: v1.AcquireLeaseRequest,
    ttl_s: float,
    on_wait: Callable[[PhaseProgress | ReclaimPlan], None] | None,
) -> AsyncIterator[HeldLease]:
    """Wait for a lease, hold it while the context is entered, and give it back."""
    granted: Lease | None = None
    async with aclosing(acquire(connection, request)) as steps:
        async for step in steps:
            if isinstance(step, Lease):
                granted = step
            elif on_wait is not None:
                on_wait(step)
    if granted is None:
        raise UnavailableError("the server ended the wait for the lease without a grant")
    holding = HeldLease(granted)
    renewing = asyncio.create_task(_keep(connection, holding, ttl_s), name=f"renew-{granted.id}")
    try:
        yield holding
    finally:
        renewing.cancel()
        await asyncio.gather(renewing, return_exceptions=True)
        # It ends by itself if this does not reach the server.
        with suppress(RungError):
            await release(connection, granted.id)


async def _keep(connection: Connection, holding: HeldLease, ttl_s: float) -> None:
    while True:
        await asyncio.sleep(ttl_s / _RENEWALS)
        try:
            holding.lease = await renew(connection, holding.lease.id)
        except NotFoundError:
            holding.lost.set()
            return
        except RungError:
            # The server is away: the next renewal may reach it in time.
            continue
