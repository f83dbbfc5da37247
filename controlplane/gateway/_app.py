"""The HTTP side of the control plane."""

from __future__ import annotations

import ipaddress
import time
from collections.abc import Awaitable, Callable

import structlog
from aiohttp import web
from prometheus_client import CollectorRegistry
from prometheus_client.exposition import choose_encoder

from controlplane.artifacts import Artifacts
from controlplane.fleet import Fleet
from controlplane.gateway._artifacts import ArtifactRoutes
from controlplane.gateway._audio import AudioRoutes
from controlplane.gateway._errors import error_response
from controlplane.gateway._generate_stream import GenerateStreamRoutes
from controlplane.gateway._generations import Follower
from controlplane.gateway._images import ImageRoutes
from controlplane.gateway._jobs import JobRoutes
from controlplane.gateway._listen import listen
from controlplane.gateway._meshes import MeshRoutes
from controlplane.gateway._metrics import RequestMetrics
from controlplane.gateway._openai import OpenAiRoutes
from controlplane.gateway._predictions import PredictionRoutes
from controlplane.gateway._workflows import WorkflowRoutes
from controlplane.jobs import Jobs
from controlplane.pipelines import Pipelines
from controlplane.workflows import Workflows
from rung.errors import (
    InvalidRequestError,
    NotAllowedError,
    NotFoundError,
    RequestTooLargeError,
    RungError,
)
from rung.service import cannot_listen, require_loopback

_log = structlog.get_logger("rung.http")

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]

_MIB = 1024 * 1024
#: What nginx writes down for a caller that has gone; it is sent to nobody.
_CALLER_HAS_GONE = 499


