"""A template, filled in.

Pure.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import msgspec
from msgspec import UNSET

from controlplane.workflows._parameters import check_value, unknown_parameter
from controlplane.workflows._pictures import has_alpha, suffix_of
from controlplane.workflows._template import PLACE, Graph, Template, is_link
from controlplane.workflows._tiers import Tier
from rung.errors import InvalidRequestError
from rung.types import FILE_PREFIX, ImageInput, WorkflowFile, WorkflowInput

_MIN_SIDE_PIXELS = 64
_MAX_SIDE_PIXELS = 4096
_MAX_COUNT = 8
_MAX_SEED = 2**63 - 1
_MEGAPIXEL = 1024 * 1024
#: The mask may be the picture itself: what is transparent there is drawn anew.
_MASK = "mask"


def build(template: Template, wanted: ImageInput, tier: Tier, seed: int) -> WorkflowInput:
    """Fill in a template for an engine.

    Args:
        template: of the operation that is wanted.
        wanted: prompt, sizes, pictures, parameters.
        tier: model, steps and the rest, where the wish leaves them open; `Tier.of` is applied to it.
        seed: of the randomness; the wish's own is not looked at.

    Raises:
        InvalidRequestError: what is wanted cannot be drawn so; the message names the parameter.
    """
    tier = tier.of(template.name)
    places = template.places()
    _check_family(template, tier)
    _check_prompt(template, wanted, places)
    _check_count(template, wanted, places)
    files, file_values = _files(template, wanted)
    values = _values_of_tier(tier) | _values_of_wish(template, wanted, tier, seed)
    values |= _given(template, wanted.parameters)
    values |= file_values
    values |= _derived(wanted, values)
    graph = _graph_for(template, tier, values)
    graph = _Filling(template, values).of(graph)
    if template.loras:
        graph = _with_loras(graph, template.loras, values["loras"])
    return WorkflowInput(graph_json=msgspec.json.encode(graph), files=files, previews=wanted.previews)


def _check_family(template: Template, tier: Tier) -> None:
    if template.families and tier.family not in template.families:
        raise InvalidRequestError(
            f"{template.name} is for models of the family {' or '.join(template.families)}; tier {tier.name} "
            f"has one of {tier.family or 'none'}: choose another tier, or name a checkpoint for it in the "
            f"configuration, under images.tiers.{tier.name}.operations.{template.name}"
        )


def _check_prompt(template: Template, wanted: ImageInput, places: frozenset[str]) -> None:
    if "prompt" in places and not wanted.prompt.strip():
        raise InvalidRequestError(f"prompt is empty; {template.name} needs one")


def _check_count(template: Template, wanted: ImageInput, places: frozenset[str]) -> None:
    if not 1 <= wanted.count <= _MAX_COUNT:
        raise InvalidRequestError(f"count is {wanted.count}; it must be 1 to {_MAX_COUNT}")
    if wanted.count > 1 and "count" not in places:
        raise InvalidRequestError(f"count is {wanted.count}; {template.name} makes one at a time")


def _side(name: str, given: int, default: int, step: int) -> int:
    pixels = given or default
    if not _MIN_SIDE_PIXELS <= pixels <= _MAX_SIDE_PIXELS or pixels % step:
        raise InvalidRequestError(
            f"{name} is {pixels}; it must be a multiple of {step} from {_MIN_SIDE_PIXELS} to "
            f"{_MAX_SIDE_PIXELS}"
        )
    return pixels


def _values_of_tier(tier: Tier) -> dict[str, Any]:
    values = {
        "checkpoint": tier.checkpoint,
        "steps": tier.steps,
        "cfg": tier.cfg,
        "guidance": tier.guidance,
        "sampler": tier.sampler,
        "scheduler": tier.scheduler,
        "upscale_factor": tier.upscale_factor,
        **tier.models,
    }
    return {name: value for name, value in values.items() if value != ""}


def _values_of_wish(template: Template, wanted: ImageInput, tier: Tier, seed: int) -> dict[str, Any]:
    if not 0 <= seed <= _MAX_SEED:
        raise InvalidRequestError(f"seed is {seed}; it must be 0 to {_MAX_SEED}")
    step = template.size_step_pixels
    return {
        "prompt": wanted.prompt,
        "negative_prompt": wanted.negative_prompt,
        "seed": seed,
        "count": wanted.count,
        "width": _side("width_pixels", wanted.width_pixels, tier.width_pixels, step),
        "height": _side("height_pixels", wanted.height_pixels, tier.height_pixels, step),
    }


def _given(template: Template, parameters: Mapping[str, Any]) -> dict[str, Any]:
    """Parameters as the caller gave them, or their defaults; those of the tier are left out."""
    known = {parameter.name: parameter for parameter in template.parameters}
    for name in parameters:
        if name not in known:
            raise InvalidRequestError(unknown_parameter(template.name, name, known))
    found: dict[str, Any] = {}
    for name, parameter in known.items():
        value = parameters.get(name)
        if value is not None:
            found[name] = check_value(parameter, value)
        elif parameter.default is UNSET:
            raise InvalidRequestError(f"{name} is missing; {template.name} needs it")
        elif parameter.default is not None:
            found[name] = parameter.default
    if template.some_of and not any(found.get(name) for name in template.some_of):
        raise InvalidRequestError(f"{template.name} needs at least one of {', '.join(template.some_of)}")
    return found


def _files(template: Template, wanted: ImageInput) -> tuple[tuple[WorkflowFile, ...], dict[str, Any]]:
    """The pictures as files, and what stands for them in the graph."""
    pictures = list(wanted.images)
    names = template.images
    for place, picture in enumerate(pictures):
        if not picture.data:
            raise InvalidRequestError(f"images[{place}] is empty")
        if not picture.content_type.startswith("image/"):
            raise InvalidRequestError(f"images[{place}] is {picture.content_type!r}; it must be a picture")
    if len(pictures) > len(names):
        takes = f"takes {_listed(names)}" if names else "takes none"
        raise InvalidRequestError(f"images has {len(pictures)}; {template.name} {takes}")
    if (
        names[-1:] == (_MASK,)
        and len(pictures) == len(names) - 1
        and pictures
        and has_alpha(pictures[0].data)
    ):
        pictures.append(pictures[0])
    if len(pictures) < len(names) - template.optional_images:
        missing = names[len(pictures)]
        hint = ", or a picture that is transparent where to draw" if missing == _MASK else ""
        raise InvalidRequestError(
            f"images lacks the {missing}: {template.name} starts from {_listed(names)}{hint}"
        )
    files = tuple(
        WorkflowFile(
            name=f"{name}{suffix_of(picture.content_type)}",
            content_type=picture.content_type,
            data=picture.data,
        )
        for name, picture in zip(names, pictures, strict=False)
    )
    values: dict[str, Any] = {name: FILE_PREFIX + file.name for name, file in zip(names, files, strict=False)}
    if _MASK in values:
        # A mask without transparency is white where to draw.
        alpha = has_alpha(files[names.index(_MASK)].data)
        values["mask_channel"] = "alpha" if alpha else "red"
    return files, values


def _derived(wanted: ImageInput, values: Mapping[str, Any]) -> dict[str, Any]:
    """What places of graphs want to have worked out."""
    width, height = values["width"], values["height"]
    sized = bool(wanted.width_pixels or wanted.height_pixels)
    derived: dict[str, Any] = {
        "megapixels": min(max(width * height / _MEGAPIXEL, 0.01), 16.0),
        # 0 leaves a picture as it is.
        "exact_width": width if sized else 0,
        "exact_height": height if sized else 0,
    }
    if "scale" in values:
        derived["scale_after_model"] = values["scale"] / values["upscale_factor"]
    return derived


def _graph_for(template: Template, tier: Tier, values: Mapping[str, Any]) -> Graph:
    graph: Any = template.graph
    for variant in template.variants:
        if variant.families and tier.family not in variant.families:
            continue
        if all(values.get(name) for name in variant.given):
            graph = _merged(graph, variant.patch)
    found: Graph = graph
    return found


def _merged(target: Any, patch: Any) -> Any:
    """A JSON merge patch (RFC 7386), applied."""
    if not isinstance(patch, dict):
        return patch
    merged = dict(target) if isinstance(target, dict) else {}
    for name, value in patch.items():
        if value is None:
            merged.pop(name, None)
        else:
            merged[name] = _merged(merged.get(name), value)
    return merged


class _Filling:
    """Fills places in."""

    def __init__(self, template: Template, values: Mapping[str, Any]) -> None:
        self._template = template
        self._values = values

    def of(self, value: Any) -> Any:
        """A graph, or a part of one, filled in."""
        match value:
            case str():
                return self._text(value)
            case dict():
                return {name: self.of(each) for name, each in value.items()}
            case list():
                return [self.of(each) for each in value]
        return value

    def _text(self, text: str) -> Any:
        whole = PLACE.fullmatch(text)
        if whole and whole[1] in self._template.images:
            return self._value(whole[1])
        # Once, from left to right: what is filled in is not looked at again.
        filled = self._value(whole[1]) if whole else PLACE.sub(lambda at: str(self._value(at[1])), text)
        # Only our own pictures are files.
        return f" {filled}" if isinstance(filled, str) and filled.startswith(FILE_PREFIX) else filled

    def _value(self, name: str) -> Any:
        if name not in self._values:
            raise InvalidRequestError(
                f"{name} has no value: {self._template.name} needs it from the request, or from images.tiers "
                "in the configuration"
            )
        return self._values[name]


def _with_loras(graph: Graph, source: str, loras: Iterable[Mapping[str, Any]]) -> Graph:
    """The graph with a chain of LoRAs behind the node that loads model and CLIP."""
    model: list[Any] = [source, 0]
    clip: list[Any] = [source, 1]
    chain: Graph = {}
    for place, lora in enumerate(loras):
        node_id = f"{source}_lora_{place}"
        chain[node_id] = {
            "class_type": "LoraLoader",
            "inputs": {
                "model": model,
                "clip": clip,
                "lora_name": lora["name"],
                "strength_model": lora["strength"],
                "strength_clip": lora["strength"],
            },
        }
        model, clip = [node_id, 0], [node_id, 1]
    if not chain:
        return graph
    behind = {(source, 0): model, (source, 1): clip}
    rest = {node_id: _relinked(node, behind) for node_id, node in graph.items()}
    return rest | chain


def _relinked(node: dict[str, Any], behind: Mapping[tuple[str, int], list[Any]]) -> dict[str, Any]:
    inputs = {
        name: behind.get((value[0], value[1]), value) if is_link(value) else value
        for name, value in node["inputs"].items()
    }
    return node | {"inputs": inputs}


def _listed(names: tuple[str, ...]) -> str:
    return " and ".join(names)
