"""Graphs in ComfyUI's API format: what is in them, and the files that they read. Pure."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, TypeAlias

import msgspec
from msgspec import Struct

from rung.errors import InvalidRequestError
from rung.types import FILE_PREFIX

#: Nodes by their ids, each with `class_type` and `inputs`.
Graph: TypeAlias = dict[str, dict[str, Any]]


class Link(Struct, frozen=True):
    """An input that another node gives: its id, and which of its outputs."""

    node_id: str
    slot: int


def graph_of(graph_json: bytes) -> Graph:
    """Read a graph.

    Raises:
        InvalidRequestError: it is none; the message says what it looks like instead.
    """
    try:
        found = msgspec.json.decode(graph_json)
    except msgspec.DecodeError as error:
        raise InvalidRequestError(f"the workflow's graph is no JSON: {error}") from error
    if not isinstance(found, dict) or not found:
        raise InvalidRequestError("the workflow's graph has no nodes")
    if isinstance(found.get("nodes"), list):
        raise InvalidRequestError(
            "the workflow's graph is in the format of ComfyUI's editor; "
            "export it with Workflow > Export (API), which gives nodes by their ids"
        )
    graph: Graph = {}
    for node_id, node in found.items():
        if not isinstance(node, dict) or not isinstance(node.get("class_type"), str):
            raise InvalidRequestError(f"node {node_id} of the workflow's graph has no class_type")
        inputs = node.get("inputs", {})
        if not isinstance(inputs, dict):
            raise InvalidRequestError(f"the inputs of {named(node_id, node)} are no object")
        graph[node_id] = {**node, "inputs": inputs}
    return graph


def named(node_id: str, node: Mapping[str, Any]) -> str:
    """How messages call a node."""
    return f"node {node_id} ({node.get('class_type', '?')})"


def link_of(value: object) -> Link | None:
    """The link that the value of an input is, if it is one."""
    if not isinstance(value, list) or len(value) != 2:
        return None
    node_id, slot = value
    if not isinstance(node_id, str) or not isinstance(slot, int) or isinstance(slot, bool):
        return None
    return Link(node_id, slot)


def links_of(graph: Graph, node_id: str) -> Iterator[tuple[str, Link]]:
    """The inputs of a node that other nodes give."""
    for name, value in graph[node_id]["inputs"].items():
        link = link_of(value)
        if link is not None:
            yield name, link


def needed_by(graph: Graph, node_ids: tuple[str, ...]) -> list[str]:
    """Nodes and all that they depend on, each after what it depends on, as far as there is no cycle."""
    order: list[str] = []
    seen: set[str] = set()
    # Not by recursion: a graph may be a longer chain than Python's stack.
    stack = [(node_id, False) for node_id in reversed(node_ids)]
    while stack:
        node_id, left = stack.pop()
        if left:
            order.append(node_id)
        elif node_id not in seen and node_id in graph:
            seen.add(node_id)
            stack.append((node_id, True))
            sources = [link.node_id for _, link in links_of(graph, node_id)]
            stack.extend((source, False) for source in reversed(sources))
    return order


def files_read(graph: Graph) -> list[str]:
    """The names of the files that a graph reads, each once, in order."""
    found: dict[str, None] = {}

    def look(value: object) -> None:
        match value:
            case str() if value.startswith(FILE_PREFIX):
                found[value.removeprefix(FILE_PREFIX)] = None
            case list():
                for each in value:
                    look(each)
            case dict():
                for each in value.values():
                    look(each)

    for node in graph.values():
        look(node["inputs"])
    return list(found)


def with_files(graph: Graph, places: Mapping[str, str]) -> Graph:
    """The same graph, with each file named as ComfyUI knows it; `places` has all that it reads."""

    def put(value: Any) -> Any:
        match value:
            case str() if value.startswith(FILE_PREFIX):
                return places[value.removeprefix(FILE_PREFIX)]
            case list():
                return [put(each) for each in value]
            case dict():
                return {name: put(each) for name, each in value.items()}
        return value

    return {node_id: {**node, "inputs": put(node["inputs"])} for node_id, node in graph.items()}
