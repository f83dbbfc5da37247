"""Templates: graphs with places to fill in, and what may be filled in.

Pure. A place is a text `{{name}}` in an input of a node. Where it is the whole text, the value takes its
place as it is, number or text; inside a longer text it is written into it.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from enum import StrEnum
from typing import Any, TypeAlias

import msgspec
from msgspec import UNSET, Struct, UnsetType

from rung.types import Workflow, WorkflowParameter

Graph: TypeAlias = dict[str, dict[str, Any]]

#: A place to fill in.
PLACE = re.compile(r"\{\{\s*([a-z][a-z0-9_]*)\s*\}\}")


class ParameterType(StrEnum):
    """What a parameter takes."""

    INTEGER = "integer"
    NUMBER = "number"
    TEXT = "text"
    CHOICE = "choice"
    BOOLEAN = "boolean"
    #: A list of `{"name": …, "strength": …}`.
    LORAS = "loras"


class Parameter(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A parameter that a caller may give.

    Attributes:
        name: as `ImageInput.parameters` has it.
        type: what it takes.
        description: one line for a person.
        default: where none is given; null for the tier's own, or none at all; unset if it has to be given.
        minimum: least value.
        maximum: greatest value.
        multiple_of: of integers.
        choices: permitted values.
    """

    name: str
    type: ParameterType
    description: str = ""
    default: Any | UnsetType = UNSET
    minimum: float | None = None
    maximum: float | None = None
    multiple_of: int = 1
    choices: tuple[str, ...] = ()

    def listed(self) -> WorkflowParameter:
        """As callers see it."""
        return WorkflowParameter(
            name=self.name,
            type=str(self.type),
            description=self.description,
            default_json="" if self.default is UNSET else msgspec.json.encode(self.default).decode(),
            minimum=self.minimum,
            maximum=self.maximum,
            choices=self.choices,
        )


class Variant(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What is different in a graph under a condition.

    Attributes:
        patch: of the graph, as JSON merge patches (RFC 7386) are: null removes.
        families: the tier's model is of one of these; empty for any.
        given: parameters that have a value, and not an empty one.
    """

    patch: dict[str, Any]
    families: tuple[str, ...] = ()
    given: tuple[str, ...] = ()


class Template(Struct, frozen=True, kw_only=True):
    """A graph to fill in.

    Attributes:
        name: as `ImageInput.operation` has it.
        graph: in ComfyUI's API format, with places to fill in.
        description: one line for a person.
        video: it makes moving pictures.
        images: pictures that it starts from, in order.
        optional_images: how many of them, counted from the last, may be left out.
        size_step_pixels: width and height are multiples of it.
        parameters: what a caller may give beside prompt, size, seed and count.
        some_of: parameters of which one at least must not be 0.
        families: models that it is for; empty for any.
        loras: node that loads model and CLIP, behind which LoRAs go; empty if it takes none.
        variants: what is different in the graph for some tiers or parameters; all that apply, in order.
    """

    name: str
    graph: Graph
    description: str = ""
    video: bool = False
    images: tuple[str, ...] = ()
    optional_images: int = 0
    size_step_pixels: int = 8
    parameters: tuple[Parameter, ...] = ()
    some_of: tuple[str, ...] = ()
    families: tuple[str, ...] = ()
    loras: str = ""
    variants: tuple[Variant, ...] = ()

    def listed(self) -> Workflow:
        """As callers see it."""
        needed = len(self.images) - self.optional_images
        return Workflow(
            name=self.name,
            description=self.description,
            video=self.video,
            images=(*self.images[:needed], *(f"{name}?" for name in self.images[needed:])),
            parameters=tuple(parameter.listed() for parameter in self.parameters),
        )

    def places(self) -> frozenset[str]:
        """Names of all places, in the graph and in its variants."""
        found = set(places_in(self.graph))
        for variant in self.variants:
            found.update(places_in(variant.patch))
        return frozenset(found)


def places_in(value: object) -> Iterator[str]:
    """Names of the places in a graph, or in a part of one."""
    match value:
        case str():
            yield from (match[1] for match in PLACE.finditer(value))
        case dict():
            for each in value.values():
                yield from places_in(each)
        case list():
            for each in value:
                yield from places_in(each)


def is_link(value: object) -> bool:
    """Whether an input comes from another node: `["4", 0]`."""
    return isinstance(value, list) and len(value) == 2 and isinstance(value[0], str) and type(value[1]) is int
