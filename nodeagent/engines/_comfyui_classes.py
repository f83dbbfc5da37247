"""What ComfyUI says of its classes of nodes in `/object_info`. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from msgspec import Struct

_NUMBERS = ("INT", "FLOAT")
#: Types whose inputs are not in a graph under their own name, or may be anything.
_OPEN_TYPES = ("COMFY_", "*")


class InputKind(Struct, frozen=True, kw_only=True):
    """An input of a class.

    Attributes:
        type: `INT`, `FLOAT`, `STRING`, `BOOLEAN`, `COMBO`, or what a link has to give.
        required: a graph has to give it.
        choices: what a `COMBO` may be; None where that is not known.
        minimum: least value of a number.
        maximum: greatest value of a number.
    """

    type: str
    required: bool = False
    choices: tuple[Any, ...] | None = None
    minimum: float | None = None
    maximum: float | None = None

    @property
    def is_open(self) -> bool:
        """Whether anything may stand for it."""
        return self.type.startswith(_OPEN_TYPES)

    @property
    def is_number(self) -> bool:
        """Whether it is a number."""
        return self.type in _NUMBERS


class NodeClass(Struct, frozen=True, kw_only=True):
    """A class of nodes: what it takes, and the types that it gives."""

    inputs: dict[str, InputKind] = {}
    outputs: tuple[str, ...] = ()
    is_output: bool = False


def node_class_of(told: Mapping[str, Any]) -> NodeClass:
    """Read one entry of `/object_info`. What it has and we do not know is passed over."""
    inputs: dict[str, InputKind] = {}
    groups = told.get("input")
    for group in ("required", "optional"):
        rows = groups.get(group) if isinstance(groups, dict) else None
        for name, row in rows.items() if isinstance(rows, dict) else ():
            if isinstance(row, list) and row:
                inputs[name] = _input_of(row, required=group == "required")
    outputs = told.get("output")
    types = tuple(_type_of(each) for each in outputs) if isinstance(outputs, list) else ()
    return NodeClass(inputs=inputs, outputs=types, is_output=told.get("output_node") is True)


def _type_of(told: object) -> str:
    return told if isinstance(told, str) else "COMBO"


def _input_of(row: list[Any], *, required: bool) -> InputKind:
    options: Mapping[str, Any] = row[1] if len(row) > 1 and isinstance(row[1], dict) else {}
    kind = _type_of(row[0])
    return InputKind(
        type=kind,
        required=required,
        choices=_choices(row[0], options) if kind == "COMBO" else None,
        minimum=_number(options.get("min")),
        maximum=_number(options.get("max")),
    )


def _choices(told: object, options: Mapping[str, Any]) -> tuple[Any, ...] | None:
    if "remote" in options or options.get("multiselect") or any(name.endswith("_upload") for name in options):
        # What is in the list is not all that may be given.
        return None
    found = told if isinstance(told, list) else options.get("options")
    return tuple(found) if isinstance(found, list) else None


def _number(value: object) -> float | None:
    return value if isinstance(value, int | float) and not isinstance(value, bool) else None
