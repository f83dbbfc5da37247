"""The effort ladder: who answers a request, and in which order the others would be tried. Pure."""

from controlplane.ladder._candidate import Candidate, TargetKind, awake_in, candidate_of
from controlplane.ladder._choose import Chain, Demand, Group, Passing, chain_of, choose, explain, refusals
from controlplane.ladder._circuit import CircuitOptions, Circuits, CircuitState
from controlplane.ladder._classifier import Classification, ClassifiedRequest, Feature, classify
from controlplane.ladder._effort import AUTO_MODEL, OWN_PREFIX, Asked, Asking, read_asking
from controlplane.ladder._judge import judge_request, read_judgement
from controlplane.ladder._ladder import (
    BURST_PREFIX,
    CHAIN_PREFIX,
    MAX_EFFORT,
    MIN_EFFORT,
    REASON_EFFORT,
    Ladder,
    LadderError,
    Modality,
    Rung,
    RungSpec,
    build_ladder,
)

__all__ = [
    "AUTO_MODEL",
    "BURST_PREFIX",
    "CHAIN_PREFIX",
    "MAX_EFFORT",
    "MIN_EFFORT",
    "OWN_PREFIX",
    "REASON_EFFORT",
    "Asked",
    "Asking",
    "Candidate",
    "Chain",
    "CircuitOptions",
    "CircuitState",
    "Circuits",
    "Classification",
    "ClassifiedRequest",
    "Demand",
    "Feature",
    "Group",
    "Ladder",
    "LadderError",
    "Modality",
    "Passing",
    "Rung",
    "RungSpec",
    "TargetKind",
    "awake_in",
    "build_ladder",
    "candidate_of",
    "chain_of",
    "choose",
    "classify",
    "explain",
    "judge_request",
    "read_asking",
    "read_judgement",
    "refusals",
]
