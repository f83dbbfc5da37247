"""A workstation that draws, as real processes, and ways to watch one job of it."""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import AsyncIterator, Sequence
from contextlib import aclosing, asynccontextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any

import aiohttp
import psutil
from msgspec import Struct

import rung
from nodeagent.simulators.gpu import SimulatedGpus, SimulatedGpuSpec
from rung.types import ImageInput, JobDone, JobEvent, LifecycleFailed, Phase, PhaseProgress, Residency
from tests.integration.stack import SIMULATORS, Stack, stack

_GIB = 1 << 30
_CHECKPOINTS = {"sdxl_lightning_4step.safetensors": 5 * _GIB, "flux1-dev-fp8.safetensors": 19 * _GIB}


class Heard(Struct):
    """What one reader heard, in one form: the time of each line, and each line as fields."""

    times_s: list[float]
    lines: list[dict[str, Any]]

    @property
    def longest_gap_s(self) -> float:
        """The longest silence, from the request on."""
        return max(later - earlier for earlier, later in pairwise(self.times_s))


class Prediction(Struct, frozen=True):
    """What was said to remain of a job, and what did; in seconds, since an event."""

    said_s: float
    took_s: float

    @property
    def relative_error(self) -> float:
        """Of what was said."""
        return abs(self.said_s - self.took_s) / self.took_s


@asynccontextmanager
async def workstation(folder: Path, *, speed: float = 1.0, load_s: float = 2.0) -> AsyncIterator[Stack]:
    """A card of 32 GiB with ComfyUI and a reasoner, both up; for a picture of `ultra` the reasoner sleeps."""
    SimulatedGpus.create(
        folder / "gpus", gpus=[SimulatedGpuSpec(name="RTX 5090", memory_total_bytes=32 * _GIB)]
    )
    environment = {
        "RUNG_SIM_GPUS": str(folder / "gpus"),
        "RUNG_SIM_SPEED": str(speed),
        "RUNG_SIM_LOAD_S": str(load_s),
    }
    sizes = ",".join(f"{name}={size}" for name, size in _CHECKPOINTS.items())
    deployments: list[dict[str, Any]] = [
        {
            "id": "reasoner",
            "model": "deepseek-r1-14b-awq",
            "residency_class": "sleepable",
            "engine": {
                "kind": "vllm",
                "model": "deepseek-r1-14b-awq",
                "gpu_memory_utilization": 0.5,
                "max_model_len_tokens": 4096,
                "sleep_mode": True,
            },
            "runtime": {"kind": "process", "executable": "vllm", "environment": environment},
        },
        {
            "id": "comfyui",
            "model": "comfyui",
            "residency_class": "cache",
            "capabilities": ["image"],
            "engine": {"kind": "comfyui"},
            "runtime": {
                "kind": "process",
                "executable": "comfyui",
                "environment": environment | {"RUNG_SIM_CHECKPOINTS": sizes},
            },
        },
    ]
    comfyui = {
        "path": sys.executable,
        "arguments_prefix": ["-m", "nodeagent.simulators.comfyui"],
        "allow_environment": True,
    }
    agent = {"simulated_gpus": str(folder / "gpus"), "executables": {**SIMULATORS, "comfyui": comfyui}}
    async with stack(folder, deployments, agent=agent) as box:
        for name in ("reasoner", "comfyui"):
            await bring_up(box, name)
        yield box


async def bring_up(box: Stack, name: str) -> None:
    """Start or wake a deployment, whoever has to make room for it."""
    found = await box.deployment(name)
    asleep = found.residency is Residency.ASLEEP
    events = box.client.wake_deployment(name) if asleep else box.client.start_deployment(name)
    last = [event async for event in events][-1]
    assert not isinstance(last.payload, LifecycleFailed), last
    await box.deployment(name, Residency.AWAKE)


async def three_ways(box: Stack, *, request_id: str, **wanted: Any) -> tuple[Heard, Heard, Heard]:
    """One picture, watched over gRPC `Generate`, NDJSON of `/generate/stream`, and its job's SSE, at once."""
    begun: asyncio.Future[str] = asyncio.get_running_loop().create_future()
    body = {"prompt": "a cat", "detached": True} | wanted

    async def grpc() -> Heard:
        heard = _heard()
        stream = box.client.generate(ImageInput(prompt="a cat", **wanted), request_id=request_id)
        async for event in stream:
            if not begun.done():
                begun.set_result(event.job_id)
            _note(heard, _fields(event))
        return heard

    async def ndjson() -> Heard:
        job_id = await begun
        heard = _heard()
        # The same request id is the same job.
        async with (
            aiohttp.ClientSession(headers={"X-Request-Id": request_id}) as http,
            http.post(f"{box.http}/generate/stream", json=body) as response,
        ):
            assert response.headers["X-Rung-Job"] == job_id
            async for line in response.content:
                _note(heard, json.loads(line))
        return heard

    async def sse() -> Heard:
        job_id = await begun
        heard = _heard()
        async with (
            aiohttp.ClientSession(headers={"Accept": "text/event-stream"}) as http,
            http.get(f"{box.http}/v1/jobs/{job_id}/events") as response,
        ):
            async for line in response.content:
                if line.startswith(b"data: "):
                    _note(heard, json.loads(line.removeprefix(b"data: ")))
        return heard

    async with asyncio.timeout(60):
        return await asyncio.gather(grpc(), ndjson(), sse())


