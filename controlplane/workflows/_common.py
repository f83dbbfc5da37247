"""Parameters that many templates have, and the places that need none. Pure."""

from __future__ import annotations

from collections.abc import Iterable

from controlplane.workflows._template import Parameter, ParameterType

_INTEGER, _NUMBER, _TEXT = ParameterType.INTEGER, ParameterType.NUMBER, ParameterType.TEXT

#: Where a template has such a place and says nothing else of it. Without a value they are the tier's.
COMMON: dict[str, Parameter] = {
    parameter.name: parameter
    for parameter in (
        Parameter(
            name="steps",
            type=_INTEGER,
            minimum=1,
            maximum=150,
            default=None,
            description="Steps of sampling; by default the tier's.",
        ),
        Parameter(
            name="cfg",
            type=_NUMBER,
            minimum=0,
            maximum=30,
            default=None,
            description="How strictly the prompt is followed; by default the tier's.",
        ),
        Parameter(
            name="guidance",
            type=_NUMBER,
            minimum=0,
            maximum=100,
            default=None,
            description="How strictly Flux follows the prompt; by default the tier's.",
        ),
        Parameter(
            name="denoise",
            type=_NUMBER,
            minimum=0.05,
            maximum=1,
            default=0.6,
            description="How much of the picture is drawn anew; 1 is all.",
        ),
        Parameter(
            name="sampler",
            type=_TEXT,
            default=None,
            description="By its name in ComfyUI; by default the tier's.",
        ),
        Parameter(
            name="scheduler",
            type=_TEXT,
            default=None,
            description="Of noise, by its name in ComfyUI; by default the tier's.",
        ),
        Parameter(
            name="controlnet",
            type=_TEXT,
            default=None,
            description="File of the ControlNet; by default the tier's.",
        ),
        Parameter(
            name="motion_model",
            type=_TEXT,
            default=None,
            description="File of AnimateDiff's motion model; by default the tier's.",
        ),
        Parameter(
            name="upscale_model",
            type=_TEXT,
            default=None,
            description="File of the model that enlarges, empty to do without; by default the tier's.",
        ),
        Parameter(
            name="upscale_factor",
            type=_NUMBER,
            minimum=1,
            maximum=16,
            default=None,
            description="How many times as large that model makes a picture; by default the tier's.",
        ),
        Parameter(
            name="loras",
            type=ParameterType.LORAS,
            default=[],
            description='LoRAs, as a list of {"name": file, "strength": number}.',
        ),
    )
}

#: Filled in from the wish, the tier or the pictures; none of them is a parameter.
FILLED = frozenset(
    {
        "prompt",
        "negative_prompt",
        "seed",
        "count",
        "width",
        "height",
        "checkpoint",
        "text_encoder",
        "mask_channel",
        "megapixels",
        "exact_width",
        "exact_height",
    }
)


def parameters_of(
    places: frozenset[str], own: Iterable[Parameter], images: Iterable[str], *, loras: bool
) -> tuple[Parameter, ...]:
    """All parameters of a template: its own, then those that its places ask for.

    A place of a name that is not known is a text, and has to be given.
    """
    found = {parameter.name: parameter for parameter in own}
    wanted = set(places) - FILLED - set(images)
    if "scale_after_model" in wanted:
        # Worked out from these two.
        wanted = wanted - {"scale_after_model"} | {"scale", "upscale_factor"}
    if loras:
        wanted.add("loras")
    for name in [*(name for name in COMMON if name in wanted), *sorted(wanted - COMMON.keys())]:
        found.setdefault(name, COMMON.get(name) or Parameter(name=name, type=_TEXT))
    return tuple(found.values())
