"""What a cloud model that draws takes, and what its pictures cost. Pure."""

from __future__ import annotations

import math
from collections.abc import Mapping

from msgspec import Struct


class CloudDrawing(Struct, frozen=True, kw_only=True):
    """How a cloud model draws.

    Attributes:
        usd_per_image: price of one, where `prices` has none.
        prices: US dollars for one by its quality and size (`low 1024x1024`), or by one of the two.
        sizes: the only ones that it draws, as `1024x1024`; none if any goes.
        qualities: what it calls the quality of a tier; a tier that is missing leaves it to the model.
        most: pictures of one request.
        edits: whether it draws from pictures, too.
        asks_for_data: whether it has to be told to send pictures, and not links to them.
    """

    usd_per_image: float
    prices: Mapping[str, float] = {}
    sizes: tuple[str, ...] = ()
    qualities: Mapping[str, str] = {}
    most: int = 10
    edits: bool = True
    asks_for_data: bool = False

    def size_for(self, width_pixels: int, height_pixels: int) -> str:
        """The size to ask for: the nearest in shape, then in pixels; empty leaves it to the model.

        Args:
            width_pixels: as wanted; 0 for any.
            height_pixels: likewise; where one is wanted, the other is the same.
        """
        width, height = width_pixels or height_pixels, height_pixels or width_pixels
        if not width or not height:
            return self.sizes[0] if self.sizes else ""
        if not self.sizes:
            return f"{width}x{height}"

        def distance(size: str) -> tuple[float, float]:
            own_width, own_height = sides_of(size)
            shape = math.log(own_width / own_height) - math.log(width / height)
            return round(abs(shape), 6), abs(own_width * own_height - width * height)

        return min(self.sizes, key=distance)

    def quality_for(self, tier: str) -> str:
        """What it calls the quality of a tier; empty leaves it to the model."""
        return self.qualities.get(tier, "")

    def price_usd(self, quality: str, size: str) -> float:
        """Price of one picture."""
        named = (f"{quality} {size}", quality, size)
        return next((self.prices[name] for name in named if name in self.prices), self.usd_per_image)


def sides_of(size: str) -> tuple[int, int]:
    """Width and height in pixels of a size such as `1024x1024`. Raises ValueError."""
    width, _, height = size.partition("x")
    if not (width.isdecimal() and height.isdecimal() and int(width) and int(height)):
        raise ValueError(f"{size!r} is not WIDTHxHEIGHT, such as 1024x1024")
    return int(width), int(height)
