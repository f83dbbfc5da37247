"""An engine that is killed, and what the requests get that come before the control plane has heard of it."""

from __future__ import annotations

import asyncio
import os
import signal
from pathlib import Path
from typing import Any

import pytest

from rung.types import JobDone, PhaseProgress, Policy, Residency
from tests.integration.stack import Stack, stack

ENGINE: dict[str, Any] = {
    "id": "sim",
    "model": "sim",
    "engine": {"kind": "llamacpp", "model_path": "/models/nemotron-8b-q4.gguf"},
    "runtime": {
        "kind": "process",
        "executable": "llama-server",
        "environment": {"RUNG_SIM_SPEED": "20", "RUNG_SIM_LOAD_S": "0.2"},
    },
    "slots": 2,
    "stop_grace": "2s",
}


async def awake(found: Stack) -> int:
    """Start the engine; its process."""
    async for _ in found.client.start_deployment("sim"):
        pass
    return (await found.deployment("sim", Residency.AWAKE)).pid


async def test_what_comes_before_its_agent_could_tell_is_answered_by_the_next_engine(tmp_path: Path) -> None:
    async with stack(tmp_path, [ENGINE]) as found:
        pid = await awake(found)
        agent_pid = found.agent.ready["pid"]
        # A stopped agent notices nothing: the control plane takes the engine for awake.
        os.kill(agent_pid, signal.SIGSTOP)
        try:
            os.kill(pid, signal.SIGKILL)
            job = await found.client.create_job("count to 3", model="sim", policy=Policy(detached=True))
            events = aiter(found.client.watch_job(job.id))
            said = [await anext(events)]
            while "to hear from box what became of it" not in getattr(said[-1].payload, "detail", ""):
                said.append(await anext(events))
        finally:
            os.kill(agent_pid, signal.SIGCONT)
        rest = [event.payload async for event in events]

        assert isinstance(rest[-1], JobDone)
        phases = [each.phase.value for each in rest if isinstance(each, PhaseProgress)]
        assert "engine_start" in phases
        after = await found.deployment("sim", Residency.AWAKE)
        assert after.pid != pid


@pytest.mark.parametrize("direct", [True, False], ids=["direct", "through the agent"])
async def test_requests_in_quick_succession_after_a_kill_are_all_answered(
    tmp_path: Path, direct: bool
) -> None:
    async with stack(tmp_path, [ENGINE], server={"direct_relay": direct}) as found:
        before = await found.deployment("sim")
        os.kill(await awake(found), signal.SIGKILL)
        results = await asyncio.gather(
            *(found.client.chat("count to 3", model="sim").result() for _ in range(4))
        )

        assert ["3" in result.text for result in results] == [True] * 4
        after = await found.deployment("sim", Residency.AWAKE)
        assert after.generation == before.generation + 2, "it was started once for all of them"
