"""Templates read from values: what the files of the package and of users say.

Pure. Whatever is wrong with a file is a ValueError whose text a person can act on.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

import msgspec
from msgspec import UNSET, Struct, UnsetType

from controlplane.workflows._common import FILLED, parameters_of
from controlplane.workflows._parameters import check_value
from controlplane.workflows._template import (
    PLACE,
    Graph,
    Parameter,
    ParameterType,
    Template,
    Variant,
    is_link,
    places_in,
)
from rung.errors import InvalidRequestError

_NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,62}")
_PLACE_NAME = re.compile(r"[a-z][a-z0-9_]*")
#: Places that are pictures where nothing says what pictures there are.
_USUAL_IMAGES = ("image", "mask")

_NOT_API = (
    'is in the format of ComfyUI\'s editor, which cannot be run; export it with "Save (API Format)", '
    'which newer ComfyUI calls "Export (API)"'
)


class BuiltIn(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A file of the package: everything of a template but its name; parameters that are common left out."""

    description: str
    graph: Graph
    video: bool = False
    images: tuple[str, ...] = ()
    optional_images: int = 0
    size_step_pixels: int = 8
    parameters: tuple[Parameter, ...] = ()
    some_of: tuple[str, ...] = ()
    families: tuple[str, ...] = ()
    loras: str = ""
    variants: tuple[Variant, ...] = ()


