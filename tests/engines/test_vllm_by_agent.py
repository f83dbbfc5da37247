"""Our adapter, through an agent as a process: a vLLM is started, asked, put to sleep, woken and stopped."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import pytest

from rung.types import DeploymentSpec, EngineSpec, ProcessRuntime, Residency, ResidencyClass, VllmEngine
from tests.engines.agent_node import AgentNode, agent_node
from tests.engines.tiny_llama import CONTEXT_TOKENS, write_tiny_llama
from tests.engines.vllm_server import CPU_ENVIRONMENT, REAL_VLLM, START_TIMEOUT_S
from tests.integration.engine_process import python_module

pytestmark = pytest.mark.timeout(900)

#: On a CPU the option is refused, though its routes are there.
_WITHOUT_OPTION = """#!/bin/sh
for each in "$@"; do
    shift
    [ "$each" = --enable-sleep-mode ] || set -- "$@" "$each"
done
exec {vllm} "$@" --enforce-eager
"""


def _real(folder: Path) -> dict[str, Any]:
    if not REAL_VLLM.exists():
        pytest.skip("there is no real vLLM; `make test-engines` installs it")
    script = folder / "vllm"
    script.write_text(_WITHOUT_OPTION.format(vllm=REAL_VLLM))
    script.chmod(0o755)
    return {"path": str(script), "environment": CPU_ENVIRONMENT}


def _simulated() -> dict[str, Any]:
    path, *arguments = python_module("nodeagent.simulators.vllm")
    environment = {"RUNG_SIM_LOAD_S": "1", "RUNG_SIM_SPEED": "50"}
    return {"path": path, "arguments_prefix": arguments, "environment": environment}


async def _asked(node: AgentNode) -> list[str]:
    """The frames of a streamed answer of 8 tokens."""
    messages = [{"role": "user", "content": "hello"}]
    wish = {"model": "tiny", "messages": messages, "max_tokens": 8, "ignore_eos": True, "stream": True}
    text = (await node.says("tiny-1", msgspec.json.encode(wish))).decode()
    return [block.removeprefix("data: ") for block in text.split("\n\n") if block]


@pytest.mark.parametrize("real", [False, pytest.param(True, marks=pytest.mark.real_vllm)])
async def test_an_agent_runs_it_from_start_to_stop(tmp_path: Path, real: bool) -> None:
    model = write_tiny_llama(tmp_path / "model")
    engine = VllmEngine(model=str(model), max_model_len_tokens=CONTEXT_TOKENS, sleep_mode=True)
    runtime = ProcessRuntime(executable="vllm")
    spec = DeploymentSpec(
        id="tiny-1",
        node_id="box",
        model="tiny",
        engine=EngineSpec(engine=engine, runtime=runtime, start_timeout_s=START_TIMEOUT_S, stop_grace_s=10),
        residency_class=ResidencyClass.SLEEPABLE,
    )
    async with agent_node(tmp_path, {"vllm": _real(tmp_path) if real else _simulated()}) as node:
        started = await node.start(spec, timeout_s=START_TIMEOUT_S)
        assert started.deployment.residency is Residency.AWAKE
        # What it printed while it loaded was understood.
        assert any("load" in each.detail for each in node.progress)
        assert (await _asked(node))[-1] == "[DONE]"

        for level in (1, 2):
            slept = await node.done("SleepEngine", deployment_id="tiny-1", level=level)
            assert (slept.deployment.residency, slept.deployment.asleep_level) == (Residency.ASLEEP, level)
            woken = await node.done("WakeEngine", deployment_id="tiny-1")
            assert woken.deployment.residency is Residency.AWAKE
            *_, last, done = await _asked(node)
            assert done == "[DONE]"
            assert msgspec.json.decode(last)["choices"][0]["finish_reason"] == "length"

        stopped = await node.done("StopEngine", deployment_id="tiny-1")
        assert stopped.deployment.residency is Residency.STOPPED
