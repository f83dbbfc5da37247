"""Voice: how much of a node speech and transcriptions may have."""

from __future__ import annotations

from collections.abc import Collection
from typing import Annotated

from pydantic import Field

from rung.service import ConfigModel, FieldError
from rung.types import JobKind, ReclaimGrade

_Slots = Annotated[int, Field(ge=1, le=64)]
#: By kind of engine, what a model of it can be for.
_CAPABILITIES = {
    "piper": ("speech",),
    "xtts": ("speech",),
    "speaches": ("speech", "transcription"),
}


class VoiceConfig(ConfigModel):
    """Speech and transcriptions: so many at once on a node, and what may give way to their models."""

    slots: _Slots = 2
    """Voice generations at once on each node."""
    nodes: dict[str, _Slots] = Field(default={})
    """By node, where it is another number."""
    max_grade: ReclaimGrade = ReclaimGrade.STANDARD
    """How much others may be disturbed, at most, to load a model that speaks or hears."""

    def max_grades(self) -> dict[str, ReclaimGrade]:
        """By capability, as the schedulers have it."""
        return {kind.value: self.max_grade for kind in (JobKind.SPEECH, JobKind.TRANSCRIPTION)}


def check_voice(voice: VoiceConfig, nodes: Collection[str]) -> None:
    """Raises FieldError for the slots of a node that there is not."""
    for node in voice.nodes:
        if node not in nodes:
            known = ", ".join(sorted(nodes)) or "none"
            raise FieldError(("voice", "nodes", node), f"there is no node {node}; nodes are: {known}")


def check_capabilities(kind: str, capabilities: Collection[str]) -> None:
    """Raises FieldError for a model of such an engine that is to do something else than speak or hear."""
    can = _CAPABILITIES.get(kind)
    if can is not None and (len(capabilities) != 1 or not set(can).issuperset(capabilities)):
        raise FieldError(
            ("capabilities",), f"a model of {kind} has one: write {' or '.join(f'[{each}]' for each in can)}"
        )
