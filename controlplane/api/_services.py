"""The services of the control plane, put on a gRPC server."""

from __future__ import annotations

from dataclasses import dataclass

import grpc.aio
from google.protobuf.descriptor import ServiceDescriptor
from google.protobuf.descriptor_pool import Default

from controlplane.api._fleet import FleetServicer
from controlplane.api._inference import InferenceServicer
from controlplane.api._ports import ArtifactsPort, JobsPort, PipelinesPort, WorkflowsPort
from controlplane.api._vram import VramServicer
from controlplane.fleet import Fleet, NodeSchedulers
from controlplane.profiles import Profiles
from rung.service import add_service

#: Full names of the services that the control plane has.
SERVICE_NAMES = (
    "rung.v1.InferenceService",
    "rung.v1.FleetService",
    "rung.v1.VramService",
    "rung.v1.BurstService",
)


@dataclass(frozen=True)
class Services:
    """Servicers by the descriptors of their services."""

    servicers: tuple[tuple[ServiceDescriptor, object], ...]

    @property
    def descriptors(self) -> tuple[ServiceDescriptor, ...]:
        """For `GrpcServer`: health and reflection tell of these."""
        return tuple(descriptor for descriptor, _ in self.servicers)

    def add_to(self, server: grpc.aio.Server) -> None:
        """Register all; before the server starts."""
        for descriptor, servicer in self.servicers:
            add_service(server, descriptor, servicer)


def build_services(
    fleet: Fleet,
    schedulers: NodeSchedulers,
    jobs: JobsPort,
    pipelines: PipelinesPort,
    profiles: Profiles,
    artifacts: ArtifactsPort,
    workflows: WorkflowsPort,
) -> Services:
    """All services of the control plane."""
    servicers: dict[str, object] = {
        "rung.v1.InferenceService": InferenceServicer(jobs, pipelines, artifacts, workflows),
        "rung.v1.FleetService": FleetServicer(fleet, profiles),
        "rung.v1.VramService": VramServicer(fleet, schedulers),
    }
    pool = Default()
    return Services(
        tuple((pool.FindServiceByName(name), servicers.get(name, object())) for name in SERVICE_NAMES)
    )
