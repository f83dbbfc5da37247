"""A vLLM as a process: the simulator, or the real one that `make test-engines` installs."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import httpx

from tests.engines.tiny_llama import CONTEXT_TOKENS, write_tiny_llama
from tests.integration.engine_process import EngineProcess, engine_process, free_port, python_module

MODEL = "tiny"
REAL_VLLM = Path(__file__).parents[2] / ".cache" / "vllm" / "bin" / "vllm"
#: A real one imports for a minute where two cores are shared.
START_TIMEOUT_S = 400.0
_POLL_S = 0.2

#: What a real one needs on a machine without GPU and without internet.
CPU_ENVIRONMENT = {"VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1"}
#: A pace that is about that of the real one with a tiny model: fast, and no answer is there at once.
_SIMULATED = {"RUNG_SIM_LOAD_S": "0.1", "RUNG_SIM_SPEED": "4"}


def serve_arguments(model: str, port: int) -> list[str]:
    """Options of `vllm serve` that both take."""
    listen = ["--host", "127.0.0.1", "--port", str(port)]
    served = ["--served-model-name", MODEL, "--max-model-len", str(CONTEXT_TOKENS), "--enforce-eager"]
    return ["serve", model, *listen, *served]


@asynccontextmanager
async def vllm_server(folder: Path, *, real: bool, dev_mode: bool = True) -> AsyncIterator[EngineProcess]:
    """One that is ready."""
    port = free_port()
    model = str(write_tiny_llama(folder / "model"))
    command = [str(REAL_VLLM)] if real else python_module("nodeagent.simulators.vllm")
    environment = CPU_ENVIRONMENT if real else _SIMULATED
    if dev_mode:
        environment = environment | {"VLLM_SERVER_DEV_MODE": "1"}
    async with engine_process(
        [*command, *serve_arguments(model, port)],
        port=port,
        log_path=folder / "vllm.log",
        environment=environment,
    ) as engine:
        await _ready(engine)
        yield engine


async def _ready(engine: EngineProcess) -> None:
    deadline_s = asyncio.get_running_loop().time() + START_TIMEOUT_S
    async with httpx.AsyncClient(base_url=engine.base_url) as client:
        while True:
            try:
                if (await client.get("/health")).status_code == 200:
                    return
            except httpx.TransportError:
                pass
            assert engine.process.returncode is None, f"it ended:\n{engine.log()[-3000:]}"
            assert asyncio.get_running_loop().time() < deadline_s, f"not ready:\n{engine.log()[-3000:]}"
            await asyncio.sleep(_POLL_S)
