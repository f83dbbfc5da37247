"""A Docker Engine's API with one container, for what a real one does not do when a test wants it."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from aiohttp import web

IMAGE = "engine:1"
CONTAINER_ID = "0123456789abcdef"


class DockerDaemon:
    """Listens on a unix socket. `on_call` sees every call, such as `start`, before it is answered."""

    def __init__(self, folder: Path) -> None:
        self.host = f"unix://{folder / 'docker.sock'}"
        #: Whether there is a container, what it carries, and whether it runs, as which process.
        self.labels: dict[str, str] | None = None
        self.running = False
        self.pid = 7
        #: What inspecting the container shows beside that.
        self.state: dict[str, Any] = {"ExitCode": 0, "StartedAt": "then"}
        #: Who reads its events now: `reading` is set while somebody does, `deserted` when nobody does any
        #: more, `inspected` each time that the container was looked at.
        self.readers: list[web.StreamResponse] = []
        self.reading = asyncio.Event()
        self.deserted = asyncio.Event()
        self.inspected = asyncio.Event()
        #: While it is not set, who asks for events waits.
        self.may_subscribe = asyncio.Event()
        self.may_subscribe.set()
        #: What it can not do.
        self.deaf_to_kill = False
        self.without_bridge = False
        self.calls: list[str] = []
        self.on_call: Callable[[str], None] = lambda call: None
        #: Whether the image is to be pulled first, which breaks off.
        self.without_image = False
        app = web.Application()
        versioned = "/{version:v[0-9.]+}"
        container = versioned + "/containers/{id}"
        app.router.add_get("/version", self._version)
        app.router.add_get("/{version:v[0-9.]+}/_ping", self._ping)
        app.router.add_get("/{version:v[0-9.]+}/networks", self._networks)
        app.router.add_get("/{version:v[0-9.]+}/events", self._events)
        app.router.add_get(versioned + "/images/{image}/json", self._image)
        app.router.add_post(versioned + "/images/create", self._break_off)
        app.router.add_post(versioned + "/containers/create", self._create)
        app.router.add_get(container + "/json", self._inspect)
        app.router.add_post(container + "/start", self._start)
        app.router.add_post(container + "/stop", self._stop)
        app.router.add_post(container + "/kill", self._stop)
        app.router.add_post(container + "/wait", self._wait)
        app.router.add_delete(container, self._remove)
        self._runner = web.AppRunner(app, handler_cancellation=True, access_log=None, shutdown_timeout=0.1)
        self._path = folder / "docker.sock"
        self._told: list[bytes] = []
        self._connections: list[asyncio.Transport] = []

    async def __aenter__(self) -> DockerDaemon:
        await self._runner.setup()
        await web.UnixSite(self._runner, str(self._path)).start()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._runner.cleanup()

    def _called(self, call: str) -> None:
        self.calls.append(call)
        self.on_call(call)

    def _require_container(self) -> None:
        if self.labels is None:
            raise web.HTTPNotFound(text='{"message": "No such container"}', content_type="application/json")

    async def _version(self, _: web.Request) -> web.Response:
        return web.json_response({"ApiVersion": "1.41", "Version": "20.10"})

    async def _ping(self, _: web.Request) -> web.Response:
        return web.Response(text="OK")

    async def _networks(self, _: web.Request) -> web.Response:
        return web.json_response([] if self.without_bridge else [{"Id": "1", "Driver": "bridge"}])

    async def tell(self, action: str, **attributes: str) -> None:
        """Tell an event of the container to all who read events."""
        event = {
            "Type": "container",
            "Action": action,
            "Actor": {"ID": CONTAINER_ID, "Attributes": attributes},
        }
        self._told.append(json.dumps(event).encode() + b"\n")
        for reader in self.readers:
            await reader.write(self._told[-1])

    def break_off(self) -> None:
        """End the streams of events."""
        for transport in self._connections:
            transport.close()
        self._connections.clear()

    async def _events(self, request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse()
        response.enable_chunked_encoding()
        await response.prepare(request)
        await self.may_subscribe.wait()
        for earlier in self._told if int(request.query.get("since", "0")) else ():
            await response.write(earlier)
        assert request.transport is not None
        self._connections.append(request.transport)
        self.calls.append("events")
        self.readers.append(response)
        self.reading.set()
        self.deserted.clear()
        try:
            await asyncio.Event().wait()
        finally:
            self.readers.remove(response)
            if not self.readers:
                self.reading.clear()
                self.deserted.set()
        return response

    async def _image(self, _: web.Request) -> web.Response:
        if self.without_image:
            raise web.HTTPNotFound(text='{"message": "No such image"}', content_type="application/json")
        return web.json_response({"Id": "sha256:1", "RepoTags": [IMAGE]})

    async def _break_off(self, request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse()
        response.enable_chunked_encoding()
        await response.prepare(request)
        await response.write(b'{"status": "Pulling from engine"}\r\n')
        assert request.transport is not None
        request.transport.close()
        return response

    async def _create(self, request: web.Request) -> web.Response:
        body: dict[str, Any] = await request.json()
        self.labels = body["Labels"]
        self._called("create")
        return web.json_response({"Id": CONTAINER_ID, "Warnings": []}, status=201)

    async def _inspect(self, _: web.Request) -> web.Response:
        self._require_container()
        ports = {} if self.without_bridge else {"8000/tcp": [{"HostIp": "127.0.0.1", "HostPort": "1"}]}
        status = "running" if self.running else "exited"
        state = {"Status": status, "Running": self.running, "Pid": self.pid, **self.state}
        self.inspected.set()
        return web.json_response(
            {
                "Id": CONTAINER_ID,
                "State": state,
                "Config": {"Labels": self.labels, "Tty": False},
                "NetworkSettings": {"Ports": ports},
            }
        )

    async def _start(self, _: web.Request) -> web.Response:
        self._require_container()
        self.running = True
        self._called("start")
        return web.Response(status=204)

    async def _stop(self, request: web.Request) -> web.Response:
        self._require_container()
        self._called(request.path.rpartition("/")[2])
        self.running = self.running and self.deaf_to_kill
        return web.Response(status=204)

    async def _wait(self, _: web.Request) -> web.Response:
        self._called("wait")
        if self.running:
            return web.json_response({"message": "it did not exit in time"}, status=500)
        return web.json_response({"StatusCode": 137})

    async def _remove(self, _: web.Request) -> web.Response:
        self._require_container()
        self._called("remove")
        self.labels, self.running = None, False
        return web.Response(status=204)
