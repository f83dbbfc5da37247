"""The gRPC face of the control plane: decode, call, encode."""

from controlplane.api._policy import ACCESS, Access
from controlplane.api._ports import JobsPort, PipelinesPort
from controlplane.api._services import SERVICE_NAMES, Services, build_services
from controlplane.api._wish import wish_from_embed, wish_from_generate

__all__ = [
    "ACCESS",
    "SERVICE_NAMES",
    "Access",
    "JobsPort",
    "PipelinesPort",
    "Services",
    "build_services",
    "wish_from_embed",
    "wish_from_generate",
]
