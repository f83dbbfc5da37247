"""Pictures as jobs of real processes: a control plane, an agent, and ComfyUI on a card that overflows."""

from __future__ import annotations

import asyncio
import hashlib
import os
import signal
import sys
from collections.abc import AsyncIterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from controlplane.pipelines.image import IMAGE_PHASES
from nodeagent.simulators.gpu import SimulatedGpus, SimulatedGpuSpec
from rung.types import (
    ArtifactChunk,
    FailureReason,
    ImageInput,
    JobCancelled,
    JobDone,
    JobEvent,
    JobFailed,
    LifecycleFailed,
    Phase,
    PhaseProgress,
    Residency,
)
from tests.integration.stack import SIMULATORS, Stack, stack

GIB = 1 << 30
TOTAL = 32 * GIB
CHECKPOINTS = {
    "sdxl_lightning_4step.safetensors": 5 * GIB,
    "waiIllustriousSDXL_v140.safetensors": 11 * GIB,
    "flux1-dev-fp8.safetensors": 19 * GIB,
}
#: Whoever watches hears something at least so often.
LONGEST_GAP_S = 1.5


class Studio:
    """The stack, and pictures by it."""

    def __init__(self, box: Stack) -> None:
        self.box = box

    async def draw(self, prompt: str = "a cat", **more: Any) -> list[JobEvent]:
        """Have a picture drawn; returns all events of its job, heartbeats too."""
        async with asyncio.timeout(60):
            return [event async for event in self.box.client.generate(ImageInput(prompt=prompt, **more))]

    async def begin(self, **more: Any) -> tuple[asyncio.Task[list[JobEvent]], str]:
        """Begin a long one; returns once it is sampled, with the task that follows it and the job's id."""
        sampling: asyncio.Future[str] = asyncio.get_running_loop().create_future()

        async def follow() -> list[JobEvent]:
            log: list[JobEvent] = []
            try:
                wanted = ImageInput(prompt="a cat", parameters={"steps": 150}, **more)
                async for event in self.box.client.generate(wanted):
                    log.append(event)
                    if _phase(event) is Phase.SAMPLING and not sampling.done():
                        sampling.set_result(event.job_id)
            finally:
                if not sampling.done():
                    sampling.set_exception(AssertionError(f"it was never sampled: {log}"))
            return log

        task = asyncio.create_task(follow())
        async with asyncio.timeout(60):
            return task, await sampling

    async def no_leases(self) -> None:
        """There are none: they are given back before a job ends."""
        assert await self.box.client.list_leases() == ()


def _phase(event: JobEvent) -> Phase | None:
    return event.payload.phase if isinstance(event.payload, PhaseProgress) else None


def phases(log: list[JobEvent]) -> list[Phase]:
    """The phases of the log, each once for each time that it began."""
    found = [phase for phase in map(_phase, log) if phase is not None]
    return [phase for place, phase in enumerate(found) if place == 0 or found[place - 1] is not phase]


def details(log: list[JobEvent], phase: Phase) -> list[str]:
    return [
        event.payload.detail
        for event in log
        if isinstance(event.payload, PhaseProgress) and event.payload.phase is phase
    ]


def longest_gap_s(log: list[JobEvent]) -> float:
    """The longest silence of a stream."""
    times_s = [0.0, *(event.elapsed_s for event in log)]
    return max(later - earlier for earlier, later in pairwise(times_s))


def _runtime(executable: str, **environment: str) -> dict[str, Any]:
    return {"kind": "process", "executable": executable, "environment": environment}


@pytest.fixture
async def studio(tmp_path: Path) -> AsyncIterator[Studio]:
    """A card of 32 GiB with a pinned orchestrator, a reasoner that is awake, and ComfyUI."""
    folder = tmp_path / "gpus"
    SimulatedGpus.create(
        folder, gpus=[SimulatedGpuSpec(name="NVIDIA GeForce RTX 5090", memory_total_bytes=TOTAL)]
    )
    fast = {"RUNG_SIM_GPUS": str(folder), "RUNG_SIM_SPEED": "4", "RUNG_SIM_LOAD_S": "0.5"}
    sizes = ",".join(f"{name}={size}" for name, size in CHECKPOINTS.items())
    vllm: dict[str, Any] = {"kind": "vllm", "max_model_len_tokens": 4096, "sleep_mode": True}
    deployments: list[dict[str, Any]] = [
        {
            "id": "orchestrator",
            "model": "nemotron-8b-awq",
            "residency_class": "pinned",
            "shrinkable": True,
            "engine": vllm | {"model": "nemotron-8b-awq", "gpu_memory_utilization": 0.4},
            "runtime": _runtime("vllm", **fast),
        },
        {
            "id": "reasoning",
            "model": "deepseek-r1-14b-awq",
            "residency_class": "sleepable",
            "engine": vllm | {"model": "deepseek-r1-14b-awq", "gpu_memory_utilization": 0.33},
            "runtime": _runtime("vllm", **fast),
        },
        {
            "id": "comfyui",
            "model": "comfyui",
            "residency_class": "cache",
            "capabilities": ["image", "video"],
            "engine": {"kind": "comfyui"},
            "runtime": _runtime("comfyui", **fast, RUNG_SIM_CHECKPOINTS=sizes),
        },
    ]
    comfyui = {
        "path": sys.executable,
        "arguments_prefix": ["-m", "nodeagent.simulators.comfyui"],
        "allow_environment": True,
    }
    agent = {"simulated_gpus": str(folder), "executables": {**SIMULATORS, "comfyui": comfyui}}
    async with stack(tmp_path, deployments, agent=agent) as box:
        for name in ("orchestrator", "reasoning", "comfyui"):
            last = [event async for event in box.client.start_deployment(name)][-1]
            assert not isinstance(last.payload, LifecycleFailed), last
        yield Studio(box)


