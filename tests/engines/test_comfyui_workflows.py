"""The built-in templates carried out: by the simulated ComfyUI in every run, and by a real one.

As `test_comfyui_contract`, with random weights on the CPU: the templates that need a checkpoint and no more.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import AsyncIterator
from contextlib import aclosing
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio
from msgspec.structs import replace

from controlplane.workflows import DEFAULT_TIERS, Tier, Workflows, build
from nodeagent.engines import ComfyUiAdapter, Generation
from rung.service import EngineClient
from rung.types import (
    ArtifactChunk,
    ComfyUiEngine,
    DeploymentSpec,
    EngineSpec,
    ImageInput,
    ImagePart,
    ProcessRuntime,
)
from tests.engines.comfyui_server import CHECKPOINT, comfyui_server, real_comfyui
from tests.integration.engine_process import EngineProcess

pytestmark = [pytest.mark.asyncio(loop_scope="module"), pytest.mark.timeout(600)]

SPEC = DeploymentSpec(
    id="pictures",
    node_id="n1",
    model="comfyui",
    engine=EngineSpec(engine=ComfyUiEngine(), runtime=ProcessRuntime(executable="comfyui")),
)
#: ComfyUI fits pictures to no fewer than a hundredth of a megapixel.
SIDE = 128
TINY: Tier = replace(
    DEFAULT_TIERS["quality"],
    checkpoint=CHECKPOINT,
    family="sd15",
    steps=2,
    sampler="euler",
    scheduler="normal",
    width_pixels=SIDE,
    height_pixels=SIDE,
    models={},
    operations={},
)


@pytest_asyncio.fixture(
    scope="module",
    loop_scope="module",
    params=["simulator", pytest.param("real", marks=pytest.mark.real_comfyui)],
)
async def process(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> AsyncIterator[EngineProcess]:
    real = request.param == "real"
    if real and real_comfyui() is None:
        pytest.skip("there is no real ComfyUI: RUNG_COMFYUI_DIR names no checkout with a Python that runs it")
    async with comfyui_server(tmp_path_factory.mktemp("comfyui"), real=real) as running:
        yield running


def png(width: int, height: int, *, alpha: bool = False) -> ImagePart:
    """A grey picture; with `alpha`, its left half is transparent."""
    left = bytes((90, 90, 90, 0)) if alpha else bytes((90, 90, 90))
    right = bytes((90, 90, 90, 255)) if alpha else bytes((90, 90, 90))
    row = b"\0" + left * (width // 2) + right * (width - width // 2)

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    head = struct.pack(">IIBBBBB", width, height, 8, 6 if alpha else 2, 0, 0, 0)
    body = chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(row * height)) + chunk(b"IEND", b"")
    return ImagePart(content_type="image/png", data=b"\x89PNG\r\n\x1a\n" + body)


@pytest.mark.parametrize(
    ("operation", "wanted", "sizes"),
    [
        ("generate", {"count": 2}, [(128, 128)] * 2),
        ("generate", {"width_pixels": 64}, [(64, 128)]),
        # About the tier's number of pixels, in the picture's proportions; or the size that is asked for.
        ("img2img", {"images": (png(128, 32),)}, [(256, 64)]),
        ("img2img", {"images": (png(128, 32),), "width_pixels": 64, "count": 2}, [(64, 128)] * 2),
        ("inpaint", {"images": (png(64, 64), png(64, 64))}, [(128, 128)]),
        ("inpaint", {"images": (png(64, 64, alpha=True),), "count": 2}, [(128, 128)] * 2),
        ("outpaint", {"images": (png(64, 64),), "parameters": {"left": 64, "feathering": 8}}, [(192, 128)]),
        ("upscale", {"images": (png(40, 20),), "parameters": {"scale": 2}}, [(80, 40)]),
    ],
)
async def test_it_makes_pictures_of_the_size_that_is_wanted(
    process: EngineProcess,
    request: pytest.FixtureRequest,
    operation: str,
    wanted: dict[str, Any],
    sizes: list[tuple[int, int]],
) -> None:
    asked = ImageInput(prompt="a cat", operation=operation, **wanted)
    files = await carried_out(process, build(Workflows().get(operation), asked, TINY, 5))
    found = [struct.unpack_from(">II", data, 16) for data in files]
    if "real" in request.node.callspec.id or operation in ("generate", "upscale"):
        assert found == sizes
    else:
        # The simulated one neither fits pictures to a number of pixels nor pads them.
        assert len(found) == len(sizes)


async def test_a_user_s_own_is_carried_out(process: EngineProcess, tmp_path: Path) -> None:
    (tmp_path / "plain.json").write_text(
        """{"1": {"class_type": "EmptyImage",
                  "inputs": {"width": "{{width}}", "height": "{{height}}", "batch_size": 1, "color": 255}},
            "2": {"class_type": "SaveImage", "inputs": {"images": ["1", 0], "filename_prefix": "plain"}}}"""
    )
    asked = ImageInput(operation="plain", width_pixels=96)
    files = await carried_out(process, build(Workflows.of_folder(tmp_path).get("plain"), asked, TINY, 5))
    assert [struct.unpack_from(">II", data, 16) for data in files] == [(96, SIDE)]


async def carried_out(process: EngineProcess, built: Any) -> list[bytes]:
    """The files, in order."""
    client = EngineClient()
    files: dict[str, bytes] = {}
    generation = Generation(job_id="j1", input=built, idle_timeout_s=120.0)
    async with aclosing(ComfyUiAdapter(client).generate(process.base_url, SPEC, generation)) as events:
        async for event in events:
            if isinstance(event, ArtifactChunk) and not event.preview:
                files[event.artifact_id] = files.get(event.artifact_id, b"") + event.data
    await client.aclose()
    return list(files.values())
