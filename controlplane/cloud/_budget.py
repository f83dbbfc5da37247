"""What may be spent on one provider in one day of UTC. Pure: time is given by the caller.

An amount is reserved before a call and settled after it, so that calls that run at the same time cannot
spend more together than there is. A call belongs to the day on which it was reserved; one that ends after
midnight no longer matters to the budget. Amounts are millionths of a dollar.
"""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

from msgspec import Struct

from controlplane.cloud._values import MICRO_USD_PER_USD
from rung.errors import BudgetExhaustedError


def day_of(time_s: float) -> str:
    """The day of UTC that a Unix time is in, as `2026-11-21`; days sort by time."""
    return datetime.fromtimestamp(time_s, UTC).date().isoformat()


def day_end_s(day: str) -> float:
    """The Unix time at which a day ends."""
    return (datetime.fromisoformat(day).replace(tzinfo=UTC) + timedelta(days=1)).timestamp()


class Spending(Struct, frozen=True):
    """How much of a day's budget is gone."""

    spent_micro_usd: int
    reserved_micro_usd: int
    cap_micro_usd: int
    resets_at_s: float


class DailyBudget:
    """The budget of one provider.

    Args:
        provider: id, for messages.
        cap_micro_usd: most that may be spent in a day.
        now_s: Unix time.
        spent_micro_usd: what of the day's budget is gone already, calls without a known end in full.
    """

    def __init__(self, provider: str, cap_micro_usd: int, now_s: float, spent_micro_usd: int = 0) -> None:
        self._provider = provider
        self._cap = cap_micro_usd
        self._day = day_of(now_s)
        self._ends_s = day_end_s(self._day)
        self._spent = spent_micro_usd
        self._reserved: dict[str, int] = {}
        self._reserved_total = 0

    def spending(self, now_s: float) -> Spending:
        """How it stands."""
        self._turn_day(now_s)
        return Spending(self._spent, self._reserved_total, self._cap, self._ends_s)

    def refusal(self, now_s: float) -> str:
        """Why no call can be made, however small; empty if one can."""
        # Asked for at each choice of a target.
        self._turn_day(now_s)
        if self._spent + self._reserved_total < self._cap:
            return ""
        return f"the daily spending cap of {self._provider} is reached: {_told(self.spending(now_s))}"

    def reserve(self, call_id: str, micro_usd: int, now_s: float) -> str:
        """Set an amount aside for a call; returns the day that it counts to.

        Raises:
            BudgetExhaustedError: there is less left; nothing was reserved.
        """
        spending = self.spending(now_s)
        if spending.spent_micro_usd + spending.reserved_micro_usd + micro_usd > self._cap:
            raise BudgetExhaustedError(
                f"the call could cost {_usd(micro_usd)}, which the daily spending cap of {self._provider} "
                f"does not leave: {_told(spending)}",
                provider=self._provider,
                spent_usd=f"{spending.spent_micro_usd / MICRO_USD_PER_USD:.6f}",
                reserved_usd=f"{spending.reserved_micro_usd / MICRO_USD_PER_USD:.6f}",
                cap_usd=f"{self._cap / MICRO_USD_PER_USD:.6f}",
                retry_after=str(max(1, int(spending.resets_at_s - now_s))),
            )
        self._reserved[call_id] = micro_usd
        self._reserved_total += micro_usd
        return self._day

    def settle(self, call_id: str, micro_usd: int, now_s: float) -> None:
        """A call has ended and cost so much; the rest of its reservation is free again.

        More than was reserved counts, too: what is owed is owed. Settling twice changes nothing.
        """
        self._turn_day(now_s)
        reserved = self._reserved.pop(call_id, None)
        if reserved is not None:
            self._reserved_total -= reserved
            self._spent += micro_usd

    def _turn_day(self, now_s: float) -> None:
        # Only forward: a clock that is set back does not give a day's money a second time.
        if now_s < self._ends_s:
            return
        self._day = day_of(now_s)
        self._ends_s = day_end_s(self._day)
        self._spent = self._reserved_total = 0
        self._reserved.clear()


def _told(spending: Spending) -> str:
    reserved = spending.reserved_micro_usd
    running = f" and {_usd(reserved)} reserved by running calls" if reserved else ""
    resets = datetime.fromtimestamp(spending.resets_at_s, UTC).strftime("%Y-%m-%d %H:%M UTC")
    return (
        f"{_usd(spending.spent_micro_usd)} of {_usd(spending.cap_micro_usd)} spent{running}; "
        f"it resets at {resets}"
    )


def _usd(micro_usd: int) -> str:
    """Dollars, to the cent, or as exactly as it takes."""
    whole, cents = f"{micro_usd / MICRO_USD_PER_USD:.6f}".rstrip("0").split(".")
    return f"${whole}.{cents:0<2}"
