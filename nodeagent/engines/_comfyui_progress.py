"""What ComfyUI's events say about one prompt, as phases of a job. Pure."""

from __future__ import annotations

import re
import struct
from collections.abc import Iterator, Mapping
from enum import Enum, auto
from typing import Any, TypeGuard

import msgspec
from msgspec import Struct

from nodeagent.engines._comfyui_classes import NodeClass
from nodeagent.engines._comfyui_graph import Graph, needed_by
from rung.types import Phase, PhaseProgress

#: Progress of a node is told in steps of so many percent.
_STEP_PERCENT = 10
_LOADS = re.compile(r"Loader|^Load.*(Model|Checkpoint|Diffusion)", re.IGNORECASE)
_LOADED = {"MODEL", "CLIP", "VAE", "CONTROL_NET", "CLIP_VISION", "UPSCALE_MODEL", "STYLE_MODEL"}
_MODEL_NAME = re.compile(r"_name\d*$|^model$|^model_path$")
_ENCODES = re.compile(r"Decode|^Save|^Preview|^CreateVideo|Combine$", re.IGNORECASE)
#: In binary frames; big-endian.
_PREVIEW, _PREVIEW_WITH_METADATA = 1, 4
_IMAGE_TYPES = {1: "image/jpeg", 2: "image/png"}
_WORD = struct.Struct(">I")


class Preview(Struct, frozen=True):
    """A picture of what is there while it is sampled."""

    content_type: str
    data: bytes


class _Role(Enum):
    LOADER = auto()
    SAMPLER = auto()
    ENCODER = auto()
    OTHER = auto()


def preview_of(frame: bytes, prompt_id: str, *, ours_runs: bool) -> Preview | None:
    """The picture in a binary frame, if it is one of this prompt.

    Args:
        frame: as the WebSocket has it.
        prompt_id: the prompt.
        ours_runs: it is the one that runs now; older frames do not say whose they are.
    """
    try:
        (kind,), rest = _WORD.unpack_from(frame), frame[4:]
        (word,) = _WORD.unpack_from(rest)
        if kind == _PREVIEW:
            content_type = _IMAGE_TYPES.get(word)
            return Preview(content_type, rest[4:]) if ours_runs and content_type else None
        if kind != _PREVIEW_WITH_METADATA:
            return None
        metadata = msgspec.json.decode(rest[4 : 4 + word], type=dict[str, Any])
    except (struct.error, msgspec.DecodeError):
        return None
    if metadata.get("prompt_id") != prompt_id:
        return None
    return Preview(str(metadata.get("image_type", "image/jpeg")), rest[4 + word :])


