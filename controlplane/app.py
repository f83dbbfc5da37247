"""Composition root of the control plane: wires everything, and runs until it is told to drain."""

from __future__ import annotations

import json
import os
import sys
import time
from contextlib import AsyncExitStack
from pathlib import Path

import structlog
import uvloop
from prometheus_client import (
    CollectorRegistry,
    GCCollector,
    PlatformCollector,
    ProcessCollector,
    disable_created_metrics,
)

from controlplane._stopping import StopSignals, drain_jobs
from controlplane.api import build_services
from controlplane.artifacts import Artifacts
from controlplane.cloud import CloudPictures, CloudSpend, CloudTargets
from controlplane.config import Config
from controlplane.estimates import EstimateKeeper, Estimates
from controlplane.fleet import DrainMarks, Fleet, MemoryAlerts, NodeSchedulers
from controlplane.gateway import Gateway
from controlplane.jobs import Jobs
from controlplane.pipelines import Pipelines, Slots
from controlplane.pipelines.image import Artist, ImagePipeline, Rooms
from controlplane.pipelines.mesh import ChainedPictures, MeshPipeline
from controlplane.pipelines.speech import VoicePipeline, VoiceSlots
from controlplane.profiles import Profiles
from controlplane.stages import load_stages
from controlplane.store import (
    ArtifactRows,
    CloudCalls,
    EstimateRows,
    FleetMarks,
    JobStore,
    ProfileStates,
)
from controlplane.workflows import Workflows
from rung.errors import RungError
from rung.service import (
    CallInterceptor,
    EngineClient,
    GrpcServer,
    ServerOptions,
    configure_logging,
    favour_event_loop,
)
from rung.types import JobKind

_log = structlog.get_logger("rung.controlplane")


def run(config: Config, file: Path | None = None) -> int:
    """Serve until SIGTERM or SIGINT; returns the exit code. What cannot start is said on stderr.

    Args:
        config: what to serve.
        file: where it was read from; None for what holds without a file.
    """
    configure_logging(level=config.server.log.level, form=config.server.log.form)
    # They double what is scraped, and say nothing that the start of the process does not.
    disable_created_metrics()  # type: ignore[no-untyped-call]  # the library has no types there
    try:
        uvloop.run(serve(config, file.absolute() if file is not None else None))
    except (RungError, OSError) as error:
        _say(f"error: {error}")
        return 1
    return 0


