"""The gRPC face of a control plane on a real server, with the production interceptor."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass

import grpc.aio
from prometheus_client import CollectorRegistry

from controlplane.api import build_services
from controlplane.api._ports import ArtifactsPort
from controlplane.artifacts import Artifacts
from controlplane.fleet import Fleet, MemoryAlerts, NodeSchedulers
from controlplane.profiles import Profiles
from controlplane.workflows import Workflows
from rung.service import CallInterceptor, GrpcServer, ServerOptions
from rung.transport import ChannelOptions, open_channel
from rung.types import DeploymentSpec, NodeOwnership, Profile, ReclaimGrade
from tests.fakes.agent_server import ScriptedAgent
from tests.fakes.artifacts import some_artifacts
from tests.fakes.jobs import FakeJobs, FakePipelines
from tests.fakes.store import MemoryProfileStore


@dataclass(frozen=True)
class ANode:
    id: str
    address: str
    ownership: NodeOwnership = NodeOwnership.OWNED


@dataclass
class ApiServer:
    fleet: Fleet
    jobs: FakeJobs
    pipelines: FakePipelines
    load: dict[str, tuple[int, int]]
    server: GrpcServer
    channel: grpc.aio.Channel
    profiles: Profiles
    artifacts: Artifacts


@asynccontextmanager
async def an_api_server(
    agents: Sequence[ScriptedAgent] = (),
    deployments: Sequence[DeploymentSpec] = (),
    *,
    max_request_bytes: int = 1024 * 1024,
    profiles: Sequence[Profile] = (),
    profile_store: MemoryProfileStore | None = None,
    served_artifacts: ArtifactsPort | None = None,
    own_grades: Mapping[str, ReclaimGrade] | None = None,
) -> AsyncIterator[ApiServer]:
    load: dict[str, tuple[int, int]] = {}
    fleet = Fleet(
        nodes=[ANode(agent.node_id, agent.address) for agent in agents],
        deployments=deployments,
        epoch=1,
        load=lambda deployment_id: load.get(deployment_id, (0, 0)),
        own_host_id="host-1",
    )
    jobs = FakeJobs()
    pipelines = FakePipelines(jobs)
    schedulers = NodeSchedulers(
        fleet, idle_s=lambda _: 60.0, alert=MemoryAlerts(fleet), own_grades=own_grades or {}
    )
    fleet.make_awake = schedulers.make_awake
    all_profiles = Profiles(fleet=fleet, store=profile_store or MemoryProfileStore(), profiles=profiles)
    await all_profiles.start()
    stack = AsyncExitStack()
    artifacts = await stack.enter_async_context(some_artifacts())
    services = build_services(
        fleet, schedulers, jobs, pipelines, all_profiles, served_artifacts or artifacts, Workflows()
    )
    server = GrpcServer(
        ServerOptions(port=0, max_request_bytes=max_request_bytes),
        services=services.descriptors,
        interceptors=[CallInterceptor(CollectorRegistry())],
        what="the test",
    )
    services.add_to(server.server)
    await server.start()
    await fleet.start()
    schedulers.start()
    channel = open_channel(ChannelOptions(address=f"127.0.0.1:{server.port}"))
    try:
        yield ApiServer(fleet, jobs, pipelines, load, server, channel, all_profiles, artifacts)
    finally:
        await channel.close()
        await server.stop(0)
        await all_profiles.aclose()
        await schedulers.aclose()
        await fleet.aclose()
        await stack.aclose()
