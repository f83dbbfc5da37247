"""Pictures: which model draws in which tier, and users' own workflows."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Self

from msgspec.structs import replace
from pydantic import Field, StringConstraints, model_validator

from controlplane.workflows import DEFAULT_TIERS, Tier, Workflows
from rung import types
from rung.service import ByteSize, ConfigModel, FieldError

_Name = Annotated[str, StringConstraints(pattern=r"^[a-z0-9][a-z0-9._-]{0,62}$")]
_NEEDED = {"checkpoint": "checkpoint", "family": "family", "vram_bytes": "vram"}


class OperationConfig(ConfigModel):
    """What is different for an operation: what is left out is the tier's."""

    checkpoint: str | None = None
    """File of the model, by its name in ComfyUI."""
    family: str | None = None
    """sdxl, flux, …: between families ComfyUI is freed before it loads."""
    steps: int | None = Field(default=None, ge=1, le=150)
    """Steps of sampling."""
    cfg: float | None = Field(default=None, ge=0, le=30)
    """How strictly the prompt is followed; 1 computes no negative prompt."""
    guidance: float | None = Field(default=None, ge=0, le=100)
    """In place of cfg, of Flux."""
    sampler: str | None = Field(default=None, min_length=1)
    """By its name in ComfyUI."""
    scheduler: str | None = Field(default=None, min_length=1)
    """By its name in ComfyUI."""
    width_pixels: int | None = Field(default=None, ge=64, le=4096, multiple_of=8)
    """Width of a picture where a request names none; a multiple of 8."""
    height_pixels: int | None = Field(default=None, ge=64, le=4096, multiple_of=8)
    """Height of a picture where a request names none; a multiple of 8."""
    vram_bytes: ByteSize | None = Field(default=None, gt=0, alias="vram")
    """GPU memory that is leased to draw, in bytes or such as `12GiB`."""
    grade: types.ReclaimGrade | None = None
    """How much others may be disturbed for it, at most."""
    models: dict[str, str] = Field(default={})
    """Further files: controlnet, upscale_model, motion_model, text_encoder; empty for none."""
    upscale_factor: float | None = Field(default=None, ge=1, le=16)
    """How many times as large upscale_model makes a picture."""

    def changes(self) -> dict[str, Any]:
        """What is set, by the attributes of `Tier`."""
        names = OperationConfig.model_fields.keys() & self.model_fields_set
        return {name: value for name in sorted(names) if (value := getattr(self, name)) is not None}


class TierConfig(OperationConfig):
    """A tier: one of lightning, quality and ultra, where what is left out stays as it is, or one more."""

    operations: dict[_Name, OperationConfig] = Field(default={})
    """What is different for inpaint, video, …, or a workflow of one's own."""

    def value(self, name: str) -> Tier:
        """As the rest of the system has it. Raises FieldError: a tier of one's own lacks something."""
        base = DEFAULT_TIERS.get(name)
        changes = self.changes()
        if base is None:
            for field, alias in _NEEDED.items():
                if field not in changes:
                    raise FieldError((alias,), f"is missing; tiers that come with one are {_known()}")
            base = replace(DEFAULT_TIERS["quality"], name=name)
        if changes.get("family", base.family) != base.family:
            # ControlNets and motion models fit one family only.
            base = replace(base, models={})
        operations = dict(base.operations)
        for operation, config in self.operations.items():
            operations[operation] = _over(operations.get(operation, {}), config.changes())
        changed = _over({"models": base.models}, changes)
        return replace(base, **changed, operations=operations)


class ImagesConfig(ConfigModel):
    """Pictures, still and moving."""

    tiers: dict[_Name, TierConfig] = Field(default={})
    """Changes of lightning, quality and ultra, and further tiers."""
    workflows_dir: Path | None = None
    """Folder of one's own workflows, in ComfyUI's API format."""

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        for name, tier in self.tiers.items():
            try:
                tier.value(name)
            except FieldError as error:
                raise FieldError(("tiers", name, *error.location), str(error)) from None
        if self.workflows_dir is not None:
            object.__setattr__(self, "workflows_dir", self.workflows_dir.expanduser())
        return self

    def tier_values(self) -> dict[str, Tier]:
        """All tiers by name: those that come with Rung, as changed, and those of one's own."""
        return DEFAULT_TIERS | {name: tier.value(name) for name, tier in self.tiers.items()}

    def workflows(self) -> Workflows:
        """The templates, read from their files; never raises."""
        return Workflows.of_folder(self.workflows_dir)


def _over(base: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """Changes over what was there; `models` one by one."""
    merged = base | changes
    if "models" in changes:
        merged["models"] = base.get("models", {}) | changes["models"]
    return merged


def _known() -> str:
    return ", ".join(DEFAULT_TIERS)
