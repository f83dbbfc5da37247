"""The ledger of a pool, from what its agent says."""

from __future__ import annotations

import pytest
from msgspec.structs import replace

from controlplane.fleet import build_view, ledger_of
from controlplane.vram import Ledger, Reserve, Timings
from rung.types import (
    ComfyUiEngine,
    Deployment,
    Engine,
    Gpu,
    GpuHealth,
    GpuProcess,
    LlamaCppEngine,
    MemorySource,
    Node,
    NodeState,
    Residency,
    ServiceEngine,
    TransitionTimes,
    VllmEngine,
)
from tests.fakes.agent_server import a_deployment, a_spec, a_status

GIB = 1 << 30


def awake(engine: Engine, vram_bytes: int | None) -> Deployment:
    return replace(a_deployment(a_spec(engine=engine), Residency.AWAKE), vram_bytes=vram_bytes)


def ledger(deployment: Deployment, *processes: GpuProcess) -> Ledger:
    """Of a card of 32 GiB, 20 of them free."""
    gpu = Gpu(
        index=0,
        uuid="GPU-0",
        name="RTX 5090",
        health=GpuHealth.OK,
        memory_source=MemorySource.NVML,
        memory_total_bytes=32 * GIB,
        memory_used_bytes=12 * GIB,
        memory_free_bytes=20 * GIB,
        processes=processes,
    )
    node = Node(id="box", address="x", state=NodeState.READY, status=replace(a_status(), gpus=(gpu,)))
    view = build_view({"box": node}, [deployment.spec], {"box": {deployment.spec.id: deployment}}, "")
    return ledger_of(
        view,
        "box/0",
        load=lambda _: (0, 0),
        idle_s=lambda _: 0.0,
        reserve=Reserve(vram_bytes=0, host_bytes=0),
    )


@pytest.mark.parametrize(
    ("processes", "resident_gib"),
    [
        # The deployment's own figure is newer, and its 11 GiB are not in the free bytes yet.
        ((GpuProcess(1, 2 * GIB, "chat-1"),), 2),
        ((GpuProcess(1, GIB, "chat-1"), GpuProcess(2, GIB, "chat-1")), 2),
        ((GpuProcess(9, GIB, ""),), 0),
        # No figures of processes: that of the deployment is all there is.
        ((), 11),
        ((GpuProcess(1, None, "chat-1"),), 11),
        ((GpuProcess(1, None, "chat-1"), GpuProcess(9, GIB, "")), 11),
    ],
)
def test_what_a_deployment_holds_is_of_the_sample_that_has_the_free_bytes(
    processes: tuple[GpuProcess, ...], resident_gib: int
) -> None:
    (entry,) = ledger(awake(VllmEngine(model="m"), 11 * GIB), *processes).entries

    assert entry.resident_bytes == resident_gib * GIB
    assert entry.measured


def test_what_was_learnt_of_a_deployment_stands_in_the_place_of_defaults() -> None:
    usual, found = Timings(), awake(VllmEngine(model="m"), None)
    (unseen,) = ledger(found).entries
    assert unseen.timings == usual

    learnt = TransitionTimes(start_s=usual.start_s / 10, sleep_s=3.5)
    (entry,) = ledger(replace(found, usual_times=learnt)).entries
    assert (entry.timings.start_s, entry.timings.sleep_s) == (usual.start_s / 10, 3.5)
    # A small model that has never slept is not taken to wake more slowly than it starts.
    assert entry.timings.wake_s == pytest.approx(usual.wake_s / 10)
    assert (entry.timings.stop_s, entry.timings.free_s) == (usual.stop_s, usual.free_s)


def test_an_engine_that_keeps_models_can_be_flushed_down_to_its_context() -> None:
    (comfyui,) = ledger(awake(ComfyUiEngine(), 11 * GIB)).entries
    (routed,) = ledger(awake(LlamaCppEngine(router_model="m"), 11 * GIB)).entries
    (vllm,) = ledger(awake(VllmEngine(model="m"), 11 * GIB)).entries
    (alone,) = ledger(awake(LlamaCppEngine(model_path="/m"), 11 * GIB)).entries
    (speaches,) = ledger(awake(ServiceEngine(dialect="speaches"), 11 * GIB)).entries
    (xtts,) = ledger(awake(ServiceEngine(dialect="xtts"), 11 * GIB)).entries

    assert comfyui.cache_bytes == routed.cache_bytes == speaches.cache_bytes == 11 * GIB - GIB // 2
    assert vllm.cache_bytes == alone.cache_bytes == xtts.cache_bytes == 0
