"""Spending on cloud models: reserved and settled in memory at once, and kept in the store."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Protocol
from uuid import uuid4

import structlog
from msgspec import Struct

from controlplane.cloud._budget import DailyBudget, Spending, day_of
from controlplane.cloud._values import MICRO_USD_PER_USD, CloudProvider
from rung.errors import RungError

_log = structlog.get_logger("rung.cloud")

#: Calls are kept for so long, for whoever wants to compare them with a bill.
_KEPT_S = 35 * 24 * 3600.0


class CloudCall(Struct, frozen=True, kw_only=True):
    """A call whose cost is reserved."""

    id: str
    day: str
    provider: str
    model: str
    reserved_micro_usd: int


class SpendStore(Protocol):
    """Where calls and their costs are kept."""

    async def add_cloud_call(
        self, call_id: str, *, day: str, provider: str, model: str, reserved_micro_usd: int
    ) -> None:
        """Keep a call that is about to be made. Raises UnavailableError: it was not kept."""
        ...

    async def settle_cloud_call(self, call_id: str, *, day: str, spent_micro_usd: int) -> None:
        """Keep what a call has cost. Raises UnavailableError."""
        ...

    async def cloud_spending(self, day: str) -> Mapping[str, int]:
        """Millionths of a dollar of a day by provider; calls that were not settled count in full."""
        ...

    async def delete_cloud_calls_before(self, day: str) -> int:
        """Forget calls of earlier days; returns how many."""
        ...


class CloudSpend:
    """The budgets of all providers.

    A reservation is stored before its call is made: a process that dies in between leaves it counted in
    full until the day ends, since nobody knows what the provider has billed. One process at a time has
    the store, so that what is in memory is all there is.
    """

    def __init__(
        self, store: SpendStore, budgets: Mapping[str, DailyBudget], now_s: Callable[[], float]
    ) -> None:
        self._store = store
        self._budgets = budgets
        self._now_s = now_s
        self._writes: set[asyncio.Task[None]] = set()

    @classmethod
    async def open(
        cls, providers: Sequence[CloudProvider], store: SpendStore, now_s: Callable[[], float] = time.time
    ) -> CloudSpend:
        """Read what was spent today. Raises UnavailableError: the store cannot be used."""
        now = now_s()
        await store.delete_cloud_calls_before(day_of(now - _KEPT_S))
        spent = await store.cloud_spending(day_of(now))
        budgets = {
            each.id: DailyBudget(
                each.id, round(each.daily_cap_usd * MICRO_USD_PER_USD), now, spent.get(each.id, 0)
            )
            for each in providers
        }
        return cls(store, budgets, now_s)

    def spending(self, provider: str) -> Spending:
        """How a provider's budget stands."""
        return self._budgets[provider].spending(self._now_s())

    def refusal(self, provider: str) -> str:
        """Why no call can be paid; empty if one can."""
        return self._budgets[provider].refusal(self._now_s())

    async def reserve(self, provider: str, model: str, micro_usd: int) -> CloudCall:
        """Set aside what a call may cost at most.

        Raises:
            BudgetExhaustedError: the provider's cap does not leave so much.
            UnavailableError: the store cannot be used, so the call must not be made.
        """
        budget, call_id = self._budgets[provider], uuid4().hex
        day = budget.reserve(call_id, micro_usd, self._now_s())
        call = CloudCall(id=call_id, day=day, provider=provider, model=model, reserved_micro_usd=micro_usd)
        try:
            await self._store.add_cloud_call(
                call_id, day=day, provider=provider, model=model, reserved_micro_usd=micro_usd
            )
        except BaseException:
            # Whether it was stored or not: no call was made.
            self.settle(call, 0)
            raise
        return call

    def settle(self, call: CloudCall, micro_usd: int) -> None:
        """A call has cost so much; it is written down in the background."""
        self._budgets[call.provider].settle(call.id, micro_usd, self._now_s())
        task = asyncio.create_task(self._write(call, micro_usd), name=f"settle {call.id}")
        self._writes.add(task)
        task.add_done_callback(self._writes.discard)

    async def _write(self, call: CloudCall, micro_usd: int) -> None:
        try:
            await self._store.settle_cloud_call(call.id, day=call.day, spent_micro_usd=micro_usd)
        except RungError as error:
            # It stays counted in full after a restart: too much, and never too little.
            _log.warning("cloud_call_not_settled", provider=call.provider, call=call.id, error=error.message)

    async def aclose(self) -> None:
        """Wait until everything is written; before the store is closed."""
        while self._writes:
            await asyncio.gather(*self._writes)
