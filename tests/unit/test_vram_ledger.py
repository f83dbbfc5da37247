"""The ledger: measured before declared before estimated, and every byte counted once."""

from __future__ import annotations

import msgspec
import pytest
from msgspec.structs import replace

from controlplane.vram import (
    HELD_ASLEEP_ESTIMATE_BYTES,
    Demand,
    Facts,
    Infeasible,
    Ledger,
    ReclaimPlan,
    Reservation,
    build_entry,
    build_ledger,
    plan,
)
from rung.types import (
    Deployment,
    DeploymentSpec,
    EngineSpec,
    ExternalRuntime,
    LlamaCppEngine,
    OllamaEngine,
    ProcessRuntime,
    Residency,
    ResidencyClass,
    Runtime,
    VllmEngine,
)

GIB = 1 << 30
VLLM = ProcessRuntime(executable="vllm")


def deployment(
    name: str,
    *,
    residency: Residency = Residency.AWAKE,
    declared: int = 0,
    measured: int | None = None,
    active: int = 0,
    sleep_mode: bool = True,
    runtime: Runtime = VLLM,
) -> Deployment:
    spec = DeploymentSpec(
        id=name,
        node_id="workstation",
        model=name,
        engine=EngineSpec(engine=VllmEngine(model=name, sleep_mode=sleep_mode), runtime=runtime),
        residency_class=ResidencyClass.SLEEPABLE,
        vram_bytes=declared,
    )
    return Deployment(spec=spec, residency=residency, vram_bytes=measured, active_requests=active)


def ledger_of(*pairs: tuple[Deployment, Facts], total: int = 32 * GIB, free: int = 8 * GIB) -> Ledger:
    return build_ledger(pool_id="workstation/0", total_bytes=total, free_bytes=free, deployments=pairs)


@pytest.mark.parametrize(
    ("measured_by_us", "measured_by_node", "declared", "estimated", "expected"),
    [
        (3, 4, 5, 6, 3),
        (None, 4, 5, 6, 4),
        (None, None, 5, 6, 5),
        (None, None, 0, 6, 6),
        (0, 4, 5, 6, 0),
    ],
)
def test_a_measured_figure_goes_before_a_declared_one_and_that_before_an_estimate(
    measured_by_us: int | None, measured_by_node: int | None, declared: int, estimated: int, expected: int
) -> None:
    entry = build_entry(
        deployment("a", measured=measured_by_node, declared=declared),
        Facts(measured_bytes=measured_by_us, estimated_bytes=estimated),
    )

    assert entry.resident_bytes == expected
    assert entry.measured is (measured_by_us is not None or measured_by_node is not None)


def test_an_engine_that_is_down_holds_nothing_unless_it_was_measured() -> None:
    for residency in (Residency.STOPPED, Residency.FAILED):
        assert build_entry(deployment("a", residency=residency, declared=5), Facts()).resident_bytes == 0
        left = deployment("a", residency=residency, declared=5, measured=2)
        assert build_entry(left, Facts()).resident_bytes == 2


def test_a_sleeper_holds_what_was_measured_asleep_or_an_estimate_and_never_more_than_awake() -> None:
    asleep = deployment("a", residency=Residency.ASLEEP, declared=16 * GIB)

    assert build_entry(asleep, Facts()).resident_bytes == HELD_ASLEEP_ESTIMATE_BYTES
    assert build_entry(asleep, Facts(held_asleep_bytes=7)).resident_bytes == 7
    small = build_entry(deployment("b", measured=GIB), Facts())
    assert small.held_asleep_bytes == GIB


def test_level_1_takes_the_weights_from_host_ram_or_else_all_that_is_given_up() -> None:
    awake = deployment("a", measured=16 * GIB)

    assert build_entry(awake, Facts(held_asleep_bytes=GIB)).host_asleep_bytes == 15 * GIB
    assert build_entry(awake, Facts(weights_bytes=8 * GIB)).host_asleep_bytes == 8 * GIB
    assert build_entry(awake, Facts(weights_bytes=8 * GIB, host_asleep_bytes=9)).host_asleep_bytes == 9


def test_what_an_engine_can_sleep_at_is_its_own_word_unless_somebody_knows_better() -> None:
    assert build_entry(deployment("a"), Facts()).sleep_levels == (1, 2)
    assert build_entry(deployment("a", sleep_mode=False), Facts()).sleep_levels == ()
    assert build_entry(deployment("a"), Facts(sleep_levels=(2,))).sleep_levels == (2,)
    by_engine = {
        OllamaEngine(model="qwen3:8b"): (2,),
        LlamaCppEngine(router_model="qwen3"): (2,),
        LlamaCppEngine(model_path="/m.gguf"): (),
    }
    for engine, levels in by_engine.items():
        spec = deployment("a").spec
        spec = msgspec.structs.replace(spec, engine=msgspec.structs.replace(spec.engine, engine=engine))
        entry = build_entry(msgspec.structs.replace(deployment("a"), spec=spec), Facts())
        assert entry.sleep_levels == levels


def test_a_busy_deployment_is_not_idle_and_an_external_one_is_marked() -> None:
    busy = build_entry(deployment("a", active=2), Facts(idle_s=60))
    external = build_entry(deployment("a", runtime=ExternalRuntime(base_url="http://127.0.0.1:1")), Facts())

    assert (busy.busy, busy.idle_s) == (True, 0.0)
    assert (busy.external, external.external) == (False, True)


