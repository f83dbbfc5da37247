"""A mesh of a few triangles, as a whole binary glTF 2.0."""

from __future__ import annotations

import hashlib
import struct

import msgspec

_CORNERS = ((1.0, 1.0, 1.0), (1.0, -1.0, -1.0), (-1.0, 1.0, -1.0), (-1.0, -1.0, 1.0))
_FACES = (0, 1, 2, 0, 3, 1, 0, 2, 3, 1, 3, 2)


def model_glb(seen: bytes, *, texture: bool) -> bytes:
    """A tetrahedron whose proportions follow from what was seen, coloured by it if it has a texture."""
    digest = hashlib.sha256(seen).digest()
    scale = [0.5 + byte / 255 for byte in digest[:3]]
    corners = [tuple(at * by for at, by in zip(corner, scale, strict=True)) for corner in _CORNERS]
    positions = b"".join(struct.pack("<3f", *corner) for corner in corners)
    faces = struct.pack(f"<{len(_FACES)}H", *_FACES)
    binary = positions + faces
    # As the file has them: a bound has to be what its reader will see.
    stored = [struct.unpack_from("<3f", positions, 12 * index) for index in range(len(corners))]
    primitive: dict[str, object] = {"attributes": {"POSITION": 0}, "indices": 1}
    document: dict[str, object] = {
        "asset": {"version": "2.0", "generator": "simulated Hunyuan3D"},
        "scene": 0,
        "scenes": [{"nodes": [0]}],
        "nodes": [{"mesh": 0}],
        "meshes": [{"primitives": [primitive]}],
        "accessors": [
            {
                "bufferView": 0,
                "componentType": 5126,
                "count": len(corners),
                "type": "VEC3",
                "min": [min(axis) for axis in zip(*stored, strict=True)],
                "max": [max(axis) for axis in zip(*stored, strict=True)],
            },
            {"bufferView": 1, "componentType": 5123, "count": len(_FACES), "type": "SCALAR"},
        ],
        "bufferViews": [
            {"buffer": 0, "byteLength": len(positions), "target": 34962},
            {"buffer": 0, "byteOffset": len(positions), "byteLength": len(faces), "target": 34963},
        ],
        "buffers": [{"byteLength": len(binary)}],
    }
    if texture:
        colour = [round(byte / 255, 3) for byte in digest[3:6]]
        primitive["material"] = 0
        document["materials"] = [{"pbrMetallicRoughness": {"baseColorFactor": [*colour, 1.0]}}]
    text = msgspec.json.encode(document)
    chunks = _chunk(b"JSON", text, b" ") + _chunk(b"BIN\0", binary, b"\0")
    return struct.pack("<4sII", b"glTF", 2, 12 + len(chunks)) + chunks


def _chunk(kind: bytes, data: bytes, filler: bytes) -> bytes:
    data += filler * (-len(data) % 4)
    return struct.pack("<I4s", len(data), kind) + data
