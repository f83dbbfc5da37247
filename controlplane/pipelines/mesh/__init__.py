"""Meshes: what happens between a prompt or a picture and a GLB."""

from controlplane.pipelines.mesh._ports import Pictures

__all__ = ["Pictures"]
