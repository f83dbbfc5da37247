"""An Ollama that the agent runs: what it says of the model is what Ollama's own list says."""

from __future__ import annotations

import asyncio
import re
import signal
from collections.abc import AsyncIterator
from pathlib import Path

import grpc.aio
import httpx
import pytest
from msgspec.structs import replace

from nodeagent.simulators.gpu import SimulatedGpus, SimulatedGpuSpec
from rung.types import (
    Deployment,
    DeploymentSpec,
    EngineSpec,
    OllamaEngine,
    ProcessRuntime,
    Residency,
    ResidencyClass,
)
from tests.engines.agent_node import AgentNode, agent_node
from tests.integration.engine_process import python_module
from tests.integration.stack import engine_pids

GIB = 1 << 30
MODEL = "qwen3:8b"
ABSENT = "llama3:8b"
OLLAMA = DeploymentSpec(
    id="ollama-1",
    node_id="box",
    model=MODEL,
    engine=EngineSpec(
        engine=OllamaEngine(model=MODEL),
        runtime=ProcessRuntime(executable="ollama", environment={"RUNG_SIM_SPEED": "20"}),
        stop_grace_s=2.0,
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
        "allow_environment": True,
        "environment": {
            "RUNG_SIM_GPUS": str(tmp_path / "gpus"),
            "RUNG_SIM_LOAD_S": "0.2",
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


# Pulling.


def missing(
    deployment_id: str, *, speed: str = "20", pull: bool | None = None, **more: str
) -> DeploymentSpec:
    """A deployment of a model that its Ollama does not have."""
    environment = {"RUNG_SIM_SPEED": speed, **more}
    engine = replace(
        OLLAMA.engine,
        engine=OllamaEngine(model=ABSENT, pull=pull),
        runtime=ProcessRuntime(executable="ollama", environment=environment),
    )
    return replace(OLLAMA, id=deployment_id, model=ABSENT, engine=engine)


async def pulling(node: AgentNode, deployment_id: str) -> Deployment:
    """The deployment, once bytes of its model have come."""
    async with asyncio.timeout(30):
        while True:
            found = await node.deployment(deployment_id)
            if found.load_percent and found.detail.startswith("pulling"):
                return found
            await asyncio.sleep(0.05)


async def test_a_start_pulls_the_model_that_is_not_there_and_says_how_far_it_is(node: AgentNode) -> None:
    started = await node.start(missing("puller"))
    assert started.deployment.residency is Residency.AWAKE
    lines = [each for each in node.progress if each.detail.startswith(f"pulling {ABSENT}: ")]
    shares = [each.percent for each in lines if each.percent is not None]
    assert shares == sorted(shares)
    assert 0 < max(shares) <= 100
    rate = re.compile(r"pulling llama3:8b: \d\.\d\d of 4\.\d\d GB, \d+\.\d MB/s( \(\d s\))?")
    told = [each for each in lines if rate.fullmatch(each.detail)]
    assert told
    assert all(each.remaining_s is not None for each in told if (each.percent or 0) < 95)
    body = b'{"model":"llama3:8b","messages":[{"role":"user","content":"count to 3"}]}'
    assert b"1 2 3" in await node.says("puller", body)


async def test_a_stop_calls_a_pull_off_and_others_need_not_wait_for_it(
    node: AgentNode, tmp_path: Path
) -> None:
    start = asyncio.create_task(node.start(missing("puller", speed="1")))
    found = await pulling(node, "puller")
    assert found.residency is Residency.STARTING
    # The same GPU: a download has no part in it.
    assert (await node.start(OLLAMA)).deployment.residency is Residency.AWAKE
    stopped = await node.done("StopEngine", deployment_id="puller")
    assert stopped.deployment.residency is Residency.STOPPED
    with pytest.raises(AssertionError, match="the start of puller was called off by a stop"):
        await start
    assert len(engine_pids(tmp_path)) == 1


async def test_an_agent_that_comes_back_goes_on_with_the_pull(node: AgentNode) -> None:
    start = asyncio.create_task(node.start(missing("puller", speed="4")))
    await pulling(node, "puller")
    await node.agent.end(signal.SIGKILL)
    with pytest.raises(grpc.aio.AioRpcError):
        await start
    await node.agent.start()
    found = await node.becomes("puller", Residency.AWAKE)
    assert found.detail == "ready"


@pytest.mark.parametrize(
    ("spec", "said"),
    [
        (missing("puller", pull=False), "Ollama has no model llama3:8b; `ollama pull llama3:8b` gets it"),
        (
            missing("puller", RUNG_SIM_FAULTS="error_frame_then_done"),
            "the registry has no model llama3:8b",
        ),
    ],
)
async def test_a_model_that_cannot_be_had_fails_the_start_at_once(
    node: AgentNode, spec: DeploymentSpec, said: str, tmp_path: Path
) -> None:
    with pytest.raises(AssertionError, match=re.escape(said)):
        await node.start(spec, timeout_s=20.0)
    found = await node.deployment("puller")
    assert found.residency is Residency.FAILED
    assert said in found.detail
    assert engine_pids(tmp_path) == []


async def test_a_context_that_the_model_does_not_get_fails_the_start(node: AgentNode) -> None:
    """As with a model whose own file says num_ctx, which goes before the server's variable."""
    environment = {"OLLAMA_CONTEXT_LENGTH": "2048"}
    engine = replace(OLLAMA.engine, runtime=ProcessRuntime(executable="ollama", environment=environment))
    spec = replace(OLLAMA, engine=engine, context_tokens=16384)
    with pytest.raises(AssertionError, match="with a context of 2048 tokens where"):
        await node.start(spec, timeout_s=30.0)
