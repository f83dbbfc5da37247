"""A ComfyUI as a process: the simulator, or a real one whose checkout the environment names.

`RUNG_COMFYUI_DIR` is a checkout of ComfyUI, and `RUNG_COMFYUI_PYTHON` a Python that can run it on the CPU (by
default that of a virtual environment `.venv` or `venv` in the checkout). It needs no weights: a small
checkpoint of random ones is made.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import httpx

from tests.integration.engine_process import EngineProcess, engine_process, free_port, python_module

CHECKPOINT = "tiny.safetensors"
START_TIMEOUT_S = 300.0
_POLL_S = 0.2
#: A pace at which a prompt can be seen while it runs.
_SIMULATED = {"RUNG_SIM_LOAD_S": "0.1", "RUNG_SIM_SPEED": "1", "RUNG_SIM_CHECKPOINTS": f"{CHECKPOINT}=1000"}
#: Sides of pictures of which a step takes some hundredths of a second, or on two busy cores tenths of one.
SIMULATED_SIDE, REAL_SIDE = 512, 64
_OPTIONS = ["--cpu", "--disable-all-custom-nodes", "--disable-api-nodes", "--preview-method", "auto"]


def real_comfyui() -> tuple[Path, Path] | None:
    """The checkout and the Python of a real one, if there is one."""
    named = os.environ.get("RUNG_COMFYUI_DIR")
    if not named:
        return None
    checkout = Path(named)
    given = os.environ.get("RUNG_COMFYUI_PYTHON")
    candidates = (
        [Path(given)] if given else [checkout / name / "bin" / "python" for name in (".venv", "venv")]
    )
    python = next((each for each in candidates if each.exists()), None)
    return (checkout, python) if python is not None and (checkout / "main.py").exists() else None


@asynccontextmanager
async def comfyui_server(folder: Path, *, real: bool, port: int = 0) -> AsyncIterator[EngineProcess]:
    """One that is ready. Its folders are below `folder`, and stay from one to the next."""
    port = port or free_port()
    listen = ["--listen", "127.0.0.1", "--port", str(port)]
    if real:
        found = real_comfyui()
        assert found is not None
        checkout, python = found
        base = folder / "base"
        await _make_checkpoint(checkout, python, base)
        database = f"sqlite:///{base / 'comfyui.db'}"
        folders = ["--base-directory", str(base), "--database-url", database]
        command = [str(python), str(checkout / "main.py"), *_OPTIONS, *folders]
        environment = {}
    else:
        command = [*python_module("nodeagent.simulators.comfyui"), *_OPTIONS]
        environment = _SIMULATED
    async with engine_process(
        [*command, *listen], port=port, log_path=folder / "comfyui.log", environment=environment
    ) as engine:
        await _ready(engine)
        yield engine


async def _make_checkpoint(checkout: Path, python: Path, base: Path) -> None:
    target = base / "models" / "checkpoints" / CHECKPOINT
    for name in ("input", "output", "temp", "custom_nodes", "user"):
        (base / name).mkdir(parents=True, exist_ok=True)
    if target.exists():
        return
    target.parent.mkdir(parents=True)
    script = Path(__file__).with_name("tiny_checkpoint.py")
    making = await asyncio.create_subprocess_exec(
        python,
        script,
        "--cpu",
        cwd=checkout,
        env={**os.environ, "PYTHONPATH": str(checkout), "TINY_CHECKPOINT": str(target)},
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
    )
    output, _ = await making.communicate()
    assert target.exists(), output.decode(errors="replace")[-3000:]


async def _ready(engine: EngineProcess) -> None:
    deadline_s = asyncio.get_running_loop().time() + START_TIMEOUT_S
    async with httpx.AsyncClient(base_url=engine.base_url) as client:
        while True:
            try:
                if (await client.get("/system_stats")).status_code == 200:
                    return
            except httpx.TransportError:
                pass
            assert engine.process.returncode is None, f"it ended:\n{engine.log()[-3000:]}"
            assert asyncio.get_running_loop().time() < deadline_s, f"not ready:\n{engine.log()[-3000:]}"
            await asyncio.sleep(_POLL_S)
