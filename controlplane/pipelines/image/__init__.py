"""Pictures and videos: what happens between a prompt and a file, with every second told."""

from controlplane.pipelines.image._artist import Artist
from controlplane.pipelines.image._phases import IMAGE_PHASES, PhaseOrder, Told
from controlplane.pipelines.image._pipeline import ImagePipeline
from controlplane.pipelines.image._ports import CloudImages, OnEvent
from controlplane.pipelines.image._room import Rooms

__all__ = [
    "IMAGE_PHASES",
    "Artist",
    "CloudImages",
    "ImagePipeline",
    "OnEvent",
    "PhaseOrder",
    "Rooms",
    "Told",
]
