"""How long, and how much, of what jobs made is kept."""

from __future__ import annotations

from pydantic import Field

from controlplane.artifacts import DEFAULT_MAX_BYTES, DEFAULT_RETENTION_S
from rung.service import ByteSize, ConfigModel, DurationS


class ArtifactsConfig(ConfigModel):
    """Files that jobs made, under `artifacts` in the server's state directory."""

    retention_s: DurationS = Field(default=DEFAULT_RETENTION_S, gt=0, alias="retention")
    """They are deleted at this age; 7 days by default."""
    max_bytes: ByteSize = Field(default=DEFAULT_MAX_BYTES, ge=1024**2)
    """Of all together, and so of one, in bytes or such as `20GiB`; beyond it the oldest are deleted."""
