"""Meshes: what happens between a prompt or a picture and a GLB."""

from controlplane.pipelines.mesh._pictures import ChainedPictures
from controlplane.pipelines.mesh._pipeline import MeshPipeline
from controlplane.pipelines.mesh._ports import Pictures

__all__ = ["ChainedPictures", "MeshPipeline", "Pictures"]
