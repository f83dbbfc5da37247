"""The three grades of making room for an image, on a workstation of real processes whose GPU overflows."""

from __future__ import annotations

import asyncio
import signal
import sys
from collections.abc import AsyncIterator, Mapping
from contextlib import aclosing
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from nodeagent.simulators.gpu import SimulatedGpus, SimulatedGpuSpec
from rung.types import (
    Deployment,
    JobEvent,
    Lease,
    LifecycleFailed,
    Phase,
    PhaseProgress,
    ReclaimAction,
    ReclaimGrade,
    ReclaimPlan,
    Residency,
)
from tests.integration.stack import SIMULATORS, Stack, stack
from tests.integration.test_simulators_comfyui import picture

GIB = 1 << 30
MIB = 1 << 20
TOTAL = 32 * GIB
#: Kept free by the ledger.
RESERVE = GIB
CHECKPOINTS = {"lightning": 5 * GIB, "quality": 11 * GIB, "ultra": 19 * GIB}
#: What the three tiers of images ask for.
LIGHTNING, QUALITY, ULTRA = 6 * GIB, 12 * GIB, 20 * GIB
ORCHESTRATOR = int(0.4 * TOTAL)
WEIGHTS = int(8e9 * 0.6)
#: Its weights, and what is in no pool of vLLM's.
SHRUNK = WEIGHTS + GIB


class Workstation:
    """The stack, and what is true of its GPU."""

    def __init__(self, box: Stack, gpus: SimulatedGpus) -> None:
        self.box = box
        self.client = box.client
        self._gpus = gpus

    @property
    def free_bytes(self) -> int:
        """What is free of the GPU now."""
        return self._gpus.read().gpu_free_bytes(0)

    async def held(self, deployment_id: str) -> int:
        """What the process of a deployment holds."""
        pid = (await self.deployment(deployment_id)).pid
        processes = self._gpus.read().processes
        return sum(each.gpu_bytes.get(0, 0) for each in processes if each.pid == pid)

    async def deployment(self, deployment_id: str, *wanted: Residency) -> Deployment:
        return await self.box.deployment(deployment_id, *wanted)

    async def chat(self, model: str) -> list[JobEvent]:
        """Ask a model, and return the job's log."""
        stream = self.client.chat("count to 3", model=model)
        events = [event async for event in stream]
        assert (await stream.result()).text == "1 2 3"
        return events

    async def lease(self, size_bytes: int) -> tuple[Lease, list[ReclaimPlan], list[str]]:
        """Wait for room for ComfyUI: the lease, the plans, and what was told meanwhile."""
        plans: list[ReclaimPlan] = []
        said: list[str] = []
        steps = self.client.acquire_lease(
            "box/0", size_bytes, holder="image", deployment_id="comfyui", ttl_s=30.0
        )
        async with aclosing(steps):
            async for step in steps:
                if isinstance(step, Lease):
                    return step, plans, said
                if isinstance(step, ReclaimPlan):
                    plans.append(step)
                else:
                    said.append(step.detail)
        raise AssertionError("no lease")

    async def generate(self, checkpoint: str) -> None:
        """Send ComfyUI a prompt, and wait until the image is there."""
        endpoint = (await self.deployment("comfyui")).endpoint
        assert endpoint is not None
        async with aiohttp.ClientSession(endpoint.base_url) as http:
            async with http.post("/prompt", json={"prompt": picture(checkpoint)}) as response:
                assert response.status == 200
                prompt_id = (await response.json())["prompt_id"]
            history: dict[str, Any] = {}
            async with asyncio.timeout(30):
                while not history:
                    async with http.get(f"/history/{prompt_id}") as response:
                        history = await response.json()
        assert history[prompt_id]["status"]["completed"], history


def _runtime(executable: str, **environment: str) -> dict[str, Any]:
    return {"kind": "process", "executable": executable, "environment": environment}


