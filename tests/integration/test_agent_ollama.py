"""An Ollama that the agent runs: what it says of the model is what Ollama's own list says."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import httpx
import pytest

from nodeagent.simulators.gpu import SimulatedGpus, SimulatedGpuSpec
from rung.types import DeploymentSpec, EngineSpec, OllamaEngine, ProcessRuntime, Residency, ResidencyClass
from tests.engines.agent_node import AgentNode, agent_node
from tests.integration.engine_process import python_module

GIB = 1 << 30
MODEL = "qwen3:8b"
OLLAMA = DeploymentSpec(
    id="ollama-1",
    node_id="box",
    model=MODEL,
    engine=EngineSpec(
        engine=OllamaEngine(model=MODEL), runtime=ProcessRuntime(executable="ollama"), stop_grace_s=2.0
    ),
    residency_class=ResidencyClass.SLEEPABLE,
)


@pytest.fixture
def gpus(tmp_path: Path) -> SimulatedGpus:
    return SimulatedGpus.create(
        tmp_path / "gpus", gpus=[SimulatedGpuSpec(name="RTX 5090", memory_total_bytes=32 * GIB)]
    )


@pytest.fixture
async def node(tmp_path: Path, gpus: SimulatedGpus) -> AsyncIterator[AgentNode]:
    path, *arguments = python_module("nodeagent.simulators.ollama")
    ollama = {
        "path": path,
        "arguments_prefix": arguments,
        "environment": {
            "RUNG_SIM_GPUS": str(tmp_path / "gpus"),
            "RUNG_SIM_LOAD_S": "0.2",
            "RUNG_SIM_SPEED": "20",
            "RUNG_SIM_MODELS": MODEL,
        },
    }
    folder = str(tmp_path / "gpus")
    async with agent_node(tmp_path, {"ollama": ollama}, simulated_gpus=folder) as running:
        yield running


async def test_its_model_is_loaded_by_the_start_gone_after_a_flush_and_back_after_a_wake(
    node: AgentNode, gpus: SimulatedGpus
) -> None:
    started = await node.start(OLLAMA)
    assert started.deployment.residency is Residency.AWAKE
    held_bytes = 32 * GIB - gpus.read().gpu_free_bytes(0)
    assert held_bytes > 4 * GIB

    freed = await node.done("FreeEngine", deployment_id="ollama-1")
    assert (freed.deployment.residency, freed.deployment.asleep_level) == (Residency.ASLEEP, 2)
    assert gpus.read().gpu_free_bytes(0) == 32 * GIB

    woken = await node.done("WakeEngine", deployment_id="ollama-1")
    assert woken.deployment.residency is Residency.AWAKE
    assert 32 * GIB - gpus.read().gpu_free_bytes(0) == held_bytes
    body = b'{"model":"qwen3:8b","messages":[{"role":"user","content":"count to 3"}]}'
    assert b"1 2 3" in await node.says("ollama-1", body)


async def test_what_others_do_to_its_model_is_noticed(node: AgentNode) -> None:
    started = await node.start(OLLAMA)
    assert started.deployment.endpoint is not None
    async with httpx.AsyncClient(base_url=started.deployment.endpoint.base_url) as somebody:
        await somebody.post("/api/generate", json={"model": MODEL, "keep_alive": 0, "stream": False})
        found = await node.becomes("ollama-1", Residency.ASLEEP)
        assert found.detail == "asleep: its model is not loaded"

        await somebody.post("/api/generate", json={"model": MODEL, "stream": False})
        await node.becomes("ollama-1", Residency.AWAKE)
