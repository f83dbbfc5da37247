"""What is wrong with a graph, in words for a person who has it before them. Pure.

ComfyUI looks at a graph, too, and has the last word: a class may look at its inputs in a way of its own,
which `/object_info` does not tell. So a finding is either sure, or what a refusal is to be told with.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from difflib import get_close_matches
from typing import Any

from msgspec import Struct

from nodeagent.engines._comfyui_classes import InputKind, NodeClass
from nodeagent.engines._comfyui_graph import Graph, Link, link_of, links_of, named, needed_by
from rung.types import FILE_PREFIX

#: So many of what there is are listed.
_LISTED = 8
_CLOSE = 3
#: ComfyUI's own types that no value in a graph stands for.
_ALWAYS_LINKED = {
    "CLIP",
    "CLIP_VISION",
    "CONDITIONING",
    "CONTROL_NET",
    "IMAGE",
    "LATENT",
    "MASK",
    "MODEL",
    "SAMPLER",
    "SIGMAS",
    "UPSCALE_MODEL",
    "VAE",
    "VIDEO",
}
_LONGEST_VALUE = 80
#: So many findings are told; the rest is counted.
_TOLD = 10


class Finding(Struct, frozen=True, kw_only=True):
    """Something wrong with a node, or with one of its inputs. `sure`: ComfyUI would not take it, either."""

    node_id: str
    what: str
    input_name: str = ""
    sure: bool = False


def look_at(graph: Graph, classes: Mapping[str, NodeClass]) -> tuple[Finding, ...]:
    """What is wrong with a graph. `classes` has those of the graph that ComfyUI has.

    Where a class is missing nothing else is looked at. Nodes that no output needs are not looked at.
    """
    missing = tuple(
        Finding(node_id=node_id, what=_missing_class(node_id, node, classes), sure=True)
        for node_id, node in graph.items()
        if node["class_type"] not in classes
    )
    if missing:
        return missing
    outputs = tuple(node_id for node_id, node in graph.items() if classes[node["class_type"]].is_output)
    if not outputs:
        what = "the graph has no output node, such as SaveImage: ComfyUI would have nothing to do"
        return (Finding(node_id="", what=what, sure=True),)
    needed = needed_by(graph, outputs)
    found = [finding for node_id in needed for finding in _node(graph, node_id, classes)]
    return (*found, *_cycles(graph, needed))


def told(findings: Iterable[Finding]) -> str:
    """Findings as one text, each once."""
    texts = list(dict.fromkeys(finding.what for finding in findings))
    rest = f"; and {len(texts) - _TOLD} more" if len(texts) > _TOLD else ""
    return "; ".join(texts[:_TOLD]) + rest


def _missing_class(node_id: str, node: Mapping[str, Any], classes: Mapping[str, NodeClass]) -> str:
    name = node["class_type"]
    return (
        f"node {node_id}: ComfyUI has no class {name!r}{_close(name, classes)}; "
        "is the custom node that brings it installed there?"
    )


def _node(graph: Graph, node_id: str, classes: Mapping[str, NodeClass]) -> Iterator[Finding]:
    node = graph[node_id]
    where = named(node_id, node)
    kinds = classes[node["class_type"]].inputs
    given = node["inputs"]
    for name, kind in kinds.items():
        if name not in given:
            if kind.required and not kind.is_open:
                what = f"{where}: the input {name} is missing; it takes {_takes(kind)}"
                yield Finding(node_id=node_id, input_name=name, what=what, sure=True)
            continue
        link = link_of(given[name])
        dangling = _dangling(graph, link, classes) if link is not None else ""
        what = _value(kind, given[name]) if link is None else dangling or _link(graph, link, kind, classes)
        if what:
            # A node fails over these, if ComfyUI does not.
            sure = bool(dangling) or (link is None and kind.type in _ALWAYS_LINKED)
            text = f"{where}: the input {name} {what}"
            yield Finding(node_id=node_id, input_name=name, what=text, sure=sure)


def _dangling(graph: Graph, link: Link, classes: Mapping[str, NodeClass]) -> str:
    """Why nothing comes along a link; empty if something does."""
    if link.node_id not in graph:
        return f"comes from node {link.node_id}, which is not in the graph; there are {_listed(graph)}"
    source = graph[link.node_id]
    outputs = classes[source["class_type"]].outputs
    if 0 <= link.slot < len(outputs):
        return ""
    what = f"has {len(outputs)}, counted from 0" if outputs else "has none"
    return f"is output {link.slot} of {named(link.node_id, source)}, which {what}"


def _link(graph: Graph, link: Link, kind: InputKind, classes: Mapping[str, NodeClass]) -> str:
    source = graph[link.node_id]
    given = classes[source["class_type"]].outputs[link.slot]
    if kind.is_open or given.startswith(("COMFY_", "*")):
        return ""
    if set(given.split(",")).isdisjoint(kind.type.split(",")):
        return f"has to be {kind.type}, and output {link.slot} of {named(link.node_id, source)} is {given}"
    return ""


def _value(kind: InputKind, value: object) -> str:
    """What is wrong with a value that is no link; empty if nothing is."""
    if isinstance(value, str) and value.startswith(FILE_PREFIX):
        return ""
    if kind.is_number:
        return _number(kind, value)
    if kind.choices is not None and not isinstance(value, dict) and value not in kind.choices:
        return f"is {_shown(value)}, which is not in its list{_close(value, kind.choices)}"
    plain = kind.type in ("STRING", "BOOLEAN", "COMBO") or kind.is_open
    if not plain and not isinstance(value, dict):
        return f"is {_shown(value)}; it takes {_takes(kind)}"
    return ""


def _number(kind: InputKind, value: object) -> str:
    number: float | None = None
    if isinstance(value, str):
        with suppress(ValueError):
            number = float(value)
    elif isinstance(value, int | float):
        # As it is: a seed is larger than what a float can hold.
        number = value
    if number is None:
        return f"is {_shown(value)}; it takes {_takes(kind)}"
    low = kind.minimum is not None and number < kind.minimum
    high = kind.maximum is not None and number > kind.maximum
    return f"is {_shown(value)}; it takes {_takes(kind)}" if low or high else ""


def _takes(kind: InputKind) -> str:
    if kind.choices is not None:
        return f"one of {_listed(kind.choices)}" if kind.choices else "one of a list that is empty"
    if kind.is_number:
        name = "an integer" if kind.type == "INT" else "a number"
        bounds = [
            f"{word} {bound}"
            for word, bound in (("from", kind.minimum), ("to", kind.maximum))
            if bound is not None
        ]
        return " ".join([name, *bounds])
    plain = {"STRING": "a text", "BOOLEAN": "true or false"}
    return plain.get(kind.type, f"a link to {kind.type}")


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= _LONGEST_VALUE else text[:_LONGEST_VALUE] + "…"


def _listed(values: Iterable[Any]) -> str:
    names = [str(value) for value in values]
    rest = f" and {len(names) - _LISTED} more" if len(names) > _LISTED else ""
    return ", ".join(names[:_LISTED]) + rest


def _close(value: object, values: Iterable[Any]) -> str:
    """What there is that is much like a value, or else all that there is."""
    names = [str(each) for each in values]
    if not names:
        return "; the list is empty"
    if len(names) <= _LISTED:
        return f"; there are {_listed(names)}"
    by_small = {name.lower(): name for name in names}
    close = get_close_matches(str(value).lower(), by_small, n=_CLOSE, cutoff=0.5)
    if close:
        return f"; close to it are {', '.join(by_small[name] for name in close)}"
    return f"; there are {_listed(names)}"


def _cycles(graph: Graph, needed: Iterable[str]) -> Iterator[Finding]:
    """One finding for the first cycle. `needed` has each node after what it depends on, but for cycles."""
    seen: set[str] = set()
    for node_id in needed:
        for name, link in links_of(graph, node_id):
            if link.node_id in graph and link.node_id not in seen:
                what = (
                    f"{named(node_id, graph[node_id])}: the input {name} comes from node {link.node_id}, "
                    "which needs this node itself"
                )
                yield Finding(node_id=node_id, input_name=name, what=what, sure=True)
                return
        seen.add(node_id)
