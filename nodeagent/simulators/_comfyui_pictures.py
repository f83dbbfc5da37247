"""The pictures that a simulated ComfyUI makes: of the right size and number, and of one colour."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Mapping
from typing import Any

from msgspec import Struct

from nodeagent.simulators._comfyui_graph import Graph, signature

_SIDE = 512
#: What comes in is what is written.
_OUTPUTS = ("SaveImage", "PreviewImage", "SaveAnimatedWEBP", "SaveWEBM")
_PNG = b"\x89PNG\r\n\x1a\n"
#: Inputs through which a picture comes to a node, the first that there is.
_FROM = ("images", "image", "pixels", "samples", "latent_image", "destination", "mask", "latent")


class Picture(Struct, frozen=True, kw_only=True):
    """Some pictures that look alike. `colour` is 0xRRGGBB; `data` is the file that was read, unchanged."""

    width_pixels: int = _SIDE
    height_pixels: int = _SIDE
    count: int = 1
    colour: int = 0
    data: bytes = b""

    @property
    def megapixels(self) -> float:
        """All of them together."""
        return self.width_pixels * self.height_pixels * self.count / 2**20


def picture_of(graph: Graph, node_id: str, files: Mapping[str, bytes]) -> Picture:
    """What comes out of a node. `files` has what was uploaded, as graphs name it."""
    node = graph[node_id]
    inputs = node["inputs"]
    source = next((inputs[name] for name in _FROM if isinstance(inputs.get(name), list)), None)
    before = picture_of(graph, source[0], files) if source else Picture()
    if node["class_type"] in _OUTPUTS:
        return before
    colour = before.colour
    match node["class_type"]:
        case "EmptyImage":
            colour = inputs["color"]
        case "LoadImage" | "LoadImageMask":
            return _of_file(files[inputs["image"]])
        case "ImageInvert":
            colour = 0xFFFFFF - colour
        case "KSampler" | "KSamplerAdvanced" | "SamplerCustom":
            colour = zlib.crc32(signature(graph, node_id).encode()) & 0xFFFFFF
    scale = inputs.get("scale_by", 1.0)
    return Picture(
        width_pixels=_number(inputs, "width") or max(int(before.width_pixels * scale), 1),
        height_pixels=_number(inputs, "height") or max(int(before.height_pixels * scale), 1),
        count=_number(inputs, "batch_size") or before.count * (_number(inputs, "amount") or 1),
        colour=colour,
    )


def is_picture(data: bytes) -> bool:
    """Whether a file is a picture, by how it begins."""
    return data.startswith((_PNG, b"\xff\xd8\xff", b"GIF8")) or data[8:12] == b"WEBP"


def png(picture: Picture) -> bytes:
    """One of them as a file."""
    if picture.data:
        return picture.data
    row = b"\0" + picture.colour.to_bytes(3, "big") * picture.width_pixels
    head = struct.pack(">IIBBBBB", picture.width_pixels, picture.height_pixels, 8, 2, 0, 0, 0)
    body = zlib.compress(row * picture.height_pixels, 1)
    return _PNG + _chunk(b"IHDR", head) + _chunk(b"IDAT", body) + _chunk(b"IEND", b"")


def _chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def _of_file(data: bytes) -> Picture:
    if not data.startswith(_PNG) or len(data) < 24:
        return Picture(colour=zlib.crc32(data) & 0xFFFFFF, data=data)
    width, height = struct.unpack_from(">II", data, 16)
    return Picture(width_pixels=width, height_pixels=height, colour=zlib.crc32(data) & 0xFFFFFF, data=data)


def _number(inputs: Mapping[str, Any], name: str) -> int:
    value = inputs.get(name, 0)
    return value if isinstance(value, int) else 0
