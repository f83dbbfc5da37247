"""Architectures that are known by name, with the figures of their published configurations.

Only models whose cache is the same in every layer are here: sliding windows and state-space layers
need less than the formula says.
"""

from __future__ import annotations

from controlplane.vram._footprint import Architecture
from rung.errors import UnknownModelError

ARCHITECTURES: tuple[Architecture, ...] = (
    Architecture(
        name="llama-3-8b",
        parameters=8_030_261_248,
        embedding_parameters=2 * 128_256 * 4096,
        layers=32,
        key_value_heads=8,
        head_size=128,
        context_tokens=8192,
    ),
    Architecture(
        name="llama-3.1-8b",
        parameters=8_030_261_248,
        embedding_parameters=2 * 128_256 * 4096,
        layers=32,
        key_value_heads=8,
        head_size=128,
        context_tokens=131_072,
    ),
    Architecture(
        name="qwen3-8b",
        parameters=8_190_735_360,
        embedding_parameters=2 * 151_936 * 4096,
        layers=36,
        key_value_heads=8,
        head_size=128,
        context_tokens=40_960,
    ),
    # Trained from Qwen3-8B.
    Architecture(
        name="nemotron-orchestrator-8b",
        parameters=8_190_735_360,
        embedding_parameters=2 * 151_936 * 4096,
        layers=36,
        key_value_heads=8,
        head_size=128,
        context_tokens=40_960,
    ),
    Architecture(
        name="qwen2.5-7b",
        parameters=7_615_616_512,
        embedding_parameters=2 * 152_064 * 3584,
        layers=28,
        key_value_heads=4,
        head_size=128,
        context_tokens=32_768,
    ),
    # The language model; the projector is a file of its own, and often stays in host RAM.
    Architecture(
        name="qwen2.5-vl-7b",
        parameters=7_615_616_512,
        embedding_parameters=2 * 152_064 * 3584,
        layers=28,
        key_value_heads=4,
        head_size=128,
        context_tokens=128_000,
    ),
    Architecture(
        name="qwen2.5-14b",
        parameters=14_770_033_664,
        embedding_parameters=2 * 152_064 * 5120,
        layers=48,
        key_value_heads=8,
        head_size=128,
        context_tokens=32_768,
    ),
    Architecture(
        name="deepseek-r1-distill-qwen-14b",
        parameters=14_770_033_664,
        embedding_parameters=2 * 152_064 * 5120,
        layers=48,
        key_value_heads=8,
        head_size=128,
        context_tokens=131_072,
    ),
    # An encoder: no cache.
    Architecture(name="nomic-embed-text-v1.5", parameters=136_731_648, context_tokens=8192),
)

#: Short names that people use.
_ALIASES = {
    "nemotron-8b": "nemotron-orchestrator-8b",
    "deepseek-r1-14b": "deepseek-r1-distill-qwen-14b",
    "deepseek-r1:14b": "deepseek-r1-distill-qwen-14b",
    "nomic-embed-text": "nomic-embed-text-v1.5",
}


def find_architecture(model: str) -> Architecture:
    """The architecture of a model by its name, which may have an owner before it and a format after it.

    `cyankiwi/Nemotron-Orchestrator-8B-AWQ-4bit` is `nemotron-orchestrator-8b`: of the known names in it
    the longest counts.

    Raises:
        UnknownModelError: no known name is in it; the message has those that there are.
    """
    wanted = model.lower()
    names = {each.name: each for each in ARCHITECTURES}
    names |= {alias: names[name] for alias, name in _ALIASES.items()}
    found = [name for name in names if name in wanted]
    if not found:
        known = ", ".join(each.name for each in ARCHITECTURES)
        raise UnknownModelError(f"the architecture of {model!r} is not known; known are {known}", model=model)
    return names[max(found, key=len)]
