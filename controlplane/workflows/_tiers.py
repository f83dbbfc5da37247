"""Tiers: which model draws, in how many steps, and what that takes of a GPU.

Pure.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from msgspec import Struct
from msgspec.structs import replace

from rung.errors import InvalidRequestError
from rung.types import ReclaimGrade

_GIB = 1024**3
#: What the figures of the default tiers were told in.
_GB = 10**9

#: Efforts up to these go to these tiers.
_TIER_BY_EFFORT = ((3, "lightning"), (7, "quality"), (10, "ultra"))


class Tier(Struct, frozen=True, kw_only=True):
    """A way of drawing.

    Attributes:
        name: as `ImageInput.tier` takes it.
        checkpoint: file of the model, by its name in ComfyUI.
        family: models of one family stay loaded side by side; between families ComfyUI is freed first.
            Empty for what loads no model to sample with.
        steps: of sampling.
        cfg: how strictly the prompt is followed; 1 computes no negative prompt.
        guidance: the same of distilled models such as Flux.
        sampler: by its name in ComfyUI.
        scheduler: of noise, by its name in ComfyUI.
        width_pixels: of pictures of no given size.
        height_pixels: of pictures of no given size.
        vram_bytes: what is leased to draw.
        grade: how much others may be disturbed for it, at most.
        models: further files by the parameter that takes them: `controlnet`, `upscale_model`,
            `motion_model`, `text_encoder`.
        upscale_factor: how many times as large the `upscale_model` makes a picture.
        operations: what is different for an operation: values of these attributes, by its name.
    """

    name: str
    checkpoint: str
    family: str
    steps: int
    cfg: float
    guidance: float = 3.5
    sampler: str = "euler"
    scheduler: str = "normal"
    width_pixels: int = 1024
    height_pixels: int = 1024
    vram_bytes: int
    grade: ReclaimGrade
    models: dict[str, str] = {}
    upscale_factor: float = 4.0
    operations: dict[str, dict[str, Any]] = {}

    def of(self, operation: str) -> Tier:
        """The tier as it is for one operation: its checkpoint, family and VRAM may be others."""
        changes = dict(self.operations.get(operation, {}))
        changes["models"] = self.models | changes.get("models", {})
        return replace(self, operations={}, **changes)


#: LTX-Video is a model of its own, with a text encoder of its own; it wants multiples of 32.
_LTX: dict[str, Any] = {
    "checkpoint": "ltx-video-2b-v0.9.5.safetensors",
    "family": "ltx",
    "steps": 30,
    "cfg": 3.0,
    "sampler": "euler",
    "width_pixels": 768,
    "height_pixels": 512,
    "vram_bytes": 16 * _GIB,
    "grade": ReclaimGrade.FULL,
    "models": {"text_encoder": "t5xxl_fp8_e4m3fn.safetensors"},
}
#: No checkpoint is loaded to enlarge a picture.
_UPSCALE: dict[str, Any] = {
    "checkpoint": "",
    "family": "",
    "vram_bytes": 4 * _GIB,
    "grade": ReclaimGrade.QUICK,
    "models": {"upscale_model": "RealESRGAN_x4plus.pth"},
}
_SDXL_MODELS = {
    "controlnet": "controlnet-union-sdxl-1.0.safetensors",
    "motion_model": "mm_sdxl_v10_beta.ckpt",
}
_QUALITY: dict[str, Any] = {
    "checkpoint": "waiIllustriousSDXL_v140.safetensors",
    "family": "sdxl",
    "steps": 28,
    "cfg": 6.0,
    "sampler": "dpmpp_2m",
    "scheduler": "karras",
}
#: AnimateDiff takes memory for all pictures of a film at once, and has no motion model for Flux.
_ANIMATE: dict[str, Any] = {
    **_QUALITY,
    "vram_bytes": 16 * _GIB,
    "grade": ReclaimGrade.FULL,
    "models": {"motion_model": _SDXL_MODELS["motion_model"]},
}
_OPERATIONS = {"animate": _ANIMATE, "upscale": _UPSCALE, "video": _LTX}

#: The tiers of a 32 GB card, by name.
DEFAULT_TIERS: dict[str, Tier] = {
    tier.name: tier
    for tier in (
        Tier(
            name="lightning",
            checkpoint="sdxl_lightning_4step.safetensors",
            family="sdxl",
            steps=4,
            cfg=1.0,
            sampler="euler",
            scheduler="sgm_uniform",
            vram_bytes=6 * _GB,
            grade=ReclaimGrade.QUICK,
            models=_SDXL_MODELS,
            operations=_OPERATIONS,
        ),
        Tier(
            name="quality",
            **_QUALITY,
            vram_bytes=12 * _GB,
            grade=ReclaimGrade.STANDARD,
            models=_SDXL_MODELS,
            operations=_OPERATIONS,
        ),
        Tier(
            name="ultra",
            checkpoint="flux1-dev-fp8.safetensors",
            family="flux",
            steps=40,
            cfg=1.0,
            guidance=3.5,
            sampler="euler",
            scheduler="simple",
            vram_bytes=20 * _GB,
            grade=ReclaimGrade.FULL,
            models={"controlnet": "flux.1-dev-controlnet-union-pro.safetensors"},
            operations=_OPERATIONS,
        ),
    )
}


def tier_of_effort(effort: int) -> str:
    """The tier of an effort: 1 to 3 `lightning`, 4 to 7 `quality`, 8 to 10 `ultra`."""
    return next((name for most, name in _TIER_BY_EFFORT if effort <= most), _TIER_BY_EFFORT[-1][1])


def find_tier(tiers: Mapping[str, Tier], name: str) -> Tier:
    """A tier by its name.

    Raises:
        InvalidRequestError: there is none; the message lists those that there are.
    """
    tier = tiers.get(name)
    if tier is None:
        raise InvalidRequestError(f"there is no tier {name!r}; tiers are: {', '.join(tiers)}")
    return tier
