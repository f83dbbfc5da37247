"""Meshes by the SDK, against the real servicers."""

from __future__ import annotations

import asyncio
import hashlib

from rung import AsyncClient, Client
from rung.types import ArtifactChunk, ImagePart, JobDone, JobKind, MeshInput, Policy, Routed, Served
from tests.fakes.api_server import an_api_server
from tests.fakes.pictures import a_png

GLB = b"glTF" + bytes(range(200))
SCRIPT = (
    Routed(Served("", "mesh-1", "workstation", "hunyuan")),
    ArtifactChunk(
        "artifact-1", "model/gltf-binary", 0, GLB, hashlib.sha256(GLB).hexdigest(), len(GLB), len(GLB)
    ),
    JobDone("stop"),
)
CHAIR = ImagePart(content_type="image/png", data=a_png())


async def test_both_clients_ask_for_a_mesh_and_get_its_file() -> None:
    policy = Policy(local_only=True)
    async with an_api_server() as server:
        server.pipelines.script = SCRIPT
        address = f"127.0.0.1:{server.server.port}"
        async with AsyncClient(address) as client:
            result = await client.mesh(
                image=CHAIR, seed=0, texture=True, model="hunyuan", policy=policy, request_id="r-1"
            ).result()

        def blocking() -> bytes:
            with Client(address) as client:
                return client.mesh("a chair", effort=2).result().artifacts[0].data

        assert await asyncio.to_thread(blocking) == GLB
        first, second = server.pipelines.wishes
    (file,) = result.artifacts
    assert (file.artifact.content_type, file.data) == ("model/gltf-binary", GLB)
    assert first.input == MeshInput(image=CHAIR, seed=0, texture=True)
    assert (first.kind, first.model, first.policy, first.request_id) == (
        JobKind.MESH,
        "hunyuan",
        policy,
        "r-1",
    )
    assert (second.input, second.effort) == (MeshInput(prompt="a chair"), 2)
