"""`rung demo` that stays, and that answers from a real model."""

from __future__ import annotations

import asyncio
import importlib.util
import os
import re
import signal
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path

import aiohttp
import psutil
import pytest

from controlplane.demo._sweeper import MARK
from tests.integration.tiny_gguf import write_tiny_gguf

_PATIENCE_S = 100.0


class Demo:
    """A running demo, its folder within `folder`."""

    def __init__(self, process: asyncio.subprocess.Process, folder: Path) -> None:
        self.process = process
        self.said = ""
        self._folder = folder

    async def until(self, words: str) -> None:
        """Read what it says until it has said something."""
        assert self.process.stdout is not None
        async with asyncio.timeout(_PATIENCE_S):
            while words not in self.said:
                line = await self.process.stdout.readline()
                assert line, f"it ended, and said:\n{self.said}"
                self.said += line.decode()

    async def end(self) -> int:
        """Read what is left, and wait for its end."""
        assert self.process.stdout is not None
        async with asyncio.timeout(_PATIENCE_S):
            self.said += (await self.process.stdout.read()).decode()
            return await self.process.wait()

    def processes(self) -> list[str]:
        """Whatever carries the mark of this demo."""
        found = []
        for process in psutil.process_iter():
            with suppress(psutil.Error):
                if process.environ().get(MARK, "").startswith(str(self._folder)):
                    found.append(" ".join(process.cmdline()))
        return found


@asynccontextmanager
async def running(folder: Path, *options: str) -> AsyncIterator[Demo]:
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "rung.cli", "demo", *options),
        env={**os.environ, "TMPDIR": str(folder), "COLUMNS": "200"},
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
    )
    demo = Demo(process, folder)
    try:
        yield demo
    finally:
        if process.returncode is None:
            process.terminate()
            await demo.end()


@pytest.mark.slow
async def test_one_that_stays_answers_until_ctrl_c_and_leaves_nothing(tmp_path: Path) -> None:
    async with running(tmp_path, "--serve") as demo:
        await demo.until("Ctrl-C ends it")
        assert "What starts is a simulated vllm, with nemotron-8b." in demo.said
        found = re.search(r"OpenAI base URL: (http://127\.0\.0\.1:\d+/v1)", demo.said)
        assert found is not None, demo.said
        wish = {"model": "nemotron-8b", "messages": [{"role": "user", "content": "Hello"}], "max_tokens": 8}
        async with (
            aiohttp.ClientSession() as http,
            http.post(f"{found[1]}/chat/completions", json=wish) as response,
        ):
            assert response.status == 200
            assert (await response.json())["choices"][0]["message"]["content"]
        # A control plane, two agents, a cloud API, and an engine at least.
        assert len(demo.processes()) >= 5

        said = " ".join(demo.said.split())
        _check_grades(said)
        _check_ladder(said)
        demo.process.send_signal(signal.SIGINT)

        assert await demo.end() == 0
        assert "All of it is gone again" in demo.said
        assert demo.processes() == []
        assert os.listdir(tmp_path) == []