def _vllm(
    name: str, model: str, utilization: float, runtime: Mapping[str, Any], **fields: Any
) -> dict[str, Any]:
    engine = {
        "kind": "vllm",
        "model": model,
        "gpu_memory_utilization": utilization,
        "max_model_len_tokens": 4096,
        "sleep_mode": fields["residency_class"] == "sleepable" or "shrinkable" in fields,
    }
    return {"id": name, "model": name, "slots": 4, "engine": engine, "runtime": dict(runtime), **fields}


@pytest.fixture
async def workstation(tmp_path: Path) -> AsyncIterator[Workstation]:
    """A card of 32 GiB with everything awake that a day of chat and images needs."""
    folder = tmp_path / "gpus"
    gpus = SimulatedGpus.create(
        folder, gpus=[SimulatedGpuSpec(name="NVIDIA GeForce RTX 5090", memory_total_bytes=TOTAL)]
    )
    fast = {"RUNG_SIM_GPUS": str(folder), "RUNG_SIM_SPEED": "20", "RUNG_SIM_LOAD_S": "0.5"}
    small = {"RUNG_SIM_VRAM_BYTES": str(640 * MIB)}
    sizes = ",".join(f"{name}={size}" for name, size in CHECKPOINTS.items())
    deployments = [
        _vllm(
            "orchestrator",
            "nemotron-8b-awq",
            0.4,
            _runtime("vllm", **fast),
            residency_class="pinned",
            shrinkable=True,
        ),
        _vllm(
            "reasoning", "deepseek-r1-14b-awq", 0.33, _runtime("vllm", **fast), residency_class="sleepable"
        ),
        _vllm(
            "embeddings",
            "nomic-embed-text-0.14b",
            0.02,
            _runtime("vllm", **fast, **small),
            residency_class="pinned",
            capabilities=["embedding"],
        ),
        {
            "id": "comfyui",
            "model": "comfyui",
            "residency_class": "cache",
            "capabilities": ["image"],
            "engine": {"kind": "comfyui"},
            "runtime": _runtime("comfyui", **fast, RUNG_SIM_CHECKPOINTS=sizes),
        },
        {
            "id": "vision",
            "model": "qwen2.5-vl-7b",
            "residency_class": "on_demand",
            "idle_timeout": "1s",
            "capabilities": ["chat", "vision"],
            "engine": {"kind": "llamacpp", "model_path": str(tmp_path / "qwen2.5-vl-7b-q4.gguf")},
            "runtime": _runtime("llama-server", **fast, RUNG_SIM_VRAM_BYTES=str(5 * GIB)),
        },
    ]
    comfyui = {
        "path": sys.executable,
        "arguments_prefix": ["-m", "nodeagent.simulators.comfyui"],
        "allow_environment": True,
    }
    agent = {"simulated_gpus": str(folder), "executables": {**SIMULATORS, "comfyui": comfyui}}
    async with stack(tmp_path, deployments, agent=agent) as box:
        for name in ("orchestrator", "embeddings", "reasoning", "comfyui"):
            last = [event async for event in box.client.start_deployment(name)][-1]
            assert not isinstance(last.payload, LifecycleFailed), last
        yield Workstation(box, gpus)


def actions(plans: list[ReclaimPlan]) -> set[tuple[str, ReclaimAction]]:
    return {(step.deployment_id, step.action) for plan in plans for step in plan.steps}


