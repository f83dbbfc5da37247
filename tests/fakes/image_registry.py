"""A registry with one image, whose only layer comes half at once, and whole when a test wants it.

Until then it drips: Docker leaves a download that was called off with the next byte of it.
"""

from __future__ import annotations

import asyncio
import gzip
import hashlib
import io
import json
import os
import platform
import tarfile
from contextlib import suppress

from aiohttp import web

_MANIFEST = "application/vnd.docker.distribution.manifest.v2+json"
_CONFIG = "application/vnd.docker.container.image.v1+json"
_LAYER = "application/vnd.docker.image.rootfs.diff.tar.gzip"
#: Docker tells of a download every half a megabyte.
_FILE_BYTES = 4 * 1024 * 1024
_DRIP_INTERVAL_S = 0.02
_ARCHITECTURES = {"x86_64": "amd64", "aarch64": "arm64"}


class ImageRegistry:
    """On loopback, where Docker asks for no TLS. `image` is what to pull."""

    def __init__(self) -> None:
        self.image = ""
        #: Its client has left in the middle of the layer.
        self.broken_off = asyncio.Event()
        self.release = asyncio.Event()
        layer = _layer()
        self._layer = gzip.compress(layer, compresslevel=0)
        self._config = json.dumps(
            {
                "architecture": _ARCHITECTURES.get(platform.machine(), platform.machine()),
                "os": "linux",
                "config": {},
                "rootfs": {"type": "layers", "diff_ids": [_digest(layer)]},
            }
        ).encode()
        self._manifest = json.dumps(
            {
                "schemaVersion": 2,
                "mediaType": _MANIFEST,
                "config": _described(_CONFIG, self._config),
                "layers": [_described(_LAYER, self._layer)],
            }
        ).encode()
        app = web.Application()
        app.router.add_get("/v2/", self._hello)
        app.router.add_get("/v2/engine/manifests/{reference}", self._get_manifest)
        app.router.add_get("/v2/engine/blobs/{digest}", self._get_blob)
        self._runner = web.AppRunner(app, handler_cancellation=True, access_log=None, shutdown_timeout=0.1)

    async def __aenter__(self) -> ImageRegistry:
        await self._runner.setup()
        await web.TCPSite(self._runner, "127.0.0.1", 0).start()
        self.image = f"127.0.0.1:{self._runner.addresses[0][1]}/engine:1"
        return self

    async def __aexit__(self, *_: object) -> None:
        self.release.set()
        await self._runner.cleanup()

    async def _hello(self, _: web.Request) -> web.Response:
        return web.json_response({}, headers={"Docker-Distribution-Api-Version": "registry/2.0"})

    async def _get_manifest(self, request: web.Request) -> web.Response:
        if request.match_info["reference"] not in ("1", _digest(self._manifest)):
            error = {"code": "MANIFEST_UNKNOWN", "message": "manifest unknown"}
            return web.json_response({"errors": [error]}, status=404)
        headers = {"Docker-Content-Digest": _digest(self._manifest)}
        return web.Response(body=self._manifest, content_type=_MANIFEST, headers=headers)

    async def _get_blob(self, request: web.Request) -> web.StreamResponse:
        if request.match_info["digest"] == _digest(self._config):
            return web.Response(body=self._config)
        response = web.StreamResponse(headers={"Content-Length": str(len(self._layer))})
        await response.prepare(request)
        if request.method == "GET":
            sent = len(self._layer) // 2
            try:
                await response.write(self._layer[:sent])
                while not await self._released():
                    await response.write(self._layer[sent : sent + 1])
                    sent += 1
                await response.write(self._layer[sent:])
            except asyncio.CancelledError:
                self.broken_off.set()
                raise
        return response

    async def _released(self) -> bool:
        with suppress(TimeoutError):
            async with asyncio.timeout(_DRIP_INTERVAL_S):
                return await self.release.wait()
        return False


def _layer() -> bytes:
    """Empty folders, and a file that is another one each time: no daemon has it already."""
    archive = io.BytesIO()
    with tarfile.open(fileobj=archive, mode="w") as tar:
        for folder in ("tmp", "etc", "proc", "dev", "sys"):
            entry = tarfile.TarInfo(folder)
            entry.type, entry.mode = tarfile.DIRTYPE, 0o755
            tar.addfile(entry)
        entry = tarfile.TarInfo("weights")
        entry.size = _FILE_BYTES
        tar.addfile(entry, io.BytesIO(os.urandom(_FILE_BYTES)))
    return archive.getvalue()


def _digest(data: bytes) -> str:
    return f"sha256:{hashlib.sha256(data).hexdigest()}"


def _described(media_type: str, data: bytes) -> dict[str, object]:
    return {"mediaType": media_type, "size": len(data), "digest": _digest(data)}