def _check_grades(said: str) -> None:
    _check(
        said,
        r"before [█▒░]+ 23\.\d / 31\.8 GiB",
        r"rung image .{,60} --tier quality",
        r"Requesting VRAM slot \(mode=standard\)",
        r"making room: 1 step, grade standard",
        r"putting reasoner to sleep: 9\.\d GiB freed",
        r"VRAM acquired: [\d,]+ MB free \(mode=standard\)",
        r"Safety: unrestricted",
        r"Loading sdxl",
        r"Building quality workflow \(1024x1024, seed 2\)",
        r"loading waiIllustriousSDXL_v140\.safetensors",
        r"Sampling 0% .{,20} Sampling \d\d%",
        r"Sampling 100%",
        r"1 image generated",
        r"painted [█▒░]+ 25\.\d / 31\.8 GiB .{,100} reasoner 1\.0 GiB",
        r"rung chat --model deepseek-r1-14b .{,600} flushing the cache of comfyui: 11\.\d GiB freed",
        r"engine wake: .{,400} reasoner on workstation \(deepseek-r1-14b\)",
        r"woken [█▒░]+ 23\.\d / 31\.8 GiB",
        r"--tier lightning",
        r"VRAM acquired: [\d,]+ MB free \(mode=quick\)",
        r"Skipped \(fast tier\)",
        r"Sampling 25% .{,20} Sampling 50%",
        r"1 image generated",
        r"--tier ultra",
        r"Requesting VRAM slot \(mode=full\)",
        r"VRAM acquired: [\d,]+ MB free \(mode=full\)",
        r"Loading flux: sdxl was flushed, 5\.\d GiB freed",
        r"Sampling 0% .{,20} Sampling \d\d%",
        r"Sampling 100%",
        r"1 image generated",
        r"painted [█▒░]+ 26\.\d / 31\.8 GiB .{,100} orchestrator 5\.5 GiB",
        r"orchestrator was shrunk and is awake; it is process \d+, as it was all the time",
        r"after [█▒░]+ .{,100} orchestrator 11\.5 GiB",
    )
    for step in ("flushing sdxl from comfyui", "putting reasoner to sleep: 9", "shrinking orchestrator: 6"):
        assert re.search(rf"--tier ultra .*{step}.*mode=full", said), said


def _check_ladder(said: str) -> None:
    _check(
        said,
        r"rung chat --effort 3 .{,100} effort 3, rung chat: .{,500} orchestrator on workstation",
        r"rung chat --effort 8 .{,100} effort 8, rung reasoning: .{,100} thinker is reasoning",
        r"thinker is reasoning: \d+ characters so far",
        r"The tool answered: .{,300} orchestrator on workstation",
        r"rung chat --effort 8 .{,200} thinker is reasoning",
        r"\$ kill -9 \d+ \d+",
        r"thinker .{,100}; trying reasoner",
        r"reasoner is reasoning",
        r"The tool answered: .{,300} orchestrator on workstation",
        r"gaming is current",
        r"rung chat --effort 8 --local-only .{,200} no reasoner answered",
        r"reasoner: profile gaming holds it stopped",
        r"deepseek/reasoner: the request is local_only, and this is not hardware of ours",
        r"rung chat --effort 8 '.{,200} deepseek/reasoner is reasoning",
        r"deepseek/reasoner cost \$0\.0000\d\d",
        r"spark is ready",
        r"home is current",
    )


def _check(said: str, *lines: str) -> None:
    """That each of these was said, in this order."""
    place = 0
    for line in lines:
        found = re.compile(line).search(said, place)
        assert found is not None, f"no {line!r} in {said[place : place + 3000]}"
        place = found.end()


@pytest.mark.slow
@pytest.mark.llamacpp
@pytest.mark.skipif(importlib.util.find_spec("llama_cpp") is None, reason="llama-cpp-python is not installed")
async def test_one_with_a_model_says_which_server_it_starts_and_answers_from_it(
    tmp_path: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Without llama-server: the one of the package is taken.
    monkeypatch.setenv("PATH", "/nowhere")
    model = write_tiny_gguf(tmp_path_factory.mktemp("models") / "tiny.gguf")
    async with running(tmp_path, "--gguf", str(model)) as demo:
        assert await demo.end() == 0, demo.said
        assert "a real llama.cpp with tiny.gguf" in demo.said
        assert "What starts is llama-cpp-python, with tiny." in demo.said
        assert "starting llama-server" not in demo.said
        assert "rung chat --model tiny" in demo.said
        # What it makes of a tool is its own affair, and said as it is.
        assert "This time the orchestrator did not call for it." in demo.said
        assert "thinker is reasoning" not in demo.said
        assert "This is a simulated llama-server" not in demo.said
        assert "All of it is gone again" in demo.said
        assert demo.processes() == []
        assert os.listdir(tmp_path) == []
