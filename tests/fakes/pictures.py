"""A pipeline of pictures that tells what a test has it tell, and pictures to send."""

from __future__ import annotations

import hashlib
import struct
import zlib
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import TypeAlias

from controlplane.artifacts import Artifacts, Collector
from controlplane.pipelines import Begun, Wish
from rung.types import ArtifactChunk, ImageInput, JobKind, Phase, Served
from tests.fakes.fleet_view import deployment_view
from tests.fakes.gateway import Plane, a_plane

SERVED = Served("", "comfyui", "workstation", "sdxl")


def a_png(width: int = 1, height: int = 1) -> bytes:
    """A black picture; beyond a few thousand pixels only its head, which is what is looked at."""
    rows = b"" if width * height > 4096 else (b"\0" + b"\0\0\0" * width) * height
    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    chunks = ((b"IHDR", head), (b"IDAT", zlib.compress(rows)), (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
        for name, data in chunks
    )


def a_chunk(place: int, data: bytes) -> ArtifactChunk:
    """A whole picture, as an adapter gives it."""
    return ArtifactChunk(
        str(place), "image/png", data=data, sha256=hashlib.sha256(data).hexdigest(), size_bytes=len(data)
    )


Script: TypeAlias = Callable[[Begun, Collector], Awaitable[None]]


class ScriptedPictures:
    """Carries out a script, by default that of a picture by the fast tier."""

    def __init__(self, artifacts: Artifacts) -> None:
        self._artifacts = artifacts
        self.script: Script = lightning
        self.wishes: list[Wish] = []

    def prepared(self, wish: Wish) -> Wish:
        self.wishes.append(wish)
        return wish

    async def run(self, begun: Begun) -> str:
        wanted = begun.wish.input
        seed = wanted.seed if isinstance(wanted, ImageInput) else None
        async with self._artifacts.collector(begun.job, seed) as collector:
            await self.script(begun, collector)
        return "stop"


async def lightning(begun: Begun, collector: Collector) -> None:
    """What the fast tier tells."""
    job = begun.job
    job.routed(SERVED)
    for phase, detail in (
        (Phase.HEALTH_CHECK, "Checking ComfyUI status"),
        (Phase.VRAM_ACQUIRE, "Requesting VRAM slot (mode=quick)"),
        (Phase.VRAM_ACQUIRE, "VRAM acquired: 1127MB free (mode=quick)"),
        (Phase.SAFETY_FILTER, "Safety: unrestricted"),
        (Phase.PROMPT_ENHANCE, "Skipped (fast tier)"),
        (Phase.MODEL_SWAP, "Loading sdxl"),
        (Phase.WORKFLOW_BUILD, "Building lightning workflow (1024x1024)"),
        (Phase.QUEUED, "Submitted to ComfyUI"),
    ):
        job.progress(phase, detail)
    for step in (1, 3, 4):
        job.progress(Phase.SAMPLING, step=step, total=4, percent=step * 25.0)
        await collector.take(
            ArtifactChunk("preview", "image/jpeg", data=b"seen after %d" % step, preview=True)
        )
    job.progress(Phase.ENCODING, "Encoding images")
    for place in range(getattr(begun.wish.input, "count", 1)):
        await collector.take(a_chunk(place, a_png(place + 1)))
    job.progress(Phase.DONE, "1 image(s) generated", percent=100)


@asynccontextmanager
async def a_picture_plane() -> AsyncIterator[tuple[Plane, ScriptedPictures]]:
    """A gateway whose only deployment is `comfyui`, which can do what has no engine of its own in tests."""
    async with a_plane() as plane:
        kinds = (JobKind.IMAGE, JobKind.VIDEO, JobKind.MESH, JobKind.SPEECH, JobKind.TRANSCRIPTION)
        capabilities = tuple(kind.value for kind in kinds)
        plane.fleet.show(deployment_view("comfyui", None, model="sdxl", capabilities=capabilities))
        pictures = ScriptedPictures(plane.artifacts)
        plane.pipelines.add(pictures, *kinds)
        yield plane, pictures