@pytest.mark.parametrize("residency", list(Residency))
def test_only_what_has_settled_and_is_not_leased_may_be_touched(residency: Residency) -> None:
    settled = (Residency.AWAKE, Residency.ASLEEP, Residency.STOPPED, Residency.FAILED)

    assert build_entry(deployment("a", residency=residency), Facts()).touchable is (residency in settled)
    assert not build_entry(deployment("a", residency=residency), Facts(leased=True)).touchable
    assert not build_entry(deployment("a", residency=residency), Facts(in_flux=True)).touchable


def test_what_nobody_owns_is_unattributed() -> None:
    ledger = ledger_of(
        (deployment("a", measured=10 * GIB), Facts()), (deployment("b", measured=6 * GIB), Facts())
    )

    assert ledger.unattributed_bytes == 8 * GIB
    assert sum(entry.resident_bytes for entry in ledger.entries) == 16 * GIB


def test_without_figures_of_processes_declared_ones_count_and_the_rest_is_unattributed() -> None:
    ledger = ledger_of(
        (deployment("a", declared=16 * GIB), Facts()), (deployment("b", declared=2 * GIB), Facts())
    )

    assert ledger.unattributed_bytes == 6 * GIB


def test_declared_figures_never_add_up_to_more_than_is_in_use() -> None:
    ledger = ledger_of(
        (deployment("a", declared=16 * GIB), Facts(cache_bytes=16 * GIB)),
        (deployment("b", declared=8 * GIB), Facts()),
        (deployment("c", measured=6 * GIB), Facts()),
        free=14 * GIB,
    )
    held = {entry.deployment_id: entry.resident_bytes for entry in ledger.entries}

    assert held == {"a": 8 * GIB, "b": 4 * GIB, "c": 6 * GIB}
    assert ledger.unattributed_bytes == 0
    assert ledger.entries[0].cache_bytes == 8 * GIB


def test_measured_figures_that_exceed_what_is_in_use_leave_nothing_below_zero() -> None:
    ledger = ledger_of(
        (deployment("a", measured=30 * GIB), Facts()), (deployment("b", declared=GIB), Facts())
    )

    assert ledger.unattributed_bytes == 0
    assert [entry.resident_bytes for entry in ledger.entries] == [30 * GIB, 0]


def test_entries_are_in_the_order_of_their_ids() -> None:
    ledger = ledger_of((deployment("b"), Facts()), (deployment("a"), Facts()))

    assert [entry.deployment_id for entry in ledger.entries] == ["a", "b"]
    found = ledger.entry("b")
    assert found is not None
    assert found.deployment_id == "b"
    assert ledger.entry("c") is None


def test_two_demands_never_count_the_same_free_bytes() -> None:
    free = Ledger(pool_id="workstation/0", total_bytes=32 * GIB, free_bytes=20 * GIB, reserve_bytes=2 * GIB)
    demand = Demand(vram_bytes=12 * GIB)
    promised = Ledger(
        pool_id="workstation/0",
        total_bytes=32 * GIB,
        free_bytes=20 * GIB,
        reserve_bytes=2 * GIB,
        reservations=(Reservation(holder="first", promised_bytes=12 * GIB),),
    )

    assert isinstance(plan(free, demand), ReclaimPlan)
    second = plan(promised, demand)
    assert isinstance(second, Infeasible)
    assert second.missing_bytes == 6 * GIB
    assert second.retry_when == ("the lease of first ends",)


def test_bytes_of_a_promise_that_were_taken_are_not_counted_twice() -> None:
    ledger = Ledger(
        pool_id="workstation/0",
        total_bytes=32 * GIB,
        free_bytes=10 * GIB,
        reservations=(
            Reservation(holder="half taken", promised_bytes=6 * GIB, taken_bytes=4 * GIB),
            Reservation(holder="took too much", promised_bytes=1 * GIB, taken_bytes=3 * GIB),
        ),
    )

    assert ledger.promised_bytes == 2 * GIB
    assert ledger.available_bytes == 8 * GIB


def test_the_size_of_the_kv_cache_says_what_is_left_of_a_shrunk_deployment() -> None:
    awake = replace(deployment("a"), vram_bytes=13 * GIB, kv_cache_bytes=7 * GIB)
    entry = build_entry(awake, Facts())
    assert (entry.shrunk_bytes, entry.shrunk) == (6 * GIB, False)

    shrunk = replace(awake, residency=Residency.ASLEEP, shrunk=True, vram_bytes=6 * GIB)
    entry = build_entry(shrunk, Facts())
    assert (entry.resident_bytes, entry.shrunk_bytes, entry.shrunk) == (6 * GIB, 6 * GIB, True)
    # Where nothing is measured: what it was declared to hold, less its KV cache.
    declared = replace(shrunk, vram_bytes=None, spec=replace(shrunk.spec, vram_bytes=12 * GIB))
    assert build_entry(declared, Facts()).resident_bytes == 5 * GIB


def test_of_one_whose_kv_cache_nobody_knows_a_shrink_frees_nothing() -> None:
    entry = build_entry(replace(deployment("a"), vram_bytes=13 * GIB), Facts())

    assert entry.shrunk_bytes == entry.resident_bytes
