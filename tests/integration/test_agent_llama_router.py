"""A model of a router that somebody else runs: its residency is the router's word and the GPU's bytes."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from nodeagent.simulators.gpu import SimulatedGpus, SimulatedGpuSpec
from rung.types import DeploymentSpec, EngineSpec, ExternalRuntime, LlamaCppEngine, Residency, ResidencyClass
from tests.engines.agent_node import AgentNode, agent_node
from tests.integration.engine_process import engine_process, free_port, python_module

GIB = 1 << 30
MODEL = "qwen3-8b-Q4_K_M"
OTHER = "gemma3-4b-Q4_K_M"
BODY = b'{"model":"qwen3-8b-Q4_K_M","messages":[{"role":"user","content":"count to 3"}]}'


@pytest.fixture
def gpus(tmp_path: Path) -> SimulatedGpus:
    return SimulatedGpus.create(
        tmp_path / "gpus", gpus=[SimulatedGpuSpec(name="RTX 5090", memory_total_bytes=32 * GIB)]
    )


@pytest.fixture
async def router(tmp_path: Path, gpus: SimulatedGpus) -> AsyncIterator[str]:
    """The URL of a router with two models, of which it keeps one."""
    models = tmp_path / "models"
    models.mkdir()
    for name in (MODEL, OTHER):
        (models / f"{name}.gguf").touch()
    port = free_port()
    command = [*python_module("nodeagent.simulators.llama_server"), "--port", str(port)]
    command += ["--models-dir", str(models), "--models-max", "1", "--ctx-size", "4096"]
    environment = {
        "RUNG_SIM_GPUS": str(tmp_path / "gpus"),
        "RUNG_SIM_LOAD_S": "0.1",
        "RUNG_SIM_SPEED": "20",
    }
    log_path = tmp_path / "router.log"
    async with engine_process(command, port=port, log_path=log_path, environment=environment) as engine:
        async with asyncio.timeout(30), httpx.AsyncClient(base_url=engine.base_url) as somebody:
            while True:
                try:
                    await somebody.get("/health")
                    break
                except httpx.ConnectError:
                    await asyncio.sleep(0.02)
        yield engine.base_url


@pytest.fixture
async def node(tmp_path: Path, gpus: SimulatedGpus) -> AsyncIterator[AgentNode]:
    async with agent_node(tmp_path, {}, simulated_gpus=str(tmp_path / "gpus")) as running:
        yield running


def routed(base_url: str) -> DeploymentSpec:
    return DeploymentSpec(
        id="routed",
        node_id="box",
        model="qwen3-8b",
        engine=EngineSpec(
            engine=LlamaCppEngine(router_model=MODEL), runtime=ExternalRuntime(base_url=base_url)
        ),
        residency_class=ResidencyClass.SLEEPABLE,
    )


async def status_of(somebody: httpx.AsyncClient, name: str) -> dict[str, Any]:
    rows = (await somebody.get("/models")).json()["data"]
    status: dict[str, Any] = next(row["status"] for row in rows if row["id"] == name)
    return status


async def until(somebody: httpx.AsyncClient, name: str, value: str) -> dict[str, Any]:
    async with asyncio.timeout(30):
        while True:
            status = await status_of(somebody, name)
            if status["value"] == value:
                return status
            await asyncio.sleep(0.02)


async def test_its_model_is_loaded_by_a_wake_and_gone_after_a_flush(
    node: AgentNode, router: str, gpus: SimulatedGpus
) -> None:
    adopted = await node.start(routed(router))
    assert (adopted.deployment.residency, adopted.deployment.asleep_level) == (Residency.ASLEEP, 2)
    assert gpus.read().gpu_free_bytes(0) == 32 * GIB

    woken = await node.done("WakeEngine", deployment_id="routed")
    assert woken.deployment.residency is Residency.AWAKE
    held_bytes = 32 * GIB - gpus.read().gpu_free_bytes(0)
    assert held_bytes > 4 * GIB
    assert b"1 2 3" in await node.says("routed", BODY)

    freed = await node.done("FreeEngine", deployment_id="routed")
    assert (freed.deployment.residency, freed.deployment.asleep_level) == (Residency.ASLEEP, 2)
    assert freed.freed_bytes == held_bytes
    assert gpus.read().gpu_free_bytes(0) == 32 * GIB


async def test_a_request_does_not_load_a_model_that_somebody_unloaded(
    node: AgentNode, router: str, gpus: SimulatedGpus
) -> None:
    await node.start(routed(router))
    await node.done("WakeEngine", deployment_id="routed")
    async with httpx.AsyncClient(base_url=router) as somebody:
        await somebody.post("/models/unload", json={"model": MODEL})
        await until(somebody, MODEL, "unloaded")

        assert b"model is not loaded" in await node.says("routed", BODY)
        assert (await status_of(somebody, MODEL))["value"] == "unloaded"
    assert gpus.read().gpu_free_bytes(0) == 32 * GIB
    found = await node.becomes("routed", Residency.ASLEEP)
    assert found.detail == "asleep: its model is unloaded"


# The simulator's own ways.


async def test_a_router_loads_for_a_request_lets_go_of_the_longest_unused_and_refuses_the_rest(
    router: str,
) -> None:
    async with httpx.AsyncClient(base_url=router, timeout=30) as somebody:

        async def told(path: str, model: str) -> tuple[int, str]:
            answer = await somebody.post(path, json={"model": model})
            return answer.status_code, answer.json().get("error", {}).get("message", "")

        assert await told("/models/load", "nobody") == (404, "model is not found")
        assert await told("/models/unload", "nobody") == (400, "model is not found")
        assert await told("/models/unload", MODEL) == (400, "model is not running")
        assert await told("/v1/chat/completions?autoload=false", MODEL) == (400, "model is not loaded")
        assert await told("/v1/chat/completions", "nobody") == (400, "model 'nobody' not found")
        missing = await somebody.get("/metrics")
        assert missing.json()["error"]["message"] == "model name is missing from the request"

        answer = await somebody.post("/v1/chat/completions", content=BODY)
        assert answer.json()["choices"][0]["message"]["content"].startswith("1 2 3")
        assert await told("/models/load", MODEL) == (400, "model is already running")
        # Only one is kept.
        assert await told("/models/load", OTHER) == (200, "")
        assert (await status_of(somebody, MODEL)) == {"value": "unloaded"}
        await until(somebody, OTHER, "loaded")


async def test_a_model_that_finds_no_room_failed_and_its_words_are_told(
    node: AgentNode, router: str, gpus: SimulatedGpus
) -> None:
    await node.start(routed(router))
    async with httpx.AsyncClient(base_url=router) as somebody, asyncio.timeout(60):
        gpus.allocate(os.getpid(), 0, 30 * GIB)
        with pytest.raises(AssertionError, match="the process of its model ended with exit code 1"):
            await node.done("WakeEngine", deployment_id="routed")
        gpus.free(os.getpid())
        assert await status_of(somebody, MODEL) == {"value": "unloaded", "failed": True, "exit_code": 1}
    assert (await node.deployment("routed")).residency is Residency.ASLEEP
    woken = await node.done("WakeEngine", deployment_id="routed")
    assert woken.deployment.residency is Residency.AWAKE
