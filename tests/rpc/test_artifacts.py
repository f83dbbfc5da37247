"""Artifacts over gRPC, through the SDK, and over HTTP."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import json
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import AsyncExitStack, aclosing
from pathlib import Path
from typing import TYPE_CHECKING

import aiohttp
import pytest
from multidict import CIMultiDictProxy

import rung
from controlplane.artifacts import PIECE_BYTES, Artifact, Artifacts
from controlplane.jobs import LiveJob
from rung import AsyncClient, codec, v1
from rung.errors import (
    ArtifactDamagedError,
    InvalidRequestError,
    OutOfRangeError,
    UnavailableError,
    UnknownArtifactError,
)
from rung.types import ArtifactChunk, JobDone, JobKind, Policy
from tests.fakes.api_server import ApiServer, an_api_server
from tests.fakes.artifacts import a_job, some_artifacts
from tests.fakes.gateway import Plane, a_plane
from tests.fakes.proxy import BreakableProxy

if TYPE_CHECKING:
    from rung.v1.inference_service_pb2_grpc import InferenceServiceAsyncStub

#: More than one piece, and no whole number of them.
CONTENT = bytes(range(256)) * 4096 + b"end"
SHA256 = hashlib.sha256(CONTENT).hexdigest()


class Interrupted:
    """Real artifacts; the first `chunks` to be read stops after two pieces until it is told to go on."""

    def __init__(self, artifacts: Artifacts) -> None:
        self._artifacts = artifacts
        self.asked: list[int] = []
        self.stopped = asyncio.Event()
        self.damage = b""

    async def chunks(self, artifact_id: str, offset_bytes: int = 0) -> AsyncGenerator[ArtifactChunk, None]:
        self.asked.append(offset_bytes)
        first = len(self.asked) == 1
        async with aclosing(self._artifacts.chunks(artifact_id, offset_bytes)) as chunks:
            count = 0
            async for chunk in chunks:
                if first and count == 2:
                    self.stopped.set()
                    await asyncio.Event().wait()
                count += 1
                if self.damage:
                    chunk = ArtifactChunk("", "image/png", chunk.offset_bytes, self.damage, chunk.sha256)
                yield chunk


def _names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


async def keep(
    artifacts: Artifacts, content_type: str = "image/png", job: LiveJob | None = None, data: bytes = CONTENT
) -> Artifact:
    async with artifacts.collector(job or a_job()) as collector:
        await collector.take(ArtifactChunk("0", content_type, 0, data, size_bytes=len(data)))
    return collector.artifacts[0]


class TestGrpc:
    @pytest.fixture
    async def plane(self) -> AsyncIterator[ApiServer]:
        async with an_api_server() as found:
            yield found

    @pytest.fixture
    def stub(self, plane: ApiServer) -> InferenceServiceAsyncStub:
        return v1.InferenceServiceStub(plane.channel)

    async def chunks(
        self, stub: InferenceServiceAsyncStub, artifact_id: str, offset_bytes: int = 0
    ) -> list[ArtifactChunk]:
        request = v1.GetArtifactRequest(artifact_id=artifact_id, offset_bytes=offset_bytes)
        call = stub.GetArtifact(request)
        return [codec.artifact_chunk_from_proto(response.chunk) async for response in call]

    async def test_pieces_are_of_256_kib_and_the_last_has_the_hash(
        self, plane: ApiServer, stub: InferenceServiceAsyncStub
    ) -> None:
        made = await keep(plane.artifacts)
        chunks = await self.chunks(stub, made.id)

        assert b"".join(chunk.data for chunk in chunks) == CONTENT
        assert [chunk.length_bytes for chunk in chunks] == [PIECE_BYTES] * 4 + [3]
        assert [chunk.sha256 for chunk in chunks] == [""] * 4 + [SHA256]
        rest = await self.chunks(stub, made.id, len(CONTENT) - 2)
        assert [(chunk.data, chunk.offset_bytes) for chunk in rest] == [(b"nd", len(CONTENT) - 2)]

    async def test_what_cannot_be_is_refused(self, plane: ApiServer) -> None:
        made = await keep(plane.artifacts)
        async with AsyncClient(f"127.0.0.1:{plane.server.port}") as client:
            for artifact_id, offset, error in (
                ("artifact-0", 0, UnknownArtifactError),
                (made.id, -1, InvalidRequestError),
                (made.id, len(CONTENT) + 1, OutOfRangeError),
            ):
                request = v1.GetArtifactRequest(artifact_id=artifact_id, offset_bytes=offset)
                connection = client._connection
                with pytest.raises(error):
                    await anext(connection.stream(connection.stubs.inference.GetArtifact, request))

    async def test_logs_come_with_data_unless_it_is_not_wanted(self, plane: ApiServer) -> None:
        async with AsyncClient(f"127.0.0.1:{plane.server.port}") as client:
            await client.chat("hi", model="tiny").result()
            async for _ in client.watch_job("job-1"):
                pass
            async for _ in client.watch_job("job-1", artifact_data=False):
                pass

        assert plane.jobs.asked_data == [True, True, False]


class TestSdk:
    @pytest.fixture
    async def artifacts(self) -> AsyncIterator[Artifacts]:
        async with some_artifacts() as found:
            yield found

    @pytest.fixture
    async def served(self, artifacts: Artifacts) -> Interrupted:
        return Interrupted(artifacts)

    @pytest.fixture
    async def proxy(self, served: Interrupted) -> AsyncIterator[BreakableProxy]:
        async with AsyncExitStack() as stack:
            plane = await stack.enter_async_context(an_api_server(served_artifacts=served))
            relay = BreakableProxy(plane.server.port)
            await relay.start()
            yield relay
            await relay.stop()

    async def test_a_lost_connection_is_made_again_and_nothing_is_fetched_twice(
        self, artifacts: Artifacts, served: Interrupted, proxy: BreakableProxy
    ) -> None:
        made = await keep(artifacts)
        async with AsyncClient(proxy.address) as client:
            fetching = asyncio.create_task(client.get_artifact(made.id))
            await served.stopped.wait()
            proxy.cut()

            assert await fetching == CONTENT
        assert served.asked[0] == 0
        assert served.asked[-1] <= 2 * PIECE_BYTES

    async def test_a_file_is_there_once_it_is_whole_and_goes_on_where_it_stopped(
        self, artifacts: Artifacts, served: Interrupted, proxy: BreakableProxy, tmp_path: Path
    ) -> None:
        made = await keep(artifacts)
        part, target = tmp_path / f"{made.id}.part", tmp_path / "picture.png"
        async with AsyncClient(proxy.address, reconnect_s=0.0) as client:
            saving = asyncio.create_task(client.save_artifact(made.id, target))
            await served.stopped.wait()
            while _size(part) < 2 * PIECE_BYTES:  # noqa: ASYNC110 - a file tells nobody
                await asyncio.sleep(0)
            saving.cancel()
            with pytest.raises(asyncio.CancelledError):
                await saving
            assert _names(tmp_path) == [part.name]

            assert await client.save_artifact(made.id, target) == target

        assert target.read_bytes() == CONTENT
        assert _names(tmp_path) == ["picture.png"]
        assert served.asked == [0, 2 * PIECE_BYTES]

    async def test_into_a_folder_it_goes_under_a_name_of_its_kind(
        self, artifacts: Artifacts, served: Interrupted, proxy: BreakableProxy, tmp_path: Path
    ) -> None:
        made = await keep(artifacts, "model/gltf-binary", data=b"glTF")

        def save() -> Path:
            with rung.Client(proxy.address) as client:
                assert client.get_artifact(made.id) == b"glTF"
                return client.save_artifact(made.id, str(tmp_path))

        saved = await asyncio.to_thread(save)
        assert saved == tmp_path / f"model-{made.id.removeprefix('artifact-')}.glb"
        assert saved.read_bytes() == b"glTF"

    async def test_what_arrives_damaged_is_no_result(
        self, artifacts: Artifacts, served: Interrupted, proxy: BreakableProxy, tmp_path: Path
    ) -> None:
        made = await keep(artifacts, data=b"picture")
        served.damage = b"Picture"
        async with AsyncClient(proxy.address) as client:
            with pytest.raises(ArtifactDamagedError):
                await client.get_artifact(made.id)
            with pytest.raises(ArtifactDamagedError):
                await client.save_artifact(made.id, tmp_path / "picture.png")
        assert _names(tmp_path) == []

    async def test_a_part_of_something_else_is_dropped(
        self, artifacts: Artifacts, served: Interrupted, proxy: BreakableProxy, tmp_path: Path
    ) -> None:
        made = await keep(artifacts, data=b"picture")
        for error, there in ((OutOfRangeError, b"more than there is"), (ArtifactDamagedError, b"other")):
            (tmp_path / f"{made.id}.part").write_bytes(there)
            async with AsyncClient(proxy.address) as client:
                with pytest.raises(error):
                    await client.save_artifact(made.id, tmp_path / "picture.png")
            assert _names(tmp_path) == []

    async def test_what_there_is_not_leaves_no_file(self, proxy: BreakableProxy, tmp_path: Path) -> None:
        async with AsyncClient(proxy.address) as client:
            with pytest.raises(UnknownArtifactError):
                await client.save_artifact("artifact-0", tmp_path)
        proxy.refusing = True
        async with AsyncClient(proxy.address) as client:
            with pytest.raises(UnavailableError):
                await client.save_artifact("artifact-0", tmp_path)
        assert _names(tmp_path) == []


class TestHttp:
    @pytest.fixture
    async def plane(self) -> AsyncIterator[Plane]:
        async with a_plane() as found:
            yield found

    async def fetch(
        self, plane: Plane, artifact_id: str, method: str = "GET", **headers: str
    ) -> tuple[int, bytes, CIMultiDictProxy[str]]:
        url = f"{plane.url}/v1/artifacts/{artifact_id}"
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        async with plane.http.request(method, url, headers=named) as response:
            return response.status, await response.read(), response.headers

    async def test_an_artifact_is_served_whole(self, plane: Plane) -> None:
        made = await keep(plane.artifacts)
        status, body, headers = await self.fetch(plane, made.id)

        assert (status, body) == (200, CONTENT)
        name = f"image-{made.id.removeprefix('artifact-')}.png"
        assert headers["Content-Type"] == "image/png"
        assert headers["Content-Length"] == str(len(CONTENT))
        assert headers["Content-Disposition"] == f'inline; filename="{name}"'
        assert headers["ETag"] == f'"{SHA256}"'
        assert headers["Cache-Control"] == "private, max-age=31536000, immutable"
        assert headers["X-Content-Type-Options"] == "nosniff"
        assert headers["Content-Security-Policy"] == "sandbox; default-src 'none'"
        head = await self.fetch(plane, made.id, "HEAD")
        assert (head[0], head[1], head[2]["Content-Length"]) == (200, b"", str(len(CONTENT)))

    @pytest.mark.parametrize(
        ("wanted", "status", "body", "content_range"),
        [
            ("bytes=0-3", 206, b"0123", "bytes 0-3/10"),
            ("bytes=7-", 206, b"789", "bytes 7-9/10"),
            ("bytes=-4", 206, b"6789", "bytes 6-9/10"),
            ("bytes=-99", 206, b"0123456789", "bytes 0-9/10"),
            ("bytes=8-99", 206, b"89", "bytes 8-9/10"),
            ("bytes=10-", 416, b"", "bytes */10"),
            ("bytes=-0", 416, b"", "bytes */10"),
            ("bytes=3-1", 200, b"0123456789", None),
            ("bytes=0-1,3-4", 200, b"0123456789", None),
            ("bytes=-", 200, b"0123456789", None),
            ("pages=1-2", 200, b"0123456789", None),
        ],
    )
    async def test_ranges(
        self, plane: Plane, wanted: str, status: int, body: bytes, content_range: str | None
    ) -> None:
        made = await keep(plane.artifacts, data=b"0123456789")
        found, content, headers = await self.fetch(plane, made.id, Range=wanted)

        assert (found, content, headers.get("Content-Range")) == (status, body, content_range)
        assert (await self.fetch(plane, made.id, "HEAD", Range=wanted))[0] == status

    async def test_what_a_cache_has_is_not_sent_again(self, plane: Plane) -> None:
        made = await keep(plane.artifacts, data=b"0123456789")
        etag = f'"{made.sha256}"'
        for header in (etag, f'"x", W/{etag}', "*"):
            status, body, headers = await self.fetch(plane, made.id, If_None_Match=header)
            assert (status, body, headers["ETag"]) == (304, b"", etag)
        assert (await self.fetch(plane, made.id, If_None_Match='"x"'))[0] == 200
        half = {"Range": "bytes=5-"}
        assert (await self.fetch(plane, made.id, If_Range=etag, **half))[:2] == (206, b"56789")
        assert (await self.fetch(plane, made.id, If_Range='"x"', **half))[:2] == (200, b"0123456789")

    @pytest.mark.parametrize(
        ("content_type", "served", "disposition"),
        [
            ("text/html", "application/octet-stream", "attachment"),
            ("TEXT/HTML; charset=utf-8", "application/octet-stream", "attachment"),
            ("image/svg+xml", "application/octet-stream", "attachment"),
            ("image/png\r\nX-Evil: 1", "application/octet-stream", "attachment"),
            ("", "application/octet-stream", "attachment"),
            ("model/gltf-binary", "model/gltf-binary", "attachment"),
            ("audio/wav; rate=24000", "audio/wav", "inline"),
        ],
    )
    async def test_nothing_is_served_that_a_browser_would_run(
        self, plane: Plane, content_type: str, served: str, disposition: str
    ) -> None:
        made = await keep(plane.artifacts, content_type, data=b"<script>")
        _, _, headers = await self.fetch(plane, made.id)

        assert headers["Content-Type"] == served
        assert headers["Content-Disposition"].partition(";")[0] == disposition
        assert "X-Evil" not in headers

    async def test_what_there_is_not(self, plane: Plane) -> None:
        status, body, _ = await self.fetch(plane, "artifact-0")
        assert (status, json.loads(body)["error"]["code"]) == (404, "unknown_artifact")
        made = await keep(plane.artifacts)
        (plane.artifacts.directory / made.id).unlink()
        assert (await self.fetch(plane, made.id))[0] == 404

    async def test_an_answer_that_cannot_be_finished_is_broken_off(self, plane: Plane) -> None:
        made = await keep(plane.artifacts)
        (plane.artifacts.directory / made.id).write_bytes(CONTENT[:PIECE_BYTES])
        with pytest.raises(aiohttp.ClientPayloadError):
            await self.fetch(plane, made.id)

    async def test_a_job_lists_its_artifacts_and_its_log_has_their_urls(self, plane: Plane) -> None:
        job = plane.jobs.open(kind=JobKind.IMAGE, model="m", policy=Policy())
        made = await keep(plane.artifacts, job=job, data=b"picture")
        job.artifact(ArtifactChunk("x", "image/png", data=b"dim", length_bytes=3, preview=True))
        url = f"/v1/artifacts/{made.id}"

        async with plane.http.get(f"{plane.url}/v1/jobs/{job.id}/artifacts") as response:
            listed = await response.json()
        assert listed["data"] == [
            {
                "id": made.id,
                "job_id": job.id,
                "content_type": "image/png",
                "size_bytes": 7,
                "sha256": made.sha256,
                "create_time_s": 1_000_000.0,
                "seed": None,
                "url": url,
            }
        ]
        async with plane.http.get(f"{plane.url}/v1/jobs/none/artifacts") as response:
            assert response.status == 404

        job.append(JobDone("stop"))
        inline, plain = [await self.log(plane, job.id, query) for query in ("?data=inline", "")]
        assert [event.get("url") for event in plain if event["event"] == "artifact"] == [url, None]
        assert [event for event in plain if "data" in event] == []
        (piece,) = [event for event in inline if event.get("url")]
        assert base64.b64decode(str(piece["data"])) == b"picture"
        async with plane.http.get(f"{plane.url}/v1/jobs/{job.id}/events?data=all") as response:
            assert response.status == 400

    async def log(self, plane: Plane, job_id: str, query: str) -> list[dict[str, object]]:
        async with plane.http.get(f"{plane.url}/v1/jobs/{job_id}/events{query}") as response:
            return [json.loads(line) for line in (await response.text()).splitlines()]
