"""Artifacts: the files that jobs make, kept for a while and fetched from any place."""

from controlplane.artifacts._artifacts import (
    DEFAULT_MAX_BYTES,
    DEFAULT_RETENTION_S,
    Artifacts,
    Rows,
)
from controlplane.artifacts._collector import PIECE_BYTES, Collector
from rung.types import Artifact

__all__ = [
    "DEFAULT_MAX_BYTES",
    "DEFAULT_RETENTION_S",
    "PIECE_BYTES",
    "Artifact",
    "Artifacts",
    "Collector",
    "Rows",
]
