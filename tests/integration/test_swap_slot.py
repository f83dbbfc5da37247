"""Two models take turns on one port: real processes, and a control plane that is killed between the two."""

from __future__ import annotations

import asyncio
import signal
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from nodeagent.simulators.gpu import SimulatedGpus, SimulatedGpuSpec
from rung.types import LifecycleDone, Residency
from tests.integration.stack import Stack, stack

GIB = 1 << 30


def a_free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
        return port


def a_vllm(folder: Path, name: str, port: int, load_s: float) -> dict[str, Any]:
    return {
        "id": name,
        "model": f"{name}-8b-fp8",
        "residency_class": "sleepable",
        "swap_slot": "reasoning",
        "port": port,
        "engine": {
            "kind": "vllm",
            "model": f"{name}-8b-fp8",
            "gpu_memory_utilization": 0.6,
            "max_model_len_tokens": 4096,
            "sleep_mode": True,
        },
        "runtime": {
            "kind": "process",
            "executable": "vllm",
            "environment": {
                "RUNG_SIM_GPUS": str(folder / "gpus"),
                "RUNG_SIM_SPEED": "20",
                "RUNG_SIM_LOAD_S": str(load_s),
            },
        },
    }


@asynccontextmanager
async def a_box(tmp_path: Path, *, gemma_load_s: float) -> AsyncIterator[Stack]:
    """Two that share a port."""
    SimulatedGpus.create(
        tmp_path / "gpus",
        gpus=[SimulatedGpuSpec(name="NVIDIA GeForce RTX 5090", memory_total_bytes=32 * GIB)],
    )
    port = a_free_port()
    deployments = [a_vllm(tmp_path, "deepseek", port, 1.0), a_vllm(tmp_path, "gemma", port, gemma_load_s)]
    async with stack(tmp_path, deployments, agent={"simulated_gpus": str(tmp_path / "gpus")}) as found:
        yield found


async def residencies(box: Stack) -> dict[str, Residency]:
    return {each.spec.id: each.residency for each in await box.client.list_deployments()}


async def test_one_is_stopped_for_the_other_and_neither_is_lost_when_the_control_plane_is_killed(
    tmp_path: Path,
) -> None:
    async with a_box(tmp_path, gemma_load_s=10.0) as box:
        async for event in box.client.start_deployment("deepseek"):
            last = event.payload
        assert isinstance(last, LifecycleDone)
        swapping = asyncio.create_task(anext(aiter(box.client.chat("hello", model="gemma"))))
        await box.deployment("deepseek", Residency.STOPPED)
        await box.deployment("gemma", Residency.STARTING)

        await box.plane.end(signal.SIGKILL)
        swapping.cancel()
        await asyncio.gather(swapping, return_exceptions=True)
        await box.plane.start()
        await box.connect()

        # The agent goes on with the one that it was told to start.
        await box.deployment("gemma", Residency.AWAKE)
        assert (await residencies(box))["deepseek"] is Residency.STOPPED
        stream = box.client.chat("hello", model="deepseek")
        assert (await stream.result()).text
        assert await residencies(box) == {"deepseek": Residency.AWAKE, "gemma": Residency.STOPPED}


async def test_after_a_kill_the_old_one_comes_back_if_the_new_one_does_not(
    tmp_path: Path,
) -> None:
    async with a_box(tmp_path, gemma_load_s=100.0) as box:
        async for _ in box.client.start_deployment("deepseek"):
            pass
        swapping = asyncio.create_task(anext(aiter(box.client.chat("hello", model="gemma"))))
        gemma = await box.deployment("gemma", Residency.STARTING)

        await box.plane.end(signal.SIGKILL)
        swapping.cancel()
        await asyncio.gather(swapping, return_exceptions=True)
        await box.plane.start()
        await box.connect()
        await box.heard()
        async for _ in box.client.stop_deployment(gemma.spec.id):
            pass

        await box.deployment("deepseek", Residency.AWAKE)
