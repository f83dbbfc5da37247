"""Bodies of the kind `multipart/form-data`."""

from __future__ import annotations

import re
import secrets
from collections.abc import Mapping

from msgspec import Struct

_MEDIA_TYPE = re.compile(r"[\w.+-]+/[\w.+-]+")
_UNKNOWN_TYPE = "application/octet-stream"


class FormFile(Struct, frozen=True, kw_only=True):
    """A file in a form; `name` is the field's, and both names are ours and never a caller's."""

    name: str
    file_name: str
    content_type: str
    data: bytes


def form(fields: Mapping[str, str], *files: FormFile) -> tuple[str, bytes]:
    """The content type and the body of a form. What a caller chose stands in values and data only.

    A media type that is none goes as one that says nothing.
    """
    # Nobody who does not know it can write it into a value.
    boundary = secrets.token_hex(16)
    parts = [
        f'--{boundary}\r\nContent-Disposition: form-data; name="{name}"\r\n\r\n{value}\r\n'.encode()
        for name, value in fields.items()
    ]
    for file in files:
        media_type = file.content_type if _MEDIA_TYPE.fullmatch(file.content_type) else _UNKNOWN_TYPE
        head = (
            f'--{boundary}\r\nContent-Disposition: form-data; name="{file.name}"; '
            f'filename="{file.file_name}"\r\nContent-Type: {media_type}\r\n\r\n'
        )
        parts += [head.encode(), file.data, b"\r\n"]
    return f"multipart/form-data; boundary={boundary}", b"".join((*parts, f"--{boundary}--\r\n".encode()))
