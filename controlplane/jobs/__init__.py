"""Jobs: one generation each, an append-only log of events, and any number of subscribers."""

from controlplane.jobs._jobs import (
    HEARTBEAT_S,
    SEQUENCE_JUMP_AFTER_CRASH,
    STORE_INTERVAL_S,
    TEXT_INTERVAL_S,
    Jobs,
    KeptArtifacts,
    Store,
)
from controlplane.jobs._live import LiveJob

__all__ = [
    "HEARTBEAT_S",
    "SEQUENCE_JUMP_AFTER_CRASH",
    "STORE_INTERVAL_S",
    "TEXT_INTERVAL_S",
    "Jobs",
    "KeptArtifacts",
    "LiveJob",
    "Store",
]
