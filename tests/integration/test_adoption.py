"""`rung up` finds the engines that run already, uses them as they are, and leaves them running."""

from __future__ import annotations

import asyncio
import json
import signal
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from pathlib import Path

import aiohttp
import pytest
import yaml

from controlplane.local import free_ports
from nodeagent.simulators.gpu import SimulatedGpus, SimulatedProfile
from tests.integration.engine_process import EngineProcess, engine_process, python_module
from tests.integration.test_rung_up import run_rung, running_up

#: What each answers when it is ready.
HEALTH = {"vllm": "/health", "llamacpp": "/health", "ollama": "/api/tags", "comfyui": "/system_stats"}
COMMANDS = {
    "vllm": (
        "vllm",
        "qwen3-8b-awq",
        "--served-model-name",
        "qwen3-8b",
        "--gpu-memory-utilization",
        "0.4",
        "--port",
    ),
    "llamacpp": ("llama_server", "-m", "/models/gemma-4b.gguf", "--port"),
    "ollama": ("ollama", "serve"),
    "comfyui": ("comfyui", "--port"),
}


@pytest.fixture
async def engines(tmp_path: Path) -> AsyncIterator[dict[str, EngineProcess]]:
    """One of each kind, on a port that no guide names."""
    SimulatedGpus.create_profile(tmp_path / "gpus", SimulatedProfile.WORKSTATION)
    ports = dict(zip(COMMANDS, free_ports(len(COMMANDS)), strict=True))
    async with AsyncExitStack() as stack, aiohttp.ClientSession() as http:
        started = {}
        for kind, (module, *arguments) in COMMANDS.items():
            port = ports[kind]
            started[kind] = await stack.enter_async_context(
                engine_process(
                    [
                        *python_module(f"nodeagent.simulators.{module}"),
                        *(*arguments, *([str(port)] if arguments[-1] == "--port" else [])),
                    ],
                    port=port,
                    log_path=tmp_path / f"{kind}.log",
                    environment={
                        "RUNG_SIM_GPUS": str(tmp_path / "gpus"),
                        "RUNG_SIM_LOAD_S": "0.1",
                        "RUNG_SIM_MODELS": "llama3.2:3b",
                        "OLLAMA_HOST": f"127.0.0.1:{port}",
                    },
                )
            )
        async with asyncio.timeout(60):
            for kind, engine in started.items():
                await ready(http, engine, kind)
        yield started


async def ready(http: aiohttp.ClientSession, engine: EngineProcess, kind: str) -> None:
    while True:
        if await answers(http, engine, kind):
            return
        await asyncio.sleep(0.05)


async def answers(http: aiohttp.ClientSession, engine: EngineProcess, kind: str) -> bool:
    assert engine.process.returncode is None, engine.log()
    try:
        async with http.get(engine.base_url + HEALTH[kind]) as response:
            return response.status == 200
    except aiohttp.ClientConnectionError:
        return False


async def test_four_kinds_on_ports_of_their_own_are_adopted_and_outlive_their_agent(
    tmp_path: Path, engines: dict[str, EngineProcess]
) -> None:
    ports = {kind: [int(engine.base_url.rpartition(":")[2])] for kind, engine in engines.items()}
    agent_file = tmp_path / "agent.yaml"
    agent_file.write_text(yaml.safe_dump({"discover_ports": ports}))
    async with running_up(tmp_path, "--agent-config", str(agent_file)) as up:
        assert "Found running here, and adopted as they are: " in up.said
        code, output = await run_rung("--address", up.address, "status", "--json")
        assert code == 0
        found = json.loads(output)["deployments"]
        assert {
            each["spec"]["id"]: (each["spec"]["model"], each["adopted"], each["residency"]) for each in found
        } == {
            f"vllm-{ports['vllm'][0]}": ("qwen3-8b", True, "awake"),
            f"llamacpp-{ports['llamacpp'][0]}": ("gemma-4b", True, "awake"),
            f"ollama-{ports['ollama'][0]}-llama3-2-3b": ("llama3.2:3b", True, "asleep"),
            f"comfyui-{ports['comfyui'][0]}": ("comfyui", True, "awake"),
        }
        for model in ("qwen3-8b", "gemma-4b", "llama3.2:3b"):
            code, said = await run_rung("--address", up.address, "chat", "--model", model, "count to 3")
            assert code == 0
            assert "1 2 3" in said
        up.process.send_signal(signal.SIGINT)
        assert await up.end() == 0
    async with aiohttp.ClientSession() as http:
        for kind, engine in engines.items():
            assert await answers(http, engine, kind)
