"""Whether a model fits on a GPU, and if not, what would make it fit."""

from __future__ import annotations

from collections.abc import Iterator

from msgspec import Struct

from controlplane.vram._footprint import (
    KV_FORMATS,
    WEIGHT_FORMATS,
    Architecture,
    KvFormat,
    WeightFormat,
    estimate_footprint,
)
from rung.types import Footprint


class Fit(Struct, frozen=True, kw_only=True):
    """The answer to whether a model fits.

    Attributes:
        footprint: what the model needs.
        total_bytes: what the GPU has.
        reserve_bytes: kept free there.
        left_bytes: what is left beside the model; negative when it does not fit.
        most_tokens: tokens, of all sequences together, that the KV cache could hold; 0 for a model without.
        remedies: what would make it fit, the least loss first; none if it fits, or if nothing would.
    """

    footprint: Footprint
    total_bytes: int
    reserve_bytes: int
    left_bytes: int
    most_tokens: int
    remedies: tuple[str, ...] = ()

    @property
    def fits(self) -> bool:
        """Whether it does."""
        return self.left_bytes >= 0

    @property
    def gpu_memory_utilization(self) -> float:
        """The share of the GPU that the model needs, as vLLM is told it."""
        return self.footprint.total_bytes / self.total_bytes if self.total_bytes else 0.0


def check_fit(
    architecture: Architecture,
    *,
    weights: WeightFormat,
    kv: KvFormat,
    context_tokens: int,
    sequences: int,
    total_bytes: int,
    reserve_bytes: int = 0,
) -> Fit:
    """Whether a model fits on a GPU with nothing else on it.

    Raises:
        InvalidRequestError: a count is less than 0.
    """
    footprint = estimate_footprint(
        architecture, weights=weights, kv=kv, context_tokens=context_tokens, sequences=sequences
    )
    usable_bytes = total_bytes - reserve_bytes
    left_bytes = usable_bytes - footprint.total_bytes
    remedies: tuple[str, ...] = ()
    if left_bytes < 0:
        remedies = tuple(
            _remedies(architecture, footprint, weights, kv, context_tokens, sequences, usable_bytes)
        )
    return Fit(
        footprint=footprint,
        total_bytes=total_bytes,
        reserve_bytes=reserve_bytes,
        left_bytes=left_bytes,
        most_tokens=footprint.tokens_beside_weights(usable_bytes),
        remedies=remedies,
    )


def _remedies(
    architecture: Architecture,
    footprint: Footprint,
    weights: WeightFormat,
    kv: KvFormat,
    context_tokens: int,
    sequences: int,
    usable_bytes: int,
) -> Iterator[str]:
    def fits(weights: WeightFormat, kv: KvFormat) -> bool:
        smaller = estimate_footprint(
            architecture, weights=weights, kv=kv, context_tokens=context_tokens, sequences=sequences
        )
        return smaller.total_bytes <= usable_bytes

    # The most bits that still fit: the least loss.
    for other in sorted(KV_FORMATS.values(), key=lambda each: -each.bits):
        if other.bits < kv.bits and fits(weights, other):
            yield f"a KV cache in {other.name}: --kv-dtype {other.name}"
            break
    for form in sorted(WEIGHT_FORMATS.values(), key=lambda each: -each.bits):
        if form.bits < weights.bits and fits(form, kv):
            yield f"weights in {form.name}: --weights {form.name}"
            break
    tokens = footprint.tokens_beside_weights(usable_bytes) // max(1, sequences)
    if 0 < tokens < context_tokens:
        yield f"a shorter context: --context {tokens}"
    if sequences > 1 and tokens * sequences >= context_tokens:
        fewer = tokens * sequences // context_tokens
        yield f"fewer sequences at once: --sequences {fewer}"
