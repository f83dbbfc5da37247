"""Bodies of the kind `multipart/form-data`."""

from __future__ import annotations

import re
import secrets
from collections.abc import Mapping

from msgspec import Struct

_MEDIA_TYPE = re.compile(r"[\w.+-]+/[\w.+-]+")
_UNKNOWN_TYPE = "application/octet-stream"


class FormFile(Struct, frozen=True, kw_only=True):
    """A file in a form; `name` is the field's, and both names are the adapter's own."""

    name: str
    file_name: str
    content_type: str
    data: bytes


def form(fields: Mapping[str, str], file: FormFile) -> tuple[str, bytes]:
    """The content type and the body of a form. What a caller chose stands in values and data only.

    A media type that is none goes as one that says nothing.
    """
    # Nobody who does not know it can write it into a value.
    boundary = secrets.token_hex(16)
    parts = [
        f'--{boundary}\r\nContent-Disposition: form-data; name="{name}"\r\n\r\n{value}\r\n'.encode()
        for name, value in fields.items()
    ]
    media_type = file.content_type if _MEDIA_TYPE.fullmatch(file.content_type) else _UNKNOWN_TYPE
    head = (
        f'--{boundary}\r\nContent-Disposition: form-data; name="{file.name}"; filename="{file.file_name}"\r\n'
        f"Content-Type: {media_type}\r\n\r\n"
    )
    body = b"".join((*parts, head.encode(), file.data, f"\r\n--{boundary}--\r\n".encode()))
    return f"multipart/form-data; boundary={boundary}", body
