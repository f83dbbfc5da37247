"""A small fleet as values: a workstation with an RTX 5090 and a DGX Spark."""

from __future__ import annotations

from rung.types import (
    Deployment,
    DeploymentSpec,
    EngineSpec,
    FleetSnapshot,
    Gpu,
    GpuHealth,
    GpuProcess,
    HostStatus,
    LlamaCppEngine,
    MemorySource,
    Node,
    NodeState,
    NodeStatus,
    OpenAiCompatibleEngine,
    ProcessRuntime,
    Residency,
    ResidencyClass,
)

GIB = 1024**3
MIB = 1024**2


def a_gpu(
    *,
    used_bytes: int = 0,
    total_bytes: int = 32_607 * MIB,
    processes: tuple[GpuProcess, ...] = (),
    unified: bool = False,
) -> Gpu:
    """A GPU with so much memory in use."""
    return Gpu(
        index=0,
        uuid="GPU-0",
        name="NVIDIA GB10" if unified else "NVIDIA GeForce RTX 5090",
        health=GpuHealth.OK,
        memory_source=MemorySource.SIMULATED,
        memory_total_bytes=total_bytes,
        memory_used_bytes=used_bytes,
        memory_free_bytes=total_bytes - used_bytes,
        utilization_percent=42.0,
        power_watts=210.0,
        temperature_celsius=61.0,
        processes=processes,
        unified_memory=unified,
    )


def a_deployment(
    deployment_id: str = "orchestrator",
    *,
    node_id: str = "workstation",
    model: str = "nemotron-8b",
    residency: Residency = Residency.AWAKE,
    vram_bytes: int | None = None,
    llama_cpp: bool = True,
    detail: str = "",
    load_percent: float | None = None,
) -> Deployment:
    """A deployment run as a process."""
    engine = LlamaCppEngine(model_path="/m.gguf") if llama_cpp else OpenAiCompatibleEngine()
    spec = DeploymentSpec(
        id=deployment_id,
        node_id=node_id,
        model=model,
        engine=EngineSpec(engine=engine, runtime=ProcessRuntime(executable="engine")),
        residency_class=ResidencyClass.PINNED if llama_cpp else ResidencyClass.ON_DEMAND,
        slots=4,
    )
    return Deployment(
        spec=spec, residency=residency, vram_bytes=vram_bytes, detail=detail, load_percent=load_percent
    )


def a_node(
    node_id: str = "workstation",
    *,
    gpus: tuple[Gpu, ...] = (),
    state: NodeState = NodeState.READY,
    simulated: bool = True,
) -> Node:
    """A node that was just measured."""
    host = HostStatus(
        memory_total_bytes=64 * GIB,
        memory_available_bytes=48 * GIB,
        disk_total_bytes=1000 * GIB,
        disk_free_bytes=500 * GIB,
        cpu_count=16,
        cpu_utilization_percent=7.0,
        hostname=node_id,
    )
    status = NodeStatus(
        sample_time_s=1_750_000_000.0,
        gpus=gpus,
        host=host,
        agent_version="0.1.0",
        host_id=f"host-{node_id}",
        simulated=simulated,
    )
    return Node(id=node_id, address="127.0.0.1:8152", state=state, status=status)


def a_fleet() -> FleetSnapshot:
    """Two machines; the workstation's model is awake, the Spark's is stopped."""
    held = (GpuProcess(100, 9 * GIB, "orchestrator"),)
    return FleetSnapshot(
        nodes=(
            a_node("spark", gpus=(a_gpu(used_bytes=5 * GIB, total_bytes=122 * GIB, unified=True),)),
            a_node("workstation", gpus=(a_gpu(used_bytes=10 * GIB, processes=held),)),
        ),
        deployments=(
            a_deployment("orchestrator", vram_bytes=9 * GIB),
            a_deployment(
                "thinker",
                node_id="spark",
                model="qwen3-32b",
                residency=Residency.STOPPED,
                llama_cpp=False,
            ),
        ),
    )
