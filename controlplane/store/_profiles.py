"""What is remembered of profiles: which is current, and the newest switch."""

from __future__ import annotations

from functools import partial

import msgspec
from msgspec import Struct
from sqlalchemy import Connection, delete, insert, select

from controlplane.store._store import JobStore
from controlplane.store._tables import profile_state
from rung.types import Profile


class ProfileState(Struct, frozen=True, kw_only=True):
    """The current profile and the newest switch.

    Attributes:
        current: the profile that was applied and verified, as it was then; None if none was.
        operation_id: the newest switch; empty if there was none.
        target: the profile that it is, or was, to.
        ended: whether it is known how that ended.
        detail: how it failed, or why there is no current profile; empty if neither.
    """

    current: Profile | None = None
    operation_id: str = ""
    target: Profile | None = None
    ended: bool = True
    detail: str = ""


_decoder = msgspec.msgpack.Decoder(ProfileState)


class ProfileStates:
    """What is remembered of profiles, in the file of the jobs."""

    def __init__(self, store: JobStore) -> None:
        self._store = store

    async def read(self) -> ProfileState:
        """What was written last; that of a new fleet if nothing was. Raises UnavailableError."""
        return await self._store.read_with(_read)

    async def write(self, state: ProfileState) -> None:
        """Replace what was written before. Raises UnavailableError: it was not stored."""
        await self._store.write_with(partial(_write, state))


def _read(connection: Connection) -> ProfileState:
    record = connection.execute(select(profile_state.c.record)).scalar()
    return _decoder.decode(record) if record is not None else ProfileState()


def _write(state: ProfileState, connection: Connection) -> None:
    connection.execute(delete(profile_state))
    connection.execute(insert(profile_state).values(id=1, record=msgspec.msgpack.encode(state)))
