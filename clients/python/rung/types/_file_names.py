"""What a file of an artifact is called."""

from __future__ import annotations

_ENDINGS = {
    "application/json": ".json",
    "audio/aac": ".aac",
    "audio/flac": ".flac",
    "audio/mpeg": ".mp3",
    "audio/ogg": ".ogg",
    "audio/opus": ".opus",
    "audio/pcm": ".pcm",
    "audio/wav": ".wav",
    "audio/x-wav": ".wav",
    "image/gif": ".gif",
    "image/jpeg": ".jpg",
    "image/png": ".png",
    "image/svg+xml": ".svg",
    "image/webp": ".webp",
    "model/gltf-binary": ".glb",
    "model/gltf+json": ".gltf",
    "model/obj": ".obj",
    "model/stl": ".stl",
    "text/plain": ".txt",
    "video/mp4": ".mp4",
    "video/quicktime": ".mov",
    "video/webm": ".webm",
}


def artifact_file_name(artifact_id: str, content_type: str) -> str:
    """A name such as `image-019a….png`; it sorts by time, and has `.bin` for types that nobody knows."""
    media_type = content_type.partition(";")[0].strip().lower()
    ending = _ENDINGS.get(media_type, ".bin")
    kind = media_type.partition("/")[0] if ending != ".bin" else "artifact"
    return f"{'artifact' if kind == 'application' else kind}-{artifact_id.removeprefix('artifact-')}{ending}"
