"""What a runtime finds wrong with an engine is told where its own answers do not say that it is well."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from pathlib import Path

from msgspec.structs import replace

from nodeagent.engines import EngineHealth
from nodeagent.runtimes import RunningEngine
from rung.types import LifecycleProgress
from tests.fakes.agent_server import a_spec
from tests.fakes.engines import AnAgent, ScriptedAdapter, ScriptedRuntime, an_agent, done, events_of, failed
from tests.fakes.virtual_time import in_virtual_time

UNWELL = "its HEALTHCHECK fails: no model"


@dataclass(eq=False)
class CheckingRuntime(ScriptedRuntime):
    """One that looks after the health of its engines."""

    found_wrong: str = ""

    def complaint(self, record: RunningEngine) -> str:
        assert record.deployment_id == "chat-1"
        return self.found_wrong


async def shown(agent: AnAgent, detail: str) -> None:
    """Return once the deployment says so."""
    async with asyncio.timeout(60):
        while agent.supervisor.engine("chat-1").deployment.detail != detail:
            await agent.supervisor.changed.wait()


@in_virtual_time
async def test_an_engine_that_loads_says_what_its_runtime_finds_wrong(tmp_path: Path) -> None:
    runtime = CheckingRuntime(found_wrong=UNWELL)
    adapter = ScriptedAdapter(health=EngineHealth.LOADING)
    spec = a_spec("chat-1")
    async with an_agent(tmp_path, runtime=runtime, adapter=adapter) as agent:
        start = agent.start(replace(spec, engine=replace(spec.engine, start_timeout_s=2.0)))
        ended = await failed(start)
        told = [
            each.payload.detail
            for each in await events_of(start)
            if isinstance(each.payload, LifecycleProgress)
        ]

    assert f"waiting for the engine; {UNWELL}" in told
    assert f"was not ready within 2 s: {UNWELL}" in ended.detail


@in_virtual_time
async def test_an_engine_that_is_not_well_says_what_its_runtime_finds_wrong(tmp_path: Path) -> None:
    runtime, adapter = CheckingRuntime(found_wrong=UNWELL), ScriptedAdapter()
    async with an_agent(tmp_path, runtime=runtime, adapter=adapter) as agent:
        await done(agent.start(a_spec("chat-1")))
        # While it answers, it is its own answers that count.
        await asyncio.sleep(30)
        await shown(agent, "ready")
        adapter.health, adapter.detail = EngineHealth.ABSENT, "nothing answers"

        await shown(agent, f"not well: nothing answers; {UNWELL}")
