"""Predictions from a caller to a worker and back: processes, and a card on which the workers take turns."""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from nodeagent.simulators.gpu import SimulatedGpus, SimulatedGpuSpec
from rung.errors import InvalidRequestError
from rung.types import Deployment, JobState, Residency
from tests.integration.stack import SIMULATORS, Stack, stack

MIB = 1 << 20
#: Two bytes for each of 0.2 and 1.6 billion weights.
TIMESFM_BYTES = 400_000_000
TABFM_BYTES = 3_200_000_000
WEEKS = [float(day % 7) for day in range(35)]
LOW, HIGH = [[0.0, 0.0], [0.0, 1.0], [1.0, 0.0]], [[9.0, 9.0], [9.0, 8.0], [8.0, 9.0]]


def worker(name: str, model: str, vram_bytes: int, folder: Path, *tasks: str) -> dict[str, Any]:
    environment = {
        "RUNG_SIM_GPUS": str(folder / "gpus"),
        "RUNG_SIM_SPEED": "50",
        "RUNG_SIM_LOAD_S": "0.1",
    }
    return {
        "id": name,
        "model": model,
        "engine": {"kind": "prediction"},
        "runtime": {"kind": "process", "executable": "prediction", "environment": environment},
        "residency_class": "sleepable",
        "capabilities": ["prediction", *tasks],
        "vram": vram_bytes,
        "start_timeout": "30s",
    }


@pytest.fixture
async def box(tmp_path: Path) -> AsyncIterator[Stack]:
    """A card with 3.2 GiB beside what is kept free: room for the tables or for the series."""
    card = SimulatedGpuSpec(name="one", memory_total_bytes=4300 * MIB)
    SimulatedGpus.create(tmp_path / "gpus", gpus=[card])
    deployments = [
        worker("timesfm", "timesfm-2.5-0.2b", 500 * MIB, tmp_path, "forecast"),
        worker("tabfm", "tabfm-1.6b", 3100 * MIB, tmp_path, "classify", "regress"),
    ]
    executable = SIMULATORS["ollama"] | {"arguments_prefix": ["-m", "nodeagent.simulators.prediction"]}
    agent = {"executables": {"prediction": executable}, "simulated_gpus": str(tmp_path / "gpus")}
    async with stack(tmp_path, deployments, agent=agent) as found:
        yield found


async def holding(box: Stack, deployment_id: str, vram_bytes: int, *residencies: Residency) -> Deployment:
    """The deployment, once it is so, and the ledger has it with so many bytes."""
    async with asyncio.timeout(30):
        async for fleet in box.client.watch_fleet():
            for found in fleet.deployments:
                there = found.residency in residencies and (found.vram_bytes or 0) == vram_bytes
                if found.spec.id == deployment_id and there:
                    return found
    raise AssertionError("the watch ended")


async def rung(box: Stack, *arguments: str, stdin: str = "") -> str:
    """What the command prints."""
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        *("-m", "rung.cli", "--address", box.client.address, *arguments),
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    out, err = await asyncio.wait_for(process.communicate(stdin.encode()), 60)
    assert process.returncode == 0, err.decode()
    return out.decode()


async def test_workers_take_turns_and_the_ledger_has_what_they_hold(box: Stack) -> None:
    found = await box.client.forecast(WEEKS, 7)
    assert found.forecasts[0] == pytest.approx(WEEKS[:7])
    assert [each.level for each in found.quantiles] == [0.1, 0.5, 0.9]
    assert found.served is not None
    assert (found.served.target, found.served.node) == ("timesfm", "box")
    await holding(box, "timesfm", TIMESFM_BYTES, Residency.AWAKE)
    job = await box.client.get_job(found.job_id)
    assert (job.kind, job.state) == ("prediction", JobState.DONE)

    # Not both fit: the one that forecasts gives way, and comes back when it is asked.
    labels = ["low"] * 3 + ["high"] * 3
    assert await box.client.classify(LOW + HIGH, labels, [[1, 1], [8, 8]]) == ("low", "high")
    await holding(box, "tabfm", TABFM_BYTES, Residency.AWAKE)
    await holding(box, "timesfm", 0, Residency.ASLEEP, Residency.STOPPED)
    low, high = await box.client.regress(LOW + HIGH, [1, 1, 1, 9, 9, 9], [[0, 0.5], [9, 9.5]])
    assert low < 5 < high
    assert (await box.client.forecast(WEEKS, 1)).forecasts[0] == pytest.approx(WEEKS[:1])
    await holding(box, "tabfm", 0, Residency.ASLEEP, Residency.STOPPED)


async def test_a_column_is_continued_by_the_command_and_status_shows_the_worker(box: Stack) -> None:
    table = "day,sales\n" + "".join(f"{day},{value}\n" for day, value in enumerate(WEEKS))
    arguments = ("forecast", "--column", "sales", "--horizon", "7", "--json")
    answer = json.loads(await rung(box, *arguments, stdin=table))
    assert answer["columns"][0]["forecast"] == pytest.approx(WEEKS[:7])
    assert answer["served"]["target"] == "timesfm"

    await holding(box, "timesfm", TIMESFM_BYTES, Residency.AWAKE)
    status = await rung(box, "status")
    (line,) = [line for line in status.splitlines() if "timesfm" in line and "awake" in line]
    assert "381 MiB" in line

    await rung(box, "free", "timesfm")
    await holding(box, "timesfm", 0, Residency.ASLEEP)
    shown = json.loads(await rung(box, "status", "--json"))
    assert {each["spec"]["id"]: each["residency"] for each in shown["deployments"]}["timesfm"] == "asleep"


async def test_over_http_a_worker_is_woken_and_what_is_wrong_is_said(box: Stack) -> None:
    url, body = f"{box.http}/v1/predictions", {"task": "forecast", "series": [WEEKS], "horizon": 7}
    async with asyncio.timeout(60), aiohttp.ClientSession() as http:
        async with http.post(url, json=body) as response:
            answer = await response.json()
            assert (response.status, response.headers["X-Rung-Target"]) == (200, "timesfm")
            assert answer["forecasts"][0] == pytest.approx(WEEKS[:7])

        # A worker that forgot its model behind everybody's back has failed; the caller has not.
        found = await box.deployment("timesfm", Residency.AWAKE)
        assert found.endpoint is not None
        async with http.post(f"{found.endpoint.base_url}/sim/faults", json={"faults": ["http_500"]}):
            pass
        async with http.post(url, json=body) as response:
            answer = await response.json()
            assert response.status == 502
            assert "/predict answers 500: /predict failed (simulated fault)" in answer["error"]["message"]
    with pytest.raises(InvalidRequestError, match=r"series\[0\]\[1\] is nan"):
        await box.client.forecast([1.0, float("nan")], 1)