class ImageAt(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A picture that a user's graph starts from, and where it goes."""

    name: str
    node: str
    input: str


class ParameterAt(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A parameter of a user's graph, as `Parameter`, and where it goes: unset where a place has its name."""

    name: str
    node: str = ""
    input: str = ""
    type: ParameterType | UnsetType = UNSET
    description: str = ""
    default: Any | UnsetType = UNSET
    minimum: float | None = None
    maximum: float | None = None
    multiple_of: int = 1
    choices: tuple[str, ...] = ()


class Sidecar(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What a user says of a graph beside it."""

    description: str = ""
    video: bool = False
    families: tuple[str, ...] = ()
    loras: str = ""
    images: tuple[ImageAt, ...] = ()
    parameters: tuple[ParameterAt, ...] = ()


def built_in_template(name: str, data: bytes) -> Template:
    """A template of the package. Raises ValueError: a defect of ours."""
    file = msgspec.json.decode(data, type=BuiltIn)
    template = Template(name=name, **{field: getattr(file, field) for field in file.__struct_fields__})
    return msgspec.structs.replace(
        template,
        parameters=parameters_of(template.places(), file.parameters, file.images, loras=bool(file.loras)),
    )


def user_template(name: str, graph: object, sidecar: object = None) -> Template:
    """A template of a user.

    Args:
        name: of the file, without its ending.
        graph: what the JSON file has.
        sidecar: what the YAML file beside it has; None without one.

    Raises:
        ValueError: what is wrong.
    """
    if not _NAME.fullmatch(name):
        raise ValueError("its name must be of lower-case letters, digits, dots, hyphens and underscores")
    checked = _checked_graph(graph)
    said = _sidecar(sidecar)
    if said.loras and said.loras not in checked:
        raise ValueError(f"loras: there is no node {said.loras!r}; nodes are: {_names(checked)}")
    for image in said.images:
        checked = _with_place(checked, f"images: {image.name}", image.name, image.node, image.input)
    parameters = []
    for at in said.parameters:
        literal: object = UNSET
        if at.node or at.input:
            literal = _literal(checked, f"parameters: {at.name}", at.node, at.input)
            checked = _with_place(checked, f"parameters: {at.name}", at.name, at.node, at.input)
        if at.name not in FILLED:
            parameters.append(_parameter(at, literal))
    places = frozenset(places_in(checked))
    for parameter in parameters:
        if parameter.name not in places:
            raise ValueError(
                f"parameters: {parameter.name} goes nowhere; name node and input, or write "
                f"{{{{{parameter.name}}}}} in the graph"
            )
    images = tuple(image.name for image in said.images) or tuple(
        image for image in _USUAL_IMAGES if image in places
    )
    return Template(
        name=name,
        graph=checked,
        description=said.description or "Of your own.",
        video=said.video,
        images=images,
        families=said.families,
        loras=said.loras,
        parameters=parameters_of(places, parameters, images, loras=bool(said.loras)),
    )


def remarks(template: Template) -> tuple[str, ...]:
    """What a user may not have meant, though the template can be used."""
    places = template.places()
    found = []
    if "prompt" not in places:
        found.append("no prompt goes into it; write {{prompt}} where one should")
    if "seed" not in places:
        found.append(
            "the seed is fixed: ComfyUI gives the same result again; write {{seed}} where one should be"
        )
    return tuple(found)


def _checked_graph(graph: object) -> Graph:
    if not isinstance(graph, dict):
        raise ValueError("is no graph: a JSON object of nodes by id is wanted")
    if isinstance(graph.get("nodes"), list):
        raise ValueError(_NOT_API)
    if not graph:
        raise ValueError("has no nodes")
    for node_id, node in graph.items():
        if not isinstance(node, dict) or not isinstance(node.get("class_type"), str):
            raise ValueError(f"node {node_id!r} has no class_type; is this a graph in the API format?")
        if not isinstance(node.get("inputs"), dict):
            raise ValueError(f"node {node_id!r} ({node['class_type']}) has no inputs")
    for node_id, node in graph.items():
        for name, value in node["inputs"].items():
            if is_link(value) and value[0] not in graph:
                raise ValueError(f"node {node_id!r}: {name} comes from node {value[0]!r}, which is not there")
    return graph


def _sidecar(value: object) -> Sidecar:
    if value is None:
        return Sidecar()
    try:
        said = msgspec.convert(value, Sidecar)
    except msgspec.ValidationError as error:
        raise ValueError(str(error).replace(" - at `$.", " at `")) from None
    names = [*(image.name for image in said.images), *(at.name for at in said.parameters)]
    for place, name in enumerate(names):
        if not _PLACE_NAME.fullmatch(name):
            raise ValueError(f"{name!r} is no name of a parameter: lower-case letters, digits, underscores")
        if name in names[:place]:
            raise ValueError(f"{name} is there twice")
    return said


def _literal(graph: Graph, what: str, node: str, name: str) -> object:
    """What a graph has where a parameter goes."""
    if node not in graph:
        raise ValueError(f"{what}: there is no node {node!r}; nodes are: {_names(graph)}")
    inputs = graph[node]["inputs"]
    if name not in inputs:
        raise ValueError(
            f"{what}: node {node!r} ({graph[node]['class_type']}) has no input {name!r}; it has: "
            f"{', '.join(inputs) or 'none'}"
        )
    if is_link(inputs[name]):
        raise ValueError(f"{what}: {name} of node {node!r} comes from another node, and cannot be filled in")
    found: object = inputs[name]
    return found


def _with_place(graph: Graph, what: str, place: str, node: str, name: str) -> Graph:
    _literal(graph, what, node, name)
    inputs = graph[node]["inputs"] | {name: f"{{{{{place}}}}}"}
    return graph | {node: graph[node] | {"inputs": inputs}}


def _parameter(at: ParameterAt, literal: object) -> Parameter:
    """A parameter as a sidecar has it; what it leaves out is read off the graph."""
    default = at.default
    if default is UNSET and literal is not UNSET and not (isinstance(literal, str) and PLACE.search(literal)):
        default = literal
    parameter = Parameter(
        name=at.name,
        type=_type_of(at, literal),
        description=at.description,
        default=default,
        minimum=at.minimum,
        maximum=at.maximum,
        multiple_of=at.multiple_of,
        choices=at.choices,
    )
    if parameter.type is ParameterType.CHOICE and not parameter.choices:
        raise ValueError(f"parameters: {at.name} is a choice without choices")
    if at.minimum is not None and at.maximum is not None and at.minimum > at.maximum:
        raise ValueError(f"parameters: {at.name}: minimum is above maximum")
    if at.multiple_of < 1:
        raise ValueError(f"parameters: {at.name}: multiple_of is below 1")
    if default is not UNSET and default is not None:
        try:
            check_value(parameter, default)
        except InvalidRequestError as error:
            raise ValueError(f"parameters: the default of {error.message}") from None
    return parameter


def _type_of(at: ParameterAt, literal: object) -> ParameterType:
    if at.type is not UNSET:
        return at.type
    if at.choices:
        return ParameterType.CHOICE
    match literal if at.default is UNSET else at.default:
        case bool():
            return ParameterType.BOOLEAN
        case int():
            return ParameterType.INTEGER
        case float():
            return ParameterType.NUMBER
    return ParameterType.TEXT


def _names(graph: Mapping[str, Any] | Iterable[str]) -> str:
    return ", ".join(graph)
