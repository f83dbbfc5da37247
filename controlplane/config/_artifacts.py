"""How long, and how much, of what jobs made is kept."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, Field

from controlplane.artifacts import DEFAULT_MAX_BYTES, DEFAULT_RETENTION_S
from rung.service import ByteSize, DurationS


class ArtifactsConfig(BaseModel):
    """Files that jobs made, under `artifacts` in the server's state directory."""

    model_config = ConfigDict(extra="forbid", frozen=True, validate_by_name=True, validate_by_alias=True)

    retention_s: DurationS = Field(
        default=DEFAULT_RETENTION_S, gt=0, alias="retention", description="They are deleted at this age."
    )
    max_bytes: ByteSize = Field(
        default=DEFAULT_MAX_BYTES,
        ge=1024**2,
        description="Of all together, and so of one; beyond it the oldest are deleted.",
    )
