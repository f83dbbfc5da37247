"""How much effort a picture deserves, when its caller left that open. Pure."""

from __future__ import annotations

from rung.types import ImageInput


def image_effort(wanted: ImageInput) -> tuple[int, str]:
    """The effort of a wish for a picture, 1 to 10, and why in one line. Never raises."""
    words = len(wanted.prompt.split())
    return (2 if words <= 8 else 5), f"{words} words"