async def test_each_tier_of_images_disturbs_as_much_as_it_must_and_all_is_restored(
    workstation: Workstation,
) -> None:
    orchestrator = await workstation.deployment("orchestrator", Residency.AWAKE)
    assert await workstation.held("orchestrator") == ORCHESTRATOR

    # Standard: the reasoner sleeps.
    before_bytes = workstation.free_bytes
    assert before_bytes - RESERVE < QUALITY
    lease, plans, said = await workstation.lease(QUALITY)
    assert lease.grade is ReclaimGrade.STANDARD
    assert actions(plans) == {("reasoning", ReclaimAction.SLEEP)}
    assert workstation.free_bytes >= QUALITY + RESERVE
    assert any(line.startswith("putting reasoning to sleep: ") for line in said)
    await workstation.generate("quality")
    await workstation.client.release_lease(lease.id)
    # Whoever needs the reasoner wakes it. ComfyUI, which keeps its models, gives way.
    assert await workstation.held("comfyui") > CHECKPOINTS["quality"]
    woken = await workstation.chat("reasoning")
    assert "flushing the cache of comfyui" in _details(woken, Phase.VRAM_ACQUIRE)
    assert workstation.free_bytes == before_bytes

    # Quick: nobody is disturbed.
    lease, plans, _ = await workstation.lease(LIGHTNING)
    assert (lease.grade, plans) == (ReclaimGrade.QUICK, [])
    await workstation.generate("lightning")
    await workstation.client.release_lease(lease.id)
    await workstation.deployment("reasoning", Residency.AWAKE)
    assert await workstation.held("orchestrator") == ORCHESTRATOR

    # Full: the reasoner sleeps, the cache is flushed, and the orchestrator is left with its weights.
    before_bytes = workstation.free_bytes
    lease, plans, said = await workstation.lease(ULTRA)
    assert lease.grade is ReclaimGrade.FULL
    assert actions(plans) == {
        ("reasoning", ReclaimAction.SLEEP),
        ("comfyui", ReclaimAction.FREE),
        ("orchestrator", ReclaimAction.SHRINK),
    }
    assert workstation.free_bytes >= ULTRA + RESERVE > before_bytes
    assert await workstation.held("orchestrator") == SHRUNK
    freed_gib = (ORCHESTRATOR - SHRUNK) / GIB
    assert f"shrinking orchestrator: {freed_gib:.1f} GiB freed" in said
    shrunk = await workstation.deployment("orchestrator", Residency.ASLEEP)
    assert (shrunk.shrunk, shrunk.pid, shrunk.generation) == (True, orchestrator.pid, orchestrator.generation)
    # Who asks it meanwhile waits, and is told so.
    stream = workstation.client.chat("count to 3", model="orchestrator")
    heard: list[str] = []
    waiting = asyncio.create_task(_listen(stream, heard))
    await workstation.generate("ultra")
    async with asyncio.timeout(20):
        while not any("the lease of image ends" in line for line in heard):
            assert not waiting.done()
            await asyncio.sleep(0.05)
    assert await workstation.held("embeddings") == 640 * MIB
    await workstation.client.release_lease(lease.id)

    await waiting
    assert "giving it its KV cache again" in heard
    assert (await stream.result()).text == "1 2 3"
    assert await workstation.held("orchestrator") == ORCHESTRATOR
    again = await workstation.deployment("orchestrator", Residency.AWAKE)
    assert (again.pid, again.generation) == (orchestrator.pid, orchestrator.generation)
    assert await workstation.chat("reasoning")


async def test_vision_comes_and_goes_and_a_shrunk_orchestrator_is_grown_by_the_next_control_plane(
    workstation: Workstation,
) -> None:
    # Vision is started into what is free, and stopped when it is idle.
    before_bytes = workstation.free_bytes
    assert before_bytes - RESERVE > 5 * GIB
    await workstation.chat("qwen2.5-vl-7b")
    await workstation.deployment("vision", Residency.STOPPED)
    await workstation.deployment("reasoning", Residency.AWAKE)
    assert workstation.free_bytes == before_bytes

    lease, _, _ = await workstation.lease(ULTRA)
    assert (await workstation.deployment("orchestrator", Residency.ASLEEP)).shrunk
    await workstation.generate("ultra")
    # With the control plane its leases are gone, and with them the reason to be shrunk.
    await workstation.box.plane.end(signal.SIGKILL)
    await workstation.box.plane.start()
    await workstation.box.connect()
    await workstation.deployment("orchestrator", Residency.AWAKE)

    assert await workstation.held("orchestrator") == ORCHESTRATOR
    assert lease.grade is ReclaimGrade.FULL


async def _listen(stream: Any, heard: list[str]) -> None:
    """Note what a job tells of its progress."""
    async for event in stream:
        if isinstance(event.payload, PhaseProgress):
            heard.append(event.payload.detail)


def _details(events: list[JobEvent], phase: Phase) -> list[str]:
    return [
        event.payload.detail
        for event in events
        if isinstance(event.payload, PhaseProgress) and event.payload.phase is phase
    ]