def predictions(heard: Heard) -> tuple[Prediction | None, Prediction | None]:
    """What was first said to remain of the job, and what when sampling began; None for nothing."""
    end_s = heard.lines[-1]["elapsed_s"]
    over = (Phase.ENCODING.value, Phase.DONE.value)
    said = [
        line
        for line in heard.lines
        if line.get("job_remaining_s") is not None and line.get("phase") not in over
    ]
    sampling = [line for line in said if line.get("phase") == Phase.SAMPLING.value]

    def first_of(lines: list[dict[str, Any]]) -> Prediction | None:
        if not lines:
            return None
        return Prediction(lines[0]["job_remaining_s"], end_s - lines[0]["elapsed_s"])

    return first_of(said), first_of(sampling)


class Crowd(Struct, frozen=True):
    """What came of one job that was watched by many.

    Attributes:
        events: in its log.
        counts: by watcher that read, how many events of the log it had.
        late_counts: the same of those that read nothing until the job had ended.
        took_s: from its acceptance to its end.
        grew_bytes: of the control plane's memory, at most.
    """

    events: int
    counts: list[int]
    late_counts: list[int]
    took_s: float
    grew_bytes: int


async def watched_by(box: Stack, readers: int, stalled: int, **wanted: Any) -> Crowd:
    """Have a picture drawn that so many watch, half of each over HTTP and half over gRPC."""
    plane = _plane_of(box)
    before_bytes = peak_bytes = plane.memory_info().rss
    job = await box.client.create_job(wanted=ImageInput(prompt="a cat", **wanted))
    async with (
        rung.AsyncClient(f"127.0.0.1:{box.plane.ready['grpc_port']}") as client,
        aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as http,
    ):
        stalled_http = [await _stall(box, job.id) for _ in range(stalled // 2)]
        stalled_grpc = [client.watch_job(job.id) for _ in range(stalled - stalled // 2)]
        for events in stalled_grpc:
            await anext(events)
        watching = [
            asyncio.create_task(_count_http(http, box, job.id) if place % 2 else _count_grpc(client, job.id))
            for place in range(readers)
        ]
        log = []
        async for event in box.client.watch_job(job.id):
            log.append(event)
            peak_bytes = max(peak_bytes, plane.memory_info().rss)
        counts = await asyncio.gather(*watching)
        peak_bytes = max(peak_bytes, plane.memory_info().rss)
        assert isinstance(log[-1].payload, JobDone), log[-1]
        late_counts = [1 + len([event async for event in events]) for events in stalled_grpc]
        late_counts += [await _count_stalled(*connection) for connection in stalled_http]
    return Crowd(
        events=len(log),
        counts=counts,
        late_counts=late_counts,
        took_s=log[-1].elapsed_s,
        grew_bytes=peak_bytes - before_bytes,
    )


async def _count_grpc(client: rung.AsyncClient, job_id: str) -> int:
    async with aclosing(client.watch_job(job_id)) as events:
        return len([event async for event in events])


async def _count_http(http: aiohttp.ClientSession, box: Stack, job_id: str) -> int:
    async with http.get(f"{box.http}/v1/jobs/{job_id}/events") as response:
        return sum([json.loads(line)["sequence"] > 0 async for line in response.content])


async def _stall(box: Stack, job_id: str) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    """A connection that asks for all there is, and reads nothing of it."""
    reader, writer = await asyncio.open_connection("127.0.0.1", box.plane.ready["http_port"], limit=1024)
    writer.write(
        f"GET /v1/jobs/{job_id}/events?data=inline HTTP/1.1\r\nHost: 127.0.0.1\r\n"
        "Connection: close\r\n\r\n".encode()
    )
    await writer.drain()
    return reader, writer


async def _count_stalled(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> int:
    text = await reader.read()
    writer.close()
    return sum(b'"sequence":0,' not in line for line in text.splitlines() if b'"sequence":' in line)


def _plane_of(box: Stack) -> psutil.Process:
    process = box.plane._process
    assert process is not None
    return psutil.Process(process.pid)


def _heard() -> Heard:
    return Heard([asyncio.get_running_loop().time()], [])


def _note(heard: Heard, fields: dict[str, Any]) -> None:
    heard.times_s.append(asyncio.get_running_loop().time())
    heard.lines.append(fields)


def _fields(event: JobEvent) -> dict[str, Any]:
    fields: dict[str, Any] = {"elapsed_s": event.elapsed_s}
    if isinstance(event.payload, PhaseProgress):
        fields |= {"phase": event.payload.phase.value, "job_remaining_s": event.payload.job_remaining_s}
        fields["detail"] = event.payload.detail
    return fields


def phases_of(heard: Heard) -> Sequence[str]:
    """The phases, each once, in the order in which they came."""
    return list(dict.fromkeys(line["phase"] for line in heard.lines if "phase" in line))
