"""Tables and migrations: what survives a restart."""

from controlplane.store._artifacts import ArtifactRows
from controlplane.store._cloud_calls import CloudCalls
from controlplane.store._estimates import EstimateRows
from controlplane.store._fleet_marks import FleetMarks
from controlplane.store._profiles import ProfileState, ProfileStates
from controlplane.store._store import JobStore, StoredSegment, migrate

__all__ = [
    "ArtifactRows",
    "CloudCalls",
    "EstimateRows",
    "FleetMarks",
    "JobStore",
    "ProfileState",
    "ProfileStates",
    "StoredSegment",
    "migrate",
]
