"""`rung fit`: whether a model fits on a GPU, before anything is started."""

from __future__ import annotations

from msgspec import Struct
from rich.console import Console
from rich.table import Table
from rich.text import Text

from controlplane.vram import (
    Architecture,
    Fit,
    check_fit,
    find_architecture,
    kv_format,
    weight_format,
)
from rung._sizes import parse_size
from rung.cli.views import format_bytes
from rung.errors import InvalidRequestError, UnknownModelError

#: What is known by name: memory as the card or the machine reports it.
_GPUS = {
    "rtx-5090": 32_607 * 1024**2,
    "rtx-4090": 24_564 * 1024**2,
    "rtx-3090": 24_576 * 1024**2,
    "h100": 81_559 * 1024**2,
    "h200": 143_771 * 1024**2,
}


class FitQuestion(Struct, frozen=True, kw_only=True):
    """What is asked, as it was typed; `layers` and the like describe a model that is not known by name."""

    model: str
    gpu: str
    weights: str
    kv_dtype: str
    context_tokens: int
    sequences: int
    reserve: str
    parameters: str = ""
    layers: int = 0
    key_value_heads: int = 0
    head_size: int = 0


def answer_fit(question: FitQuestion) -> tuple[Architecture, Fit]:
    """The answer.

    Raises:
        InvalidRequestError: a size, a format or a count is not one.
        UnknownModelError: the model is neither known nor described.
    """
    architecture = _architecture(question)
    return architecture, check_fit(
        architecture,
        weights=weight_format(question.weights),
        kv=kv_format(question.kv_dtype),
        context_tokens=question.context_tokens or architecture.context_tokens,
        sequences=question.sequences,
        total_bytes=_gpu_bytes(question.gpu),
        reserve_bytes=_size(question.reserve, "--reserve"),
    )


def print_fit(console: Console, question: FitQuestion, architecture: Architecture, fit: Fit) -> None:
    """The answer as a person reads it."""
    footprint = fit.footprint
    context_tokens = question.context_tokens or architecture.context_tokens
    each = "1 sequence" if question.sequences == 1 else f"{question.sequences} sequences"
    table = Table.grid(padding=(0, 2))
    table.add_column()
    table.add_column(justify="right")
    table.add_column(style="dim")
    table.add_row(
        "weights", format_bytes(footprint.weights_bytes), f"{architecture.parameters / 1e9:.1f} B parameters"
    )
    if footprint.kv_bytes_per_token:
        per_token = f"{footprint.kv_bytes_per_token / 1024:.0f} KiB a token, {each} of {context_tokens:,}"
        table.add_row("KV cache", format_bytes(footprint.kv_cache_bytes), per_token)
    table.add_row("overhead", format_bytes(footprint.overhead_bytes), "CUDA context, graphs, activations")
    table.add_row("total", format_bytes(footprint.total_bytes), "", style="bold")
    console.print(Text(f"{architecture.name}, weights {question.weights}, KV cache {question.kv_dtype}"))
    console.print(table)
    usable = f"{format_bytes(fit.total_bytes)} with {format_bytes(fit.reserve_bytes)} kept free"
    if fit.fits:
        verdict = f"fits in {usable}: {format_bytes(fit.left_bytes)} left"
        if fit.most_tokens:
            verdict += f"; the cache could hold {fit.most_tokens:,} tokens in all"
        console.print(Text(verdict, style="green"))
        console.print(
            Text(f"vLLM: --gpu-memory-utilization {fit.gpu_memory_utilization:.2f} reserves so much", "dim")
        )
        return
    console.print(Text(f"does not fit in {usable}: {format_bytes(-fit.left_bytes)} are missing", style="red"))
    for remedy in fit.remedies:
        console.print(Text(f"  it would with {remedy}"))


def _architecture(question: FitQuestion) -> Architecture:
    if question.parameters:
        return Architecture(
            name=question.model,
            parameters=_count(question.parameters),
            layers=question.layers,
            key_value_heads=question.key_value_heads,
            head_size=question.head_size,
        )
    try:
        return find_architecture(question.model)
    except UnknownModelError as error:
        raise UnknownModelError(
            f"{error.message}; describe another: --parameters 8B --layers 32 --kv-heads 8 --head-size 128",
            model=question.model,
        ) from None


def _gpu_bytes(gpu: str) -> int:
    known = _GPUS.get(gpu.lower())
    if known is not None:
        return known
    # A card that is sold as 32 GB has 32 GiB, less what its firmware keeps.
    return _size(gpu.upper().removesuffix("GB") + "GiB" if gpu.upper().endswith("GB") else gpu, "--gpu")


def _size(text: str, option: str) -> int:
    try:
        found = parse_size(text)
    except ValueError as error:
        raise InvalidRequestError(f"{option}: {error}") from None
    return int(found) if isinstance(found, int) else 0


def _count(text: str) -> int:
    number, factor = text.strip().upper(), 1
    for suffix, value in (("T", 10**12), ("B", 10**9), ("M", 10**6)):
        if number.endswith(suffix):
            number, factor = number.removesuffix(suffix), value
    try:
        return int(float(number) * factor)
    except (ValueError, OverflowError):
        raise InvalidRequestError(f"--parameters: {text!r} is not a count; write for instance 8B") from None