async def test_each_tier_is_drawn_with_every_second_told(studio: Studio) -> None:
    lightning = await studio.draw(tier="lightning", seed=1)
    again = await studio.draw(tier="lightning", seed=2)
    quality = await studio.draw(tier="quality", seed=1)
    ultra = await studio.draw(tier="ultra", seed=1)

    for log in (lightning, again, quality, ultra):
        assert phases(log) == list(IMAGE_PHASES), details(log, Phase.VRAM_ACQUIRE)
        assert isinstance(log[-1].payload, JobDone)
        assert details(log, Phase.DONE) == ["1 image(s) generated"]
        assert longest_gap_s(log) < LONGEST_GAP_S
    assert details(lightning, Phase.VRAM_ACQUIRE)[-1].endswith("(mode=quick)")
    assert details(quality, Phase.VRAM_ACQUIRE)[-1].endswith("(mode=standard)")
    assert details(ultra, Phase.VRAM_ACQUIRE)[-1].endswith("(mode=full)")
    assert any("putting reasoning to sleep" in line for line in details(quality, Phase.VRAM_ACQUIRE))
    assert any("shrinking orchestrator" in line for line in details(ultra, Phase.VRAM_ACQUIRE))
    [swap] = set(details(ultra, Phase.MODEL_SWAP))
    assert swap.startswith("Loading flux: sdxl was flushed, 12.")
    await studio.no_leases()
    # With the lease its reason to be small is gone.
    await studio.box.deployment("orchestrator", Residency.AWAKE)

    # What was drawn is there, whole, and the next of its kind is quicker and knows it.
    pieces = [event.payload for event in ultra if isinstance(event.payload, ArtifactChunk)]
    data = await studio.box.client.get_artifact(pieces[-1].artifact_id)
    assert hashlib.sha256(data).hexdigest() == pieces[-1].sha256
    assert details(again, Phase.MODEL_SWAP) == ["sdxl is loaded"]
    [first] = [event.payload for event in again if _phase(event) is Phase.SAMPLING][:1]
    assert isinstance(first, PhaseProgress)
    assert first.job_remaining_s is not None


async def test_cancelling_ends_the_prompt_and_the_next_picture_is_drawn(studio: Studio) -> None:
    following, job_id = await studio.begin(tier="lightning")
    await studio.box.client.cancel_job(job_id)
    log = await following

    assert isinstance(log[-1].payload, JobCancelled)
    await studio.no_leases()
    after = await studio.draw(tier="lightning")
    assert isinstance(after[-1].payload, JobDone)


async def test_comfyui_that_dies_in_the_middle_ends_the_job_honestly(studio: Studio) -> None:
    following, _ = await studio.begin(tier="lightning")
    pid = (await studio.box.deployment("comfyui")).pid
    os.kill(pid, signal.SIGKILL)
    log = await following

    failed = log[-1].payload
    assert isinstance(failed, JobFailed)
    assert failed.reason in (FailureReason.ENGINE_LOST, FailureReason.ENGINE_ERROR)
    await studio.no_leases()
    # It is started again for who comes next.
    after = await studio.draw(tier="lightning")
    assert isinstance(after[-1].payload, JobDone)


async def test_a_control_plane_that_was_killed_draws_again_with_what_comfyui_holds(studio: Studio) -> None:
    await studio.draw(tier="quality")
    following, job_id = await studio.begin(tier="quality")
    await studio.box.plane.end(signal.SIGKILL)
    await asyncio.gather(following, return_exceptions=True)
    await studio.box.plane.start()
    await studio.box.connect()

    assert (await studio.box.client.get_job(job_id)).failure_reason is FailureReason.CONTROL_PLANE_RESTARTED
    await studio.box.deployment("comfyui", Residency.AWAKE)
    log = await studio.draw(tier="ultra")
    assert isinstance(log[-1].payload, JobDone)
    assert phases(log) == list(IMAGE_PHASES)
    # Nobody remembers what it holds: it is flushed before others give way.
    assert any("what is loaded was flushed" in line for line in details(log, Phase.MODEL_SWAP))
