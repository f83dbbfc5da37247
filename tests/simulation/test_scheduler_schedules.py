"""Ten thousand random schedules of the node scheduler, with faults, in virtual time.

A failing seed is named; `RUNG_SEED=1234 pytest tests/simulation -k replayed` plays it alone.
"""

from __future__ import annotations

import gc
import os
from collections import Counter
from collections.abc import Iterator

import pytest

from tests.simulation.schedules import play

BLOCK = 1000


@pytest.fixture(autouse=True)
def small_heap() -> Iterator[None]:
    """What the test run has loaded is not looked through again with every garbage collection."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.mark.parametrize("block", range(10))
def test_no_schedule_breaks_an_invariant(block: int) -> None:
    outcomes: Counter[str] = Counter()
    for seed in range(block * BLOCK, (block + 1) * BLOCK):
        try:
            outcomes += play(seed).outcomes
        except Exception as error:  # noqa: BLE001 - whatever it is, the seed must be told
            pytest.fail(
                f"seed {seed}: {error!r}; replay: RUNG_SEED={seed} pytest tests/simulation -k replayed"
            )

    # Otherwise they show little.
    assert outcomes["Granted"] > BLOCK
    assert outcomes["Raised"] > BLOCK // 2
    assert outcomes["VRAM_INFEASIBLE"] > BLOCK // 20
    assert outcomes["ENGINE_START_FAILED"] > BLOCK // 100
    assert outcomes["UNAVAILABLE"] > BLOCK // 100
    assert outcomes["left"] > BLOCK // 20


@pytest.mark.skipif("RUNG_SEED" not in os.environ, reason="RUNG_SEED names the seed to replay")
def test_a_seed_is_replayed() -> None:
    play(int(os.environ["RUNG_SEED"]), tell=lambda now_s, what: print(f"{now_s - 1000:9.3f} {what}"))
