"""The graphs that a simulated ComfyUI takes: which nodes there are, and what is wrong with a graph. Pure."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any, TypeAlias

import msgspec
from msgspec import Struct

from nodeagent.simulators._comfyui_nodes import Choice, NodeKind, Number

Graph: TypeAlias = Mapping[str, Any]


class Validation(Struct, frozen=True):
    """What is wrong with a graph. `outputs` are the output nodes that can be executed, if there is one."""

    outputs: tuple[str, ...] = ()
    error: dict[str, Any] | None = None
    node_errors: dict[str, dict[str, Any]] = {}


def validate(graph: Graph, kinds: Mapping[str, NodeKind], files: Collection[str] = ()) -> Validation:
    """Look at a graph as `POST /prompt` does. Outputs that are well are executed, others skipped.

    Args:
        graph: by the ids of its nodes.
        kinds: the classes that there are.
        files: what was uploaded, as graphs name it.
    """
    for node_id, node in graph.items():
        class_type = node.get("class_type") if isinstance(node, dict) else None
        if class_type not in kinds:
            return Validation(
                error=_error(
                    "invalid_prompt",
                    f"Cannot execute because node {class_type} does not exist.",
                    f"Node ID '#{node_id}'",
                    {},
                )
            )
    outputs = [node_id for node_id, node in graph.items() if kinds[node["class_type"]].is_output]
    if not outputs:
        return Validation(error=_error("prompt_no_outputs", "Prompt has no outputs", "", {}))
    node_errors: dict[str, dict[str, Any]] = {}
    good = []
    for output in outputs:
        found = _Check(graph, kinds, files).errors_below(output)
        if not found:
            good.append(output)
        for node_id, errors in found.items():
            class_type = graph[node_id]["class_type"]
            entry = {"errors": errors, "dependent_outputs": [], "class_type": class_type}
            node_errors.setdefault(node_id, entry)["dependent_outputs"].append(output)
    if good:
        return Validation(outputs=tuple(good), node_errors=node_errors)
    # Only what is wrong with the outputs themselves.
    details = "\n".join(
        f"{error['message']}: {error['details']}"
        for node_id in outputs
        for error in node_errors.get(node_id, {"errors": []})["errors"]
    )
    error = _error("prompt_outputs_failed_validation", "Prompt outputs failed validation", details, {})
    return Validation(error=error, node_errors=node_errors)


class _Check:
    """Looks at everything that one output depends on."""

    def __init__(self, graph: Graph, kinds: Mapping[str, NodeKind], files: Collection[str]) -> None:
        self._graph = graph
        self._files = files
        self._kinds = kinds
        self._path: list[str] = []
        self._seen: set[str] = set()
        self._found: dict[str, list[dict[str, Any]]] = {}

    def errors_below(self, node_id: str) -> dict[str, list[dict[str, Any]]]:
        """The errors of a node and of what it depends on, by node."""
        self._visit(node_id)
        return self._found

    def _visit(self, node_id: str) -> None:
        self._path.append(node_id)
        if node_id not in self._seen:
            self._seen.add(node_id)
            node = self._graph[node_id]
            given = node.get("inputs", {})
            kind = self._kinds[node["class_type"]]
            for name, wanted in kind.inputs.items():
                if name not in given:
                    if name in kind.optional:
                        continue
                    self._say(node_id, name, "required_input_missing", "Required input is missing", name)
                elif isinstance(given[name], list):
                    self._link(node_id, name, given[name], wanted)
                else:
                    self._value(node_id, name, given[name], wanted)
        self._path.pop()

    def _link(self, node_id: str, name: str, link: list[Any], wanted: object) -> None:
        if len(link) != 2 or not isinstance(link[0], str) or not isinstance(link[1], int):
            message = "Bad linked input, must be a length-2 list of [node_id, slot_index]"
            self._say(node_id, name, "bad_linked_input", message, name)
            return
        source, slot = link
        outputs = self._kinds[self._graph[source]["class_type"]].outputs if source in self._graph else ()
        if slot not in range(len(outputs)):
            message = "Exception when validating inner node"
            self._say(node_id, name, "exception_during_inner_validation", message, f"{source}[{slot}]")
            return
        type_of_input = getattr(wanted, "type", "STRING")
        if outputs[slot] != type_of_input:
            details = f"{name}, received_type({outputs[slot]}) mismatch input_type({type_of_input})"
            message = "Return type mismatch between linked nodes"
            self._say(node_id, name, "return_type_mismatch", message, details)
        if source in self._path:
            message = "Dependency cycle detected"
            self._say(node_id, name, "dependency_cycle", message, " -> ".join([*self._path, source]))
        else:
            self._visit(source)

    def _value(self, node_id: str, name: str, value: object, wanted: object) -> None:
        match wanted:
            case Choice(values=values, uploaded=uploaded) if uploaded:
                if value not in values and value not in self._files:
                    details = f"image - Invalid image file: {value}"
                    message = "Custom validation failed for node"
                    self._say(node_id, name, "custom_validation_failed", message, details)
            case Choice(values=values) if value not in values:
                details = f"{name}: '{value}' not in {list(values)}"
                self._say(node_id, name, "value_not_in_list", "Value not in list", details)
            case Number(type=kind, minimum=minimum, maximum=maximum):
                try:
                    number = float(str(value))
                except ValueError:
                    message = f"Failed to convert an input value to a {kind} value"
                    self._say(node_id, name, "invalid_input_type", message, f"{name}, {value}")
                    return
                if number < minimum:
                    message = f"Value {value} smaller than min of {minimum}"
                    self._say(node_id, name, "value_smaller_than_min", message, name)
                elif number > maximum:
                    message = f"Value {value} bigger than max of {maximum}"
                    self._say(node_id, name, "value_bigger_than_max", message, name)
            case _:
                return

    def _say(self, node_id: str, name: str, kind: str, message: str, details: str) -> None:
        self._found.setdefault(node_id, []).append(_error(kind, message, details, {"input_name": name}))


def _error(kind: str, message: str, details: str, extra_info: dict[str, Any]) -> dict[str, Any]:
    return {"type": kind, "message": message, "details": details, "extra_info": extra_info}


def execution_order(graph: Graph, outputs: tuple[str, ...]) -> list[str]:
    """The nodes that the outputs need, each after what it depends on. The graph is valid."""
    order: list[str] = []

    def add(node_id: str) -> None:
        if node_id in order:
            return
        for value in graph[node_id].get("inputs", {}).values():
            if isinstance(value, list):
                add(value[0])
        order.append(node_id)

    for output in outputs:
        add(output)
    return order


def signature(graph: Graph, node_id: str) -> str:
    """What a node's result depends on: nodes with the same signature give the same."""
    node = graph[node_id]
    inputs = {
        name: [signature(graph, value[0]), value[1]] if isinstance(value, list) else value
        for name, value in sorted(node.get("inputs", {}).items())
    }
    return msgspec.json.encode([node["class_type"], inputs]).decode()


def loaded_by(graph: Graph, node_id: str) -> str:
    """The name of the model that a sampler uses, whatever is between them."""
    while True:
        inputs = graph[node_id]["inputs"]
        for name in ("ckpt_name", "unet_name"):
            if name in inputs:
                return str(inputs[name])
        node_id = inputs["model"][0]


def sampled_steps(graph: Graph, node_id: str) -> int:
    """How many steps a sampler takes."""
    inputs = graph[node_id]["inputs"]
    if "sigmas" in inputs:
        inputs = graph[inputs["sigmas"][0]]["inputs"]
    steps = int(inputs["steps"])
    return max(min(int(inputs.get("end_at_step", steps)), steps) - int(inputs.get("start_at_step", 0)), 0)
