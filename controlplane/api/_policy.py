"""Who may call what: one table. It takes effect when callers have identities.

`read` shows things, `generate` uses engines, `operate` changes the fleet or spends money. A method
that is missing here is denied.
"""

from __future__ import annotations

from typing import Literal, TypeAlias

Access: TypeAlias = Literal["read", "generate", "operate"]

_BY_SERVICE: dict[str, dict[Access, tuple[str, ...]]] = {
    "InferenceService": {
        "read": (
            "GetJob",
            "ListJobs",
            "WatchJob",
            "ListModels",
            "ListWorkflows",
            "ExplainRoute",
            "GetArtifact",
        ),
        "generate": ("Generate", "CreateJob", "CancelJob", "Embed", "Predict"),
    },
    "FleetService": {
        "read": ("ListNodes", "GetNode", "ListDeployments", "GetDeployment", "WatchFleet", "ListProfiles"),
        "operate": (
            "DrainNode",
            "ResumeNode",
            "DeleteNode",
            "CreateJoinToken",
            "JoinNode",
            "StartDeployment",
            "StopDeployment",
            "SleepDeployment",
            "WakeDeployment",
            "FreeDeployment",
            "SwitchProfile",
        ),
    },
    "VramService": {
        "read": ("ListLeases", "PlanReclaim", "EstimateFootprint"),
        "operate": ("AcquireLease", "RenewLease", "ReleaseLease"),
    },
    "BurstService": {
        "read": ("ListBurstProfiles", "ListOffers", "ListInstances", "GetBudget"),
        "operate": ("CreateInstance", "DestroyInstance"),
    },
}

#: Access that each method needs, by its full name such as `/rung.v1.FleetService/ListNodes`.
ACCESS: dict[str, Access] = {
    f"/rung.v1.{service}/{method}": access
    for service, by_access in _BY_SERVICE.items()
    for access, methods in by_access.items()
    for method in methods
}
