"""The HTTP gateway over real jobs, pipelines and connections, with a fleet and an engine of a test's own."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

import aiohttp
import openai
from prometheus_client import CollectorRegistry

from controlplane.artifacts import Artifacts
from controlplane.fleet import NodeSchedulers, log_alert
from controlplane.gateway import Gateway
from controlplane.jobs import Jobs
from controlplane.ladder import Ladder
from controlplane.pipelines import Cloud, Pipelines, Slots
from controlplane.workflows import Workflows
from rung.service import EngineClient
from rung.types import Job
from tests.fakes.artifacts import some_artifacts
from tests.fakes.engine_server import EngineServer
from tests.fakes.fleet_view import FakeFleet, deployment_view
from tests.fakes.store import MemoryStore


@dataclass
class Plane:
    url: str
    fleet: FakeFleet
    jobs: Jobs
    pipelines: Pipelines
    artifacts: Artifacts
    slots: Slots
    engine: EngineServer
    gateway: Gateway
    http: aiohttp.ClientSession

    async def post(self, path: str, body: object, **headers: str) -> tuple[int, dict[str, Any], Any]:
        async with self.http.post(self.url + path, json=body, headers=headers) as response:
            return response.status, await response.json(), response.headers

    async def ended(self, job_id: str) -> Job:
        async for _ in self.jobs.watch(job_id):
            pass
        return await self.jobs.get(job_id)

    @property
    def openai(self) -> openai.AsyncOpenAI:
        return openai.AsyncOpenAI(base_url=f"{self.url}/v1", api_key="none", max_retries=0)


@asynccontextmanager
async def a_plane(
    *,
    ladder: Ladder | None = None,
    cloud: Cloud | None = None,
    ask_judge: bool = False,
    max_request_bytes: int = 64 * 1024,
) -> AsyncIterator[Plane]:
    """A gateway with one deployment, `tiny-1` of the model `tiny`, served by the plane's engine."""
    async with (
        EngineServer() as engine,
        aiohttp.ClientSession() as http,
        some_artifacts() as artifacts,
    ):
        fleet = FakeFleet(deployment_view("tiny-1", engine.url))
        jobs, slots, client = Jobs(MemoryStore(), artifacts=artifacts), Slots(), EngineClient()
        await jobs.start()
        registry = CollectorRegistry()
        schedulers = NodeSchedulers(fleet, idle_s=slots.idle_s, alert=log_alert)
        pipelines = Pipelines(
            jobs=jobs,
            fleet=fleet,
            schedulers=schedulers,
            slots=slots,
            client=client,
            registry=registry,
            ladder=ladder,
            ask_judge=ask_judge,
            cloud=cloud,
            engine_idle_timeout_s=0.3,
        )
        gateway = Gateway(
            host="127.0.0.1",
            port=0,
            max_request_bytes=max_request_bytes,
            fleet=fleet,
            jobs=jobs,
            pipelines=pipelines,
            artifacts=artifacts,
            workflows=Workflows(),
            registry=registry,
        )
        await gateway.start()
        yield Plane(
            f"http://127.0.0.1:{gateway.port}",
            fleet,
            jobs,
            pipelines,
            artifacts,
            slots,
            engine,
            gateway,
            http,
        )
        await jobs.drain(0.0)
        await pipelines.aclose()
        await gateway.aclose()
        await client.aclose()
