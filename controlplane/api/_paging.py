"""Page sizes and page tokens. A token is opaque to callers."""

from __future__ import annotations

import base64
import binascii
from typing import TypeVar

import msgspec

from rung.errors import InvalidRequestError

LARGEST_PAGE = 1000

Place = TypeVar("Place")


def page_size(requested: int, default: int) -> int:
    """The size to use; 0 stands for the default. Raises InvalidRequestError outside 0 to 1000."""
    if not 0 <= requested <= LARGEST_PAGE:
        raise InvalidRequestError(f"page_size is {requested}; it must be 1 to {LARGEST_PAGE}, or 0")
    return requested or default


def encode_token(place: object) -> str:
    """A token for the place after which the next page begins."""
    return base64.urlsafe_b64encode(msgspec.json.encode(place)).decode()


def decode_token(token: str, place: type[Place]) -> Place:
    """The place of a token. Raises InvalidRequestError for one that we did not make."""
    try:
        raw = base64.b64decode(token.encode(), altchars=b"-_", validate=True)
        return msgspec.json.decode(raw, type=place)
    except (binascii.Error, ValueError) as error:
        raise InvalidRequestError("page_token is not one of ours; take it from next_page_token") from error