async def serve(config: Config, file: Path | None) -> None:
    """Start everything, wait for a signal, drain.

    Raises:
        RungError: something cannot start: a port that is not loopback, a store in use.
        OSError: a port is taken.
    """
    stop = StopSignals()
    server = config.server
    registry = CollectorRegistry()
    for collector in (GCCollector, PlatformCollector, ProcessCollector):
        collector(registry=registry)
    async with AsyncExitStack() as stack:
        store = await JobStore.open(server.state_dir / "rung.db")
        stack.push_async_callback(store.aclose)
        artifacts = Artifacts(
            server.state_dir / "artifacts",
            ArtifactRows(store),
            retention_s=config.artifacts.retention_s,
            max_bytes=config.artifacts.max_bytes,
        )
        await artifacts.start()
        stack.push_async_callback(artifacts.aclose)
        jobs = Jobs(store, retention_s=server.job_retention_s, artifacts=artifacts)
        await jobs.start()
        slots = Slots()
        marks = FleetMarks(store)
        # One replica so far: its start is its epoch, so that a later one always has the higher.
        fleet = Fleet(
            nodes=config.nodes,
            deployments=config.deployment_specs(),
            epoch=time.time_ns() // 1_000_000,
            load=slots.load,
            drained=slots.drained,
            # Without a host of our own, no engine's loopback is ours.
            own_host_id=None if server.direct_relay else "",
            drain_marks=DrainMarks(marks),
        )
        reserves = {node.id: node.reserve() for node in config.nodes}
        profiles = Profiles(
            fleet=fleet, store=ProfileStates(store), profiles=config.profile_values(), reserves=reserves
        )
        await profiles.start()
        alerts = MemoryAlerts(fleet)
        registry.register(alerts)
        schedulers = NodeSchedulers(
            fleet,
            idle_s=slots.idle_s,
            alert=alerts,
            reserves=reserves,
            max_grades=config.voice.max_grades(),
            own_grades=config.deployment_grades(),
            marks=marks,
        )
        fleet.make_awake = schedulers.make_awake
        client = EngineClient()
        stack.push_async_callback(client.aclose)
        keeper = EstimateKeeper(EstimateRows(store))
        await keeper.start([spec.id for spec in config.deployment_specs()])
        stack.push_async_callback(keeper.aclose)
        providers = config.cloud_providers()
        spend = await CloudSpend.open(providers, CloudCalls(store))
        stack.push_async_callback(spend.aclose)
        cloud = CloudTargets(providers, client, spend, registry) if providers else None
        workflows = config.images.workflows()
        for problem in workflows.problems:
            _log.warning("workflow_unusable", file=problem.file, problem=problem.what)
        pipelines = Pipelines(
            jobs=jobs,
            fleet=fleet,
            schedulers=schedulers,
            slots=slots,
            client=client,
            registry=registry,
            ladder=config.ladder.value() if config.ladder is not None else None,
            ask_judge=config.ladder is not None and config.ladder.classifier == "judge",
            cloud=cloud,
            engine_idle_timeout_s=server.engine_idle_timeout_s,
        )
        _add_generations(
            pipelines,
            config,
            fleet=fleet,
            slots=slots,
            schedulers=schedulers,
            jobs=jobs,
            artifacts=artifacts,
            workflows=workflows,
            estimates=keeper.estimates,
            cloud=CloudPictures(cloud, idle_timeout_s=server.engine_idle_timeout_s) if cloud else None,
        )
        services = build_services(fleet, schedulers, jobs, pipelines, profiles, artifacts, workflows)
        grpc_server = GrpcServer(
            ServerOptions(
                host=server.host, port=server.grpc_port, max_request_bytes=server.max_request_bytes
            ),
            services=services.descriptors,
            interceptors=[CallInterceptor(registry)],
            what="the gRPC API",
        )
        services.add_to(grpc_server.server)
        gateway = Gateway(
            host=server.host,
            port=server.http_port,
            max_request_bytes=server.max_request_bytes,
            fleet=fleet,
            jobs=jobs,
            pipelines=pipelines,
            artifacts=artifacts,
            workflows=workflows,
            registry=registry,
        )
        await gateway.start()
        stack.push_async_callback(gateway.aclose)
        await grpc_server.start()
        await fleet.start()
        schedulers.start()
        favour_event_loop()
        stack.push_async_callback(fleet.aclose)
        stack.push_async_callback(schedulers.aclose)
        stack.push_async_callback(profiles.aclose)
        stack.push_async_callback(pipelines.aclose)
        ready_file = server.state_dir / "controlplane.json"
        ready_file.write_text(
            json.dumps({"grpc_port": grpc_server.port, "http_port": gateway.port, "pid": os.getpid()})
        )
        stack.callback(ready_file.unlink, missing_ok=True)
        _log.info(
            "controlplane_ready",
            grpc_port=grpc_server.port,
            http_port=gateway.port,
            config=str(file or "none, all defaults"),
        )
        if not config.nodes and not config.cloud:
            _log.warning(
                "no_nodes",
                hint="nobody can answer: `rung config init` writes a configuration to start "
                "with, and `rung up` runs an agent on this machine, too",
            )
        await stop.first.wait()
        _log.info(
            "draining",
            jobs=jobs.running,
            grace_s=server.drain_s,
            hint="Ctrl-C or SIGTERM again ends it at once",
        )
        gateway.drain()
        await grpc_server.drain()
        await drain_jobs(jobs, server.drain_s, stop.second)
        await grpc_server.stop(1.0)
    _log.info("stopped")


def _add_generations(
    pipelines: Pipelines,
    config: Config,
    *,
    fleet: Fleet,
    slots: Slots,
    schedulers: NodeSchedulers,
    jobs: Jobs,
    artifacts: Artifacts,
    workflows: Workflows,
    estimates: Estimates,
    cloud: CloudPictures | None,
) -> None:
    """Add what makes something else than text: speech, pictures, meshes."""
    idle_timeout_s = config.server.engine_idle_timeout_s
    voice = VoicePipeline(
        fleet=fleet,
        engager=pipelines.engager,
        artifacts=artifacts,
        estimates=estimates,
        voice_slots=VoiceSlots(config.voice.slots, config.voice.nodes),
        idle_timeout_s=idle_timeout_s,
    )
    pipelines.add(voice, JobKind.SPEECH, JobKind.TRANSCRIPTION)
    artist = Artist(
        fleet=fleet,
        slots=slots,
        engager=pipelines.engager,
        rooms=Rooms(fleet, schedulers, estimates),
        artifacts=artifacts,
        estimates=estimates,
        cloud=cloud,
        idle_timeout_s=idle_timeout_s,
    )
    images = ImagePipeline(
        router=pipelines.router,
        engager=pipelines.engager,
        artist=artist,
        workflows=workflows,
        tiers=config.images.tier_values(),
        stages=load_stages(config.safety.value(), config.prompt_enhancement.value(), pipelines.ask),
    )
    pipelines.add(images, JobKind.IMAGE, JobKind.VIDEO)
    meshes = MeshPipeline(
        fleet=fleet,
        engager=pipelines.engager,
        pictures=ChainedPictures(pipelines.start, jobs, artifacts),
        artifacts=artifacts,
        estimates=estimates,
        idle_timeout_s=idle_timeout_s,
    )
    pipelines.add(meshes, JobKind.MESH)


def _say(text: str) -> None:
    sys.stderr.write(text + "\n")
