"""A ComfyUI as its tests ask it: by our adapter, and by its own routes as somebody else would."""

from __future__ import annotations

import asyncio
import hashlib
import itertools
import random
import struct
import zlib
from collections.abc import Sequence
from contextlib import aclosing
from typing import Any

import httpx
import msgspec

from nodeagent.engines import ComfyUiAdapter, Generation
from rung.codec import GenerationEvent
from rung.types import (
    ArtifactChunk,
    ComfyUiEngine,
    DeploymentSpec,
    EngineSpec,
    Phase,
    PhaseProgress,
    ProcessRuntime,
    WorkflowFile,
    WorkflowInput,
)
from tests.engines.comfyui_graphs import Graph, sampled
from tests.engines.comfyui_server import CHECKPOINT

SPEC = DeploymentSpec(
    id="pictures",
    node_id="n1",
    model="comfyui",
    engine=EngineSpec(engine=ComfyUiEngine(), runtime=ProcessRuntime(executable="comfyui")),
)
PATIENCE_S = 120.0
#: No two pictures are the same, or the second one would come from a cache.
SEEDS = itertools.count(1)


class Comfy:
    """A ComfyUI, by our adapter and by its own routes."""

    def __init__(self, base_url: str, side: int, adapter: ComfyUiAdapter, routes: httpx.AsyncClient) -> None:
        self.base_url = base_url
        self.side = side
        self.adapter = adapter
        self.routes = routes

    def sampled(self, *, steps: int, count: int = 1) -> Graph:
        return sampled(CHECKPOINT, seed=next(SEEDS), steps=steps, side=self.side, count=count)

    def events(
        self, graph: Graph, *, files: Sequence[WorkflowFile] = (), previews: bool = False, base_url: str = ""
    ) -> aclosing[Any]:
        wanted = WorkflowInput(graph_json=msgspec.json.encode(graph), files=tuple(files), previews=previews)
        generation = Generation(job_id="j1", input=wanted, idle_timeout_s=PATIENCE_S)
        return aclosing(self.adapter.generate(base_url or self.base_url, SPEC, generation))

    async def told(self, graph: Graph, *, files: Sequence[WorkflowFile] = (), previews: bool = False) -> Told:
        async with asyncio.timeout(PATIENCE_S), self.events(graph, files=files, previews=previews) as events:
            return Told([event async for event in events])

    async def submit(self, graph: Graph) -> str:
        """As somebody else would."""
        answer = await self.routes.post("/prompt", json={"prompt": graph})
        assert answer.status_code == 200, answer.text
        return str(answer.json()["prompt_id"])

    async def queue(self) -> tuple[list[str], list[str]]:
        """The ids of those that run, and of those that wait."""
        found = (await self.routes.get("/queue")).json()
        return (
            [row[1] for row in found["queue_running"]],
            [row[1] for row in found["queue_pending"]],
        )

    async def until_running(self, prompt_id: str) -> None:
        async with asyncio.timeout(PATIENCE_S):
            # Another process brings it about.
            while prompt_id not in (await self.queue())[0]:  # noqa: ASYNC110 - as above
                await asyncio.sleep(0.05)

    async def until_empty(self) -> None:
        async with asyncio.timeout(PATIENCE_S):
            while (await self.queue()) != ([], []):  # noqa: ASYNC110 - as above
                await asyncio.sleep(0.05)


class Told:
    """What the adapter said of one generation."""

    def __init__(self, events: list[GenerationEvent]) -> None:
        self.progress = [event for event in events if isinstance(event, PhaseProgress)]
        chunks = [event for event in events if isinstance(event, ArtifactChunk)]
        self.previews = [chunk for chunk in chunks if chunk.preview]
        self.files: dict[str, tuple[str, bytes]] = {}
        for chunk in chunks:
            if chunk.preview:
                continue
            _, before = self.files.get(chunk.artifact_id, ("", b""))
            data = before + chunk.data
            assert (chunk.offset_bytes, chunk.length_bytes) == (len(before), len(chunk.data))
            assert len(chunk.data) <= 256 * 1024
            if chunk.sha256:
                assert (chunk.size_bytes, chunk.sha256) == (len(data), hashlib.sha256(data).hexdigest())
            self.files[chunk.artifact_id] = (chunk.content_type, data)

    @property
    def phases(self) -> list[Phase]:
        """Without repeats, and without the queue, which may be too short to be seen."""
        found = [each.phase for each in self.progress if each.phase is not Phase.QUEUED]
        return [phase for phase, _ in itertools.groupby(found)]

    @property
    def steps(self) -> list[tuple[int | None, int | None, float | None]]:
        return [
            (each.step, each.total, each.percent) for each in self.progress if each.phase is Phase.SAMPLING
        ]

    @property
    def sizes(self) -> list[tuple[int, int]]:
        """Of its pictures, in pixels."""
        assert all(kind == "image/png" for kind, _ in self.files.values())
        return [struct.unpack_from(">II", data, 16) for _, data in self.files.values()]


def noise(width: int, height: int) -> bytes:
    """A picture that no compression makes smaller."""
    pixels = random.Random(1)
    rows = b"".join(b"\0" + pixels.randbytes(3 * width) for _ in range(height))

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    body = zlib.compress(rows, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", body) + chunk(b"IEND", b"")
