"""How a simulated engine behaves, from the environment and from the name of its model.

| variable | meaning |
| --- | --- |
| RUNG_SIM_SPEED | how many times faster than life; 1 by default |
| RUNG_SIM_LOAD_S | seconds to load, whatever the speed; by default derived from the model's size |
| RUNG_SIM_GPUS | folder of the simulated machine whose memory is taken; none by default |
| RUNG_SIM_VRAM_BYTES | memory to take on it; by default derived as the real engine does |
| RUNG_SIM_FAULTS | comma-separated names of faults |
| RUNG_SIM_SLOW_FIRST_BYTE_S | how slow `slow_first_byte` is; 5 by default |
| RUNG_SIM_SLOW_WAKE_S | how slow `slow_wake` is; 10 by default |
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

from msgspec import Struct

from nodeagent.simulators._faults import Fault, parse_faults

#: Tokens a second of an 8B model; others scale with what they read from memory for each token.
_RATE_OF_8B = 42.0
_SLOWEST_RATE = 6.0
_FASTEST_RATE = 200.0
_PREFILL_RATE_OF_8B = 3000.0
_FIRST_TOKEN_S = 0.15
_DEFAULT_BILLIONS = 8.0
_SIZE_IN_NAME = re.compile(r"(?:^|[^0-9a-z.])(\d+(?:\.\d+)?)b(?![a-z0-9])", re.IGNORECASE)
#: Bytes of a weight, by what the name says of its format; the first that fits counts.
_WEIGHT_BYTES = (
    (re.compile(r"f32|fp32", re.IGNORECASE), 4.0),
    (re.compile(r"bf16|f16|fp16", re.IGNORECASE), 2.0),
    (re.compile(r"fp8|q8|int8|w8a8", re.IGNORECASE), 1.06),
    (re.compile(r"q6", re.IGNORECASE), 0.82),
    (re.compile(r"q5", re.IGNORECASE), 0.7),
    (re.compile(r"q4|int4|awq|gptq|nvfp4|4bit", re.IGNORECASE), 0.6),
)


class Settings(Struct, frozen=True, kw_only=True):
    """What the environment says. See the module."""

    speed: float = 1.0
    load_s: float | None = None
    gpus: Path | None = None
    vram_bytes: int | None = None
    faults: frozenset[Fault] = frozenset()
    slow_first_byte_s: float = 5.0
    slow_wake_s: float = 10.0


class Pace(Struct, frozen=True):
    """How fast tokens come."""

    tokens_per_s: float
    prefill_tokens_per_s: float
    first_token_s: float

    def first_token_delay_s(self, prompt_tokens: int) -> float:
        """From the request to its first token."""
        return self.first_token_s + prompt_tokens / self.prefill_tokens_per_s


def settings_from(environment: Mapping[str, str]) -> Settings:
    """Read the variables.

    Raises:
        ValueError: one of them makes no sense.
    """
    load_s = environment.get("RUNG_SIM_LOAD_S")
    gpus = environment.get("RUNG_SIM_GPUS")
    vram_bytes = environment.get("RUNG_SIM_VRAM_BYTES")
    speed = float(environment.get("RUNG_SIM_SPEED") or 1.0)
    if speed <= 0:
        raise ValueError(f"RUNG_SIM_SPEED is {speed:g}; it must be above 0")
    return Settings(
        speed=speed,
        load_s=float(load_s) if load_s else None,
        gpus=Path(gpus) if gpus else None,
        vram_bytes=int(vram_bytes) if vram_bytes else None,
        faults=parse_faults(environment.get("RUNG_SIM_FAULTS", "").split(",")),
        slow_first_byte_s=float(environment.get("RUNG_SIM_SLOW_FIRST_BYTE_S") or 5.0),
        slow_wake_s=float(environment.get("RUNG_SIM_SLOW_WAKE_S") or 10.0),
    )


def billions_of(model: str) -> float:
    """Parameters in billions as the name tells them (`qwen3-8b`, `Gemma-27B-it.gguf`), else 8."""
    found = _SIZE_IN_NAME.search(model)
    return float(found.group(1)) if found else _DEFAULT_BILLIONS


def weight_bytes_of(model: str, *, default_bytes_per_weight: float) -> int:
    """Size of the weights, from size and format in the name."""
    each = next((size for form, size in _WEIGHT_BYTES if form.search(model)), default_bytes_per_weight)
    return int(billions_of(model) * 1e9 * each)


def load_time_s(model: str, settings: Settings) -> float:
    """How long loading takes: 4 s for 8B and 8 s for 27B at life's speed."""
    if settings.load_s is not None:
        return settings.load_s
    return max(1.0, 2.3 + 0.21 * billions_of(model)) / settings.speed


def pace_of(model: str, settings: Settings) -> Pace:
    """How fast the model is."""
    size = billions_of(model) / _DEFAULT_BILLIONS
    rate = min(max(_RATE_OF_8B / size, _SLOWEST_RATE), _FASTEST_RATE)
    return Pace(
        tokens_per_s=rate * settings.speed,
        prefill_tokens_per_s=_PREFILL_RATE_OF_8B / size * settings.speed,
        first_token_s=_FIRST_TOKEN_S / settings.speed,
    )
