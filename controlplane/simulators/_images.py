"""OpenAI's images, as the simulated API draws them: each of one colour that follows from the prompt."""

from __future__ import annotations

import base64
import hashlib
import struct
import zlib
from collections.abc import Mapping
from typing import Any

from controlplane.simulators._faults import CloudFault, Refusal, error_body

_SIZES = ("auto", "1024x1024", "1536x1024", "1024x1536")
_QUALITIES = ("auto", "low", "medium", "high")
_MOST = 10
#: A prompt with this word is against the rules.
_FORBIDDEN = "forbidden"
#: gpt-image-1 refuses what it does not know; `response_format` is among it.
_KNOWN = frozenset(
    {
        *("background", "image", "mask", "model", "moderation", "n", "output_compression", "output_format"),
        *("prompt", "quality", "size", "user"),
    }
)


def check_images(fields: Mapping[str, Any]) -> Refusal | None:
    """What is wrong with a request for pictures."""
    prompt, count = fields.get("prompt"), str(fields.get("n", 1))
    if strange := fields.keys() - _KNOWN:
        return _wrong("unknown_parameter", f"Unknown parameter: '{min(strange)}'.")
    if not prompt or not isinstance(prompt, str):
        return _wrong("missing_required_parameter", "Missing required parameter: 'prompt'.")
    if not count.isdecimal() or not 1 <= int(count) <= _MOST:
        return _wrong("invalid_value", f"Invalid value for 'n': {count}.")
    if fields.get("size", "auto") not in _SIZES:
        return _wrong("invalid_value", f"Invalid value: '{fields['size']}'. Supported: {', '.join(_SIZES)}.")
    if fields.get("quality", "auto") not in _QUALITIES:
        return _wrong("invalid_value", f"Invalid value: '{fields['quality']}' for 'quality'.")
    return moderated() if _FORBIDDEN in prompt else None


def moderated() -> Refusal:
    """What is against the rules."""
    message = "Your request was rejected by the safety system."
    error = {"message": message, "type": "image_generation_user_error", "code": "moderation_blocked"}
    return Refusal(400, {"error": error | {"param": None}})


def images_answer(fields: Mapping[str, Any], faults: frozenset[CloudFault]) -> dict[str, Any]:
    """The pictures that were asked for, smaller than that."""
    seen = f"{fields['prompt']}|{fields.get('size')}|{fields.get('quality')}|{fields.get('image')}"
    rows: list[dict[str, str]] = []
    for place in range(int(fields.get("n", 1))):
        data = base64.b64encode(_paint(f"{seen}|{place}".encode())).decode()
        if CloudFault.BROKEN_BASE64 in faults:
            data = f"{data[:-8]}!"
        elif CloudFault.NO_PICTURE in faults:
            data = base64.b64encode(b"<html>not a picture</html>").decode()
        url = "https://images.example/1.png"
        rows.append({"url": url} if CloudFault.LINKS in faults else {"b64_json": data})
    return {"created": 1_700_000_000, "data": rows, "usage": {"input_tokens": 10, "output_tokens": 272}}


def _wrong(code: str, message: str) -> Refusal:
    body = error_body(False, "invalid_request_error", message)
    return Refusal(400, {"error": body["error"] | {"code": code}})


def _paint(seen: bytes) -> bytes:
    """A PNG of one colour."""
    side, colour = 8, hashlib.sha256(seen).digest()[:3]
    rows = (b"\0" + colour * side) * side
    chunks = (
        (b"IHDR", struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)),
        (b"tEXt", b"Comment\0simulated " + hashlib.sha256(seen).hexdigest().encode()),
        (b"IDAT", zlib.compress(rows)),
        (b"IEND", b""),
    )
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        for kind, data in chunks
    )
