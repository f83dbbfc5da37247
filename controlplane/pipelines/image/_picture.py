"""A picture that is to be drawn. Pure."""

from __future__ import annotations

from msgspec import Struct

from controlplane.pipelines._wish import Wish
from controlplane.workflows import Template, Tier
from rung.types import ImageInput

_PIXELS_PER_MEGAPIXEL = 1 << 20


class Picture(Struct, frozen=True, kw_only=True):
    """What is to be drawn, the same at every target.

    Attributes:
        wish: as it was begun.
        wanted: its input, with a tier and a seed.
        template: of the operation.
        tier: as it is for the operation.
    """

    wish: Wish
    wanted: ImageInput
    template: Template
    tier: Tier

    @property
    def seed(self) -> int:
        """Of the randomness."""
        return self.wanted.seed or 0

    @property
    def used_seed(self) -> int | None:
        """The seed, if the workflow takes one."""
        return self.seed if "seed" in self.template.places() else None

    @property
    def width_pixels(self) -> int:
        """Of each."""
        return self.wanted.width_pixels or self.tier.width_pixels

    @property
    def height_pixels(self) -> int:
        """Of each."""
        return self.wanted.height_pixels or self.tier.height_pixels

    @property
    def megapixels(self) -> float:
        """Of all together."""
        return self.width_pixels * self.height_pixels * self.wanted.count / _PIXELS_PER_MEGAPIXEL

    @property
    def model_name(self) -> str:
        """What the model is called towards a person; empty if none is sampled with."""
        return self.tier.family or self.tier.checkpoint

    @property
    def learnt_as(self) -> str:
        """What its times are learnt under: those of other operations differ."""
        name = self.tier.checkpoint or self.tier.name
        return name if self.template.name == "generate" else f"{name}:{self.template.name}"

    @property
    def steps(self) -> int:
        """Of sampling, as far as that is known before."""
        steps = self.wanted.parameters.get("steps")
        return steps if isinstance(steps, int) and steps > 0 else self.tier.steps

    def in_words(self) -> str:
        """Operation, size where that is known before, and seed: what it takes to make it again."""
        operation = "" if self.template.name == "generate" else f" {self.template.name}"
        # One that starts from a picture is as large as that.
        size = "" if self.template.images else f"{self.width_pixels}x{self.height_pixels}, "
        return f"{self.tier.name}{operation} workflow ({size}seed {self.seed})"