class Gateway:
    """The HTTP server: OpenAI routes, jobs, health and metrics."""

    def __init__(
        self,
        *,
        host: str,
        port: int,
        max_request_bytes: int,
        fleet: Fleet,
        jobs: Jobs,
        pipelines: Pipelines,
        artifacts: Artifacts,
        workflows: Workflows,
        registry: CollectorRegistry,
    ) -> None:
        require_loopback(host, "the HTTP gateway")
        self._host = host
        self._wanted_port = port
        self._registry = registry
        self._requests = RequestMetrics(registry)
        self._draining = False
        self._max_request_bytes = max_request_bytes
        app = web.Application(client_max_size=max_request_bytes, middlewares=[self._counted])
        openai = OpenAiRoutes(pipelines)
        job_routes = JobRoutes(jobs, pipelines)
        artifact_routes = ArtifactRoutes(artifacts, jobs)
        follower = Follower(jobs, pipelines)
        image_routes = ImageRoutes(follower, artifacts)
        audio_routes = AudioRoutes(follower, artifacts, fleet)
        app.add_routes(
            [
                web.post("/v1/chat/completions", openai.chat),
                web.post("/v1/embeddings", openai.embeddings),
                web.post("/v1/predictions", PredictionRoutes(pipelines).create),
                web.post("/v1/images/generations", image_routes.generations),
                web.post("/v1/images/edits", image_routes.edits),
                web.post("/v1/images/variations", image_routes.variations),
                web.post("/v1/meshes", MeshRoutes(follower, artifacts).create),
                web.post("/generate/stream", GenerateStreamRoutes(follower, artifacts).stream),
                web.post("/v1/audio/speech", audio_routes.speech),
                web.post("/v1/audio/transcriptions", audio_routes.transcriptions),
                web.post("/v1/audio/translations", audio_routes.translations),
                web.get("/v1/audio/voices", audio_routes.voices),
                web.get("/v1/models", openai.models),
                web.get("/v1/models/{model:.+}", openai.model),
                web.post("/v1/jobs", job_routes.create),
                web.get("/v1/jobs", job_routes.index),
                web.get("/v1/jobs/{id}", job_routes.show),
                web.post("/v1/jobs/{id}/cancel", job_routes.cancel),
                web.get("/v1/jobs/{id}/events", job_routes.events),
                web.get("/v1/jobs/{id}/artifacts", artifact_routes.of_job),
                web.get("/v1/artifacts/{id}", artifact_routes.fetch),
                web.get("/v1/workflows", WorkflowRoutes(workflows).index),
                web.get("/healthz", self._health),
                web.get("/readyz", self._ready),
                web.get("/metrics", self._metrics),
            ]
        )
        # A caller that goes away cancels its handler, and with it the generation in the engine.
        self._runner = web.AppRunner(app, handler_cancellation=True, access_log=None, keepalive_timeout=75.0)
        self.port = 0

    async def start(self) -> None:
        """Bind and serve; `port` is then the bound one. Raises OSError if the port is taken."""
        await self._runner.setup()
        try:
            self.port = await listen(self._runner, self._host, self._wanted_port)
        except OSError as error:
            raise cannot_listen("the HTTP gateway", self._host, self._wanted_port, error) from error

    def drain(self) -> None:
        """Report not ready, so that a balancer sends nothing more."""
        self._draining = True

    async def aclose(self) -> None:
        """Close the port and what is still connected."""
        await self._runner.shutdown()
        await self._runner.cleanup()

    @web.middleware
    async def _counted(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        """Count a request once it has been answered, to its last byte."""
        started = time.monotonic()
        # Unless it is answered: whoever goes away cancels its handler.
        status = _CALLER_HAS_GONE
        try:
            response = await self._guard(request, handler)
            status = response.status
        except web.HTTPException as refused:
            status = refused.status
            raise
        finally:
            self._requests.record(request, status, time.monotonic() - started)
        return response

    async def _guard(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        """Turn errors into OpenAI's shape, and refuse what a foreign web page could make a browser send."""
        try:
            _require_own_host(request)
            return await handler(request)
        except RungError as error:
            return error_response(error)
        except web.HTTPRequestEntityTooLarge:
            limit = f"{self._max_request_bytes / _MIB:g} MiB"
            return error_response(
                RequestTooLargeError(
                    f"the request is larger than {limit}; server.max_request_bytes sets the limit",
                    limit_bytes=str(self._max_request_bytes),
                )
            )
        except web.HTTPNotFound:
            return error_response(NotFoundError(f"there is nothing at {request.method} {request.path}"))
        except web.HTTPMethodNotAllowed as refused:
            allowed = ", ".join(sorted(refused.allowed_methods))
            response = error_response(InvalidRequestError(f"{request.path} takes {allowed}"))
            response.set_status(405)
            response.headers["Allow"] = allowed
            return response
        except ConnectionError:
            # The caller has gone, which was noticed by writing to it: nobody reads what is returned.
            if request.transport is not None:
                request.transport.abort()
            return web.Response(status=_CALLER_HAS_GONE)
        except web.HTTPException:
            raise
        except Exception as error:  # noqa: BLE001 - the boundary: whatever it is becomes a status
            _log.error("http_defect", path=request.path, exc_info=error)
            return error_response(RungError("internal error; the server's log has the details"))

    async def _health(self, _request: web.Request) -> web.StreamResponse:
        return web.json_response({"status": "ok"})

    async def _ready(self, _request: web.Request) -> web.StreamResponse:
        if self._draining:
            return web.json_response({"status": "draining"}, status=503)
        return web.json_response({"status": "ready"})

    async def _metrics(self, request: web.Request) -> web.StreamResponse:
        encode, content_type = choose_encoder(request.headers.get("Accept", ""))
        return web.Response(body=encode(self._registry), headers={"Content-Type": content_type})


def _require_own_host(request: web.Request) -> None:
    """Refuse a Host that is not loopback: a page whose name was rebound to 127.0.0.1 sends its own name.

    Raises:
        NotAllowedError: the host is another one, or the request comes from a foreign page.
    """
    host = request.host
    if host in _OWN_HOSTS or _is_loopback(host):
        origin = request.headers.get("Origin")
        if origin is None or _is_loopback(origin.partition("://")[2]):
            return
        raise NotAllowedError(f"requests from the web page {origin} are not taken", origin=origin)
    raise NotAllowedError(f"this server does not go by the name {host}; use 127.0.0.1", host=host)


_OWN_HOSTS: set[str] = set()


def _is_loopback(host_and_port: str) -> bool:
    host, colon, port = host_and_port.rpartition(":")
    name = host if colon and port.isdigit() else host_and_port
    name = name.strip("[]")
    if name == "localhost":
        own = True
    else:
        try:
            own = ipaddress.ip_address(name).is_loopback
        except ValueError:
            own = False
    if own and len(_OWN_HOSTS) < 64:
        # Parsing an address costs more than the rest of this check; callers use few names.
        _OWN_HOSTS.add(host_and_port)
    return own
