"""What budgets rely on of a store."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from controlplane.store import CloudCalls, JobStore
from rung.errors import UnavailableError


@asynccontextmanager
async def _calls(path: Path) -> AsyncIterator[CloudCalls]:
    store = await JobStore.open(path)
    try:
        yield CloudCalls(store)
    finally:
        await store.aclose()


@pytest.fixture
async def calls(tmp_path: Path) -> AsyncIterator[CloudCalls]:
    async with _calls(tmp_path / "rung.db") as opened:
        yield opened


async def _add(calls: CloudCalls, call_id: str, day: str, provider: str, micro_usd: int) -> None:
    await calls.add_cloud_call(call_id, day=day, provider=provider, model="m", reserved_micro_usd=micro_usd)


async def test_a_day_is_summed_by_provider_and_open_calls_count_in_full(calls: CloudCalls) -> None:
    await _add(calls, "a", "2026-11-21", "openai", 100)
    await _add(calls, "b", "2026-11-21", "openai", 10)
    await _add(calls, "c", "2026-11-21", "deepseek", 5)
    await _add(calls, "d", "2026-11-20", "openai", 1000)

    await calls.settle_cloud_call("a", day="2026-11-21", spent_micro_usd=1)

    assert await calls.cloud_spending("2026-11-21") == {"openai": 11, "deepseek": 5}
    assert await calls.cloud_spending("2026-11-22") == {}


async def test_settling_what_is_not_there_changes_nothing(calls: CloudCalls) -> None:
    await calls.settle_cloud_call("a", day="2026-11-21", spent_micro_usd=1)

    assert await calls.cloud_spending("2026-11-21") == {}


async def test_earlier_days_are_forgotten(calls: CloudCalls) -> None:
    for day in ("2026-11-19", "2026-11-20", "2026-11-21"):
        await _add(calls, day, day, "openai", 1)

    assert await calls.delete_cloud_calls_before("2026-11-20") == 1
    assert await calls.cloud_spending("2026-11-19") == {}
    assert await calls.cloud_spending("2026-11-20") == {"openai": 1}


async def test_a_store_that_cannot_be_written_says_so(calls: CloudCalls) -> None:
    await _add(calls, "a", "2026-11-21", "openai", 1)

    with pytest.raises(UnavailableError, match="store cannot be used"):
        await _add(calls, "a", "2026-11-21", "openai", 1)


_SPENDER = """
import asyncio, sys
from pathlib import Path
from controlplane.cloud import CloudProvider, CloudSpend, Dialect
from controlplane.store import CloudCalls, JobStore
async def main():
    store = await JobStore.open(Path(sys.argv[1]))
    provider = CloudProvider(id="p", dialect=Dialect.OPENAI, base_url="", api_key_env="", api_key_file=None,
                             daily_cap_usd=1000.0, models=())
    spend = await CloudSpend.open([provider], CloudCalls(store))
    for n in range(100000):
        call = await spend.reserve("p", "p/m", 1000)
        print("reserved", flush=True)
        if n % 2:
            spend.settle(call, 1)
            await spend.aclose()
            print("settled", flush=True)
asyncio.run(main())
"""


async def test_what_was_reserved_before_a_kill_is_counted(tmp_path: Path) -> None:
    path = tmp_path / "killed.db"
    with subprocess.Popen([sys.executable, "-c", _SPENDER, str(path)], stdout=subprocess.PIPE) as spender:  # noqa: ASYNC220
        assert spender.stdout is not None
        lines = [await asyncio.to_thread(spender.stdout.readline) for _ in range(100)]
        spender.kill()
        lines += spender.stdout.read().split(b"\n")
    reserved = sum(line.strip() == b"reserved" for line in lines)
    settled = sum(line.strip() == b"settled" for line in lines)

    async with _calls(path) as calls:
        # It may have become midnight meanwhile.
        today = datetime.now(UTC).date()
        days = [today - timedelta(days=1), today]
        spent = sum([(await calls.cloud_spending(day.isoformat())).get("p", 0) for day in days])

    # A call more may have been stored, or settled, without a word of it.
    assert (reserved - settled - 1) * 1000 < spent <= (reserved - settled + 1) * 1000 + settled
    assert reserved > settled > 10
