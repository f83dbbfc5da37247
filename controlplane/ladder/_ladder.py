"""The ladder as configured: rungs with their effort ranges, and chains of targets.

Pure: reads values, returns values; `build_ladder` refuses what cannot be meant.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from enum import StrEnum

from msgspec import Struct

from rung.errors import InvalidRequestError

MIN_EFFORT = 1
MAX_EFFORT = 10
#: From this effort on the orchestrator is offered the `reason` tool; below it never is.
REASON_EFFORT = 7
#: In a chain, an entry that begins so stands for all entries of another chain.
CHAIN_PREFIX = "@"
#: A target that begins so is a burst profile: what would be rented.
BURST_PREFIX = "burst/"


class Modality(StrEnum):
    """What a request brings or wants."""

    CHAT = "chat"
    VISION = "vision"
    EMBEDDING = "embedding"
    IMAGE = "image"
    VIDEO = "video"
    MESH = "mesh"
    SPEECH = "speech"
    TRANSCRIPTION = "transcription"
    PREDICTION = "prediction"


class RungSpec(Struct, frozen=True, kw_only=True):
    """One rung as configured.

    Attributes:
        name: unique.
        modality: what it is for.
        min_effort: least effort, 1 to 10.
        max_effort: greatest effort, 1 to 10.
        capabilities: what each of its targets must have.
        chain: name of the chain of targets that answer.
        reason: name of the chain behind the `reason` tool; empty if the tool is not offered.
    """

    name: str
    modality: Modality = Modality.CHAT
    min_effort: int = MIN_EFFORT
    max_effort: int = MAX_EFFORT
    capabilities: tuple[str, ...] = ()
    chain: str
    reason: str = ""


class Rung(Struct, frozen=True, kw_only=True):
    """One rung, its chains written out as names of targets, best first."""

    name: str
    modality: Modality
    min_effort: int
    max_effort: int
    capabilities: frozenset[str]
    chain: tuple[str, ...]
    reason_chain: tuple[str, ...] = ()


class LadderError(ValueError):
    """A ladder that cannot be meant; `path` says where, from `ladder` on."""

    def __init__(self, path: tuple[str | int, ...], message: str) -> None:
        super().__init__(message)
        self.path = path


class Ladder:
    """Which rung an effort is on, and which chain a name means.

    Make it with `build_ladder`.

    Attributes:
        chains: by name, names of targets, best first.
        rungs: in the order of their modality and effort.
    """

    def __init__(self, rungs: Sequence[Rung], chains: Mapping[str, tuple[str, ...]]) -> None:
        self.rungs = tuple(rungs)
        self.chains = dict(chains)
        self._by_effort = {
            (rung.modality, effort): rung
            for rung in rungs
            for effort in range(rung.min_effort, rung.max_effort + 1)
        }
        self.modalities = frozenset(rung.modality for rung in rungs)

    def rung(self, modality: Modality, effort: int) -> Rung | None:
        """The rung of an effort; None if the ladder has none for that modality.

        Raises:
            InvalidRequestError: the effort is not 1 to 10.
        """
        check_effort(effort)
        return self._by_effort.get((modality, effort))


def check_effort(effort: int) -> int:
    """The effort. Raises InvalidRequestError if it is not 1 to 10."""
    if not MIN_EFFORT <= effort <= MAX_EFFORT:
        raise InvalidRequestError(f"effort is {effort}; it must be 1 to 10, or left out", field="effort")
    return effort


def build_ladder(rungs: Sequence[RungSpec], chains: Mapping[str, Sequence[str]]) -> Ladder:
    """Write the chains out, and check that each effort of a modality has exactly one rung.

    Args:
        rungs: as configured.
        chains: by name; an entry is the name of a target, or `@name` for all of another chain.

    Raises:
        LadderError: a hole, an overlap, a cycle, an unknown chain, a rung that offers `reason` below
            effort 7, an entry or a name given twice.
    """
    expanded = {name: _expand(name, chains, ()) for name in chains}
    built = []
    names: set[str] = set()
    for place, spec in enumerate(rungs):
        if spec.name in names:
            raise LadderError(("rungs", place, "name"), f"{spec.name} is used twice")
        names.add(spec.name)
        built.append(_rung(place, spec, expanded))
    for modality in dict.fromkeys(spec.modality for spec in rungs):
        _check_cover(modality, rungs)
    return Ladder(sorted(built, key=lambda rung: (rung.modality, rung.min_effort)), expanded)


def _rung(place: int, spec: RungSpec, chains: Mapping[str, tuple[str, ...]]) -> Rung:
    where: tuple[str | int, ...] = ("rungs", place)
    for effort in (spec.min_effort, spec.max_effort):
        if not MIN_EFFORT <= effort <= MAX_EFFORT:
            raise LadderError((*where, "effort"), f"is {effort}; an effort is {MIN_EFFORT} to {MAX_EFFORT}")
    if spec.min_effort > spec.max_effort:
        raise LadderError(
            (*where, "effort"), f"begins at {spec.min_effort} and ends at {spec.max_effort}, before it"
        )
    for field, name in (("chain", spec.chain), ("reason", spec.reason)):
        if name not in chains and (name or field == "chain"):
            known = ", ".join(sorted(chains)) or "none"
            raise LadderError((*where, field), f"there is no chain {name!r}; chains are: {known}")
    if spec.reason and spec.min_effort < REASON_EFFORT:
        raise LadderError(
            (*where, "reason"),
            f"the reason tool is offered from effort {REASON_EFFORT} on, and this rung begins at "
            f"{spec.min_effort}; split it there",
        )
    return Rung(
        name=spec.name,
        modality=spec.modality,
        min_effort=spec.min_effort,
        max_effort=spec.max_effort,
        capabilities=frozenset(spec.capabilities),
        chain=chains[spec.chain],
        reason_chain=chains[spec.reason] if spec.reason else (),
    )


def _check_cover(modality: Modality, rungs: Sequence[RungSpec]) -> None:
    """Refuse holes and overlaps. Raises LadderError."""
    owner: dict[int, str] = {}
    for place, spec in enumerate(rungs):
        if spec.modality is not modality:
            continue
        for effort in range(spec.min_effort, spec.max_effort + 1):
            if effort in owner:
                raise LadderError(
                    ("rungs", place, "effort"),
                    f"effort {effort} of {modality} is on two rungs, {owner[effort]} and {spec.name}",
                )
            owner[effort] = spec.name
    holes = [str(effort) for effort in range(MIN_EFFORT, MAX_EFFORT + 1) if effort not in owner]
    if holes:
        raise LadderError(("rungs",), f"no rung of {modality} has effort {', '.join(holes)}")


def _expand(name: str, chains: Mapping[str, Sequence[str]], above: tuple[str, ...]) -> tuple[str, ...]:
    """The targets of a chain; one that came before, by another way, stays where it was first."""
    found: dict[str, None] = {}
    if not chains[name]:
        raise LadderError(("chains", name), "has no targets")
    for place, entry in enumerate(chains[name]):
        where = ("chains", name, place)
        if not entry.startswith(CHAIN_PREFIX):
            if list(chains[name]).index(entry) != place:
                raise LadderError(where, f"{entry} is in the chain twice")
            found[entry] = None
            continue
        inner = entry.removeprefix(CHAIN_PREFIX)
        if inner not in chains:
            known = ", ".join(sorted(chains))
            raise LadderError(where, f"there is no chain {inner!r}; chains are: {known}")
        if inner in (*above, name):
            ring = " → ".join(
                [*above[above.index(inner) :], name, inner] if inner in above else [name, inner]
            )
            raise LadderError(where, f"the chains go round in a circle: {ring}")
        found |= dict.fromkeys(_expand(inner, chains, (*above, name)))
    return tuple(found)
