"""What a picture needs of a GPU, beside what ComfyUI holds of it already. Pure; all sizes are in bytes."""

from __future__ import annotations

from enum import StrEnum

from msgspec import Struct

from controlplane.workflows import Tier

_GIB = 1 << 30
_PIXELS_PER_MEGAPIXEL = 1 << 20
#: Sampling takes about so much for each megapixel beyond those that a tier reckons with.
_WORK_BYTES_PER_MEGAPIXEL = _GIB
#: What ComfyUI holds without any model: its CUDA context, and a little that PyTorch keeps.
_HELD_EMPTY_BYTES = _GIB
#: A lease keeps others away from what is loaded, so that there is one even if nothing more is needed.
_LEAST_BYTES = _GIB // 4


class Loaded(Struct, frozen=True, kw_only=True):
    """The model that a ComfyUI sampled with last.

    Attributes:
        generation: of the engine; another one has loaded nothing.
        checkpoint: file of the model.
        family: of the model.
        others_bytes: what was held beside it when it was loaded; None where that was not measured.
    """

    generation: int
    checkpoint: str
    family: str
    others_bytes: int | None = None

    def held_bytes(self, measured_bytes: int | None) -> int:
        """What is held of it, given what ComfyUI holds in all; 0 where that cannot be told."""
        if measured_bytes is None or self.others_bytes is None:
            return 0
        return max(0, measured_bytes - self.others_bytes)


class Flush(StrEnum):
    """Whether ComfyUI is to give back its models first."""

    NO = "no"
    #: Only if room has to be made otherwise: what it would load again anyway disturbs nobody.
    BEFORE_OTHERS = "before_others"
    YES = "yes"


class Need(Struct, frozen=True, kw_only=True):
    """What is to be asked for.

    Attributes:
        vram_bytes: beside what ComfyUI holds already.
        held_bytes: what it is taken to hold of the checkpoint; if it holds less when the lease is there, the
            lease is too small.
        flush: whether ComfyUI is to be flushed before.
    """

    vram_bytes: int
    held_bytes: int = 0
    flush: Flush = Flush.NO

    @property
    def is_loaded(self) -> bool:
        """Whether the checkpoint is there already."""
        return self.held_bytes > 0


def wanted_bytes(tier: Tier, width_pixels: int, height_pixels: int, count: int) -> int:
    """What a tier needs for so many pictures at once; those that are larger than its own need more."""
    pixels = width_pixels * height_pixels * count
    beyond = max(0, pixels - tier.width_pixels * tier.height_pixels) / _PIXELS_PER_MEGAPIXEL
    return tier.vram_bytes + int(beyond * _WORK_BYTES_PER_MEGAPIXEL)


def need_of(
    tier: Tier, whole_bytes: int, *, generation: int, measured_bytes: int | None, loaded: Loaded | None
) -> Need:
    """What to ask for to draw with a tier.

    1. Its checkpoint is loaded: what is missing of the whole.
    2. Nothing is loaded, as was measured: the whole.
    3. A model of another family is: the whole, after a flush. ComfyUI would try to keep both.
    4. Something else is, or nobody knows: the whole; what is there is flushed before others give way.

    Args:
        tier: as it is for the operation.
        whole_bytes: all that it needs, see `wanted_bytes`.
        generation: of the engine now.
        measured_bytes: what ComfyUI holds now; None where nobody can tell.
        loaded: what it sampled with last, if that is known.
    """
    if loaded is not None and loaded.generation != generation:
        loaded = None
    if loaded is not None and tier.checkpoint and loaded.checkpoint == tier.checkpoint:  # 1
        held_bytes = loaded.held_bytes(measured_bytes)
        if held_bytes > _HELD_EMPTY_BYTES:
            return Need(vram_bytes=max(_LEAST_BYTES, whole_bytes - held_bytes), held_bytes=held_bytes)
    if measured_bytes is not None and measured_bytes <= _HELD_EMPTY_BYTES:  # 2
        return Need(vram_bytes=whole_bytes)
    if loaded is not None and tier.family and loaded.family and loaded.family != tier.family:  # 3
        return Need(vram_bytes=whole_bytes, flush=Flush.YES)
    return Need(vram_bytes=whole_bytes, flush=Flush.BEFORE_OTHERS)  # 4
