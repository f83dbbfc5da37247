"""How long things take here: learnt from this fleet's own history, and stated only where it is known."""

from controlplane.estimates._estimates import (
    KEPT_OBSERVATIONS,
    Estimate,
    Estimates,
    Key,
    Observations,
    relative_error,
)

__all__ = ["KEPT_OBSERVATIONS", "Estimate", "Estimates", "Key", "Observations", "relative_error"]
