"""How much memory a model needs, before anything is started.

    weights   = quantised parameters * bits / 8 + parameters kept at 16 bits * 2
    KV/token  = layers * 2 * KV heads * (head size * bits + bits of metadata a vector) / 8
    KV cache  = KV/token * context (up to a multiple of 16 tokens, vLLM's block) * sequences
    total     = weights + KV cache + overhead

An estimate: a deployment that has run is measured, and the measurement wins. Sizes are in bytes. Sizes of
weights are usually told in GB (10^9), sizes of memory and of caches in GiB and KiB though they are
called GB and KB.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from msgspec import Struct

from rung.errors import ConfigError, InvalidRequestError
from rung.types import Footprint

GIB = 1 << 30

#: What an engine takes besides weights and KV cache: the CUDA context (a few hundred MB a process), graphs,
#: activations. vLLM's logs quoted in public show 0.14 to 1.27 GiB outside of its own pool.
OVERHEAD_BYTES = GIB

#: vLLM's block: a sequence takes whole ones.
BLOCK_TOKENS = 16


class WeightFormat(Struct, frozen=True, kw_only=True):
    """How weights are stored.

    Attributes:
        bits: bits a quantised parameter, scales and zero points included.
        keeps_embeddings: embeddings and output head stay at 16 bits, as AWQ and GPTQ leave them. The bits of
            GGUF formats are means over whole files, which have everything in them.
    """

    name: str
    bits: float
    keeps_embeddings: bool = False


#: `awq` is 4-bit codes with a 16-bit scale for each 32, so that 8B parameters take 4.5 GB; with groups of 128
#: and zero points, as the older AWQ files and GPTQ have them, it is (16 + 4) / 128 more than 4. NVFP4 has
#: an 8-bit scale for each 16. The GGUF ones are llama.cpp's own table (`quantize`, 7B).
WEIGHT_FORMATS: dict[str, WeightFormat] = {
    each.name: each
    for each in (
        WeightFormat(name="fp32", bits=32.0),
        WeightFormat(name="fp16", bits=16.0),
        WeightFormat(name="bf16", bits=16.0),
        WeightFormat(name="fp8", bits=8.0, keeps_embeddings=True),
        WeightFormat(name="nvfp4", bits=4.5, keeps_embeddings=True),
        WeightFormat(name="awq", bits=4.5, keeps_embeddings=True),
        WeightFormat(name="awq-g128", bits=4.15625, keeps_embeddings=True),
        WeightFormat(name="gptq", bits=4.15625, keeps_embeddings=True),
        WeightFormat(name="q4_0", bits=4.5),
        WeightFormat(name="q4_k_m", bits=4.84),
        WeightFormat(name="q5_k_m", bits=5.68),
        WeightFormat(name="q6_k", bits=6.56),
        WeightFormat(name="q8_0", bits=8.5),
    )
}


class KvFormat(Struct, frozen=True, kw_only=True):
    """How the KV cache is stored: bits an element, and bits of metadata for each vector of a head."""

    name: str
    bits: float
    vector_bits: float = 0.0


#: `tq4` packs a vector of a head into 4-bit codes with one 32-bit norm: 34 KiB a token where FP16 takes
#: 128. `int4` is per-channel quantisation in groups of 32 with a 16-bit scale and an 8-bit zero point: 4.75
#: bits, the layout nearest to the published 66 K tokens of FP16 against 224 K in the same memory (4.7 bits).
#: `q8_0` and `q4_0` are llama.cpp's blocks of 32 with a 16-bit scale.
KV_FORMATS: dict[str, KvFormat] = {
    each.name: each
    for each in (
        KvFormat(name="fp16", bits=16.0),
        KvFormat(name="fp8", bits=8.0),
        KvFormat(name="q8_0", bits=8.5),
        KvFormat(name="q4_0", bits=4.5),
        KvFormat(name="nvfp4", bits=4.5),
        KvFormat(name="int4", bits=4.75),
        KvFormat(name="tq4", bits=4.0, vector_bits=32.0),
    )
}

_KV_ALIASES = {
    "": "fp16",
    "auto": "fp16",
    "f16": "fp16",
    "float16": "fp16",
    "bf16": "fp16",
    "bfloat16": "fp16",
    "fp8_e4m3": "fp8",
    "fp8_e5m2": "fp8",
    "tq-t4nc": "tq4",
}


class Architecture(Struct, frozen=True, kw_only=True):
    """What the footprint of a model depends on.

    Attributes:
        parameters: all of them.
        embedding_parameters: those of embeddings and output head, which many formats keep at 16 bits.
        layers: layers that have a KV cache.
        key_value_heads: KV heads of a layer; 0 for a model without a cache (an encoder).
        head_size: elements of a head's key, and of its value.
        latent_size: elements a token and layer of a compressed cache (MLA), in place of heads; 0 if none.
        context_tokens: the longest context of the model itself.
    """

    name: str
    parameters: int
    embedding_parameters: int = 0
    layers: int = 0
    key_value_heads: int = 0
    head_size: int = 0
    latent_size: int = 0
    context_tokens: int = 0


def weight_format(name: str) -> WeightFormat:
    """The format of weights by its name.

    Raises:
        InvalidRequestError: there is none of this name; the message has those that there are.
    """
    found = WEIGHT_FORMATS.get(name.lower())
    if found is None:
        known = ", ".join(WEIGHT_FORMATS)
        raise InvalidRequestError(f"{name!r} is no format of weights: {known}")
    return found


def kv_format(name: str) -> KvFormat:
    """The format of a KV cache by the name that an engine gives it, as in `--kv-cache-dtype`.

    Raises:
        InvalidRequestError: there is none of this name; the message has those that there are.
    """
    found = KV_FORMATS.get(_KV_ALIASES.get(name.lower(), name.lower()))
    if found is None:
        known = ", ".join([*KV_FORMATS, *filter(None, _KV_ALIASES)])
        raise InvalidRequestError(f"{name!r} is no format of a KV cache: {known}")
    return found


def weights_bytes(parameters: int, form: WeightFormat, embedding_parameters: int = 0) -> int:
    """Bytes of the weights; with no `embedding_parameters` known, all parameters count as quantised."""
    kept = embedding_parameters if form.keeps_embeddings else 0
    return math.ceil((parameters - kept) * form.bits / 8) + kept * 2


def kv_bytes_per_token(architecture: Architecture, form: KvFormat) -> int:
    """Bytes of KV cache that a token takes in all layers."""
    if architecture.latent_size:
        vector_bits = architecture.latent_size * form.bits + form.vector_bits
    else:
        vector_bits = architecture.head_size * form.bits + form.vector_bits
        vector_bits *= 2 * architecture.key_value_heads
    return math.ceil(architecture.layers * vector_bits / 8)


def estimate_footprint(
    architecture: Architecture,
    *,
    weights: WeightFormat,
    kv: KvFormat,
    context_tokens: int = 0,
    sequences: int = 1,
    overhead_bytes: int = OVERHEAD_BYTES,
) -> Footprint:
    """What a model needs with so many sequences of so many tokens at once, each to its end.

    Raises:
        InvalidRequestError: a count is less than 0.
    """
    if context_tokens < 0 or sequences < 0 or architecture.parameters < 0:
        raise InvalidRequestError("parameters, context and sequences are counts: none is less than 0")
    per_token = kv_bytes_per_token(architecture, kv)
    tokens = -(-context_tokens // BLOCK_TOKENS) * BLOCK_TOKENS * sequences
    return Footprint(
        weights_bytes=weights_bytes(architecture.parameters, weights, architecture.embedding_parameters),
        kv_cache_bytes=per_token * tokens,
        overhead_bytes=overhead_bytes,
        kv_bytes_per_token=per_token,
    )


def reserved_bytes(gpu_memory_utilization: float, total_bytes: int) -> int:
    """What vLLM reserves when it starts: a share of the whole GPU, whatever it will use of that.

    Raises:
        InvalidRequestError: not a share, from 0 to 1.
    """
    if not 0.0 <= gpu_memory_utilization <= 1.0:
        raise InvalidRequestError(f"gpu_memory_utilization {gpu_memory_utilization} is not between 0 and 1")
    return math.ceil(gpu_memory_utilization * total_bytes)


class ProfileShare(Struct, frozen=True, kw_only=True):
    """What a profile gives a deployment: a share of the GPU as vLLM counts it, or else bytes."""

    deployment_id: str
    gpu_memory_utilization: float = 0.0
    vram_bytes: int = 0

    def bytes_of(self, total_bytes: int) -> int:
        """Its bytes on a GPU."""
        if self.gpu_memory_utilization:
            return reserved_bytes(self.gpu_memory_utilization, total_bytes)
        return self.vram_bytes


def check_profile(
    name: str, shares: Sequence[ProfileShare], *, total_bytes: int, reserve_bytes: int = 0
) -> int:
    """The bytes that a profile gives away, if they fit beside what is kept free.

    Raises:
        ConfigError: they do not; the message shows the sum.
    """
    sizes = [(share, share.bytes_of(total_bytes)) for share in shares]
    sum_bytes = sum(size_bytes for _, size_bytes in sizes)
    excess_bytes = sum_bytes + reserve_bytes - total_bytes
    if excess_bytes <= 0:
        return sum_bytes
    parts = [_part(share, size_bytes) for share, size_bytes in sizes]
    if reserve_bytes:
        parts.append(f"{reserve_bytes / GIB:.1f} GiB kept free")
    raise ConfigError(
        f"profile {name} does not fit: {' + '.join(parts)} = {(sum_bytes + reserve_bytes) / GIB:.1f} GiB "
        f"({(sum_bytes + reserve_bytes) / total_bytes:.0%}) of {total_bytes / GIB:.1f} GiB, "
        f"{excess_bytes / GIB:.1f} GiB too much",
        profile=name,
        sum_bytes=str(sum_bytes),
        total_bytes=str(total_bytes),
        excess_bytes=str(excess_bytes),
    )


def _part(share: ProfileShare, size_bytes: int) -> str:
    size = f"{share.deployment_id} {size_bytes / GIB:.1f} GiB"
    return f"{size} ({share.gpu_memory_utilization:.0%})" if share.gpu_memory_utilization else size
