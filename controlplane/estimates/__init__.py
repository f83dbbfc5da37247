"""How long things take here: learnt from this fleet's own history, and stated only where it is known."""

from controlplane.estimates._estimates import (
    KEPT_OBSERVATIONS,
    Estimate,
    Estimates,
    Key,
    Observations,
    relative_error,
)
from controlplane.estimates._keeper import WRITE_EVERY_S, EstimateKeeper, EstimateStore

__all__ = [
    "KEPT_OBSERVATIONS",
    "WRITE_EVERY_S",
    "Estimate",
    "EstimateKeeper",
    "EstimateStore",
    "Estimates",
    "Key",
    "Observations",
    "relative_error",
]
