"""The effort ladder in the configuration."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, Field, model_validator

from controlplane.ladder import (
    BURST_PREFIX,
    CHAIN_PREFIX,
    MAX_EFFORT,
    MIN_EFFORT,
    Ladder,
    LadderError,
    Modality,
    RungSpec,
    build_ladder,
)
from rung.service import ConfigModel, FieldError

_NAME = r"^[a-z][a-z0-9._-]{0,62}$"


def _effort_range(value: Any) -> Any:
    """`3`, `1-6` or `[1, 6]`."""
    if isinstance(value, int):
        return (value, value)
    if isinstance(value, str):
        first, _, last = value.partition("-")
        return (first.strip(), (last or first).strip())
    return value


class RungConfig(ConfigModel):
    """One rung: an effort range of one modality, and who answers it."""

    name: str = Field(pattern=_NAME)
    """What it is called in answers and explanations."""
    effort: Annotated[tuple[int, int], BeforeValidator(_effort_range)] = Field(
        default=(MIN_EFFORT, MAX_EFFORT),
        json_schema_extra={
            "anyOf": [
                {"type": "integer", "minimum": MIN_EFFORT, "maximum": MAX_EFFORT},
                {"type": "string", "pattern": r"^\d+\s*-\s*\d+$"},
                {"type": "array", "items": {"type": "integer"}, "minItems": 2, "maxItems": 2},
            ]
        },
    )
    """`3`, `1-6` or `[1, 6]`; each effort of a modality is on exactly one rung."""
    modality: Modality = Modality.CHAT
    """What kind of request it is for; `chat` by default."""
    capabilities: tuple[str, ...] = ()
    """What each of its targets must have."""
    chain: str
    """Chain of targets that answer."""
    reason: str = ""
    """Chain behind the `reason` tool, which is offered from effort 7 on."""

    def spec(self) -> RungSpec:
        """As the ladder takes it."""
        return RungSpec(
            name=self.name,
            modality=self.modality,
            min_effort=self.effort[0],
            max_effort=self.effort[1],
            capabilities=self.capabilities,
            chain=self.chain,
            reason=self.reason,
        )


class LadderConfig(ConfigModel):
    """Chains of targets, and the rungs that use them."""

    chains: dict[Annotated[str, Field(pattern=_NAME)], tuple[str, ...]]
    """Targets by chain, best first: a deployment, a model, `node/model`, `provider/model` of the cloud,
    `burst/name`, or `@chain` for all of another chain."""
    rungs: tuple[RungConfig, ...] = ()
    """Ranges of effort by modality, and which chain answers each."""
    classifier: Literal["heuristic", "judge"] = "heuristic"
    """Who says the effort that a caller left open: a local rule, or the orchestrator itself."""

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        try:
            self.value()
        except LadderError as error:
            raise FieldError(error.path, str(error)) from None
        return self

    def value(self) -> Ladder:
        """As the rest of the system has it."""
        return build_ladder([rung.spec() for rung in self.rungs], self.chains)


def check_targets(config: LadderConfig, known: Mapping[str, Sequence[frozenset[str]]]) -> None:
    """Refuse a chain with a target that nobody has, or that cannot do what its rung promises.

    Args:
        config: the ladder.
        known: capabilities of the targets by every name that they have.

    Raises:
        FieldError: at its place in the file, from the root on.
    """
    for name, entries in config.chains.items():
        for place, entry in enumerate(entries):
            if not entry.startswith((CHAIN_PREFIX, BURST_PREFIX)) and entry not in known:
                there = ", ".join(sorted(known)) or "none"
                raise FieldError(
                    ("ladder", "chains", name, place), f"there is no target {entry}; there are: {there}"
                )
    ladder = config.value()
    places = {rung.name: place for place, rung in enumerate(config.rungs)}
    for rung in ladder.rungs:
        for target in rung.chain:
            for capabilities in known.get(target, ()):
                missing = ", ".join(sorted(rung.capabilities - capabilities))
                if missing:
                    raise FieldError(
                        ("ladder", "rungs", places[rung.name], "capabilities"),
                        f"{target} in the chain of {rung.name} cannot do {missing}",
                    )