class PromptProgress:
    """Follows one prompt. Feed it with each event; it gives what is to be told.

    Args:
        graph: what is carried out.
        classes: those of its nodes.
    """

    def __init__(self, graph: Graph, classes: Mapping[str, NodeClass]) -> None:
        self._graph = graph
        self._roles = {node_id: _role(node["class_type"], classes) for node_id, node in graph.items()}
        outputs = tuple(node_id for node_id, node in graph.items() if classes[node["class_type"]].is_output)
        self._samplers = [
            node_id for node_id in needed_by(graph, outputs) if self._roles[node_id] is _Role.SAMPLER
        ]
        self._steps = {node_id: _steps(graph[node_id]["inputs"]) for node_id in self._samplers}
        self._finished: set[str] = set()
        #: Step of the node that is told of, by node; and in which ten percent it was told last.
        self._at: dict[str, tuple[int, int]] = {}
        self._told_tenth: dict[str, int] = {}
        self._plain = False
        self._last: PhaseProgress | None = None
        #: Whether it is this prompt that runs.
        self.running = False

    @property
    def last(self) -> PhaseProgress | None:
        """What was told last."""
        return self._last

    def on(self, event: str, data: Mapping[str, Any]) -> Iterator[PhaseProgress]:
        """An event of this prompt."""
        match event:
            case "execution_start":
                self.running = True
            case "execution_cached":
                yield from self._cached(data.get("nodes"))
            case "executing":
                self.running = data.get("node") is not None
                yield from self._executing(_node_id(data))
            case "progress":
                self._plain = True
                yield from self._stepped(_node_id(data), data.get("value"), data.get("max"))
            case "progress_state":
                yield from self._states(data.get("nodes"))
            case "execution_success" | "execution_error" | "execution_interrupted":
                self.running = event == "execution_error"

    def queued(self, ahead: int) -> PhaseProgress | None:
        """It waits; None if that is what was told last."""
        where = f"{ahead} ahead in ComfyUI's queue" if ahead else "next in ComfyUI's queue"
        return self._new(PhaseProgress(phase=Phase.QUEUED, detail=where))

    def _cached(self, node_ids: object) -> Iterator[PhaseProgress]:
        known = set(node_ids) if isinstance(node_ids, list) else set()
        self._finished |= known
        if self._samplers and known.issuperset(self._samplers):
            yield from self._tell(
                PhaseProgress(phase=Phase.SAMPLING, detail="taken from ComfyUI's cache", percent=100.0)
            )

    def _executing(self, node_id: str) -> Iterator[PhaseProgress]:
        if node_id not in self._graph:
            return
        class_type = self._graph[node_id]["class_type"]
        match self._roles[node_id]:
            case _Role.LOADER:
                detail = f"loading {_model_of(self._graph[node_id])}"
                yield from self._tell(PhaseProgress(phase=Phase.MODEL_SWAP, detail=detail))
            case _Role.ENCODER:
                word = "decoding" if "decode" in class_type.lower() else "saving"
                detail = f"{word} ({class_type})"
                yield from self._tell(PhaseProgress(phase=Phase.ENCODING, detail=detail))
            case _Role.SAMPLER if node_id not in self._at:
                yield from self._step(node_id, 0, self._steps[node_id] or 0)

    def _states(self, nodes: object) -> Iterator[PhaseProgress]:
        """Newer versions tell of all nodes at once, also of those that have no steps."""
        for node_id, state in nodes.items() if isinstance(nodes, dict) else ():
            if self._plain or not isinstance(state, dict):
                return
            value, most = state.get("value"), state.get("max")
            if value and isinstance(most, int | float) and most > 1:
                yield from self._stepped(str(state.get("display_node_id") or node_id), value, most)

    def _stepped(self, node_id: str, value: object, most: object) -> Iterator[PhaseProgress]:
        if node_id not in self._graph or not _is_count(value) or not _is_count(most):
            return
        yield from self._step(node_id, int(value), int(most))

    def _step(self, node_id: str, value: int, most: int) -> Iterator[PhaseProgress]:
        if self._at.get(node_id) == (value, most):
            return
        begins_again = value < self._at.get(node_id, (0, 0))[0]
        self._at[node_id] = (value, most)
        tenth = 100 * value // most // _STEP_PERCENT if most else 0
        told = self._told_tenth.get(node_id)
        last = most > 0 and value >= most
        if last:
            self._finished.add(node_id)
        if told is not None and tenth <= told and not last and not begins_again:
            return
        if value:
            # The first step after none is told, too.
            self._told_tenth[node_id] = tenth
        yield from self._tell(self._of_step(node_id, value, most))

    def _of_step(self, node_id: str, value: int, most: int) -> PhaseProgress:
        if self._roles[node_id] is not _Role.SAMPLER:
            encodes = self._roles[node_id] is _Role.ENCODER
            return PhaseProgress(
                phase=Phase.ENCODING if encodes else Phase.GENERATING,
                detail=self._graph[node_id]["class_type"],
                step=value,
                total=most or None,
                percent=_percent(value, most),
            )
        own = _percent(value, most)
        whole = self._whole(node_id, value, most)
        detail = ""
        if len(self._samplers) > 1:
            number = self._samplers.index(node_id) + 1 if node_id in self._samplers else 1
            detail = f"sampler {number} of {len(self._samplers)}"
        return PhaseProgress(
            phase=Phase.SAMPLING,
            detail=detail,
            step=value,
            total=most or None,
            percent=own if whole is None else whole,
        )

    def _whole(self, node_id: str, value: int, most: int) -> float | None:
        """How far all samplers together are, where the steps of each are known."""
        if len(self._samplers) < 2 or node_id not in self._steps:
            return None
        done = total = 0.0
        for sampler in self._samplers:
            steps = self._steps[sampler]
            if steps is None:
                return None
            total += steps
            if sampler == node_id:
                done += steps * value / most if most else 0
            elif sampler in self._finished:
                done += steps
        return round(100 * done / total, 1) if total else None

    def _tell(self, progress: PhaseProgress) -> Iterator[PhaseProgress]:
        new = self._new(progress)
        if new is not None:
            yield new

    def _new(self, progress: PhaseProgress) -> PhaseProgress | None:
        if progress == self._last:
            return None
        self._last = progress
        return progress


def _role(class_type: str, classes: Mapping[str, NodeClass]) -> _Role:
    found = classes[class_type]
    if "sampler" in class_type.lower() and "LATENT" in found.outputs:
        return _Role.SAMPLER
    if _LOADS.search(class_type) and not _LOADED.isdisjoint(found.outputs):
        return _Role.LOADER
    if found.is_output or _ENCODES.search(class_type):
        return _Role.ENCODER
    return _Role.OTHER


def _steps(inputs: Mapping[str, Any]) -> int | None:
    """How many steps a sampler takes, if that stands in the graph."""
    steps = inputs.get("steps")
    if not _is_count(steps):
        return None
    first, end = inputs.get("start_at_step", 0), inputs.get("end_at_step", steps)
    if not _is_count(first) or not _is_count(end):
        return None
    return max(int(min(end, steps)) - int(first), 0)


def _model_of(node: Mapping[str, Any]) -> str:
    names = [
        value for name, value in node["inputs"].items() if _MODEL_NAME.search(name) and isinstance(value, str)
    ]
    return names[0] if names else str(node["class_type"])


def _node_id(data: Mapping[str, Any]) -> str:
    """The node of the graph: one that a node brought with it stands for its own display."""
    return str(data.get("display_node") or data.get("node") or "")


def _percent(value: int, most: int) -> float | None:
    return round(100 * value / most, 1) if most else None


def _is_count(value: object) -> TypeGuard[int | float]:
    return isinstance(value, int | float) and not isinstance(value, bool) and value >= 0
