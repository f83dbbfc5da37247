"""Budgets of cloud providers: what is reserved, what is spent, and that it is never too much."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from dataclasses import dataclass, field

import pytest
from hypothesis import given
from hypothesis import strategies as st

from controlplane.cloud import CloudModel, CloudProvider, CloudSpend, CloudUsage, Dialect, ModelPrices
from controlplane.cloud._budget import DailyBudget, day_end_s, day_of
from controlplane.cloud._estimate import likely_usage, most_tokens
from rung.errors import BudgetExhaustedError, UnavailableError

#: 2026-11-21 18:49:37 UTC.
NOW_S = 1_795_286_977.0
DAY_S = 86_400.0
PRICES = ModelPrices(prompt_usd=3.0, completion_usd=15.0, cached_usd=0.3)
MODEL = CloudModel(
    id="p/m",
    provider="p",
    model="m",
    aliases=(),
    capabilities=("chat",),
    context_tokens=0,
    max_output_tokens=1000,
    prices=PRICES,
)
PROVIDER = CloudProvider(
    id="p",
    dialect=Dialect.OPENAI,
    base_url="https://p",
    api_key_env="P",
    api_key_file=None,
    daily_cap_usd=1.0,
    models=(MODEL,),
)


def test_days_are_those_of_utc() -> None:
    assert day_of(NOW_S) == "2026-11-21"
    assert day_end_s("2026-11-21") == 1_795_305_600.0
    assert day_of(day_end_s("2026-11-21")) == "2026-11-22"


def test_a_refusal_says_what_was_spent_the_cap_and_when_it_resets() -> None:
    budget = DailyBudget("deepseek", 1_000_000, NOW_S, spent_micro_usd=400_000)
    budget.reserve("a", 500_000, NOW_S)

    with pytest.raises(BudgetExhaustedError) as raised:
        budget.reserve("b", 100_001, NOW_S)

    assert raised.value.message == (
        "the call could cost $0.100001, which the daily spending cap of deepseek does not leave: "
        "$0.40 of $1.00 spent and $0.50 reserved by running calls; it resets at 2026-11-22 00:00 UTC"
    )
    assert raised.value.metadata == {
        "provider": "deepseek",
        "spent_usd": "0.400000",
        "reserved_usd": "0.500000",
        "cap_usd": "1.000000",
        "retry_after": "18623",
    }


def test_a_budget_refuses_when_nothing_is_left_and_not_before() -> None:
    budget = DailyBudget("p", 100, NOW_S, spent_micro_usd=99)
    assert budget.refusal(NOW_S) == ""
    budget.reserve("a", 1, NOW_S)

    assert "cap of p is reached" in budget.refusal(NOW_S)
    budget.settle("a", 0, NOW_S)
    assert budget.refusal(NOW_S) == ""


def test_a_new_day_has_its_own_money_and_a_late_call_belongs_to_the_old_one() -> None:
    budget = DailyBudget("p", 100, NOW_S)
    budget.reserve("late", 100, NOW_S)
    budget.reserve("new", 100, NOW_S + DAY_S)

    budget.settle("late", 100, NOW_S + DAY_S)

    spending = budget.spending(NOW_S + DAY_S)
    assert (spending.spent_micro_usd, spending.reserved_micro_usd) == (0, 100)


def test_a_clock_that_is_set_back_gives_nothing_twice() -> None:
    budget = DailyBudget("p", 100, NOW_S)
    budget.reserve("a", 100, NOW_S)

    with pytest.raises(BudgetExhaustedError):
        budget.reserve("b", 1, NOW_S - DAY_S)


@given(
    st.integers(0, 1000),
    st.lists(
        st.tuples(st.sampled_from("rs"), st.integers(0, 5), st.integers(0, 400), st.floats(0, DAY_S / 4)),
        max_size=60,
    ),
)
def test_no_order_of_calls_spends_more_in_a_day_than_the_cap(
    cap: int, steps: list[tuple[str, int, int, float]]
) -> None:
    budget, now_s = DailyBudget("p", cap, NOW_S), NOW_S
    reserved: dict[str, tuple[str, int]] = {}
    spent: dict[str, int] = {}
    for action, name, amount, later_s in steps:
        now_s += later_s
        call = f"call-{name}"
        if action == "r" and call not in reserved:
            try:
                reserved[call] = budget.reserve(call, amount, now_s), amount
            except BudgetExhaustedError:
                continue
        elif action == "s" and call in reserved:
            day, most = reserved.pop(call)
            cost = min(amount, most)
            budget.settle(call, cost, now_s)
            spent[day] = spent.get(day, 0) + cost
        today = budget.spending(now_s)
        open_today = sum(most for day, most in reserved.values() if day == day_of(now_s))
        assert today.spent_micro_usd == spent.get(day_of(now_s), 0)
        assert today.reserved_micro_usd == open_today
        assert today.spent_micro_usd + today.reserved_micro_usd <= cap
    assert all(total <= cap for total in spent.values())


@pytest.mark.parametrize(
    ("usage", "micro_usd"),
    [
        (CloudUsage(), 0),
        (CloudUsage(1000, 100), 4500),
        (CloudUsage(1000, 100, 1000), 1800),
        (CloudUsage(1, 0, 1), 1),
        (CloudUsage(10, 0, 50), 3),
    ],
)
def test_what_tokens_cost(usage: CloudUsage, micro_usd: int) -> None:
    assert usage.cost_micro_usd(PRICES) == micro_usd


@given(st.integers(0, 10**7), st.integers(0, 10**6), st.integers(0, 10**7))
def test_a_cost_is_rounded_up_by_less_than_a_millionth(prompt: int, completion: int, cached: int) -> None:
    usage = CloudUsage(prompt, completion, cached)
    known = min(prompt, cached)
    exact = (prompt - known) * 30 + known * 3 + completion * 150

    assert usage.cost_micro_usd(PRICES) == -(-exact // 10)


def test_the_most_that_a_request_can_cost() -> None:
    image = "data:image/png;base64," + "A" * 100_000
    parts = [{"type": "text", "text": "x"}, {"type": "image_url", "image_url": {"url": image}}]
    with_image = {"messages": [{"role": "user", "content": parts}]}

    assert most_tokens({"messages": [], "max_tokens": 7}, 50, MODEL) == CloudUsage(50, 7)
    assert most_tokens({"messages": [], "max_tokens": 10**9}, 50, MODEL) == CloudUsage(50, 1000)
    assert most_tokens({"messages": [], "max_completion_tokens": 5, "n": 3}, 50, MODEL) == CloudUsage(50, 15)
    assert most_tokens({"messages": [], "tools": [{}]}, 50, MODEL) == CloudUsage(1050, 1000)
    assert most_tokens(with_image, 60 + len(image), MODEL) == CloudUsage(5060, 1000)


def test_what_a_cut_answer_has_probably_cost() -> None:
    most = CloudUsage(300, 1000)

    assert likely_usage(most, None, 30) == CloudUsage(100, 10)
    assert likely_usage(most, None, 10**9) == CloudUsage(100, 1000)
    assert likely_usage(most, CloudUsage(80, 1, 40), 30) == CloudUsage(80, 10, 40)
    assert likely_usage(most, CloudUsage(80, 50, 40), 30) == CloudUsage(80, 50, 40)


@dataclass
class FakeSpendStore:
    """Keeps calls in memory; fails when it is told to."""

    calls: dict[str, tuple[str, str, int]] = field(default_factory=dict)
    settled: dict[str, int] = field(default_factory=dict)
    fails: bool = False

    async def add_cloud_call(
        self, call_id: str, *, day: str, provider: str, model: str, reserved_micro_usd: int
    ) -> None:
        await asyncio.sleep(0)
        if self.fails:
            raise UnavailableError("the disk is full")
        self.calls[call_id] = (day, provider, reserved_micro_usd)

    async def settle_cloud_call(self, call_id: str, *, day: str, spent_micro_usd: int) -> None:
        await asyncio.sleep(0)
        if self.fails:
            raise UnavailableError("the disk is full")
        self.settled[call_id] = spent_micro_usd

    async def cloud_spending(self, day: str) -> Mapping[str, int]:
        found: dict[str, int] = {}
        for call_id, (on, provider, reserved) in self.calls.items():
            if on == day:
                found[provider] = found.get(provider, 0) + self.settled.get(call_id, reserved)
        return found

    async def delete_cloud_calls_before(self, day: str) -> int:
        old = [call_id for call_id, (on, _, _) in self.calls.items() if on < day]
        for call_id in old:
            del self.calls[call_id]
        return len(old)


async def _open(store: FakeSpendStore, now_s: float = NOW_S) -> CloudSpend:
    return await CloudSpend.open([PROVIDER], store, now_s=lambda: now_s)


async def test_a_call_without_an_end_counts_in_full_until_the_day_ends() -> None:
    store = FakeSpendStore()
    spend = await _open(store)
    await spend.reserve("p", "p/m", 700_000)
    paid = await spend.reserve("p", "p/m", 200_000)
    spend.settle(paid, 50_000)
    await spend.aclose()

    later = await _open(store)
    assert later.spending("p").spent_micro_usd == 750_000
    with pytest.raises(BudgetExhaustedError):
        await later.reserve("p", "p/m", 300_000)
    assert (await _open(store, NOW_S + DAY_S)).spending("p").spent_micro_usd == 0


async def test_reservations_at_the_same_time_share_one_budget() -> None:
    spend = await _open(FakeSpendStore())

    results = await asyncio.gather(
        *(spend.reserve("p", "p/m", 300_000) for _ in range(9)), return_exceptions=True
    )

    assert sum(isinstance(each, BudgetExhaustedError) for each in results) == 6


async def test_a_call_that_cannot_be_stored_is_not_made_and_costs_nothing() -> None:
    store = FakeSpendStore(fails=True)
    spend = await _open(store)

    with pytest.raises(UnavailableError, match="disk is full"):
        await spend.reserve("p", "p/m", 700_000)

    assert spend.spending("p").reserved_micro_usd == 0
    await spend.aclose()


async def test_a_cost_that_cannot_be_stored_is_known_here_all_the_same() -> None:
    store = FakeSpendStore()
    spend = await _open(store)
    call = await spend.reserve("p", "p/m", 700_000)
    store.fails = True

    spend.settle(call, 10)
    await spend.aclose()

    assert (spend.spending("p").spent_micro_usd, spend.spending("p").reserved_micro_usd) == (10, 0)
    assert (await _open(store)).spending("p").spent_micro_usd == 700_000


async def test_calls_are_forgotten_after_five_weeks() -> None:
    store = FakeSpendStore(calls={"old": ("2026-10-16", "p", 5), "kept": ("2026-10-18", "p", 5)})

    await _open(store)

    assert set(store.calls) == {"kept"}
