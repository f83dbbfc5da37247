"""Cloud model APIs as targets: keys, budgets, two dialects, one shape for callers."""

from controlplane.cloud._budget import Spending
from controlplane.cloud._drawing import CloudDrawing, sides_of
from controlplane.cloud._failure import CloudFailure, CloudFailureKind, classify_failure
from controlplane.cloud._images import CloudPictures
from controlplane.cloud._spend import CloudSpend, SpendStore
from controlplane.cloud._targets import CloudReply, CloudTargets
from controlplane.cloud._values import (
    CloudModel,
    CloudProvider,
    CloudUsage,
    Dialect,
    ModelPrices,
    Thinking,
)

__all__ = [
    "CloudDrawing",
    "CloudFailure",
    "CloudFailureKind",
    "CloudModel",
    "CloudPictures",
    "CloudProvider",
    "CloudReply",
    "CloudSpend",
    "CloudTargets",
    "CloudUsage",
    "Dialect",
    "ModelPrices",
    "SpendStore",
    "Spending",
    "Thinking",
    "classify_failure",
    "sides_of",
]
